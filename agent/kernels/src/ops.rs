//! The table of kernels: each is `generic`, `matmul` and `attention` compiled for one set of CPU features.

use crate::attention::{self, Blocks, Query};
use crate::generic::{self, Row};
use crate::matmul::{self, Output};
use crate::packed::{Layout, Packed};
use crate::quantised::{Quantised, Slot};
use std::ops::Range;

/// One kernel. The functions may only be called if `detect` says so.
pub(crate) struct Ops {
    pub(crate) name: &'static str,
    pub(crate) layout: Layout,
    pub(crate) needs: &'static str,
    pub(crate) detect: fn() -> bool,
    pub(crate) quantise: unsafe fn(Row, usize, &mut Slot, Option<&mut Slot>),
    pub(crate) evaluate: unsafe fn(Row, &mut [f32]),
    pub(crate) tiles: unsafe fn(Packed, Range<usize>, &Quantised, &Output),
    pub(crate) silu_mul: unsafe fn(&mut [f32], &[f32]),
    pub(crate) rope: unsafe fn(&mut [f32], &[f32], &[f32]),
    pub(crate) to_f16: unsafe fn(&[f32], &mut [u16]),
    pub(crate) to_i8: unsafe fn(&[f32], &mut [i8]) -> f32,
    pub(crate) attend: unsafe fn(&mut [Query], &Blocks, f32),
}

/// Compiles every function of `generic`, `matmul` and `attention` for `$simd` with the given features.
macro_rules! kernel {
    ($module:ident, $name:literal, $layout:expr, $simd:expr, [$($feature:literal),*], $detect:expr) => {
        mod $module {
            use super::*;

            $(#[target_feature(enable = $feature)])*
            unsafe fn quantise(row: Row, width: usize, slot: &mut Slot, rest: Option<&mut Slot>) {
                generic::quantise($simd, row, width / 32, slot, rest);
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn evaluate(row: Row, out: &mut [f32]) {
                generic::evaluate($simd, row, out);
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn tiles(w: Packed, tiles: Range<usize>, a: &Quantised, out: &Output) {
                matmul::tiles($simd, w, tiles, a, out);
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn silu_mul(gate: &mut [f32], up: &[f32]) {
                generic::silu_mul($simd, gate, up);
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
                generic::rope($simd, x, cos, sin);
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn to_f16(x: &[f32], out: &mut [u16]) {
                generic::to_f16($simd, x, out);
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn to_i8(x: &[f32], out: &mut [i8]) -> f32 {
                generic::to_i8($simd, x, out)
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn attend(queries: &mut [Query], blocks: &Blocks, scale: f32) {
                attention::attend($simd, queries, blocks, scale);
            }

            pub(super) const OPS: Ops = Ops {
                name: $name,
                layout: $layout,
                needs: concat!("a CPU with" $(, " ", $feature)*),
                detect: || $detect,
                quantise,
                evaluate,
                tiles,
                silu_mul,
                rope,
                to_f16,
                to_i8,
                attend,
            };
        }
    };
}

kernel!(
    scalar,
    "scalar",
    Layout::Signed,
    crate::scalar::Scalar,
    [],
    true
);

#[cfg(target_arch = "x86_64")]
kernel!(
    avx2,
    "avx2",
    Layout::Signed,
    // SAFETY: evaluated only inside functions that are unsafe for needing these features.
    unsafe { crate::x86::avx2::Avx2::<false>::assume() },
    ["avx2", "fma", "f16c"],
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
);

#[cfg(target_arch = "x86_64")]
kernel!(
    avxvnni,
    "avxvnni",
    Layout::Offset,
    // SAFETY: evaluated only inside functions that are unsafe for needing these features.
    unsafe { crate::x86::avx2::Avx2::<true>::assume() },
    ["avx2", "fma", "f16c", "avxvnni"],
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("avxvnni")
);

#[cfg(target_arch = "x86_64")]
kernel!(
    avx512vnni,
    "avx512vnni",
    Layout::Offset,
    // SAFETY: evaluated only inside functions that are unsafe for needing these features.
    unsafe { crate::x86::avx512::Avx512::assume() },
    ["avx512f", "avx512bw", "avx512vl", "avx512vnni"],
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
);

#[cfg(target_arch = "aarch64")]
kernel!(
    neon,
    "neon",
    Layout::Signed,
    // SAFETY: evaluated only inside functions that are unsafe for needing these features.
    unsafe { crate::aarch64::Neon::<crate::aarch64::smull::Smull>::assume() },
    ["neon"],
    std::arch::is_aarch64_feature_detected!("neon")
);

#[cfg(target_arch = "aarch64")]
kernel!(
    dotprod,
    "dotprod",
    Layout::Signed,
    // SAFETY: evaluated only inside functions that are unsafe for needing these features.
    unsafe { crate::aarch64::Neon::<crate::aarch64::sdot::Sdot>::assume() },
    ["neon", "dotprod"],
    std::arch::is_aarch64_feature_detected!("dotprod")
);

#[cfg(all(target_arch = "arm", target_abi = "eabihf", target_os = "linux"))]
kernel!(
    armv7,
    "neon",
    Layout::Signed,
    // SAFETY: evaluated only inside functions that may only be called if `detect` says so.
    unsafe { crate::armv7::Armv7::assume() },
    [],
    crate::armv7::detect()
);

#[cfg(target_arch = "aarch64")]
kernel!(
    i8mm,
    "i8mm",
    Layout::Signed,
    // SAFETY: evaluated only inside functions that are unsafe for needing these features.
    unsafe { crate::aarch64::Neon::<crate::aarch64::smmla::Smmla>::assume() },
    ["neon", "dotprod", "i8mm"],
    std::arch::is_aarch64_feature_detected!("dotprod")
        && std::arch::is_aarch64_feature_detected!("i8mm")
);

/// The kernels of this build, slowest first.
#[cfg(target_arch = "x86_64")]
pub(crate) static ALL: &[Ops] = &[scalar::OPS, avx2::OPS, avxvnni::OPS, avx512vnni::OPS];
#[cfg(target_arch = "aarch64")]
pub(crate) static ALL: &[Ops] = &[scalar::OPS, neon::OPS, dotprod::OPS, i8mm::OPS];
#[cfg(all(target_arch = "arm", target_abi = "eabihf", target_os = "linux"))]
pub(crate) static ALL: &[Ops] = &[
    scalar::OPS,
    Ops {
        needs: "a CPU with NEON and VFPv4",
        tiles: crate::armv7::tiles,
        ..armv7::OPS
    },
];
#[cfg(not(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    all(target_arch = "arm", target_abi = "eabihf", target_os = "linux")
)))]
pub(crate) static ALL: &[Ops] = &[scalar::OPS];

/// Names of kernels that another architecture may have, and what they need.
pub(crate) const FOREIGN: &[(&str, &str)] = &[
    ("avx2", "an x86-64 CPU with AVX2"),
    ("avxvnni", "an x86-64 CPU with AVX-VNNI"),
    ("avx512vnni", "an x86-64 CPU with AVX512-VNNI"),
    (
        "neon",
        "an ARM CPU, of 32 bits one with NEON and VFPv4 and Linux",
    ),
    ("dotprod", "a 64-bit ARM CPU with dotprod"),
    ("i8mm", "a 64-bit ARM CPU with dotprod and i8mm"),
];
