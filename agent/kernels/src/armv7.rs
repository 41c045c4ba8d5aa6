//! 32-bit ARM with NEON and VFPv4 (Cortex-A7, A15 and 64-bit cores under a 32-bit system). Stable Rust has no
//! intrinsics for it and no way to name its registers, hence whole loops in assembly:
//!
//! | file | what it computes | denormals |
//! |---|---|---|
//! | `linear.s` | a tile times one or two tokens, for each of the twelve kinds | flushed |
//! | `accumulate.s` | both products of attention, for one to four queries | flushed |
//! | `vector.s` | exp, comparisons and conversions of sixteen lanes | no matter |
//!
//! NEON takes a denormal f32 for zero and makes none. The rest is compiled by Rust for VFP, which knows them, so it
//! is equal to the scalar kernel without exception. ARITHMETIC.md says what that means.

use crate::matmul::Output;
use crate::packed::{Packed, TILE_ROWS};
use crate::quantised::{GROUP, GroupView, Quantised, Sums};
use crate::scalar::Scalar;
use crate::simd::{Activations, Elements, Simd, Weights};
use crate::{math, packed};
use std::arch::{asm, global_asm};
use std::ops::Range;

#[cfg(test)]
mod tests;

global_asm!(include_str!("armv7/linear.s"), options(raw));
global_asm!(include_str!("armv7/accumulate.s"), options(raw));
global_asm!(include_str!("armv7/vector.s"), options(raw));

// The strides in linear.s.
const _: () = {
    assert!(size_of::<[[i8; packed::BLOCK]; GROUP]>() == 256);
    assert!(size_of::<[f32; GROUP]>() == 32 && size_of::<Sums>() == 160);
};

unsafe extern "C" {
    /// The C library's.
    fn getauxval(key: usize) -> usize;

    fn millwright_armv7_load_f16(x: &[u8; 32], out: &mut [f32; 16]);
    fn millwright_armv7_store_f16(x: &[f32; 16], out: &mut [u16; 16]);
    fn millwright_armv7_load_i8(x: &[i8; 16], out: &mut [f32; 16]);
    fn millwright_armv7_store_i8(x: &[f32; 16], out: &mut [i8; 16]) -> i32;
    fn millwright_armv7_nan_to_zero(x: &mut [f32; 16]);
    fn millwright_armv7_max(a: &[f32; 16], b: &mut [f32; 16]);
    fn millwright_armv7_exp(x: &[f32; 16], out: &mut [f32; 16], constants: &[f32; 14]);
}

/// Whether the kernel says that this CPU has NEON and VFPv4, which brings f16 conversions and fused multiply-add.
pub(crate) fn detect() -> bool {
    const AT_HWCAP: usize = 16;
    const NEON: usize = 1 << 12;
    const VFPV4: usize = 1 << 16;
    // SAFETY: it reads what the process was started with.
    let has = unsafe { getauxval(AT_HWCAP) };
    has & (NEON | VFPV4) == NEON | VFPV4
}

/// What a function of linear.s is called with.
#[repr(C)]
struct Step {
    /// The tile.
    weights: *const u8,
    blocks: usize,
    /// Of the first token, in block 0.
    q: *const i8,
    scale: *const f32,
    /// Sums of activations times their scale, over blocks or, with groups of 16, over halves.
    sum: *const f32,
    /// `[tokens][16]`, zeros.
    out: *mut [f32; TILE_ROWS],
}

type Linear = unsafe extern "C" fn(&Step);

/// Names the functions of linear.s: by the kind's code, one token and two.
macro_rules! linears {
    ($($code:literal: $one:ident, $two:ident;)*) => {
        unsafe extern "C" {
            $(fn $one(step: &Step); fn $two(step: &Step);)*
        }

        fn linear(kind: packed::Kind) -> [Linear; 2] {
            match kind.code() {
                $($code => [$one, $two],)*
                code => unreachable!("there is no kind {code}"),
            }
        }
    };
}

