//! Attention over a cache of 64-position blocks, once, on top of sixteen lanes. ARITHMETIC.md says the same in words.
//! Knows nothing of positions in a batch or of threads: `heads` cuts the work.
//!
//! Keys lie transposed, so that lanes are keys and a score needs no sum over lanes; up to four queries share
//! each vector that is loaded, mostly the query heads of one KV head.

use crate::simd::{self, Elements, Simd};
use std::ops::Range;

/// Positions in a KV block, and keys in a tile of the softmax.
pub const KV_BLOCK: usize = 64;
/// Queries that one call takes.
pub(crate) const QUERIES_MAX: usize = 12;

/// One block of one KV head's cache: keys `[head, 64]` (transposed) and values `[64, head]`.
#[derive(Copy, Clone)]
pub enum KvBlock<'a> {
    F16 {
        keys: &'a [u16],
        values: &'a [u16],
    },
    /// Each key and each value is its bytes times its scale.
    I8 {
        keys: &'a [i8],
        values: &'a [i8],
        key_scales: &'a [f32; KV_BLOCK],
        value_scales: &'a [f32; KV_BLOCK],
    },
}

/// One query head of one token.
pub(crate) struct Query<'a> {
    /// `[head]`
    pub(crate) q: &'a [f32],
    /// Positions that it sees, from the first on.
    pub(crate) keys: usize,
    /// `[head]`
    pub(crate) out: &'a mut [f32],
}

/// Block `i` of the sequence, for one KV head.
pub(crate) type Blocks<'f, 'kv> = dyn Fn(usize) -> KvBlock<'kv> + 'f;

/// A number as the cache holds it.
trait Element: Copy {
    fn load<S: Simd>(s: S, x: &[Self; 16]) -> S::F;
    fn elements(x: &[Self]) -> Elements<'_>;
    const ZERO: Self;
}

impl Element for u16 {
    const ZERO: Self = 0;

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[u16; 16]) -> S::F {
        s.load_f16(simd::bytes(x))
    }

    #[inline(always)]
    fn elements(x: &[u16]) -> Elements<'_> {
        Elements::F16(x)
    }
}

impl Element for i8 {
    const ZERO: Self = 0;

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[i8; 16]) -> S::F {
        s.load_i8(x)
    }

    #[inline(always)]
    fn elements(x: &[i8]) -> Elements<'_> {
        Elements::I8(x)
    }
}

/// A block's numbers, of either kind.
#[derive(Copy, Clone)]
struct View<'a, E> {
    keys: &'a [E],
    values: &'a [E],
    scales: Option<(&'a [f32; KV_BLOCK], &'a [f32; KV_BLOCK])>,
}

/// The softmax so far.
#[derive(Copy, Clone)]
struct Running {
    top: f32,
    total: f32,
}

/// Up to twelve queries against the cache of one KV head, ordered by the number of keys they see.
#[inline(always)]
pub(crate) fn attend<S: Simd>(s: S, queries: &mut [Query], blocks: &Blocks, scale: f32) {
    let longest = queries.last().map_or(0, |query| query.keys);
    let mut running = [Running {
        top: f32::NEG_INFINITY,
        total: 0.0,
    }; QUERIES_MAX];
    for query in &mut *queries {
        query.out.fill(0.0);
    }
    for block in 0..longest.div_ceil(KV_BLOCK) {
        let before = block * KV_BLOCK;
        let blind = queries.partition_point(|query| query.keys <= before);
        let (queries, running) = (&mut queries[blind..], &mut running[blind..]);
        match blocks(block) {
            KvBlock::F16 { keys, values } => {
                let view = View {
                    keys,
                    values,
                    scales: None,
                };
                tile(s, queries, running, view, before, scale);
            }
            KvBlock::I8 {
                keys,
                values,
                key_scales,
                value_scales,
            } => {
                let view = View {
                    keys,
                    values,
                    scales: Some((key_scales, value_scales)),
                };
                tile(s, queries, running, view, before, scale);
            }
        }
    }
    for (query, running) in queries.iter_mut().zip(running) {
        for out in query.out.chunks_mut(16) {
            let y = s.div(s.load_part(out), s.splat(running.total));
            s.store_part(y, out);
        }
    }
}

/// One block for all queries, a few at a time.
#[inline(always)]
fn tile<S: Simd, E: Element>(
    s: S,
    queries: &mut [Query],
    running: &mut [Running],
    view: View<E>,
    before: usize,
    scale: f32,
) {
    let mut at = 0;
    while at < queries.len() {
        let (queries, running) = (&mut queries[at..], &mut running[at..]);
        at += match queries.len() {
            1 => several::<S, E, 1>(s, queries, running, view, before, scale),
            2 => several::<S, E, 2>(s, queries, running, view, before, scale),
            3 => several::<S, E, 3>(s, queries, running, view, before, scale),
            _ => several::<S, E, 4>(s, queries, running, view, before, scale),
        };
    }
}

