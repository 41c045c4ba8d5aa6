//! 64-bit ARM: a vector is four registers. Byte products go through SDOT where the CPU has it (`Neon<true>`: A55, A76
//! and later) and else through SMULL, SMLAL and SADALP (A53, A72), whose 16-bit sums of two products hold any
//! weights times ±127 (2 · 128 · 127 < 32,768). Stable Rust has intrinsics neither for SDOT nor for f16, hence `asm!`.

#![allow(clippy::wildcard_imports, reason = "intrinsics carry their own prefix")]
#![allow(
    clippy::cast_ptr_alignment,
    reason = "only unaligned loads and stores go through such pointers"
)]

use crate::simd::{Activations, Simd, Weights};
use std::arch::aarch64::*;
use std::arch::asm;

/// Exists only on CPUs with neon, and `Neon<true>` only on those with dotprod.
#[derive(Copy, Clone)]
pub(crate) struct Neon<const DOTPROD: bool>(());

impl<const DOTPROD: bool> Neon<DOTPROD> {
    /// # Safety
    /// The CPU has the features above.
    #[inline(always)]
    pub(crate) unsafe fn assume() -> Self {
        Self(())
    }
}

/// One intrinsic, or a few, on values in registers.
macro_rules! op {
    ($($body:tt)*) => {{
        // SAFETY: `self` proves the features; what memory is touched is behind references of the right size.
        unsafe { $($body)* }
    }};
}

/// The same for each of the four registers.
macro_rules! each {
    ($i:ident: $($body:tt)*) => {
        op!([{ const $i: usize = 0; $($body)* }, { const $i: usize = 1; $($body)* },
             { const $i: usize = 2; $($body)* }, { const $i: usize = 3; $($body)* }])
    };
}

type F = [float32x4_t; 4];
type I = [int32x4_t; 4];

