//! The operations on rows of activations, once, on top of sixteen lanes; linears are in `matmul`, attention in
//! `attention`. ARITHMETIC.md says the same in words; keep them equal. Nothing here knows a CPU: `ops` puts these
//! functions into ones with target features.

use crate::math;
use crate::quantised::Slot;
use crate::simd::Simd;

/// Blocks below this (2^-100) are zero: 127 / amax must stay finite.
const AMAX_MIN: f32 = 7.888_609e-31;

/// Rows of activations that are computed on their way into the quantisation.
#[derive(Copy, Clone)]
pub(crate) enum Row<'a> {
    Plain(&'a [f32]),
    Normed {
        x: &'a [f32],
        gamma: &'a [f32],
        eps: f32,
    },
    Gated {
        gate: &'a [f32],
        up: &'a [f32],
    },
}

/// Sixteen elements of a row from `at` on; all that are left, and zeros, if `REST`. `factor` is the norm's.
#[inline(always)]
fn elements<S: Simd, const REST: bool>(s: S, row: Row, factor: S::F, at: usize) -> S::F {
    match row {
        Row::Plain(x) => lanes::<S, REST>(s, x, at),
        Row::Normed { x, gamma, .. } => s.mul(
            s.mul(lanes::<S, REST>(s, x, at), factor),
            lanes::<S, REST>(s, gamma, at),
        ),
        Row::Gated { gate, up } => s.mul(
            silu(s, lanes::<S, REST>(s, gate, at)),
            lanes::<S, REST>(s, up, at),
        ),
    }
}

#[inline(always)]
fn lanes<S: Simd, const REST: bool>(s: S, x: &[f32], at: usize) -> S::F {
    if REST {
        s.load_part(&x[at..])
    } else {
        s.load(x[at..].first_chunk().expect("sixteen elements"))
    }
}

#[inline(always)]
fn factor<S: Simd>(s: S, row: Row) -> S::F {
    match row {
        Row::Normed { x, eps, .. } => s.splat(norm_factor(s, x, eps)),
        _ => s.splat(1.0),
    }
}

/// Evaluates a row of any width without quantising it.
#[inline(always)]
pub(crate) fn evaluate<S: Simd>(s: S, row: Row, out: &mut [f32]) {
    let factor = factor(s, row);
    let (whole, rest) = out.as_chunks_mut();
    for (index, out) in whole.iter_mut().enumerate() {
        s.store(elements::<S, false>(s, row, factor, index * 16), out);
    }
    if !rest.is_empty() {
        let x = elements::<S, true>(s, row, factor, whole.len() * 16);
        s.store_part(x, rest);
    }
}

/// Quantises a row of `blocks` · 32 elements, and what is left of it.
#[inline(always)]
pub(crate) fn quantise<S: Simd>(
    s: S,
    row: Row,
    blocks: usize,
    slot: &mut Slot,
    mut remainder: Option<&mut Slot>,
) {
    let factor = factor(s, row);
    for block in 0..blocks {
        let low = s.nan_to_zero(elements::<S, false>(s, row, factor, block * 32));
        let high = s.nan_to_zero(elements::<S, false>(s, row, factor, block * 32 + 16));
        let left = put(s, [low, high], block, slot);
        if let Some(slot) = &mut remainder {
            put(s, left, block, slot);
        }
    }
}

/// Quantises a block; what rounding took from it.
#[inline(always)]
fn put<S: Simd>(s: S, x: [S::F; 2], block: usize, slot: &mut Slot) -> [S::F; 2] {
    let amax = s.max_lane(s.max(s.abs(x[0]), s.abs(x[1])));
    let mut q = [[0; 16]; 2];
    if !(amax >= AMAX_MIN && amax.is_finite()) {
        slot.put(block, q, 0.0, [0; 2]);
        return [s.splat(0.0); 2];
    }
    let (inverse, scale) = (s.splat(127.0 / amax), amax / 127.0);
    // |x| · (127 / amax) is at most 127.00002, which rounds to 127: nothing to clamp.
    // Closures would not be compiled for the CPU.
    let rounded = [s.round(s.mul(x[0], inverse)), s.round(s.mul(x[1], inverse))];
    let halves = [
        s.store_i8(rounded[0], &mut q[0]),
        s.store_i8(rounded[1], &mut q[1]),
    ];
    slot.put(block, q, scale, halves);
    let minus = s.splat(-scale);
    [
        s.fma(rounded[0], minus, x[0]),
        s.fma(rounded[1], minus, x[1]),
    ]
}

