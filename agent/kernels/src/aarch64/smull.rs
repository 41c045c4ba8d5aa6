//! Byte products without dotprod: SMULL, SMLAL, SADALP, in an order that suits in-order cores (A53) as well as others.
//!
//! A register of products holds two rows, eight 16-bit numbers, and there are eight chains of them, so that each
//! instruction finds its operands ready (latency 6 at most, distance 8). Loads come in bursts ahead of arithmetic: of the
//! orders tried, none is faster by LLVM's models of A53, A55, A72 and N1. Two products of 8-bit weights with ±127 fit
//! 16 bits (2 · 128 · 127 < 32,768), so those become 32 bits wide after every second one. Of 4-bit ones sixteen fit
//! (16 · 15 · 127 = 30,480), half of what a group has at most: those become so at the end alone.
//! Left to the compiler, all products are begun first and half of them spilled.

use super::{I, Products};
use crate::simd::{self, Activations, Weights};
use std::arch::aarch64::*;
use std::arch::asm;

/// Needs nothing but neon.
#[derive(Copy, Clone)]
pub(crate) struct Smull;

/// The sums of one group, of 32 columns at most. Which one it is is known when code is generated.
#[derive(Copy, Clone)]
pub(crate) enum Sums {
    Zero,
    /// Of 8-bit weights. Per four rows, two numbers of rows 0 and 1 each, then of 2 and 3.
    Wide([[int32x4_t; 2]; 4]),
    /// Of 4-bit weights. Per four rows, four numbers of rows 0 and 1 each, then of 2 and 3.
    Narrow([[int16x8_t; 2]; 4]),
}

impl Products for Smull {
    type Sums = Sums;
    // Multiplying is the limit, so loading weights once for several tokens gains nothing.
    const TOKENS: usize = 1;

    #[inline(always)]
    unsafe fn start<const T: usize>() -> [Sums; T] {
        [Sums::Zero; T]
    }

