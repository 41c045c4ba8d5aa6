//! The loops of linear.s and accumulate.s against f32 arithmetic that flushes denormals, over numbers of which many are
//! denormal; vector.s against the scalar kernel. Everything else is in the tests of all kernels.

use super::*;
use crate::packed::{Kind, Layout, Packed, Scales, Shape, TILE_ROWS};
use crate::{Kernel, Pool, Quantised, Rows};
use std::ops::Range;

/// A CPU without NEON has nothing to test.
macro_rules! armv7_or_return {
    () => {
        if detect() {
            // SAFETY: it was detected.
            unsafe { Armv7::assume() }
        } else {
            return;
        }
    };
}

/// Xorshift64*, as in the tests of all kernels.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 24) as u32
    }

    fn below(&mut self, n: u32) -> u32 {
        self.bits() % n
    }

    /// Of either sign, with a biased exponent from `exponents`; 0 makes it denormal.
    fn float(&mut self, exponents: Range<u32>) -> f32 {
        let exponent = exponents.start + self.below(exponents.end - exponents.start);
        f32::from_bits(self.bits() & 0x807f_ffff | exponent << 23)
    }
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0.0f32.copysign(x)
    } else {
        x
    }
}

/// `a · b` as ARMv7 NEON has it: denormal operands are zeros, and so is what is below 2^-126 before it is rounded.
fn flushing_mul(a: f32, b: f32) -> f32 {
    flushing_fma(a, b, -0.0)
}

/// `a · b + c` likewise.
fn flushing_fma(a: f32, b: f32, c: f32) -> f32 {
    let (a, b, c) = (flush(a), flush(b), flush(c));
    // The product of two f32 is exact in f64; the sum and its error are what was to be rounded.
    let (product, addend) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + addend;
    let part = sum - product;
    let error = (product - (sum - part)) + (addend - part);
    let least = f64::from(f32::MIN_POSITIVE);
    let tiny = sum.abs() < least || (sum.abs() == least && error * sum < 0.0);
    if sum != 0.0 && tiny {
        return 0.0f32.copysign(sum as f32);
    }
    a.mul_add(b, c)
}

fn same(got: f32, want: f32) -> bool {
    got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan())
}

#[test]
fn the_model_flushes() {
    let (least, below) = (f32::MIN_POSITIVE, f32::from_bits(0x007f_ffff));
    assert_eq!(flushing_mul(below, 2.0).to_bits(), 0);
    assert_eq!(flushing_mul(-least, 0.5).to_bits(), 1 << 31);
    // Rounds up to the least normal number, but is below it before.
    let almost = 1.0 - f32::EPSILON / 2.0;
    assert_eq!((least * almost, flushing_mul(least, almost)), (least, 0.0));
    assert_eq!(flushing_fma(least, 2.0, -least), least);
    assert_eq!(flushing_fma(least, 1.5, -least), 0.0);
    assert_eq!(flushing_mul(-0.0, 1.0).to_bits(), 1 << 31);
}

/// A weight of random bytes, whose scales and minimums are of all sizes.
fn weight(random: &mut Random, kind: Kind, shape: Shape) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..shape.bytes(kind))
        .map(|_| random.bits() as u8)
        .collect();
    for block in bytes.chunks_exact_mut(kind.block_bytes()) {
        let head = &mut block[..kind.head_bytes()];
        match kind.scales() {
            Scales::F16 => head.as_chunks_mut().0.iter_mut().for_each(|scale| {
                let masks = [0x8007, 0x83ff, 0xbfff, 0xffff];
                *scale = (random.bits() as u16 & masks[random.below(4) as usize]).to_le_bytes();
            }),
            Scales::F32 => head.as_chunks_mut().0.iter_mut().for_each(|scale| {
                let end = [1, 40, 127, 255][random.below(4) as usize];
                *scale = random.float(0..end).to_le_bytes();
            }),
        }
    }
    bytes
}

