//! Byte products without dotprod: SMULL, SMLAL, SADALP, in an order that suits in-order cores (A53) as well as others.
//!
//! A register of products holds two rows, eight 16-bit numbers, and there are eight chains of them, so that each
//! instruction finds its operands ready (latency 6 at most, distance 8). Loads come in bursts ahead of arithmetic: by
//! LLVM's models no other order is faster on any of A53, A55, A72, N1. Two products of 8-bit weights with ±127 fit
//! 16 bits (2 · 128 · 127 < 32,768), four of 4-bit ones too (4 · 15 · 127).
//! Left to the compiler, all products are begun first and half of them spilled.

use super::{I, Products};
use crate::simd::{Activations, Weights};
use std::arch::aarch64::*;
use std::arch::asm;

/// Needs nothing but neon.
#[derive(Copy, Clone)]
pub(crate) struct Smull;

/// Per four rows, two numbers of rows 0 and 1 each, then of 2 and 3.
type Sums = [[int32x4_t; 2]; 4];

impl Products for Smull {
    type Sums = Sums;
    // Multiplying is the limit, so loading weights once for several tokens gains nothing.
    const TOKENS: usize = 1;

    #[inline(always)]
    unsafe fn start<const T: usize>() -> [Sums; T] {
        // SAFETY: the caller has neon.
        [[[unsafe { vdupq_n_s32(0) }; 2]; 4]; T]
    }