    #[inline(always)]
    unsafe fn dot<const T: usize, const PART: u8>(
        mut sums: [Sums; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [Sums; T] {
        for token in 0..T {
            // SAFETY: the caller has neon.
            sums[token] = unsafe {
                match PART {
                    simd::WHOLE => dot(sums[token], w, a[token]),
                    simd::LOW => dot_nibbles::<false>(sums[token], w, a[token]),
                    _ => dot_nibbles::<true>(sums[token], w, a[token]),
                }
            };
        }
        sums
    }

    #[inline(always)]
    unsafe fn finish<const T: usize>(sums: [Sums; T]) -> [I; T] {
        // SAFETY: the caller has neon.
        sums.map(|sums| unsafe {
            match sums {
                Sums::Zero => [vdupq_n_s32(0); 4],
                Sums::Wide(sums) => sums.map(|[low, high]| vpaddq_s32(low, high)),
                Sums::Narrow(sums) => sums.map(|[low, high]| vpaddlq_s16(vpaddq_s16(low, high))),
            }
        })
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

/// Adds neighbouring products, with SADDLP as the first ones, with SADALP to those before.
#[rustfmt::skip]
macro_rules! add {
    ($add:literal) => {
        concat!(
            $add, " {s0:v}.4s, {p0:v}.8h\n", $add, " {s1:v}.4s, {p1:v}.8h\n",
            $add, " {s2:v}.4s, {p2:v}.8h\n", $add, " {s3:v}.4s, {p3:v}.8h\n",
            $add, " {s4:v}.4s, {p4:v}.8h\n", $add, " {s5:v}.4s, {p5:v}.8h\n",
            $add, " {s6:v}.4s, {p6:v}.8h\n", $add, " {s7:v}.4s, {p7:v}.8h\n",
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

/// `asm!` with weights, activations and the registers for them.
#[rustfmt::skip]
macro_rules! multiply {
    ($w:expr, $a:expr, [$($text:expr),*], $($operands:tt)*) => {
        asm!(
            $($text,)*
            $($operands)*
            w = in(reg) $w.as_ptr(), a = inout(reg) $a.as_ptr() => _,
            u0 = out(vreg) _, u1 = out(vreg) _, u2 = out(vreg) _, u3 = out(vreg) _,
            w0 = out(vreg) _, w1 = out(vreg) _, w2 = out(vreg) _, w3 = out(vreg) _,
            x0 = out(vreg) _, x1 = out(vreg) _,
            options(pure, readonly, nostack, preserves_flags)
        )
    };
}

/// Sixteen columns of sixteen rows of 8-bit weights, into `$sums` by `$first`.
#[rustfmt::skip]
macro_rules! bytes {
    ($w:expr, $a:expr, $first:literal, $direction:ident, $sums:expr) => {{
        let [[s0, s1], [s2, s3], [s4, s5], [s6, s7]] = &mut $sums;
        multiply!($w, $a, [
            eight_columns!(whole, "smull", 0, 1), add!($first), eight_columns!(whole, "smull", 2, 3), add!("sadalp")],
            s0 = $direction(vreg) *s0, s1 = $direction(vreg) *s1, s2 = $direction(vreg) *s2, s3 = $direction(vreg) *s3,
            s4 = $direction(vreg) *s4, s5 = $direction(vreg) *s5, s6 = $direction(vreg) *s6, s7 = $direction(vreg) *s7,
            p0 = out(vreg) _, p1 = out(vreg) _, p2 = out(vreg) _, p3 = out(vreg) _,
            p4 = out(vreg) _, p5 = out(vreg) _, p6 = out(vreg) _, p7 = out(vreg) _,
        );
    }};
}

/// Sixteen columns of sixteen rows of what `$cut` leaves of bytes, into `$products` by `$first`.
#[rustfmt::skip]
macro_rules! nibbles {
    ($w:expr, $a:expr, $cut:ident, $first:literal, $direction:ident, $products:expr $(, $mask:expr)?) => {{
        let [[p0, p1], [p2, p3], [p4, p5], [p6, p7]] = &mut $products;
        multiply!($w, $a, [eight_columns!($cut, $first, 0, 1), eight_columns!($cut, "smlal", 2, 3)],
            $(mask = in(vreg) $mask,)?
            p0 = $direction(vreg) *p0, p1 = $direction(vreg) *p1, p2 = $direction(vreg) *p2, p3 = $direction(vreg) *p3,
            p4 = $direction(vreg) *p4, p5 = $direction(vreg) *p5, p6 = $direction(vreg) *p6, p7 = $direction(vreg) *p7,
        );
    }};
}

/// # Safety
/// Needs neon.
#[inline(always)]
unsafe fn dot(sums: Sums, w: &Weights, a: &Activations) -> Sums {
    // SAFETY: reads sixteen bytes from `a` on and 256 from `w` on.
    unsafe {
        match sums {
            Sums::Zero => {
                let mut sums = [[vdupq_n_s32(0); 2]; 4];
                bytes!(w, a, "saddlp", out, sums);
                Sums::Wide(sums)
            }
            Sums::Wide(mut sums) => {
                bytes!(w, a, "sadalp", inout, sums);
                Sums::Wide(sums)
            }
            Sums::Narrow(_) => unreachable!("a group has weights of one kind"),
        }
    }
}

/// # Safety
/// Needs neon.
#[inline(always)]
unsafe fn dot_nibbles<const HIGH: bool>(sums: Sums, w: &Weights, a: &Activations) -> Sums {
    // SAFETY: as above.
    unsafe {
        let mask = vdupq_n_u8(15);
        match (sums, HIGH) {
            (Sums::Zero, _) => {
                let mut sums = [[vdupq_n_s16(0); 2]; 4];
                if HIGH {
                    nibbles!(w, a, high, "smull", out, sums);
                } else {
                    nibbles!(w, a, low, "smull", out, sums, mask);
                }
                Sums::Narrow(sums)
            }
            (Sums::Narrow(mut sums), true) => {
                nibbles!(w, a, high, "smlal", inout, sums);
                Sums::Narrow(sums)
            }
            _ => unreachable!("a group has weights of one kind, the low halves first"),
        }
    }
}
