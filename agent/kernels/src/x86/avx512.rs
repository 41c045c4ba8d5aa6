//! AVX-512 with VNNI: a vector is one register, and one `vpdpbusd` multiplies 64 weights. It takes unsigned times
//! signed bytes, so weights are stored with 128 added and the sums start at −128 · Σa.

#![allow(clippy::wildcard_imports, reason = "intrinsics carry their own prefix")]
#![allow(
    clippy::cast_ptr_alignment,
    reason = "only unaligned loads and stores go through such pointers"
)]

use super::{max_lane, sum};
use crate::simd::{self, Activations, Simd, Weights};
use std::arch::{asm, x86_64::*};

/// Exists only on CPUs with avx512f, avx512bw, avx512vl and avx512vnni.
#[derive(Copy, Clone)]
pub(crate) struct Avx512(());

impl Avx512 {
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

impl Simd for Avx512 {
    type F = __m512;
    type Sums = __m512i;
    const TOKENS: usize = 8;
    const TILES: usize = 3;
    const VECTORS: usize = 4;
    const OFFSET: bool = true;

    #[inline(always)]
    fn prefetch(self, bytes: &[u8]) {
        for line in bytes.chunks(64) {
            op!(_mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()));
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> __m512 {
        op!(_mm512_loadu_ps(x.as_ptr()))
    }

    #[inline(always)]
    fn store(self, x: __m512, out: &mut [f32; 16]) {
        op!(_mm512_storeu_ps(out.as_mut_ptr(), x));
    }

    #[inline(always)]
    fn load_f16(self, x: &[u8; 32]) -> __m512 {
        op!(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())))
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> __m512 {
        op!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(
            x.as_ptr().cast()
        ))))
    }

    #[inline(always)]
    fn store_f16(self, x: __m512, out: &mut [u16; 16]) {
        op!(_mm256_storeu_si256(
            out.as_mut_ptr().cast(),
            _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)
        ));
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        op!(_mm512_abs_ps(a))
    }

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<
            { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
        >(a))
    }

    #[inline(always)]
    fn greater(self, a: __m512, b: __m512, then: __m512, other: __m512) -> __m512 {
        op!(_mm512_mask_blend_ps(
            _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b),
            other,
            then
        ))
    }

    #[inline(always)]
    fn nan_to_zero(self, a: __m512) -> __m512 {
        op!(_mm512_maskz_mov_ps(
            _mm512_cmp_ps_mask::<_CMP_ORD_Q>(a, a),
            a
        ))
    }

    #[inline(always)]
    fn power_of_two(self, n: __m512) -> __m512 {
        op! {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }

    #[inline(always)]
    fn store_i8(self, x: __m512, out: &mut [i8; 16]) -> i32 {
        op! {
            let x = _mm512_cvtps_epi32(x);
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(x));
            _mm512_reduce_add_epi32(x)
        }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn sum(self, x: __m512) -> f32 {
        op!(sum(halves(x)))
    }

    #[inline(always)]
    fn max_lane(self, x: __m512) -> f32 {
        op!(max_lane(halves(x)))
    }

    #[inline(always)]
    fn start<const T: usize>(self, from: [i32; T]) -> [__m512i; T] {
        let mut sums = [op!(_mm512_setzero_si512()); T];
        for token in 0..T {
            sums[token] = op!(_mm512_set1_epi32(from[token]));
        }
        sums
    }

    #[inline(always)]
    fn dot<const T: usize, const PART: u8>(
        self,
        sums: [__m512i; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [__m512i; T] {
        let [sums] = self.dots::<T, 1, PART>([sums], [w], a);
        sums
    }

    #[inline(always)]
    fn dots<const T: usize, const R: usize, const PART: u8>(
        self,
        mut sums: [[__m512i; T]; R],
        w: [&Weights; R],
        a: [&Activations; T],
    ) -> [[__m512i; T]; R] {
        for k4 in 0..4 {
            let mut x = [op!(_mm512_setzero_si512()); R];
            for tile in 0..R {
                x[tile] = op! {
                    let w = _mm512_loadu_si512(w[tile][k4].as_ptr().cast());
                    match PART {
                        simd::WHOLE => w,
                        simd::LOW => _mm512_and_si512(w, _mm512_set1_epi8(15)),
                        _ => _mm512_and_si512(_mm512_srli_epi16::<4>(w), _mm512_set1_epi8(15)),
                    }
                };
            }
            if T == 4 && R == 3 {
                // SAFETY: these are the sizes of the arrays, and the CPU has the features.
                unsafe {
                    let sums = &mut *(&raw mut sums).cast();
                    let a = &*(&raw const a).cast();
                    let x = &*(&raw const x).cast();
                    three_by_four(sums, x, a, k4);
                }
                continue;
            }
            for token in 0..T {
                let a = op!(four(a[token], k4));
                for tile in 0..R {
                    sums[tile][token] = op!(_mm512_dpbusd_epi32(sums[tile][token], x[tile], a));
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn finish<const T: usize>(self, sums: [__m512i; T]) -> [__m512; T] {
        let mut out = [op!(_mm512_setzero_ps()); T];
        for token in 0..T {
            out[token] = op!(_mm512_cvtepi32_ps(sums[token]));
        }
        out
    }
}

/// Four activations, for every row.
#[inline(always)]
unsafe fn four(a: &Activations, k4: usize) -> __m512i {
    // SAFETY: four bytes from 4 · `k4` on lie within the sixteen; the caller has the features.
    unsafe { _mm512_set1_epi32(a.as_ptr().cast::<i32>().add(k4).read_unaligned()) }
}

/// Three tiles times four tokens. In assembly for its order alone: the compiler gathers the loads, runs out of
/// registers and lines up products that wait for each other.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
#[allow(
    unused_assignments,
    unused_variables,
    reason = "two registers are only for the assembly"
)]
unsafe fn three_by_four(
    sums: &mut [[__m512i; 4]; 3],
    x: &[__m512i; 3],
    a: &[&Activations; 4],
    k4: usize,
) {
    let [
        [s00, s01, s02, s03],
        [s10, s11, s12, s13],
        [s20, s21, s22, s23],
    ] = sums;
    // Without a type, the assembler would be given names of byte registers.
    let (mut even, mut odd): (__m512i, __m512i);
    // SAFETY: four bytes from 4 · `k4` on lie within each token's sixteen; the caller has the features.
    unsafe {
        asm!(
            "vpbroadcastd {even}, [{a0}]",
            "vpdpbusd {s00}, {x0}, {even}",
            "vpdpbusd {s10}, {x1}, {even}",
            "vpdpbusd {s20}, {x2}, {even}",
            "vpbroadcastd {odd}, [{a1}]",
            "vpdpbusd {s01}, {x0}, {odd}",
            "vpdpbusd {s11}, {x1}, {odd}",
            "vpdpbusd {s21}, {x2}, {odd}",
            "vpbroadcastd {even}, [{a2}]",
            "vpdpbusd {s02}, {x0}, {even}",
            "vpdpbusd {s12}, {x1}, {even}",
            "vpdpbusd {s22}, {x2}, {even}",
            "vpbroadcastd {odd}, [{a3}]",
            "vpdpbusd {s03}, {x0}, {odd}",
            "vpdpbusd {s13}, {x1}, {odd}",
            "vpdpbusd {s23}, {x2}, {odd}",
            even = out(zmm_reg) even, odd = out(zmm_reg) odd,
            x0 = in(zmm_reg) x[0], x1 = in(zmm_reg) x[1], x2 = in(zmm_reg) x[2],
            s00 = inout(zmm_reg) *s00, s01 = inout(zmm_reg) *s01,
            s02 = inout(zmm_reg) *s02, s03 = inout(zmm_reg) *s03,
            s10 = inout(zmm_reg) *s10, s11 = inout(zmm_reg) *s11,
            s12 = inout(zmm_reg) *s12, s13 = inout(zmm_reg) *s13,
            s20 = inout(zmm_reg) *s20, s21 = inout(zmm_reg) *s21,
            s22 = inout(zmm_reg) *s22, s23 = inout(zmm_reg) *s23,
            a0 = in(reg) a[0].as_ptr().add(4 * k4), a1 = in(reg) a[1].as_ptr().add(4 * k4),
            a2 = in(reg) a[2].as_ptr().add(4 * k4), a3 = in(reg) a[3].as_ptr().add(4 * k4),
            options(nostack, readonly, preserves_flags),
        );
    }
}

#[inline(always)]
unsafe fn halves(x: __m512) -> [__m256; 2] {
    // SAFETY: the caller has the features.
    unsafe {
        let high = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x));
        [_mm512_castps512_ps256(x), _mm256_castpd_ps(high)]
    }
}
