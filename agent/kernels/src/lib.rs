//! Arithmetic on packed weights, and the threads that do it. Knows neither models nor files.
//!
//! There is one arithmetic (ARITHMETIC.md) and several kernels that compute it, each for another CPU, all with the
//! same bits. A kernel is chosen at run time: [`Kernel::chosen`].
//!
//! Read: `packed` (the weights' layout), `kernel` (the safe interface), `matmul`, `attention` and `generic`
//! (every operation, once), `simd` (what a CPU must do for that), then the CPUs: `scalar`, `x86`, `aarch64`,
//! `armv7`.

#![allow(
    clippy::inline_always,
    reason = "see simd.rs: only inlined code gets the target features"
)]
#![allow(
    clippy::needless_range_loop,
    reason = "loops over a constant number of registers: zipped iterators don't always unroll"
)]
#![cfg_attr(
    test,
    allow(clippy::float_cmp, reason = "bits are what the tests are about")
)]

mod attention;
mod generic;
mod heads;
mod kernel;
mod kind;
pub mod math;
mod matmul;
mod ops;
pub mod packed;
mod pool;
mod quantised;
mod reference;
mod scalar;
mod simd;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(all(target_arch = "arm", target_abi = "eabihf", target_os = "linux"))]
mod armv7;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use attention::{KV_BLOCK, KvBlock};
pub use heads::{Heads, Token};
pub use kernel::{ENV, Kernel, KernelError, Rows};
pub use matmul::Job;
pub use pool::Pool;
pub use quantised::Quantised;
