//! Byte products with SMMLA: two tokens times two rows, eight columns deep, in one instruction. One token alone goes
//! through SDOT, which every CPU with i8mm has.
//!
//! The layout is everybody's: rows lie four bytes apart, so two registers of four columns are zipped into two operands of
//! two rows by eight columns. Of a pair of tokens, the first one's sums hold, per four rows, `[token][row]` of rows 0 and
//! 1, the second one's of rows 2 and 3, until `finish` sorts them.

use super::sdot::{Sdot, part};
use super::{I, Products};
use crate::simd::{Activations, Weights};
use std::arch::aarch64::*;
use std::arch::asm;

/// Needs dotprod and i8mm.
#[derive(Copy, Clone)]
pub(crate) struct Smmla;

impl Products for Smmla {
    type Sums = I;
    const TOKENS: usize = 4;

    #[inline(always)]
    unsafe fn start<const T: usize>() -> [I; T] {
        const { assert!(T == 1 || T.is_multiple_of(2), "tokens come in pairs") };
        // SAFETY: the caller has neon.
        [[unsafe { vdupq_n_s32(0) }; 4]; T]
    }

    #[inline(always)]
    unsafe fn dot<const T: usize, const PART: u8>(
        mut sums: [I; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [I; T] {
        // SAFETY: the caller has i8mm.
        unsafe {
            if T == 1 {
                return Sdot::dot::<T, PART>(sums, w, a);
            }
            several::<T, PART>(&mut sums, w, a);
        }
        sums
    }

    #[inline(always)]
    unsafe fn finish<const T: usize>(mut sums: [I; T]) -> [I; T] {
        for [first, second] in sums.as_chunks_mut::<2>().0 {
            for (low, high) in first.iter_mut().zip(second) {
                // SAFETY: the caller has neon.
                unsafe {
                    let (a, b) = (vreinterpretq_s64_s32(*low), vreinterpretq_s64_s32(*high));
                    *low = vreinterpretq_s32_s64(vzip1q_s64(a, b));
                    *high = vreinterpretq_s32_s64(vzip2q_s64(a, b));
                }
            }
        }
        sums
    }
}

/// `$sum += tokens · rowsᵀ`, two tokens by two rows.
macro_rules! smmla {
    ($sum:expr, $tokens:expr, $rows:expr) => {
        asm!(
            "smmla {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) $sum, in(vreg) $tokens, in(vreg) $rows,
            options(pure, nomem, nostack, preserves_flags)
        )
    };
}

/// # Safety
/// Needs i8mm; `T` is even.
#[inline(always)]
unsafe fn several<const T: usize, const PART: u8>(
    sums: &mut [I; T],
    w: &Weights,
    a: [&Activations; T],
) {
    let (sums, a) = (sums.as_chunks_mut::<2>().0, a.as_chunks::<2>().0);
    // SAFETY: the caller has i8mm; loads stay within the references.
    unsafe {
        let load = |k4: usize, quad: usize| {
            vreinterpretq_s32_s8(part::<PART>(vld1q_u8(w[k4].as_ptr().add(16 * quad))))
        };
        for quad in 0..4 {
            let w = [load(0, quad), load(1, quad), load(2, quad), load(3, quad)];
            let low = [vzip1q_s32(w[0], w[1]), vzip1q_s32(w[2], w[3])];
            let high = [vzip2q_s32(w[0], w[1]), vzip2q_s32(w[2], w[3])];
            for (sums, a) in sums.iter_mut().zip(a) {
                let x = a.map(|a| vreinterpretq_s64_s8(vld1q_s8(a.as_ptr())));
                let x = [vzip1q_s64(x[0], x[1]), vzip2q_s64(x[0], x[1])];
                for k8 in 0..2 {
                    smmla!(sums[0][quad], x[k8], low[k8]);
                    smmla!(sums[1][quad], x[k8], high[k8]);
                }
            }
        }
    }
}
