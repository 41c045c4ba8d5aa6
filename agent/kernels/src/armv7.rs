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

use crate::math;
use crate::scalar::Scalar;
use crate::simd::{Activations, Elements, Simd, Weights};
use std::arch::{asm, global_asm};

mod accumulate;
mod linear;
#[cfg(test)]
mod tests;

pub(crate) use linear::tiles;

global_asm!(include_str!("armv7/vector.s"), options(raw));

unsafe extern "C" {
    /// The C library's.
    fn getauxval(key: usize) -> usize;

    fn millwright_armv7_load_f16(x: &[u8; 32], out: &mut [f32; 16]);
    fn millwright_armv7_store_f16(x: &[f32; 16], out: &mut [u16; 16]);
    fn millwright_armv7_load_i8(x: &[i8; 16], out: &mut [f32; 16]);
    fn millwright_armv7_store_i8(x: &[f32; 16], out: &mut [i8; 16]) -> i32;
    fn millwright_armv7_nan_to_zero(x: &mut [f32; 16]);
    fn millwright_armv7_max(a: &[f32; 16], b: &mut [f32; 16]);
    fn millwright_armv7_exp(x: &mut [f32; 16], constants: &[f32; 13]);
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

/// What exp in vector.s reads, in its order.
static EXP: [f32; 13] = {
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
    fn exp(self, mut x: F) -> F {
        op!(millwright_armv7_exp(&mut x, &EXP));
        x
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
        accumulate::accumulate(self, rows, stride, x, sums);
    }

    // Linears are whole loops, `tiles`; nobody asks for these, but the trait has them.

    #[inline(always)]
    fn start<const T: usize>(self, from: [i32; T]) -> [[i32; 16]; T] {
        Scalar.start(from)
    }

    #[inline(always)]
    fn dot<const T: usize, const PART: u8>(
        self,
        sums: [[i32; 16]; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [[i32; 16]; T] {
        Scalar.dot::<T, PART>(sums, w, a)
    }

    #[inline(always)]
    fn finish<const T: usize>(self, sums: [[i32; 16]; T]) -> [F; T] {
        Scalar.finish(sums)
    }
}