/// Output `row` for `token`, by ARITHMETIC.md; `fma` and `mul` decide about denormals.
fn expected(
    w: Packed,
    a: &Quantised,
    (token, row): (usize, usize),
    mul: fn(f32, f32) -> f32,
    fma: fn(f32, f32, f32) -> f32,
) -> f32 {
    let (kind, mut acc) = (w.kind(), 0.0);
    for index in 0..w.shape().blocks() {
        let block = w.block(row / TILE_ROWS, index);
        let (q, scale, _) = a.block(token, index);
        for (group, q) in q.chunks_exact(kind.group()).enumerate() {
            let products = q.iter().enumerate().map(|(k, q)| {
                i32::from(*q) * i32::from(block.weight(row % TILE_ROWS, group * kind.group() + k))
            });
            let dot: i32 = products.sum();
            let total: i32 = q.iter().map(|q| i32::from(*q)).sum();
            acc = fma(
                dot as f32,
                mul(block.scale(row % TILE_ROWS, group), scale),
                acc,
            );
            if kind.is_affine() {
                acc = fma(
                    block.minimum(row % TILE_ROWS, group),
                    total as f32 * scale,
                    acc,
                );
            }
        }
    }
    acc
}

#[test]
fn linears_flush_denormals_and_do_nothing_else() {
    let _: Armv7 = armv7_or_return!();
    let (mut random, pool) = (Random(1), Pool::new(1));
    let kernel = Kernel::named("neon").unwrap();
    for kind in Kind::all() {
        let mut flushed = 0;
        for (m, rows, cols) in [(1, 16, 32), (2, 40, 32), (3, 33, 64), (11, 16, 96)] {
            let shape = Shape::new(rows, cols).unwrap();
            let bytes = weight(&mut random, kind, shape);
            let w = Packed::new(kind, shape, Layout::Signed, &bytes).unwrap();
            let mut x = vec![0.0; m * cols];
            for block in x.chunks_exact_mut(32) {
                let exponent = [27, 40, 120, 200][random.below(4) as usize];
                block.fill_with(|| random.float(exponent..exponent + 2));
            }
            let mut a = Quantised::new();
            kernel.quantise_rows(Rows::Plain(&x), cols, &mut a, &pool);
            let mut y = vec![f32::NAN; m * rows];
            kernel.matmul(w, &a, &mut y, &pool);
            for (at, got) in y.iter().enumerate() {
                let place = (at / rows, at % rows);
                let want = expected(w, &a, place, flushing_mul, flushing_fma);
                assert!(same(*got, want), "{kind:?} {place:?}: {got:e} for {want:e}");
                let plain = expected(w, &a, place, |a, b| a * b, f32::mul_add);
                flushed += usize::from(!same(want, plain));
            }
        }
        assert!(flushed > 0, "{kind:?}: nothing was denormal");
    }
}

fn check_accumulate<const Q: usize>(s: Armv7, random: &mut Random, bytes: bool) {
    let mut flushed = 0;
    for (count, lanes, stride) in [
        (1, 8, 8),
        (64, 8, 64),
        (5, 24, 27),
        (70, 40, 64),
        (3, 64, 64),
    ] {
        let halves: Vec<u16> = (0..count * stride).map(|_| random.bits() as u16).collect();
        let small: Vec<i8> = halves.iter().map(|half| *half as i8).collect();
        let mut floats = |n: usize| -> Vec<f32> {
            let ends = [2, 30, 127, 200];
            (0..n).map(|_| random.float(0..ends[n % 4])).collect()
        };
        let x: [Vec<f32>; Q] = std::array::from_fn(|query| {
            let n = count + query;
            floats(n)[..count].to_vec()
        });
        let before: [Vec<f32>; Q] = std::array::from_fn(|_| floats(lanes));
        let mut got = before.clone();
        let rows = if bytes {
            Elements::I8(&small)
        } else {
            Elements::F16(&halves)
        };
        s.accumulate(
            rows,
            stride,
            x.each_ref().map(|x| &**x),
            got.each_mut().map(|s| &mut **s),
        );
        for query in 0..Q {
            for lane in 0..lanes {
                let (mut want, mut plain) = (before[query][lane], before[query][lane]);
                for (row, x) in x[query].iter().enumerate() {
                    let number = match rows {
                        Elements::I8(rows) => f32::from(rows[row * stride + lane]),
                        Elements::F16(rows) => math::f16_to_f32(rows[row * stride + lane]),
                    };
                    want = flushing_fma(*x, number, want);
                    plain = x.mul_add(number, plain);
                }
                let got = got[query][lane];
                assert!(
                    same(got, want),
                    "{Q} queries, {lanes} lanes: {got:e} for {want:e}"
                );
                flushed += usize::from(!same(want, plain));
            }
        }
    }
    assert!(flushed > 0, "nothing was denormal");
}

