//! Byte products without dotprod: SMULL, SMLAL, SADALP, in the order in which an in-order core (A53) never waits.
//!
//! A register of products holds two rows, eight 16-bit numbers, and there are eight chains of them, so that each
//! instruction finds its operands ready (latency 6 at most, distance 8). Weights of 8 bits are loaded by halves of
//! registers, since an A53 issues a 64-bit load together with arithmetic and a 128-bit one alone. Two products of
//! 8-bit weights with ±127 fit 16 bits (2 · 128 · 127 < 32,768), four of 4-bit ones too (4 · 15 · 127).
//! Left to the compiler, all products are begun first and half of them are spilled.

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

/// Loads eight bytes, number `$at` of the four columns `$k4`.
macro_rules! load {
    ($to:literal, $k4:literal, $at:literal) => {
        concat!("ldr {", $to, ":d}, [{w}, #64*", $k4, "+8*", $at, "]\n")
    };
}

/// Four activations twice.
macro_rules! repeat {
    ($to:literal) => {
        concat!("ld1r {{{", $to, ":v}.4s}}, [{a}], #4\n")
    };
}

macro_rules! smull {
    ($p:literal, $x:literal) => {
        concat!("smull {", $p, ":v}.8h, {", $p, ":v}.8b, {", $x, ":v}.8b\n")
    };
}

macro_rules! smlal {
    ($p:literal, $w:literal, $x:literal) => {
        concat!("smlal {", $p, ":v}.8h, {", $w, ":v}.8b, {", $x, ":v}.8b\n")
    };
}

macro_rules! sadalp {
    ($s:literal, $p:literal) => {
        concat!("sadalp {", $s, ":v}.4s, {", $p, ":v}.8h\n")
    };
}

/// Eight columns of sixteen rows; `p0` to `p3` are loaded. Each arithmetic instruction goes with one load at most.
macro_rules! eight_columns {
    ($even:literal, $odd:literal, $x:literal, $y:literal, $then:expr) => {
        concat!(
            smull!("p0", $x), load!("p4", $even, 4), smull!("p1", $x), load!("p5", $even, 5),
            smull!("p2", $x), load!("p6", $even, 6), smull!("p3", $x), load!("p7", $even, 7),
            smull!("p4", $x), repeat!($y), smull!("p5", $x), load!("w0", $odd, 0),
            smull!("p6", $x), load!("w1", $odd, 1), smull!("p7", $x), load!("w2", $odd, 2),
            smlal!("p0", "w0", $y), load!("w3", $odd, 3), smlal!("p1", "w1", $y), load!("w0", $odd, 4),
            smlal!("p2", "w2", $y), load!("w1", $odd, 5), smlal!("p3", "w3", $y), load!("w2", $odd, 6),
            smlal!("p4", "w0", $y), load!("w3", $odd, 7), smlal!("p5", "w1", $y),
            smlal!("p6", "w2", $y), smlal!("p7", "w3", $y),
            sadalp!("s0", "p0"), sadalp!("s1", "p1"), sadalp!("s2", "p2"), sadalp!("s3", "p3"),
            $then,
            sadalp!("s4", "p4"), sadalp!("s5", "p5"), sadalp!("s6", "p6"), sadalp!("s7", "p7"),
        )
    };
}

