//! Every operation, once, on top of sixteen lanes. ARITHMETIC.md says the same in words; keep them equal.
//! Nothing here knows a CPU: `entry` puts these functions into ones with target features.

use crate::math;
use crate::packed::{BLOCK_BYTES, SCALE_BYTES};
use crate::simd::Simd;

/// Positions in a KV block, and keys in a tile of the softmax.
pub const KV_BLOCK: usize = 64;
/// Largest head that [`attend`] has room for.
pub const HEAD_MAX: usize = 256;
/// Tokens that lie together in a `Quantised`.
pub(crate) const GROUP: usize = 8;
/// Blocks below this (2^-100) are zero: 127 / amax must stay finite.
const AMAX_MIN: f32 = 7.888_609e-31;

/// One KV block of one head: keys and values, both `[64, head]` f16.
pub(crate) type Blocks<'f, 'kv> = dyn Fn(usize) -> (&'kv [u16], &'kv [u16]) + 'f;

/// Activations of a group of tokens, all `[blocks]`.
#[derive(Copy, Clone)]
pub(crate) struct GroupView<'a> {
    pub(crate) q: &'a [[[i8; 32]; GROUP]],
    pub(crate) scale: &'a [[f32; GROUP]],
    pub(crate) offset: &'a [[i32; GROUP]],
}

/// Where one token's quantised blocks go.
pub(crate) trait Sink {
    fn put(&mut self, block: usize) -> (&mut [i8; 32], &mut f32, &mut i32);
}

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

/// Sixteen elements of a row from `at` on. `factor` is the norm's.
#[inline(always)]
fn element<S: Simd>(s: S, row: Row, factor: S::F, at: usize) -> S::F {
    match row {
        Row::Plain(x) => s.load_part(part(x, at)),
        Row::Normed { x, gamma, .. } => s.mul(
            s.mul(s.load_part(part(x, at)), factor),
            s.load_part(part(gamma, at)),
        ),
        Row::Gated { gate, up } => s.mul(
            silu(s, s.load_part(part(gate, at))),
            s.load_part(part(up, at)),
        ),
    }
}

#[inline(always)]
fn part<T>(x: &[T], at: usize) -> &[T] {
    &x[at..x.len().min(at + 16)]
}

#[inline(always)]
fn factor<S: Simd>(s: S, row: Row) -> S::F {
    match row {
        Row::Normed { x, eps, .. } => s.splat(norm_factor(s, x, eps)),
        _ => s.splat(1.0),
    }
}

/// Evaluates a row without quantising it.
#[inline(always)]
pub(crate) fn evaluate<S: Simd>(s: S, row: Row, out: &mut [f32]) {
    let factor = factor(s, row);
    for at in (0..out.len()).step_by(16) {
        let end = out.len().min(at + 16);
        let x = element(s, row, factor, at);
        s.store_part(x, &mut out[at..end]);
    }
}

/// Quantises a row of `blocks` · 32 elements.
#[inline(always)]
pub(crate) fn quantise<S: Simd>(s: S, row: Row, blocks: usize, sink: &mut impl Sink) {
    let factor = factor(s, row);
    for block in 0..blocks {
        let low = s.nan_to_zero(element(s, row, factor, block * 32));
        let high = s.nan_to_zero(element(s, row, factor, block * 32 + 16));
        let amax = max_lane(s, s.max(s.abs(low), s.abs(high)));
        let (q, scale, offset) = sink.put(block);
        let [q_low, q_high] = q.as_chunks_mut::<16>().0 else {
            unreachable!()
        };
        if amax >= AMAX_MIN && amax.is_finite() {
            let inverse = s.splat(127.0 / amax);
            // |x| · (127 / amax) is at most 127.00002, which rounds to 127: nothing to clamp.
            let sum = s.store_i8(s.round(s.mul(low, inverse)), q_low)
                + s.store_i8(s.round(s.mul(high, inverse)), q_high);
            (*scale, *offset) = (amax / 127.0, -128 * sum);
        } else {
            (*q, *scale, *offset) = ([0; 32], 0.0, 0);
        }
    }
}

#[inline(always)]
fn max_lane<S: Simd>(s: S, x: S::F) -> f32 {
    let mut lanes = [0.0; 16];
    s.store(x, &mut lanes);
    for step in [8, 4, 2, 1] {
        for lane in 0..step {
            let (a, b) = (lanes[lane], lanes[lane + step]);
            lanes[lane] = if a > b { a } else { b };
        }
    }
    lanes[0]
}