linears! {
    0: millwright_armv7_linear_0_1, millwright_armv7_linear_0_2;
    2: millwright_armv7_linear_2_1, millwright_armv7_linear_2_2;
    3: millwright_armv7_linear_3_1, millwright_armv7_linear_3_2;
    4: millwright_armv7_linear_4_1, millwright_armv7_linear_4_2;
    6: millwright_armv7_linear_6_1, millwright_armv7_linear_6_2;
    7: millwright_armv7_linear_7_1, millwright_armv7_linear_7_2;
    8: millwright_armv7_linear_8_1, millwright_armv7_linear_8_2;
    10: millwright_armv7_linear_10_1, millwright_armv7_linear_10_2;
    11: millwright_armv7_linear_11_1, millwright_armv7_linear_11_2;
    12: millwright_armv7_linear_12_1, millwright_armv7_linear_12_2;
    14: millwright_armv7_linear_14_1, millwright_armv7_linear_14_2;
    15: millwright_armv7_linear_15_1, millwright_armv7_linear_15_2;
}

/// Computes `tiles` for all tokens, as `matmul::tiles` does. Tiles are the outer loop: one stays in the cache while
/// the tokens pass.
///
/// # Safety
/// [`detect`] says so.
pub(crate) unsafe fn tiles(w: Packed, tiles: Range<usize>, a: &Quantised, out: &Output) {
    let steps = linear(w.kind());
    for tile in tiles {
        for group in 0..a.m().div_ceil(GROUP) {
            let (view, base) = (a.group(group), group * GROUP);
            let tokens = GROUP.min(a.m() - base);
            for first in (0..tokens).step_by(2) {
                let count = (tokens - first).min(2);
                let mut sums = [[0.0; TILE_ROWS]; 2];
                // SAFETY: the caller's promise, and `count` tokens from `first` on are the group's.
                unsafe { step(steps[count - 1], w, tile, view, first, &mut sums) }
                for (token, sums) in sums.iter().take(count).enumerate() {
                    out.put(base + first + token, tile, sums);
                }
            }
        }
    }
}

/// # Safety
/// The CPU has what [`detect`] asks for; `linear` is the kind's, for a number of tokens that the group has from
/// `first` on.
unsafe fn step(
    linear: Linear,
    w: Packed,
    tile: usize,
    a: GroupView,
    first: usize,
    out: &mut [[f32; TILE_ROWS]; 2],
) {
    let blocks = w.shape().blocks();
    assert!(a.q.len() == blocks && a.scale.len() == blocks && a.sums.len() == blocks);
    let step = Step {
        weights: w.tile(tile).as_ptr(),
        blocks,
        q: a.q[0][first..].as_ptr().cast(),
        scale: a.scale[0][first..].as_ptr(),
        sum: if w.kind().groups() == 1 {
            a.sums[0].block[first..].as_ptr()
        } else {
            a.sums[0].half[0][first..].as_ptr()
        },
        out: out.as_mut_ptr(),
    };
    // SAFETY: the tile and the group have `blocks` blocks each, one at least, by the assertion and `Packed`.
    unsafe { linear(&step) }
}

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

/// What exp in vector.s reads, in its order.
static EXP: [f32; 14] = {
    let p = math::EXP_POLYNOMIAL;
    // Above 2^23 a number has no fraction; half as much again leaves room for negative ones.
    let round = 12_582_912.0;
    [
        std::f32::consts::LOG2_E,
        round,
        -math::LN2_HIGH,
        -math::LN2_LOW,
        p[0],
        p[1],
        p[2],
        p[3],
        p[4],
        p[5],
        math::EXP_HIGH,
        f32::INFINITY,
        math::EXP_LOW,
        0.0,
    ]
};

type F = [f32; 16];

/// A function of vector.s.
macro_rules! op {
    ($call:expr) => {{
        // SAFETY: `self` proves the features; what memory is touched is behind references of the right size.
        unsafe { $call }
    }};
}

/// Exists only on CPUs with what [`detect`] asks for.
#[derive(Copy, Clone)]
pub(crate) struct Armv7(());

impl Armv7 {
    /// # Safety
    /// [`detect`] says so.
    #[inline(always)]
    pub(crate) unsafe fn assume() -> Self {
        Self(())
    }
}