#[test]
fn accumulation_flushes_denormals_and_does_nothing_else() {
    let s = armv7_or_return!();
    let mut random = Random(2);
    for bytes in [false, true] {
        for _ in 0..20 {
            check_accumulate::<1>(s, &mut random, bytes);
            check_accumulate::<2>(s, &mut random, bytes);
            check_accumulate::<3>(s, &mut random, bytes);
            check_accumulate::<4>(s, &mut random, bytes);
        }
    }
}

#[test]
fn exp_is_the_scalar_one_even_where_neon_flushes() {
    let s = armv7_or_return!();
    let ends = [0.0, math::EXP_LOW, math::EXP_HIGH, -1.0, f32::MIN_POSITIVE];
    let near = ends
        .iter()
        .flat_map(|end| (0..2000).map(|d| end.to_bits().wrapping_add(d) - 1000));
    let all: Vec<u32> = (0..=u32::MAX).step_by(9973).chain(near).collect();
    for bits in all.as_chunks::<16>().0 {
        let x = bits.map(f32::from_bits);
        for (x, got) in x.iter().zip(s.exp(x)) {
            let want = math::exp(*x);
            assert!(same(got, want), "exp({x:e}): {got:e} for {want:e}");
        }
    }
}

#[test]
fn conversions_are_the_scalar_ones() {
    let s = armv7_or_return!();
    for first in (0..=u16::MAX - 15).step_by(16) {
        let bits: [u16; 16] = std::array::from_fn(|lane| first + lane as u16);
        let got = s.load_f16(crate::simd::bytes(&bits));
        let want = Scalar.load_f16(crate::simd::bytes(&bits));
        assert!(
            got.iter().zip(want).all(|(got, want)| same(*got, want)),
            "{first:x}"
        );
        // As they are, halfway to the next, and to both sides of that.
        for step in [0, 0xfff, 0x1000, 0x1001] {
            let x = want.map(|x| f32::from_bits(x.to_bits() + step));
            let (mut got, mut want) = ([0; 16], [0; 16]);
            s.store_f16(x, &mut got);
            Scalar.store_f16(x, &mut want);
            let (got, want) = (got.map(math::f16_to_f32), want.map(math::f16_to_f32));
            assert!(
                got.iter().zip(want).all(|(got, want)| same(*got, want)),
                "{first:x}"
            );
        }
    }
    for first in -128..=112i8 {
        let bytes: [i8; 16] = std::array::from_fn(|lane| first.wrapping_add(lane as i8));
        let x = s.load_i8(&bytes);
        assert_eq!(x, bytes.map(f32::from));
        let mut back = [0; 16];
        let sum = s.store_i8(x, &mut back);
        assert_eq!(
            (back, sum),
            (bytes, bytes.iter().map(|x| i32::from(*x)).sum())
        );
    }
}

#[test]
fn comparisons_are_the_scalar_ones() {
    let s = armv7_or_return!();
    let mut random = Random(3);
    for _ in 0..2000 {
        // Denormals apart, which the comparison takes for zeros: ARITHMETIC.md says why none is ever lost by it.
        let mut vector = || -> F { std::array::from_fn(|_| flush(f32::from_bits(random.bits()))) };
        let (a, b) = (vector(), vector());
        let pairs = s.max(a, b).into_iter().zip(Scalar.max(a, b));
        assert!(
            pairs.into_iter().all(|(got, want)| same(got, want)),
            "{a:?} {b:?}"
        );
        assert_eq!(s.nan_to_zero(a), Scalar.nan_to_zero(a));
    }
}