    #[inline(always)]
    unsafe fn dot<const T: usize>(
        mut sums: [Sums; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [Sums; T] {
        for token in 0..T {
            // SAFETY: the caller has neon.
            unsafe { dot(&mut sums[token], w, a[token]) };
        }
        sums
    }

    #[inline(always)]
    unsafe fn dot_nibbles<const T: usize, const HIGH: bool>(
        mut sums: [Sums; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [Sums; T] {
        for token in 0..T {
            // SAFETY: the caller has neon.
            unsafe {
                if HIGH {
                    dot_high(&mut sums[token], w, a[token]);
                } else {
                    dot_low(&mut sums[token], w, a[token]);
                }
            }
        }
        sums
    }

    #[inline(always)]
    unsafe fn finish<const T: usize>(sums: [Sums; T]) -> [I; T] {
        // SAFETY: the caller has neon.
        sums.map(|sums| sums.map(|[low, high]| unsafe { vpaddq_s32(low, high) }))
    }
}

/// Loads the bytes of four rows and four columns.
macro_rules! load {
    ($to:literal, $k4:literal, $quad:literal) => {
        concat!("ldr {", $to, ":q}, [{w}, #64*", $k4, "+16*", $quad, "]\n")
    };
}

/// Four activations twice.
macro_rules! repeat {
    ($to:literal) => {
        concat!("ld1r {{{", $to, ":v}.4s}}, [{a}], #4\n")
    };
}

/// Four columns of four rows, into two registers of products.
#[rustfmt::skip]
macro_rules! products {
    ($mul:literal, $p:literal, $q:literal, $w:literal, $x:literal) => {
        concat!(
            $mul, " {", $p, ":v}.8h, {", $w, ":v}.8b, {", $x, ":v}.8b\n",
            $mul, "2 {", $q, ":v}.8h, {", $w, ":v}.16b, {", $x, ":v}.16b\n",
        )
    };
}

/// Eight columns of sixteen rows, `$even` and `$odd` being fours of them, `$cut` out of bytes.
#[rustfmt::skip]
macro_rules! eight_columns {
    ($cut:ident, $first:literal, $even:literal, $odd:literal) => {
        concat!(
            repeat!("x0"), repeat!("x1"),
            load!("u0", $even, 0), load!("u1", $even, 1), load!("u2", $even, 2), load!("u3", $even, 3),
            load!("w0", $odd, 0), load!("w1", $odd, 1), load!("w2", $odd, 2), load!("w3", $odd, 3),
            $cut!("u0"), $cut!("u1"), $cut!("u2"), $cut!("u3"), $cut!("w0"), $cut!("w1"), $cut!("w2"), $cut!("w3"),
            products!($first, "p0", "p1", "u0", "x0"), products!($first, "p2", "p3", "u1", "x0"),
            products!($first, "p4", "p5", "u2", "x0"), products!($first, "p6", "p7", "u3", "x0"),
            products!("smlal", "p0", "p1", "w0", "x1"), products!("smlal", "p2", "p3", "w1", "x1"),
            products!("smlal", "p4", "p5", "w2", "x1"), products!("smlal", "p6", "p7", "w3", "x1"),
        )
    };
}

/// Adds neighbouring products.
#[rustfmt::skip]
macro_rules! add {
    () => {
        concat!(
            "sadalp {s0:v}.4s, {p0:v}.8h\n", "sadalp {s1:v}.4s, {p1:v}.8h\n",
            "sadalp {s2:v}.4s, {p2:v}.8h\n", "sadalp {s3:v}.4s, {p3:v}.8h\n",
            "sadalp {s4:v}.4s, {p4:v}.8h\n", "sadalp {s5:v}.4s, {p5:v}.8h\n",
            "sadalp {s6:v}.4s, {p6:v}.8h\n", "sadalp {s7:v}.4s, {p7:v}.8h\n",
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

/// Sixteen columns of sixteen rows, from what `$cut` leaves of bytes. `$between` the first and the last eight the products are
/// added to the sums and started anew (`$second` is SMULL), or they go on (SMLAL).
#[rustfmt::skip]
macro_rules! sixteen_columns {
    ($sums:expr, $w:expr, $a:expr, $cut:ident, $between:expr, $second:literal $(, $mask:expr)?) => {{
        let [[s0, s1], [s2, s3], [s4, s5], [s6, s7]] = $sums;
        asm!(
            eight_columns!($cut, "smull", 0, 1), $between, eight_columns!($cut, $second, 2, 3), add!(),
            $(mask = in(vreg) $mask,)?
            w = in(reg) $w.as_ptr(), a = inout(reg) $a.as_ptr() => _,
            s0 = inout(vreg) *s0, s1 = inout(vreg) *s1, s2 = inout(vreg) *s2, s3 = inout(vreg) *s3,
            s4 = inout(vreg) *s4, s5 = inout(vreg) *s5, s6 = inout(vreg) *s6, s7 = inout(vreg) *s7,
            p0 = out(vreg) _, p1 = out(vreg) _, p2 = out(vreg) _, p3 = out(vreg) _,
            p4 = out(vreg) _, p5 = out(vreg) _, p6 = out(vreg) _, p7 = out(vreg) _,
            u0 = out(vreg) _, u1 = out(vreg) _, u2 = out(vreg) _, u3 = out(vreg) _,
            w0 = out(vreg) _, w1 = out(vreg) _, w2 = out(vreg) _, w3 = out(vreg) _,
            x0 = out(vreg) _, x1 = out(vreg) _,
            options(pure, readonly, nostack, preserves_flags)
        );
    }};
}

/// # Safety
/// Needs neon, as all below.
#[inline(always)]
unsafe fn dot(sums: &mut Sums, w: &Weights, a: &Activations) {
    // SAFETY: reads sixteen bytes from `a` on and 256 from `w` on.
    unsafe { sixteen_columns!(sums, w, a, whole, add!(), "smull") }
}

#[inline(always)]
unsafe fn dot_low(sums: &mut Sums, w: &Weights, a: &Activations) {
    // SAFETY: as above.
    unsafe { sixteen_columns!(sums, w, a, low, "", "smlal", vdupq_n_u8(15)) }
}

#[inline(always)]
unsafe fn dot_high(sums: &mut Sums, w: &Weights, a: &Activations) {
    // SAFETY: as above.
    unsafe { sixteen_columns!(sums, w, a, high, "", "smlal") }
}
