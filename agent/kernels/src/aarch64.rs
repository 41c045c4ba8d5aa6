//! 64-bit ARM: a vector is four registers. How byte products are added up depends on the CPU, and is in three forms in
//! `smull` (A53, A72), `sdot` (A55, A76 and later) and `smmla` (CPUs with i8mm). Stable Rust has no intrinsics for f16,
//! hence `asm!`.

#![allow(clippy::wildcard_imports, reason = "intrinsics carry their own prefix")]
#![allow(
    clippy::cast_ptr_alignment,
    reason = "only unaligned loads and stores go through such pointers"
)]

pub(crate) mod sdot;
pub(crate) mod smmla;
pub(crate) mod smull;

use crate::simd::{Activations, Simd, Weights};
use std::arch::aarch64::*;
use std::arch::asm;
use std::marker::PhantomData;

/// Exists only on CPUs with neon and what `P` needs.
#[derive(Copy, Clone)]
pub(crate) struct Neon<P>(PhantomData<P>);

impl<P> Neon<P> {
    /// # Safety
    /// The CPU has these features.
    #[inline(always)]
    pub(crate) unsafe fn assume() -> Self {
        Self(PhantomData)
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
/// Sixteen i32: `[quad]`, four rows each.
type I = [int32x4_t; 4];

/// How a CPU multiplies bytes and adds the products up. The functions are those of [`Simd`].
///
/// # Safety
/// Of each: the CPU has neon and what the form needs.
pub(crate) trait Products: Copy {
    type Sums: Copy;
    const TOKENS: usize;

    unsafe fn start<const T: usize>() -> [Self::Sums; T];
    unsafe fn dot<const T: usize, const PART: u8>(
        sums: [Self::Sums; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [Self::Sums; T];
    unsafe fn finish<const T: usize>(sums: [Self::Sums; T]) -> [I; T];
}

impl<P: Products> Simd for Neon<P> {
    type F = F;
    type Sums = P::Sums;
    const TOKENS: usize = P::TOKENS;
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
    fn sum(self, x: F) -> f32 {
        op! {
            let x = vaddq_f32(vaddq_f32(x[0], x[2]), vaddq_f32(x[1], x[3]));
            vaddv_f32(vadd_f32(vget_low_f32(x), vget_high_f32(x)))
        }
    }

    #[inline(always)]
    fn max_lane(self, x: F) -> f32 {
        op!(vmaxvq_f32(vmaxq_f32(
            vmaxq_f32(x[0], x[2]),
            vmaxq_f32(x[1], x[3])
        )))
    }

    #[inline(always)]
    fn start<const T: usize>(self, _: [i32; T]) -> [P::Sums; T] {
        // Weights are signed, so sums start at zero.
        op!(P::start())
    }

    #[inline(always)]
    fn dot<const T: usize, const PART: u8>(
        self,
        sums: [P::Sums; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [P::Sums; T] {
        op!(P::dot::<T, PART>(sums, w, a))
    }

    #[inline(always)]
    fn finish<const T: usize>(self, sums: [P::Sums; T]) -> [F; T] {
        let sums = op!(P::finish(sums));
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
        asm!("fcvtl {0:v}.4s, {1:v}.4h", lateout(vreg) out, in(vreg) x, options(pure, nomem, nostack, preserves_flags));
    };
    out
}

#[inline(always)]
unsafe fn widen_high(x: uint8x16_t) -> float32x4_t {
    let out;
    // SAFETY: registers only.
    unsafe {
        asm!("fcvtl2 {0:v}.4s, {1:v}.8h", lateout(vreg) out, in(vreg) x, options(pure, nomem, nostack, preserves_flags));
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