#[inline(always)]
fn several<S: Simd, E: Element, const Q: usize>(
    s: S,
    queries: &mut [Query],
    running: &mut [Running],
    view: View<E>,
    before: usize,
    scale: f32,
) -> usize {
    let mut present = [0; Q];
    let mut p = [[0.0; KV_BLOCK]; Q];
    let mut q: [&[f32]; Q] = [&[]; Q];
    for at in 0..Q {
        present[at] = (queries[at].keys - before).min(KV_BLOCK);
        q[at] = queries[at].q;
    }
    scores(s, q, view.keys, present[Q - 1], &mut p);
    if let Some((scales, _)) = view.scales {
        for p in &mut p {
            times(s, p, scales);
        }
    }
    let decay = soften(s, &mut p, present, scale, running);
    if let Some((_, scales)) = view.scales {
        for p in &mut p {
            times(s, p, scales);
        }
    }
    // What all of them see, then what only the later ones do.
    let mut out = outputs::<Q>(queries);
    accumulate(s, &p, 0..present[0], view.values, decay, &mut out);
    for at in 1..Q {
        if present[at] > present[0] {
            let (p, out) = ([p[at]], &mut [&mut *out[at]]);
            accumulate(s, &p, present[0]..present[at], view.values, [1.0], out);
        }
    }
    Q
}

/// The outputs of the first `Q` queries.
#[inline(always)]
fn outputs<'q, const Q: usize>(queries: &'q mut [Query]) -> [&'q mut [f32]; Q] {
    let queries: &mut [Query; Q] = queries.first_chunk_mut().expect("there are Q queries");
    queries.each_mut().map(|query| &mut *query.out)
}

/// `p = q · keys`, for at least the first `present` keys of the block; `p` comes as zeros.
#[inline(always)]
fn scores<S: Simd, E: Element, const Q: usize>(
    s: S,
    q: [&[f32]; Q],
    keys: &[E],
    present: usize,
    p: &mut [[f32; KV_BLOCK]; Q],
) {
    if S::ACCUMULATES {
        let lanes = present.next_multiple_of(8);
        let sums = p.each_mut().map(|p| &mut p[..lanes]);
        return s.accumulate(E::elements(keys), KV_BLOCK, q, sums);
    }
    let step = 16 * S::VECTORS;
    for at in (0..present).step_by(step) {
        match S::VECTORS {
            4 => products::<S, E, Q, 4>(s, q, keys, at, p),
            2 => products::<S, E, Q, 2>(s, q, keys, at, p),
            _ => products::<S, E, Q, 1>(s, q, keys, at, p),
        }
    }
}

#[inline(always)]
fn products<S: Simd, E: Element, const Q: usize, const V: usize>(
    s: S,
    q: [&[f32]; Q],
    keys: &[E],
    at: usize,
    p: &mut [[f32; KV_BLOCK]; Q],
) {
    let sums = add_rows(s, [[s.splat(0.0); V]; Q], keys, KV_BLOCK, at, q);
    for query in 0..Q {
        let out = p[query][at..at + 16 * V].as_chunks_mut::<16>().0;
        for vector in 0..V {
            s.store(sums[query][vector], &mut out[vector]);
        }
    }
}

/// Turns scores into weights relative to each query's largest score so far, which it updates; the factors by which what
/// was summed before shrinks. All queries go a step together, since one alone would wait for its maximum.
#[inline(always)]
fn soften<S: Simd, const Q: usize>(
    s: S,
    p: &mut [[f32; KV_BLOCK]; Q],
    present: [usize; Q],
    scale: f32,
    running: &mut [Running],
) -> [f32; Q] {
    let mut tops = [0.0; Q];
    for at in 0..Q {
        for p in p[at].as_chunks_mut::<16>().0 {
            s.store(s.mul(s.load(p), s.splat(scale)), p);
        }
        // What lies behind the last key is somebody else's or nobody's.
        p[at][present[at]..].fill(f32::NEG_INFINITY);
        let mut top = s.splat(f32::NEG_INFINITY);
        for p in p[at].as_chunks::<16>().0 {
            top = s.max(s.load(p), top);
        }
        let tile = s.max_lane(top);
        let before = running[at].top;
        tops[at] = if before > tile { before } else { tile };
    }
    let mut decay = [0.0; Q];
    for at in 0..Q {
        let (running, top) = (&mut running[at], tops[at]);
        decay[at] = s.exp_one(running.top - top);
        let mut weights = s.splat(0.0);
        for p in p[at].as_chunks_mut::<16>().0 {
            let e = s.exp(s.sub(s.load(p), s.splat(top)));
            weights = s.add(weights, e);
            s.store(e, p);
        }
        running.total = s.fma_one(running.total, decay[at], s.sum(weights));
        running.top = top;
    }
    decay
}

