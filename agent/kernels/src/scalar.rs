//! The kernel that defines the others: plain Rust, one lane after the other.

use crate::math;
use crate::simd::{self, Activations, Simd, Weights};

/// Needs nothing, so it always exists.
#[derive(Copy, Clone)]
pub(crate) struct Scalar;

type F = [f32; 16];

#[inline(always)]
fn map(a: F, f: impl Fn(f32) -> f32) -> F {
    a.map(f)
}

#[inline(always)]
fn zip(a: F, b: F, f: impl Fn(f32, f32) -> f32) -> F {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

impl Simd for Scalar {
    type F = F;
    type Sums = [i32; 16];
    const TOKENS: usize = 4;
    const VECTORS: usize = 1;
    const OFFSET: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; 16]
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
        std::array::from_fn(|lane| {
            math::f16_to_f32(u16::from_le_bytes([x[2 * lane], x[2 * lane + 1]]))
        })
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> F {
        x.map(f32::from)
    }

    #[inline(always)]
    fn store_f16(self, x: F, out: &mut [u16; 16]) {
        *out = x.map(math::f32_to_f16);
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }

    #[inline(always)]
    fn abs(self, a: F) -> F {
        map(a, f32::abs)
    }

    #[inline(always)]
    fn round(self, a: F) -> F {
        map(a, f32::round_ties_even)
    }

    #[inline(always)]
    fn greater(self, a: F, b: F, then: F, other: F) -> F {
        std::array::from_fn(|lane| {
            if a[lane] > b[lane] {
                then[lane]
            } else {
                other[lane]
            }
        })
    }

    #[inline(always)]
    fn nan_to_zero(self, a: F) -> F {
        map(a, |a| if a.is_nan() { 0.0 } else { a })
    }

    #[inline(always)]
    fn power_of_two(self, n: F) -> F {
        map(n, math::power_of_two)
    }

    #[inline(always)]
    fn store_i8(self, x: F, out: &mut [i8; 16]) -> i32 {
        *out = x.map(|x| x as i8);
        out.iter().map(|x| i32::from(*x)).sum()
    }

    #[inline(always)]
    fn start<const T: usize>(self, from: [i32; T]) -> [[i32; 16]; T] {
        from.map(|from| [from; 16])
    }

    #[inline(always)]
    fn dot<const T: usize, const PART: u8>(
        self,
        mut sums: [[i32; 16]; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [[i32; 16]; T] {
        let weight = |byte: u8| match PART {
            simd::WHOLE => i32::from(byte.cast_signed()),
            simd::LOW => i32::from(byte & 15),
            _ => i32::from(byte >> 4),
        };
        for (sums, a) in sums.iter_mut().zip(a) {
            for (w, a) in w.iter().zip(a.as_chunks::<4>().0) {
                for (w, sum) in w.as_chunks::<4>().0.iter().zip(sums.iter_mut()) {
                    for (w, a) in w.iter().zip(a) {
                        *sum += weight(*w) * i32::from(*a);
                    }
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn finish<const T: usize>(self, sums: [[i32; 16]; T]) -> [F; T] {
        sums.map(|sums| sums.map(|sum| sum as f32))
    }
}
