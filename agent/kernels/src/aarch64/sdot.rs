//! Byte products with SDOT: four rows' four products in one instruction. For one token, which is most of decoding, loads
//! and products are in an order that suits in-order cores (A55, A510): a burst of loads, then products that touch a
//! sum every fourth time. Loads are single ones: in LLVM's model of the A55 a pair takes three times as long as two.
//! For more tokens the compiler's order does.

use super::{I, Products};
use crate::simd::{self, Activations, Weights};
use std::arch::aarch64::*;
use std::arch::asm;

/// Needs dotprod.
#[derive(Copy, Clone)]
pub(crate) struct Sdot;

impl Products for Sdot {
    type Sums = I;
    const TOKENS: usize = 4;

    #[inline(always)]
    unsafe fn start<const T: usize>() -> [I; T] {
        // SAFETY: the caller has neon.
        [[unsafe { vdupq_n_s32(0) }; 4]; T]
    }

    #[inline(always)]
    unsafe fn dot<const T: usize, const PART: u8>(
        mut sums: [I; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [I; T] {
        // SAFETY: the caller has dotprod.
        unsafe {
            match (T, PART) {
                (1, simd::WHOLE) => dot_whole(&mut sums[0], w, a[0]),
                (1, simd::LOW) => dot_low(&mut sums[0], w, a[0]),
                (1, _) => dot_high(&mut sums[0], w, a[0]),
                _ => several::<T, PART>(&mut sums, w, a),
            }
        }
        sums
    }

    #[inline(always)]
    unsafe fn finish<const T: usize>(sums: [I; T]) -> [I; T] {
        sums
    }
}

/// The weights in sixteen bytes.
///
/// # Safety
/// Needs neon; all below need dotprod.
#[inline(always)]
pub(super) unsafe fn part<const PART: u8>(w: uint8x16_t) -> int8x16_t {
    // SAFETY: the caller has neon.
    unsafe {
        vreinterpretq_s8_u8(match PART {
            simd::WHOLE => w,
            simd::LOW => vandq_u8(w, vdupq_n_u8(15)),
            _ => vshrq_n_u8::<4>(w),
        })
    }
}

/// Adds to `sums` the products of four rows' four bytes with lane `$lane` of the activations.
macro_rules! sdot {
    ($sum:expr, $w:expr, $a:expr, $lane:literal) => {
        asm!(
            concat!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[", $lane, "]"),
            inout(vreg) $sum, in(vreg) $w, in(vreg) $a,
            options(pure, nomem, nostack, preserves_flags)
        )
    };
}

#[inline(always)]
unsafe fn several<const T: usize, const PART: u8>(
    sums: &mut [I; T],
    w: &Weights,
    a: [&Activations; T],
) {
    // SAFETY: the caller has dotprod; loads stay within the references.
    unsafe {
        let load = |k4: usize, quad: usize| part::<PART>(vld1q_u8(w[k4].as_ptr().add(16 * quad)));
        for quad in 0..4 {
            let w = [load(0, quad), load(1, quad), load(2, quad), load(3, quad)];
            for (sums, a) in sums.iter_mut().zip(a) {
                let (sum, x) = (&mut sums[quad], vld1q_s8(a.as_ptr()));
                sdot!(*sum, w[0], x, "0");
                sdot!(*sum, w[1], x, "1");
                sdot!(*sum, w[2], x, "2");
                sdot!(*sum, w[3], x, "3");
            }
        }
    }
}

/// Loads the bytes of four rows and four columns.
macro_rules! load {
    ($to:literal, $k4:literal, $quad:literal) => {
        concat!("ldr {", $to, ":q}, [{w}, #64*", $k4, "+16*", $quad, "]\n")
    };
}

/// Multiplies them.
macro_rules! products {
    ($s:literal, $w:literal, $lane:literal) => {
        concat!(
            "sdot {",
            $s,
            ":v}.4s, {",
            $w,
            ":v}.16b, {x:v}.4b[",
            $lane,
            "]\n"
        )
    };
}

macro_rules! whole {
    ($w:literal) => {
        ""
    };
}
macro_rules! low {
    ($w:literal) => {
        concat!("and {", $w, ":v}.16b, {", $w, ":v}.16b, {mask:v}.16b\n")
    };
}
macro_rules! high {
    ($w:literal) => {
        concat!("ushr {", $w, ":v}.16b, {", $w, ":v}.16b, #4\n")
    };
}

/// Eight columns of sixteen rows, `$even` and `$odd` being fours of them, `$cut` out of bytes.
#[rustfmt::skip]
macro_rules! eight_columns {
    ($cut:ident, $even:literal, $odd:literal) => {
        concat!(
            load!("u0", $even, 0), load!("u1", $even, 1), load!("u2", $even, 2), load!("u3", $even, 3),
            load!("w0", $odd, 0), load!("w1", $odd, 1), load!("w2", $odd, 2), load!("w3", $odd, 3),
            $cut!("u0"), $cut!("u1"), $cut!("u2"), $cut!("u3"), $cut!("w0"), $cut!("w1"), $cut!("w2"), $cut!("w3"),
            products!("s0", "u0", $even), products!("s1", "u1", $even),
            products!("s2", "u2", $even), products!("s3", "u3", $even),
            products!("s0", "w0", $odd), products!("s1", "w1", $odd),
            products!("s2", "w2", $odd), products!("s3", "w3", $odd),
        )
    };
}

/// Sixteen columns of sixteen rows, from what `$cut` leaves of bytes.
#[rustfmt::skip]
macro_rules! sixteen_columns {
    ($sums:expr, $w:expr, $a:expr, $cut:ident $(, $mask:expr)?) => {{
        let [s0, s1, s2, s3] = $sums;
        asm!(
            "ldr {x:q}, [{a}]", eight_columns!($cut, 0, 1), eight_columns!($cut, 2, 3),
            $(mask = in(vreg) $mask,)?
            w = in(reg) $w.as_ptr(), a = in(reg) $a.as_ptr(),
            s0 = inout(vreg) *s0, s1 = inout(vreg) *s1, s2 = inout(vreg) *s2, s3 = inout(vreg) *s3,
            u0 = out(vreg) _, u1 = out(vreg) _, u2 = out(vreg) _, u3 = out(vreg) _,
            w0 = out(vreg) _, w1 = out(vreg) _, w2 = out(vreg) _, w3 = out(vreg) _,
            x = out(vreg) _,
            options(pure, readonly, nostack, preserves_flags)
        );
    }};
}

#[inline(always)]
unsafe fn dot_whole(sums: &mut I, w: &Weights, a: &Activations) {
    // SAFETY: reads sixteen bytes from `a` on and 256 from `w` on.
    unsafe { sixteen_columns!(sums, w, a, whole) }
}

#[inline(always)]
unsafe fn dot_low(sums: &mut I, w: &Weights, a: &Activations) {
    // SAFETY: as above.
    unsafe { sixteen_columns!(sums, w, a, low, vdupq_n_u8(15)) }
}

#[inline(always)]
unsafe fn dot_high(sums: &mut I, w: &Weights, a: &Activations) {
    // SAFETY: as above.
    unsafe { sixteen_columns!(sums, w, a, high) }
}