#[inline(always)]
fn norm_factor<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let mut squares = s.splat(0.0);
    for x in x.chunks(16) {
        let x = s.load_part(x);
        squares = s.fma(x, x, squares);
    }
    1.0 / (s.sum(squares) / x.len() as f32 + eps).sqrt()
}

/// What [`Simd::exp`] is unless a CPU has its own: `math::exp` step by step.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(
        n,
        s.splat(-math::LN2_LOW),
        s.fma(n, s.splat(-math::LN2_HIGH), x),
    );
    let mut p = s.splat(math::EXP_POLYNOMIAL[0]);
    for coefficient in &math::EXP_POLYNOMIAL[1..] {
        p = s.fma(p, r, s.splat(*coefficient));
    }
    let y = s.add(s.fma(s.mul(r, r), p, r), s.splat(1.0));
    let y = s.mul(y, s.power_of_two(n));
    let y = s.greater(x, s.splat(math::EXP_HIGH), s.splat(f32::INFINITY), y);
    s.greater(s.splat(math::EXP_LOW), x, s.splat(0.0), y)
}

#[inline(always)]
fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    let minus = s.sub(s.splat(0.0), x);
    s.div(x, s.add(s.splat(1.0), s.exp(minus)))
}

/// `gate = silu(gate) * up`.
#[inline(always)]
pub(crate) fn silu_mul<S: Simd>(s: S, gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.chunks_mut(16).zip(up.chunks(16)) {
        let y = s.mul(silu(s, s.load_part(gate)), s.load_part(up));
        s.store_part(y, gate);
    }
}

/// Rotates the pairs (i, i + half) of one head.
#[inline(always)]
pub(crate) fn rope<S: Simd>(s: S, x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = x.split_at_mut(cos.len());
    let halves = low.chunks_mut(16).zip(high.chunks_mut(16));
    for ((low, high), (cos, sin)) in halves.zip(cos.chunks(16).zip(sin.chunks(16))) {
        let (a, b) = (s.load_part(low), s.load_part(high));
        let (cos, sin) = (s.load_part(cos), s.load_part(sin));
        let b_sin = s.mul(b, sin);
        s.store_part(s.fma(a, cos, s.sub(s.splat(0.0), b_sin)), low);
        s.store_part(s.fma(b, cos, s.mul(a, sin)), high);
    }
}

#[inline(always)]
pub(crate) fn to_f16<S: Simd>(s: S, x: &[f32], out: &mut [u16]) {
    for (x, out) in x.chunks(16).zip(out.chunks_mut(16)) {
        let x = s.load_part(x);
        if let Ok(out) = (&mut *out).try_into() {
            s.store_f16(x, out);
        } else {
            let mut lanes = [0; 16];
            s.store_f16(x, &mut lanes);
            out.copy_from_slice(&lanes[..out.len()]);
        }
    }
}

/// Quantises one whole vector symmetrically to bytes; the scale.
#[inline(always)]
pub(crate) fn to_i8<S: Simd>(s: S, x: &[f32], out: &mut [i8]) -> f32 {
    let mut top = s.splat(0.0);
    for x in x.chunks(16) {
        top = s.max(s.abs(s.nan_to_zero(s.load_part(x))), top);
    }
    let amax = s.max_lane(top);
    if !(amax >= AMAX_MIN && amax.is_finite()) {
        out.fill(0);
        return 0.0;
    }
    let inverse = s.splat(127.0 / amax);
    for (x, out) in x.chunks(16).zip(out.chunks_mut(16)) {
        let x = s.nan_to_zero(s.load_part(x));
        let mut lanes = [0; 16];
        s.store_i8(s.round(s.mul(x, inverse)), &mut lanes);
        out.copy_from_slice(&lanes[..out.len()]);
    }
    amax / 127.0
}