/// One tile of sixteen rows times `T` tokens of a group, from `first` on.
#[inline(always)]
pub(crate) fn tile<S: Simd, const T: usize>(
    s: S,
    w: &[[u8; BLOCK_BYTES]],
    a: GroupView,
    first: usize,
    out: &mut [[f32; 16]; T],
) {
    let mut sums = [s.splat(0.0); T];
    for (((w, q), scale), offset) in w.iter().zip(a.q).zip(a.scale).zip(a.offset) {
        let (w_scale, w) = w
            .split_first_chunk::<SCALE_BYTES>()
            .expect("a block has scales");
        let w_scale = s.load_f16(w_scale);
        let w = w.try_into().expect("a block has weights");
        let q = q[first..first + T]
            .try_into()
            .expect("a group has the tokens");
        let offset = offset[first..first + T]
            .try_into()
            .expect("a group has the tokens");
        let dots = s.dot::<T>(w, q, offset);
        for token in 0..T {
            let scale = s.mul(w_scale, s.splat(scale[first + token]));
            sums[token] = s.fma(s.to_f32(dots[token]), scale, sums[token]);
        }
    }
    for token in 0..T {
        s.store(sums[token], &mut out[token]);
    }
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

/// exp of every lane; `math::exp` step by step.
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
    s.div(x, s.add(s.splat(1.0), exp(s, minus)))
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

/// One query against `keys` keys, softmax over absolute tiles of 64 keys.
#[inline(always)]
pub(crate) fn attend<S: Simd>(
    s: S,
    q: &[f32],
    blocks: &Blocks,
    keys: usize,
    scale: f32,
    out: &mut [f32],
) {
    let head = q.len();
    // Both padded with zeros to whole vectors, which adds nothing to a dot product.
    let mut query = [0.0; HEAD_MAX];
    query[..head].copy_from_slice(q);
    let mut sums = [0.0; HEAD_MAX];
    let mut p = [0.0; KV_BLOCK];
    let (mut top, mut total) = (f32::NEG_INFINITY, 0.0f32);
    for block in 0..keys.div_ceil(KV_BLOCK) {
        let present = (keys - block * KV_BLOCK).min(KV_BLOCK);
        let (k, v) = blocks(block);
        assert!(
            k.len() == KV_BLOCK * head && v.len() == KV_BLOCK * head,
            "block {block} is not [64, {head}]"
        );
        scores(s, &query, head, k, present, scale, &mut p);
        let new_top = max_score(s, &p, top);
        let decay = math::exp(top - new_top);
        let mut weights = s.splat(0.0);
        for p in p.as_chunks_mut::<16>().0 {
            let e = exp(s, s.sub(s.load(p), s.splat(new_top)));
            weights = s.add(weights, e);
            s.store(e, p);
        }
        total = total.mul_add(decay, s.sum(weights));
        top = new_top;
        accumulate(s, &p[..present], v, head, decay, &mut sums);
    }
    for (sums, out) in sums.chunks(16).zip(out.chunks_mut(16)) {
        let y = s.div(s.load_part(sums), s.splat(total));
        s.store_part(y, out);
    }
}

/// The scaled products of the query with the `present` keys of a block; −∞ for the others.
#[inline(always)]
fn scores<S: Simd>(
    s: S,
    q: &[f32; HEAD_MAX],
    head: usize,
    k: &[u16],
    present: usize,
    scale: f32,
    p: &mut [f32; 64],
) {
    for (group, p) in p.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        if group * 16 >= present {
            p.fill(f32::NEG_INFINITY);
            continue;
        }
        let k = &k[group * 16 * head..][..16 * head];
        let mut sums = [s.splat(0.0); 16];
        for (sum, k) in sums.iter_mut().zip(k.chunks_exact(head)) {
            for (k, q) in k.chunks(16).zip(q.as_chunks().0) {
                *sum = s.fma(s.load_f16_part(k), s.load(q), *sum);
            }
        }
        s.store(s.mul(s.sums(&sums), s.splat(scale)), p);
        // What lies behind the last key is somebody else's or nobody's.
        for p in p.iter_mut().skip(present - group * 16) {
            *p = f32::NEG_INFINITY;
        }
    }
}

#[inline(always)]
fn max_score<S: Simd>(s: S, p: &[f32; 64], top: f32) -> f32 {
    let [a, b, c, d] = p.as_chunks().0 else {
        unreachable!()
    };
    let tile = s.max(s.max(s.load(a), s.load(b)), s.max(s.load(c), s.load(d)));
    let tile = max_lane(s, tile);
    if top > tile { top } else { tile }
}

/// `sums = sums * decay + Σ p_j · v_j`, j ascending.
#[inline(always)]
fn accumulate<S: Simd>(
    s: S,
    p: &[f32],
    v: &[u16],
    head: usize,
    decay: f32,
    sums: &mut [f32; HEAD_MAX],
) {
    let mut at = 0;
    // Four vectors at a time hide the latency of the multiply-adds.
    while at + 64 <= head {
        let [a, b, c, d] = sums[at..at + 64].as_chunks_mut().0 else {
            unreachable!()
        };
        let decay = s.splat(decay);
        let (mut x0, mut x1) = (s.mul(s.load(a), decay), s.mul(s.load(b), decay));
        let (mut x2, mut x3) = (s.mul(s.load(c), decay), s.mul(s.load(d), decay));
        for (p, v) in p.iter().zip(v.chunks_exact(head)) {
            let (p, v) = (s.splat(*p), &v[at..at + 64]);
            x0 = s.fma(p, s.load_f16_part(&v[..16]), x0);
            x1 = s.fma(p, s.load_f16_part(&v[16..32]), x1);
            x2 = s.fma(p, s.load_f16_part(&v[32..48]), x2);
            x3 = s.fma(p, s.load_f16_part(&v[48..]), x3);
        }
        s.store(x0, a);
        s.store(x1, b);
        s.store(x2, c);
        s.store(x3, d);
        at += 64;
    }
    for at in (at..head).step_by(16) {
        let out = &mut sums[at..at + 16];
        let mut x = s.mul(s.load_part(out), s.splat(decay));
        for (p, v) in p.iter().zip(v.chunks_exact(head)) {
            x = s.fma(s.splat(*p), s.load_f16_part(part(v, at)), x);
        }
        s.store_part(x, out);
    }
}
