//! The x86-64 kernels.

pub(crate) mod avx2;
pub(crate) mod avx512;

#[allow(clippy::wildcard_imports, reason = "intrinsics carry their own prefix")]
use std::arch::x86_64::*;

/// `Simd::sum`.
///
/// # Safety
/// Needs AVX.
#[inline(always)]
unsafe fn sum([low, high]: [__m256; 2]) -> f32 {
    // SAFETY: the caller has it.
    unsafe {
        let x = _mm256_add_ps(low, high);
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
    }
}

/// `Simd::max_lane`.
///
/// # Safety
/// Needs AVX.
#[inline(always)]
unsafe fn max_lane([low, high]: [__m256; 2]) -> f32 {
    // SAFETY: the caller has it.
    unsafe {
        let x = _mm256_max_ps(low, high);
        let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
    }
}