/// # Safety
/// Needs neon, as all below.
#[inline(always)]
unsafe fn dot(sums: &mut Sums, w: &Weights, a: &Activations) {
    let [[s0, s1], [s2, s3], [s4, s5], [s6, s7]] = sums;
    // SAFETY: reads sixteen bytes from `a` on and 256 from `w` on.
    unsafe {
        asm!(
            repeat!("x0"), load!("p0", 0, 0), load!("p1", 0, 1), load!("p2", 0, 2), load!("p3", 0, 3),
            eight_columns!(0, 1, "x0", "x1", concat!(
                repeat!("x0"), load!("p0", 2, 0), load!("p1", 2, 1), load!("p2", 2, 2), load!("p3", 2, 3),
            )),
            eight_columns!(2, 3, "x0", "x1", ""),
            w = in(reg) w.as_ptr(), a = inout(reg) a.as_ptr() => _,
            s0 = inout(vreg) *s0, s1 = inout(vreg) *s1, s2 = inout(vreg) *s2, s3 = inout(vreg) *s3,
            s4 = inout(vreg) *s4, s5 = inout(vreg) *s5, s6 = inout(vreg) *s6, s7 = inout(vreg) *s7,
            p0 = out(vreg) _, p1 = out(vreg) _, p2 = out(vreg) _, p3 = out(vreg) _,
            p4 = out(vreg) _, p5 = out(vreg) _, p6 = out(vreg) _, p7 = out(vreg) _,
            w0 = out(vreg) _, w1 = out(vreg) _, w2 = out(vreg) _, w3 = out(vreg) _,
            x0 = out(vreg) _, x1 = out(vreg) _,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
}

/// Loads the bytes of four rows and four columns.
macro_rules! load_quad {
    ($to:literal, $k4:literal, $quad:literal) => {
        concat!("ldr {", $to, ":q}, [{w}, #64*", $k4, "+16*", $quad, "]\n")
    };
}

/// The low or the high halves of bytes.
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

/// Four columns of four rows, into two registers of products.
macro_rules! products {
    ($mul:literal, $p:literal, $q:literal, $w:literal, $x:literal) => {
        concat!(
            $mul, " {", $p, ":v}.8h, {", $w, ":v}.8b, {", $x, ":v}.8b\n",
            $mul, "2 {", $q, ":v}.8h, {", $w, ":v}.16b, {", $x, ":v}.16b\n",
        )
    };
}

/// Four columns of sixteen rows, whose bytes are loaded and half of them cut; the same for the next four on the way.
macro_rules! four_columns {
    ($cut:ident, $mul:literal, $x:literal, [$w0:literal, $w1:literal, $w2:literal, $w3:literal],
     $k4:literal, $y:literal, [$n0:literal, $n1:literal, $n2:literal, $n3:literal]) => {
        concat!(
            $cut!($w2), repeat!($y), products!($mul, "p0", "p1", $w0, $x), load_quad!($n0, $k4, 0),
            $cut!($w3), products!($mul, "p2", "p3", $w1, $x), load_quad!($n1, $k4, 1),
            $cut!($n0), products!($mul, "p4", "p5", $w2, $x), load_quad!($n2, $k4, 2),
            $cut!($n1), products!($mul, "p6", "p7", $w3, $x), load_quad!($n3, $k4, 3),
        )
    };
}

/// Sixteen columns of sixteen rows, from the halves of bytes that `$cut` gives.
macro_rules! nibbles {
    ($sums:expr, $w:expr, $a:expr, $cut:ident $(, $mask:expr)?) => {{
        let [[s0, s1], [s2, s3], [s4, s5], [s6, s7]] = $sums;
        asm!(
            repeat!("x0"), load_quad!("u0", 0, 0), load_quad!("u1", 0, 1),
            load_quad!("u2", 0, 2), load_quad!("u3", 0, 3), $cut!("u0"), $cut!("u1"),
            four_columns!($cut, "smull", "x0", ["u0", "u1", "u2", "u3"], 1, "x1", ["w0", "w1", "w2", "w3"]),
            four_columns!($cut, "smlal", "x1", ["w0", "w1", "w2", "w3"], 2, "x0", ["u0", "u1", "u2", "u3"]),
            four_columns!($cut, "smlal", "x0", ["u0", "u1", "u2", "u3"], 3, "x1", ["w0", "w1", "w2", "w3"]),
            $cut!("w2"), products!("smlal", "p0", "p1", "w0", "x1"),
            $cut!("w3"), products!("smlal", "p2", "p3", "w1", "x1"),
            products!("smlal", "p4", "p5", "w2", "x1"), products!("smlal", "p6", "p7", "w3", "x1"),
            sadalp!("s0", "p0"), sadalp!("s1", "p1"), sadalp!("s2", "p2"), sadalp!("s3", "p3"),
            sadalp!("s4", "p4"), sadalp!("s5", "p5"), sadalp!("s6", "p6"), sadalp!("s7", "p7"),
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

#[inline(always)]
unsafe fn dot_low(sums: &mut Sums, w: &Weights, a: &Activations) {
    // SAFETY: reads sixteen bytes from `a` on and 256 from `w` on.
    unsafe { nibbles!(sums, w, a, low, vdupq_n_u8(15)) }
}

#[inline(always)]
unsafe fn dot_high(sums: &mut Sums, w: &Weights, a: &Activations) {
    // SAFETY: as above.
    unsafe { nibbles!(sums, w, a, high) }
}