impl<const DOTPROD: bool> Simd for Neon<DOTPROD> {
    type F = F;
    type Sums = I;
    const TOKENS: usize = 4;
    const VECTORS: usize = 1;
    const OFFSET: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        op!([vdupq_n_f32(x); 4])
    }

    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> F {
        each!(I: vld1q_f32(x.as_ptr().add(4 * I)))
    }

    #[inline(always)]
    fn store(self, x: F, out: &mut [f32; 16]) {
        each!(I: vst1q_f32(out.as_mut_ptr().add(4 * I), x[I]));
    }

    #[inline(always)]
    fn load_f16(self, x: &[u8; 32]) -> F {
        let half = op!([vld1q_u8(x.as_ptr()), vld1q_u8(x.as_ptr().add(16))]);
        op!([
            widen_low(half[0]),
            widen_high(half[0]),
            widen_low(half[1]),
            widen_high(half[1])
        ])
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> F {
        op! {
            let x = vld1q_s8(x.as_ptr());
            let (low, high) = (vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }
    }

    #[inline(always)]
    fn store_f16(self, x: F, out: &mut [u16; 16]) {
        op! {
            vst1q_u16(out.as_mut_ptr(), narrow(x[0], x[1]));
            vst1q_u16(out.as_mut_ptr().add(8), narrow(x[2], x[3]));
        }
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        each!(I: vaddq_f32(a[I], b[I]))
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        each!(I: vsubq_f32(a[I], b[I]))
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        each!(I: vmulq_f32(a[I], b[I]))
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        each!(I: vdivq_f32(a[I], b[I]))
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        each!(I: vfmaq_f32(c[I], a[I], b[I]))
    }

    #[inline(always)]
    fn abs(self, a: F) -> F {
        each!(I: vabsq_f32(a[I]))
    }

    #[inline(always)]
    fn round(self, a: F) -> F {
        each!(I: vrndnq_f32(a[I]))
    }

    #[inline(always)]
    fn greater(self, a: F, b: F, then: F, other: F) -> F {
        each!(I: vbslq_f32(vcgtq_f32(a[I], b[I]), then[I], other[I]))
    }

    #[inline(always)]
    fn nan_to_zero(self, a: F) -> F {
        each!(I: vbslq_f32(vceqq_f32(a[I], a[I]), a[I], vdupq_n_f32(0.0)))
    }

    #[inline(always)]
    fn power_of_two(self, n: F) -> F {
        each!(I: {
            let biased = vaddq_s32(vcvtnq_s32_f32(n[I]), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased))
        })
    }

    #[inline(always)]
    fn store_i8(self, x: F, out: &mut [i8; 16]) -> i32 {
        let x: I = each!(I: vcvtnq_s32_f32(x[I]));
        op! {
            let low = vcombine_s16(vmovn_s32(x[0]), vmovn_s32(x[1]));
            let high = vcombine_s16(vmovn_s32(x[2]), vmovn_s32(x[3]));
            vst1q_s8(out.as_mut_ptr(), vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
            vaddlvq_s16(vaddq_s16(low, high))
        }
    }

    #[inline(always)]
    fn start<const T: usize>(self, from: [i32; T]) -> [I; T] {
        let mut sums = [op!([vdupq_n_s32(0); 4]); T];
        for token in 0..T {
            sums[token] = op!([vdupq_n_s32(from[token]); 4]);
        }
        sums
    }

    #[inline(always)]
    fn dot<const T: usize>(self, sums: [I; T], w: &Weights, a: [&Activations; T]) -> [I; T] {
        let load =
            |k4: usize, quad: usize| op!(vld1q_s8(w[k4].as_ptr().cast::<i8>().add(16 * quad)));
        op!(add_products::<DOTPROD, T>(sums, load, a))
    }

    #[inline(always)]
    fn dot_nibbles<const T: usize, const HIGH: bool>(
        self,
        sums: [I; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [I; T] {
        let load = |k4: usize, quad: usize| {
            op! {
                let w = vld1q_u8(w[k4].as_ptr().add(16 * quad));
                vreinterpretq_s8_u8(if HIGH { vshrq_n_u8::<4>(w) } else { vandq_u8(w, vdupq_n_u8(15)) })
            }
        };
        op!(add_products::<DOTPROD, T>(sums, load, a))
    }

    #[inline(always)]
    fn finish<const T: usize>(self, sums: [I; T]) -> [F; T] {
        let mut out = [op!([vdupq_n_f32(0.0); 4]); T];
        for token in 0..T {
            out[token] = each!(Q: vcvtq_f32_s32(sums[token][Q]));
        }
        out
    }
}

/// # Safety
/// Needs neon, as all below.
#[inline(always)]
unsafe fn widen_low(x: uint8x16_t) -> float32x4_t {
    let out;
    // SAFETY: registers only.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", lateout(vreg) out, in(vreg) x, options(pure, nomem, nostack, preserves_flags))
    };
    out
}

#[inline(always)]
unsafe fn widen_high(x: uint8x16_t) -> float32x4_t {
    let out;
    // SAFETY: registers only.
    unsafe {
        asm!("fcvtl2 {0:v}.4s, {1:v}.8h", lateout(vreg) out, in(vreg) x, options(pure, nomem, nostack, preserves_flags))
    };
    out
}

#[inline(always)]
unsafe fn narrow(low: float32x4_t, high: float32x4_t) -> uint16x8_t {
    let out;
    // SAFETY: registers only; `out` is written before `high` is read, so they must differ.
    unsafe {
        asm!(
            "fcvtn {0:v}.4h, {1:v}.4s",
            "fcvtn2 {0:v}.8h, {2:v}.4s",
            out(vreg) out, in(vreg) low, in(vreg) high,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    out
}

/// `$sum += ` the products of four rows' four bytes with lane `$lane` of the activations.
macro_rules! sdot {
    ($sum:expr, $w:expr, $a:expr, $lane:literal) => {
        asm!(
            concat!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[", $lane, "]"),
            inout(vreg) $sum, in(vreg) $w, in(vreg) $a,
            options(pure, nomem, nostack, preserves_flags)
        )
    };
}

/// Adds to `sums` the products of four rows' (`quad`) four bytes (`k4`), as `load` gives them, with each token's.
/// Without dotprod: rows 0 and 1 of four are the low half of a register, 2 and 3 the high one; two such registers,
/// four of K apart, are multiplied and added in 16 bits, then neighbours in 32.
///
/// # Safety
/// Needs neon, and dotprod if `DOTPROD`.
#[inline(always)]
unsafe fn add_products<const DOTPROD: bool, const T: usize>(
    mut sums: [I; T],
    load: impl Fn(usize, usize) -> int8x16_t,
    a: [&Activations; T],
) -> [I; T] {
    // SAFETY: the caller has the features; loads stay within the references.
    unsafe {
        let mut x = [vdupq_n_s8(0); T];
        for token in 0..T {
            x[token] = vld1q_s8(a[token].as_ptr());
        }
        for quad in 0..4 {
            let w = [load(0, quad), load(1, quad), load(2, quad), load(3, quad)];
            for token in 0..T {
                let (sum, x) = (&mut sums[token][quad], x[token]);
                if DOTPROD {
                    sdot!(*sum, w[0], x, "0");
                    sdot!(*sum, w[1], x, "1");
                    sdot!(*sum, w[2], x, "2");
                    sdot!(*sum, w[3], x, "3");
                } else {
                    let x = vreinterpretq_s32_s8(x);
                    let x0 = vreinterpretq_s8_s32(vdupq_laneq_s32::<0>(x));
                    let x1 = vreinterpretq_s8_s32(vdupq_laneq_s32::<1>(x));
                    let x2 = vreinterpretq_s8_s32(vdupq_laneq_s32::<2>(x));
                    let x3 = vreinterpretq_s8_s32(vdupq_laneq_s32::<3>(x));
                    let low = vmull_s8(vget_low_s8(w[0]), vget_low_s8(x0));
                    let low = vpaddlq_s16(vmlal_s8(low, vget_low_s8(w[1]), vget_low_s8(x1)));
                    let high = vpaddlq_s16(vmlal_high_s8(vmull_high_s8(w[0], x0), w[1], x1));
                    let more = vmull_s8(vget_low_s8(w[2]), vget_low_s8(x2));
                    let low = vpadalq_s16(low, vmlal_s8(more, vget_low_s8(w[3]), vget_low_s8(x3)));
                    let more = vmlal_high_s8(vmull_high_s8(w[2], x2), w[3], x3);
                    let high = vpadalq_s16(high, more);
                    *sum = vaddq_s32(*sum, vpaddq_s32(low, high));
                }
            }
        }
        sums
    }
}