/// `a * b + c`, rounded once; `f32::mul_add` is a slow function of the C library here.
#[inline(always)]
fn fma(a: f32, b: f32, c: f32) -> f32 {
    let mut out = c;
    // SAFETY: registers only; whoever calls has an `Armv7`, which proves VFPv4.
    unsafe {
        asm!(
            ".fpu vfpv4",
            "vfma.f32 {0}, {1}, {2}",
            inout(sreg) out, in(sreg) a, in(sreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    out
}

impl Simd for Armv7 {
    type F = F;
    type Sums = [i32; 16];
    const TOKENS: usize = 4;
    const VECTORS: usize = 1;
    const OFFSET: bool = false;
    const ACCUMULATES: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        Scalar.splat(x)
    }

    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> F {
        *x
    }

    #[inline(always)]
    fn store(self, x: F, out: &mut [f32; 16]) {
        *out = x;
    }

    #[inline(always)]
    fn load_f16(self, x: &[u8; 32]) -> F {
        let mut out = [0.0; 16];
        op!(millwright_armv7_load_f16(x, &mut out));
        out
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> F {
        let mut out = [0.0; 16];
        op!(millwright_armv7_load_i8(x, &mut out));
        out
    }

    #[inline(always)]
    fn store_f16(self, x: F, out: &mut [u16; 16]) {
        op!(millwright_armv7_store_f16(&x, out));
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        Scalar.add(a, b)
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        Scalar.sub(a, b)
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        Scalar.mul(a, b)
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        Scalar.div(a, b)
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        std::array::from_fn(|lane| fma(a[lane], b[lane], c[lane]))
    }

    #[inline(always)]
    fn abs(self, a: F) -> F {
        Scalar.abs(a)
    }

    /// For what is quantised, so within ±128; there is no instruction for it.
    #[inline(always)]
    fn round(self, a: F) -> F {
        a.map(|a| a + EXP[1] - EXP[1])
    }

    #[inline(always)]
    fn greater(self, a: F, b: F, then: F, other: F) -> F {
        Scalar.greater(a, b, then, other)
    }

    #[inline(always)]
    fn nan_to_zero(self, mut a: F) -> F {
        op!(millwright_armv7_nan_to_zero(&mut a));
        a
    }

    #[inline(always)]
    fn power_of_two(self, n: F) -> F {
        Scalar.power_of_two(n)
    }

    #[inline(always)]
    fn store_i8(self, x: F, out: &mut [i8; 16]) -> i32 {
        op!(millwright_armv7_store_i8(&x, out))
    }

    #[inline(always)]
    fn max(self, a: F, mut b: F) -> F {
        op!(millwright_armv7_max(&a, &mut b));
        b
    }

    #[inline(always)]
    fn exp(self, x: F) -> F {
        let mut out = [0.0; 16];
        op!(millwright_armv7_exp(&x, &mut out, &EXP));
        out
    }

    #[inline(always)]
    fn exp_one(self, x: f32) -> f32 {
        self.exp([x; 16])[0]
    }

    #[inline(always)]
    fn fma_one(self, a: f32, b: f32, c: f32) -> f32 {
        fma(a, b, c)
    }

    fn accumulate<const Q: usize>(
        self,
        rows: Elements,
        stride: usize,
        x: [&[f32]; Q],
        sums: [&mut [f32]; Q],
    ) {
        let (count, lanes) = (x[0].len(), sums[0].len());
        let (len, size, table) = match rows {
            Elements::F16(rows) => (rows.len(), 2, &ACCUMULATE_F16),
            Elements::I8(rows) => (rows.len(), 1, &ACCUMULATE_I8),
        };
        let base: *const u8 = match rows {
            Elements::F16(rows) => rows.as_ptr().cast(),
            Elements::I8(rows) => rows.as_ptr().cast(),
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
            // SAFETY: `self` proves the features; by the assertions the rows and sums have `lanes` lanes, of which
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

    // Linears are whole loops, `tiles`; nobody asks for these, but the trait has them.

    #[inline(always)]
    fn start<const T: usize>(self, from: [i32; T]) -> [[i32; 16]; T] {
        Scalar.start(from)
    }

    #[inline(always)]
    fn dot<const T: usize>(
        self,
        sums: [[i32; 16]; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [[i32; 16]; T] {
        Scalar.dot(sums, w, a)
    }

    #[inline(always)]
    fn dot_nibbles<const T: usize, const HIGH: bool>(
        self,
        sums: [[i32; 16]; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [[i32; 16]; T] {
        Scalar.dot_nibbles::<T, HIGH>(sums, w, a)
    }

    #[inline(always)]
    fn finish<const T: usize>(self, sums: [[i32; 16]; T]) -> [F; T] {
        Scalar.finish(sums)
    }
}
