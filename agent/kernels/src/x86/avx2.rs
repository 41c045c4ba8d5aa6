//! AVX2 with FMA and F16C, and perhaps AVX-VNNI: a vector is two registers of eight lanes. With VNNI byte products are
//! as in `avx512`. Without, they go through `vpmaddubsw(|w|, sign(a, w))`: both factors are at most 128 and 127 in
//! magnitude, so its 16-bit sums of two do not saturate (2 · 128 · 127 < 32,768).

#![allow(clippy::wildcard_imports, reason = "intrinsics carry their own prefix")]
#![allow(
    clippy::cast_ptr_alignment,
    reason = "only unaligned loads and stores go through such pointers"
)]

use super::{max_lane, sum};
use crate::simd::{self, Activations, Simd, Weights};
use std::arch::x86_64::*;

/// Exists only on CPUs with avx2, fma and f16c; if `VNNI`, with avxvnni too.
#[derive(Copy, Clone)]
pub(crate) struct Avx2<const VNNI: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
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
        // SAFETY: `self` proves the features; what memory is touched is behind references of the right size,
        // and unaligned forms are used.
        unsafe { $($body)* }
    }};
}

type F = [__m256; 2];

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type F = F;
    type Sums = [__m256i; 2];
    const TOKENS: usize = 4;
    const VECTORS: usize = 1;
    const OFFSET: bool = VNNI;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        op!([_mm256_set1_ps(x); 2])
    }

    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> F {
        op!([
            _mm256_loadu_ps(x.as_ptr()),
            _mm256_loadu_ps(x.as_ptr().add(8))
        ])
    }

    #[inline(always)]
    fn store(self, x: F, out: &mut [f32; 16]) {
        op! {
            _mm256_storeu_ps(out.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), x[1]);
        }
    }

    #[inline(always)]
    fn load_f16(self, x: &[u8; 32]) -> F {
        op! {
            let half = x.as_ptr().cast::<__m128i>();
            [_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half.add(1)))]
        }
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> F {
        op! {
            let x = _mm_loadu_si128(x.as_ptr().cast());
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(x))),
            ]
        }
    }

    #[inline(always)]
    fn store_f16(self, x: F, out: &mut [u16; 16]) {
        op! {
            let half = out.as_mut_ptr().cast::<__m128i>();
            _mm_storeu_si128(half, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[0]));
            _mm_storeu_si128(half.add(1), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[1]));
        }
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        op!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        op!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        op!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        op!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        op!([
            _mm256_fmadd_ps(a[0], b[0], c[0]),
            _mm256_fmadd_ps(a[1], b[1], c[1])
        ])
    }

    #[inline(always)]
    fn abs(self, a: F) -> F {
        op! {
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])]
        }
    }

    #[inline(always)]
    fn round(self, a: F) -> F {
        op! {[
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a[0]),
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a[1]),
        ]}
    }

    #[inline(always)]
    fn greater(self, a: F, b: F, then: F, other: F) -> F {
        op! {[
            _mm256_blendv_ps(other[0], then[0], _mm256_cmp_ps::<_CMP_GT_OQ>(a[0], b[0])),
            _mm256_blendv_ps(other[1], then[1], _mm256_cmp_ps::<_CMP_GT_OQ>(a[1], b[1])),
        ]}
    }

    #[inline(always)]
    fn nan_to_zero(self, a: F) -> F {
        op! {[
            _mm256_and_ps(a[0], _mm256_cmp_ps::<_CMP_ORD_Q>(a[0], a[0])),
            _mm256_and_ps(a[1], _mm256_cmp_ps::<_CMP_ORD_Q>(a[1], a[1])),
        ]}
    }

    #[inline(always)]
    fn power_of_two(self, n: F) -> F {
        op! {
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_add_epi32(_mm256_cvtps_epi32(n[0]), bias);
            let high = _mm256_add_epi32(_mm256_cvtps_epi32(n[1]), bias);
            [_mm256_castsi256_ps(_mm256_slli_epi32::<23>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<23>(high))]
        }
    }

    #[inline(always)]
    fn store_i8(self, x: F, out: &mut [i8; 16]) -> i32 {
        op! {
            let (low, high) = (_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
            // Packing works within halves: 0–3, 8–11, 4–7, 12–15; the permutation puts them in order.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
            let sum = _mm256_add_epi32(low, high);
            let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
            _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<0b00_00_00_01>(sum)))
        }
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        op!([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn sum(self, x: F) -> f32 {
        op!(sum(x))
    }

    #[inline(always)]
    fn max_lane(self, x: F) -> f32 {
        op!(max_lane(x))
    }

    #[inline(always)]
    fn start<const T: usize>(self, from: [i32; T]) -> [[__m256i; 2]; T] {
        let mut sums = [op!([_mm256_setzero_si256(); 2]); T];
        for token in 0..T {
            sums[token] = op!([_mm256_set1_epi32(from[token]); 2]);
        }
        sums
    }

    #[inline(always)]
    fn dot<const T: usize, const PART: u8>(
        self,
        mut sums: [[__m256i; 2]; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [[__m256i; 2]; T] {
        for (k4, w) in w.iter().enumerate() {
            let mut w = load(self, w);
            for w in &mut w {
                *w = op! {
                    match PART {
                        simd::WHOLE => *w,
                        simd::LOW => _mm256_and_si256(*w, _mm256_set1_epi8(15)),
                        _ => _mm256_and_si256(_mm256_srli_epi16::<4>(*w), _mm256_set1_epi8(15)),
                    }
                };
            }
            let magnitude = op!([_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])]);
            for token in 0..T {
                let a = op!(four(a[token], k4));
                for half in 0..2 {
                    let sum = sums[token][half];
                    sums[token][half] = if VNNI {
                        op!(_mm256_dpbusd_avx_epi32(sum, w[half], a))
                    } else if PART == simd::WHOLE {
                        op!(add_products(
                            sum,
                            magnitude[half],
                            _mm256_sign_epi8(a, w[half])
                        ))
                    } else {
                        op!(add_products(sum, w[half], a))
                    };
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn finish<const T: usize>(self, sums: [[__m256i; 2]; T]) -> [F; T] {
        let mut out = [op!([_mm256_setzero_ps(); 2]); T];
        for token in 0..T {
            out[token] = op!([
                _mm256_cvtepi32_ps(sums[token][0]),
                _mm256_cvtepi32_ps(sums[token][1])
            ]);
        }
        out
    }
}

#[inline(always)]
fn load<const VNNI: bool>(_: Avx2<VNNI>, w: &[u8; 64]) -> [__m256i; 2] {
    op! {
        [_mm256_loadu_si256(w.as_ptr().cast()), _mm256_loadu_si256(w.as_ptr().add(32).cast())]
    }
}

/// Four activations, for every row.
#[inline(always)]
unsafe fn four(a: &Activations, k4: usize) -> __m256i {
    // SAFETY: four bytes from 4 · `k4` on lie within the sixteen; the caller has the features.
    unsafe { _mm256_set1_epi32(a.as_ptr().cast::<i32>().add(k4).read_unaligned()) }
}

/// `sums + unsigned · signed`, four bytes to a lane, by way of 16 bits.
#[inline(always)]
unsafe fn add_products(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    // SAFETY: the caller has the features.
    unsafe {
        let pairs = _mm256_maddubs_epi16(unsigned, signed);
        _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}
