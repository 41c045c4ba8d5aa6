//! Sixteen lanes: what a CPU must be able to do. Everything in `generic` is written once on top of this, so a kernel
//! is equal to the scalar one as soon as each of these operations is.
//!
//! A value that implements [`Simd`] is a token: it exists only where the CPU has what its methods use, which is
//! why the methods are safe. All of them are `#[inline(always)]` and take no closures, since only code that ends
//! up inside a function with the right target features compiles to the instructions meant.

use crate::{generic, math};

/// Weight bytes of half a block of one tile (16 columns), `[k4: 4][row: 16][4]`; of a whole block with 4 bits.
pub(crate) type Weights = [[u8; 64]; 4];
/// One token's quantised half block.
pub(crate) type Activations = [i8; 16];

/// Which bits of a byte are a weight.
pub(crate) const WHOLE: u8 = 0;
pub(crate) const LOW: u8 = 1;
pub(crate) const HIGH: u8 = 2;

/// Numbers of the cache, of either kind.
#[derive(Copy, Clone)]
#[allow(dead_code, reason = "only armv7 looks inside")]
pub(crate) enum Elements<'a> {
    F16(&'a [u16]),
    I8(&'a [i8]),
}

pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type F: Copy;
    /// The running sums of one token's products with sixteen rows, exact, in whatever form suits the CPU.
    type Sums: Copy;
    /// Tokens that the registers hold at once beside a tile; 1, 4 or 8.
    const TOKENS: usize;
    /// Tiles that the registers hold at once beside four tokens, if sharing loads is worth it; 1 or 3.
    const TILES: usize = 1;
    /// Vectors that the registers hold at once for each of four queries; 1, 2 or 4.
    const VECTORS: usize;
    /// Whether sums of 8-bit weights start at −128 times the activations' sum.
    const OFFSET: bool;
    /// Whether [`accumulate`](Self::accumulate) is there, for CPUs on which Rust can't keep vectors in registers.
    const ACCUMULATES: bool = false;

    /// Asks for memory that will be read soon, where the CPU has to be told.
    #[inline(always)]
    fn prefetch(self, _bytes: &[u8]) {}

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; 16]) -> Self::F;
    fn store(self, x: Self::F, out: &mut [f32; 16]);
    /// Sixteen f16, little endian.
    fn load_f16(self, x: &[u8; 32]) -> Self::F;
    fn load_i8(self, x: &[i8; 16]) -> Self::F;
    /// Rounds to nearest, ties to even.
    fn store_f16(self, x: Self::F, out: &mut [u16; 16]);

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    /// To whole numbers, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// `then` where `a > b`, else (so with a NaN too) `other`.
    fn greater(self, a: Self::F, b: Self::F, then: Self::F, other: Self::F) -> Self::F;
    /// Zero where `a` is NaN.
    fn nan_to_zero(self, a: Self::F) -> Self::F;
    /// 2 to the `n`, for whole `n` from −126 to 127.
    fn power_of_two(self, n: Self::F) -> Self::F;
    /// Whole numbers within ±127 to bytes; their sum.
    fn store_i8(self, x: Self::F, out: &mut [i8; 16]) -> i32;

    /// Sums that start at `from`, the same for all rows.
    fn start<const T: usize>(self, from: [i32; T]) -> [Self::Sums; T];
    /// Adds the products of a tile with `T` tokens. `PART` is [`WHOLE`] for 8-bit weights, [`LOW`] or [`HIGH`] for the
    /// halves of bytes; within a group the low ones come first. Where 8-bit weights are stored with 128 added, the
    /// sums have started at −128 times the sum of the activations.
    fn dot<const T: usize, const PART: u8>(
        self,
        sums: [Self::Sums; T],
        w: &Weights,
        a: [&Activations; T],
    ) -> [Self::Sums; T];
    /// The same for several tiles, which may share the loads of activations.
    #[inline(always)]
    fn dots<const T: usize, const R: usize, const PART: u8>(
        self,
        mut sums: [[Self::Sums; T]; R],
        w: [&Weights; R],
        a: [&Activations; T],
    ) -> [[Self::Sums; T]; R] {
        for tile in 0..R {
            sums[tile] = self.dot::<T, PART>(sums[tile], w[tile], a);
        }
        sums
    }
    fn finish<const T: usize>(self, sums: [Self::Sums; T]) -> [Self::F; T];

    /// The larger of each lane; `b` if either is NaN.
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        self.greater(a, b, a, b)
    }

    /// exp of every lane.
    #[inline(always)]
    fn exp(self, x: Self::F) -> Self::F {
        generic::exp(self, x)
    }

    /// The same for one number.
    #[inline(always)]
    fn exp_one(self, x: f32) -> f32 {
        math::exp(x)
    }

    /// `a * b + c`, rounded once, for one number.
    #[inline(always)]
    fn fma_one(self, a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    /// `sums[query][lane] = fma(x[query][i], rows[i * stride + lane], sums[query][lane])`, i ascending, for a multiple
    /// of eight lanes.
    fn accumulate<const Q: usize>(
        self,
        _rows: Elements,
        _stride: usize,
        _x: [&[f32]; Q],
        _sums: [&mut [f32]; Q],
    ) {
        unreachable!("only where ACCUMULATES says so");
    }

    /// The sum of the lanes, in the one order there is: each with the one 8 further, then 4, 2, 1.
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        let mut lanes = [0.0; 16];
        self.store(x, &mut lanes);
        fold(lanes, |a, b| a + b)
    }

    /// The largest lane, where none is NaN; which zero it is, if it is one, is not promised.
    #[inline(always)]
    fn max_lane(self, x: Self::F) -> f32 {
        let mut lanes = [0.0; 16];
        self.store(x, &mut lanes);
        fold(lanes, |a, b| if a > b { a } else { b })
    }

    /// Up to sixteen numbers, zeros behind them.
    #[inline(always)]
    fn load_part(self, x: &[f32]) -> Self::F {
        if let Ok(x) = x.try_into() {
            return self.load(x);
        }
        let mut lanes = [0.0; 16];
        lanes[..x.len()].copy_from_slice(x);
        self.load(&lanes)
    }

    /// As many lanes as `out` has places, sixteen at most.
    #[inline(always)]
    fn store_part(self, x: Self::F, out: &mut [f32]) {
        if let Ok(out) = out.try_into() {
            return self.store(x, out);
        }
        let mut lanes = [0.0; 16];
        self.store(x, &mut lanes);
        out.copy_from_slice(&lanes[..out.len()]);
    }
}

#[inline(always)]
fn fold(mut lanes: [f32; 16], with: impl Fn(f32, f32) -> f32) -> f32 {
    for step in [8, 4, 2, 1] {
        for lane in 0..step {
            lanes[lane] = with(lanes[lane], lanes[lane + step]);
        }
    }
    lanes[0]
}

/// The same sixteen numbers as bytes in memory.
#[inline(always)]
pub(crate) fn bytes(x: &[u16; 16]) -> &[u8; 32] {
    // SAFETY: same size, weaker alignment, and every byte pattern is valid.
    unsafe { &*std::ptr::from_ref(x).cast() }
}

/// Sixteen f32 that lie unaligned in memory.
#[inline(always)]
pub(crate) fn floats(x: &[u8; 64]) -> [f32; 16] {
    // SAFETY: same size, and every byte pattern is valid.
    unsafe { std::mem::transmute(*x) }
}

#[cfg(target_endian = "big")]
compile_error!("packed weights and the cache are read as little endian");