#[inline(always)]
fn times<S: Simd>(s: S, p: &mut [f32; KV_BLOCK], scales: &[f32; KV_BLOCK]) {
    for (p, scales) in p
        .as_chunks_mut::<16>()
        .0
        .iter_mut()
        .zip(scales.as_chunks().0)
    {
        s.store(s.mul(s.load(p), s.load(scales)), p);
    }
}

/// `out = out · decay + Σ p_j · v_j`, j ascending over `keys`.
#[inline(always)]
fn accumulate<S: Simd, E: Element, const Q: usize>(
    s: S,
    p: &[[f32; KV_BLOCK]; Q],
    keys: Range<usize>,
    values: &[E],
    decay: [f32; Q],
    out: &mut [&mut [f32]; Q],
) {
    let head = out[0].len();
    if S::ACCUMULATES && head.is_multiple_of(8) {
        for (out, decay) in out.iter_mut().zip(decay) {
            for out in out.chunks_mut(16) {
                let shrunk = s.mul(s.load_part(out), s.splat(decay));
                s.store_part(shrunk, out);
            }
        }
        let rows = E::elements(&values[keys.start * head..keys.end * head]);
        let x = p.each_ref().map(|p| &p[keys.clone()]);
        return s.accumulate(rows, head, x, out.each_mut().map(|out| &mut **out));
    }
    let mut at = 0;
    while at + 16 <= head {
        at += match S::VECTORS {
            4 if at + 64 <= head => weigh::<S, E, Q, 4>(s, p, &keys, values, decay, out, at),
            2.. if at + 32 <= head => weigh::<S, E, Q, 2>(s, p, &keys, values, decay, out, at),
            _ => weigh::<S, E, Q, 1>(s, p, &keys, values, decay, out, at),
        };
    }
    if at < head {
        weigh_rest(s, p, &keys, values, decay, out, at);
    }
}

/// `accumulate` for the `16 · V` dimensions from `at` on.
#[inline(always)]
fn weigh<S: Simd, E: Element, const Q: usize, const V: usize>(
    s: S,
    p: &[[f32; KV_BLOCK]; Q],
    keys: &Range<usize>,
    values: &[E],
    decay: [f32; Q],
    out: &mut [&mut [f32]; Q],
    at: usize,
) -> usize {
    let head = out[0].len();
    let mut sums = [[s.splat(0.0); V]; Q];
    for query in 0..Q {
        let old = out[query][at..at + 16 * V].as_chunks().0;
        for vector in 0..V {
            sums[query][vector] = s.mul(s.load(&old[vector]), s.splat(decay[query]));
        }
    }
    // One slice: an iterator that skips and takes keeps its state in registers that the sums need.
    let p = p.each_ref().map(|p| &p[keys.clone()]);
    let values = &values[keys.start * head..keys.end * head];
    let sums = add_rows(s, sums, values, head, at, p);
    for query in 0..Q {
        let new = out[query][at..at + 16 * V].as_chunks_mut().0;
        for vector in 0..V {
            s.store(sums[query][vector], &mut new[vector]);
        }
    }
    16 * V
}

/// `sums + x · rows` for the `16 · V` columns from `at` on of rows of `stride`, one after the other.
#[inline(always)]
fn add_rows<S: Simd, E: Element, const Q: usize, const V: usize>(
    s: S,
    mut sums: [[S::F; V]; Q],
    rows: &[E],
    stride: usize,
    at: usize,
    x: [&[f32]; Q],
) -> [[S::F; V]; Q] {
    let rows = rows.chunks_exact(stride);
    let x = x.map(|x| &x[..rows.len()]);
    for (index, row) in rows.enumerate() {
        let row = row[at..at + 16 * V].as_chunks().0;
        for vector in 0..V {
            let y = E::load(s, &row[vector]);
            for query in 0..Q {
                let x = s.splat(x[query][index]);
                sums[query][vector] = s.fma(x, y, sums[query][vector]);
            }
        }
    }
    sums
}

/// `accumulate` for the last, fewer than sixteen, dimensions from `at` on.
#[inline(always)]
fn weigh_rest<S: Simd, E: Element, const Q: usize>(
    s: S,
    p: &[[f32; KV_BLOCK]; Q],
    keys: &Range<usize>,
    values: &[E],
    decay: [f32; Q],
    out: &mut [&mut [f32]; Q],
    at: usize,
) {
    let head = out[0].len();
    for query in 0..Q {
        let out = &mut out[query][at..];
        let mut sums = s.mul(s.load_part(out), s.splat(decay[query]));
        for key in keys.clone() {
            let mut v = [E::ZERO; 16];
            v[..head - at].copy_from_slice(&values[key * head + at..(key + 1) * head]);
            sums = s.fma(s.splat(p[query][key]), E::load(s, &v), sums);
        }
        s.store_part(sums, out);
    }
}
