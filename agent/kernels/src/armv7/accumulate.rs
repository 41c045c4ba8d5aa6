//! The call of accumulate.s: checks sizes, cuts lanes into what its functions take.

use super::Armv7;
use crate::simd::Elements;
use std::arch::global_asm;

global_asm!(include_str!("accumulate.s"), options(raw));

/// What a function of accumulate.s is called with.
#[repr(C)]
struct Accumulate {
    rows: *const u8,
    /// In bytes.
    stride: usize,
    count: usize,
    x: [*const f32; 4],
    sums: [*mut f32; 4],
}

/// Names the functions of accumulate.s: 8 lanes of one to four queries, 16 lanes of one and two.
macro_rules! accumulates {
    ($($table:ident: $($name:ident),*;)*) => {
        unsafe extern "C" {
            $($(fn $name(loops: &Accumulate);)*)*
        }
        $(static $table: [unsafe extern "C" fn(&Accumulate); 6] = [$($name),*];)*
    };
}

accumulates! {
    ACCUMULATE_F16: millwright_armv7_accumulate_f16_1_8, millwright_armv7_accumulate_f16_2_8,
        millwright_armv7_accumulate_f16_3_8, millwright_armv7_accumulate_f16_4_8,
        millwright_armv7_accumulate_f16_1_16, millwright_armv7_accumulate_f16_2_16;
    ACCUMULATE_I8: millwright_armv7_accumulate_i8_1_8, millwright_armv7_accumulate_i8_2_8,
        millwright_armv7_accumulate_i8_3_8, millwright_armv7_accumulate_i8_4_8,
        millwright_armv7_accumulate_i8_1_16, millwright_armv7_accumulate_i8_2_16;
}

/// [`Simd::accumulate`](crate::simd::Simd::accumulate), in strips of 16 or 8 lanes.
///
/// # Panics
/// If the sizes don't fit, or the lanes are not a multiple of eight.
pub(super) fn accumulate<const Q: usize>(
    _: Armv7,
    rows: Elements,
    stride: usize,
    x: [&[f32]; Q],
    sums: [&mut [f32]; Q],
) {
    let (count, lanes) = (x[0].len(), sums[0].len());
    let (base, len, size, table) = match rows {
        Elements::F16(rows) => (rows.as_ptr().cast(), rows.len(), 2, &ACCUMULATE_F16),
        Elements::I8(rows) => (rows.as_ptr().cast(), rows.len(), 1, &ACCUMULATE_I8),
    };
    if count == 0 {
        return;
    }
    assert!(lanes.is_multiple_of(8) && (count - 1) * stride + lanes <= len);
    assert!(x.iter().all(|x| x.len() == count) && sums.iter().all(|s| s.len() == lanes));
    let mut loops = Accumulate {
        rows: base,
        stride: stride * size,
        count,
        x: [std::ptr::null(); 4],
        sums: [std::ptr::null_mut(); 4],
    };
    for (query, (x, sums)) in x.iter().zip(sums).enumerate() {
        (loops.x[query], loops.sums[query]) = (x.as_ptr(), sums.as_mut_ptr());
    }
    let mut at = 0;
    while at < lanes {
        let (width, function) = if Q <= 2 && at + 16 <= lanes {
            (16, table[Q + 3])
        } else {
            (8, table[Q - 1])
        };
        // SAFETY: an `Armv7` proves the features; by the assertions the rows and sums have `lanes` lanes, of which
        // `width` from `at` on are touched, and each of the `Q` queries that the function knows has a `count`.
        unsafe {
            function(&loops);
            loops.rows = loops.rows.add(width * size);
            for sums in &mut loops.sums[..Q] {
                *sums = sums.add(width);
            }
        }
        at += width;
    }
}
