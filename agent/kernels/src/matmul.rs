//! Linears over packed weights: how tiles and tokens are walked, what a tile computes, where results go.
//! Knows every kind, and no CPU.

use crate::packed::{BLOCK, Bits, Packed, Scales, TILE_ROWS};
use crate::pool::Shareable;
use crate::quantised::{GROUP, GroupView, Quantised};
use crate::simd::{self, Activations, Simd, Weights};
use std::ops::Range;

/// One linear of several that share their activations.
pub struct Job<'a> {
    pub weight: Packed<'a>,
    /// `[m, rows]`, overwritten.
    pub y: &'a mut [f32],
}

/// Where the results of one linear go, `[m, rows]`; workers write disjoint tiles of it.
pub(crate) struct Output {
    y: Shareable<f32>,
    m: usize,
    rows: usize,
}

impl Output {
    /// # Safety
    /// `y` points to `len` elements that stay mutably borrowed while this is used, and no tile is written by two
    /// threads.
    pub(crate) unsafe fn new(y: *mut f32, len: usize, rows: usize) -> Self {
        Self {
            m: len / rows,
            rows,
            y: Shareable(y),
        }
    }

    #[inline(always)]
    pub(crate) fn put(&self, token: usize, tile: usize, sums: &[f32; TILE_ROWS]) {
        let row = tile * TILE_ROWS;
        assert!(token < self.m && row < self.rows);
        let count = TILE_ROWS.min(self.rows - row);
        // SAFETY: `count` places from here on lie in row `token` of `y`, by the assertion; they belong to this
        // tile, which is this thread's.
        let out =
            unsafe { std::slice::from_raw_parts_mut(self.y.at(token * self.rows + row), count) };
        if let Ok(out) = <&mut [f32; TILE_ROWS]>::try_from(&mut *out) {
            *out = *sums;
        } else {
            out.copy_from_slice(&sums[..count]);
        }
    }
}

/// One kind, known when code is generated.
trait Form {
    const FOUR: bool;
    const AFFINE: bool;
    /// Groups in a block.
    const GROUPS: usize;
    /// Bytes of the scales of one group of one tile.
    const SCALES: usize;
    const HEAD: usize = Self::SCALES * Self::GROUPS * (1 + Self::AFFINE as usize);
    const BYTES: usize = Self::HEAD + if Self::FOUR { 256 } else { 512 };

    /// Sixteen scales or minimums.
    fn scales<S: Simd>(s: S, bytes: &[u8]) -> S::F;
}

struct Known<const FOUR: bool, const AFFINE: bool, const GROUPS: usize, const WIDE: bool>;

impl<const FOUR: bool, const AFFINE: bool, const GROUPS: usize, const WIDE: bool> Form
    for Known<FOUR, AFFINE, GROUPS, WIDE>
{
    const FOUR: bool = FOUR;
    const AFFINE: bool = AFFINE;
    const GROUPS: usize = GROUPS;
    const SCALES: usize = if WIDE { 64 } else { 32 };

    #[inline(always)]
    fn scales<S: Simd>(s: S, bytes: &[u8]) -> S::F {
        if WIDE {
            let bytes = bytes.first_chunk().expect("a block has scales");
            s.load(&simd::floats(bytes))
        } else {
            s.load_f16(bytes.first_chunk().expect("a block has scales"))
        }
    }
}

/// Computes `tiles` for all tokens.
#[inline(always)]
pub(crate) fn tiles<S: Simd>(s: S, w: Packed, tiles: Range<usize>, a: &Quantised, out: &Output) {
    let kind = w.kind();
    let wide = kind.scales() == Scales::F32;
    match (kind.bits(), kind.is_affine(), kind.group(), wide) {
        (Bits::Eight, false, 32, false) => {
            walk::<S, Known<false, false, 1, false>>(s, w, tiles, a, out)
        }
        (Bits::Eight, false, 32, true) => {
            walk::<S, Known<false, false, 1, true>>(s, w, tiles, a, out)
        }
        (Bits::Eight, false, _, false) => {
            walk::<S, Known<false, false, 2, false>>(s, w, tiles, a, out)
        }
        (Bits::Eight, false, _, true) => {
            walk::<S, Known<false, false, 2, true>>(s, w, tiles, a, out)
        }
        (Bits::Eight, true, 32, false) => {
            walk::<S, Known<false, true, 1, false>>(s, w, tiles, a, out)
        }
        (Bits::Eight, true, 32, true) => {
            walk::<S, Known<false, true, 1, true>>(s, w, tiles, a, out)
        }
        (Bits::Eight, true, _, false) => {
            walk::<S, Known<false, true, 2, false>>(s, w, tiles, a, out)
        }
        (Bits::Eight, true, _, true) => walk::<S, Known<false, true, 2, true>>(s, w, tiles, a, out),
        (Bits::Four, _, 32, false) => walk::<S, Known<true, true, 1, false>>(s, w, tiles, a, out),
        (Bits::Four, _, 32, true) => walk::<S, Known<true, true, 1, true>>(s, w, tiles, a, out),
        (Bits::Four, _, _, false) => walk::<S, Known<true, true, 2, false>>(s, w, tiles, a, out),
        (Bits::Four, _, _, true) => walk::<S, Known<true, true, 2, true>>(s, w, tiles, a, out),
    }
}

/// Tiles are the outer loop: one stays in the first cache while the tokens pass.
#[inline(always)]
fn walk<S: Simd, F: Form>(s: S, w: Packed, tiles: Range<usize>, a: &Quantised, out: &Output) {
    for tile in tiles {
        let blocks = w.tile(tile);
        for group in 0..a.m().div_ceil(GROUP) {
            let (view, base) = (a.group(group), group * GROUP);
            let tokens = GROUP.min(a.m() - base);
            let mut first = 0;
            while first < tokens {
                let at = Place { tile, base, first };
                first += match tokens - first {
                    8.. if S::TOKENS >= 8 => step::<S, F, 8>(s, blocks, view, at, out),
                    4.. => step::<S, F, 4>(s, blocks, view, at, out),
                    2.. => step::<S, F, 2>(s, blocks, view, at, out),
                    _ => step::<S, F, 1>(s, blocks, view, at, out),
                };
            }
        }
    }
}

#[derive(Copy, Clone)]
struct Place {
    tile: usize,
    /// First token of the group, and of this step within the group.
    base: usize,
    first: usize,
}

/// One tile of sixteen rows times `T` tokens of a group.
#[inline(always)]
fn step<S: Simd, F: Form, const T: usize>(
    s: S,
    w: &[u8],
    a: GroupView,
    at: Place,
    out: &Output,
) -> usize {
    let mut acc = [s.splat(0.0); T];
    let sums = a.q.iter().zip(a.scale).zip(a.offset).zip(a.sums);
    for (w, (((q, scale), offset), sums)) in w.chunks_exact(F::BYTES).zip(sums) {
        let (head, weights) = w.split_at(F::HEAD);
        let (q, scale) = (tokens::<_, T>(q, at.first), tokens::<_, T>(scale, at.first));
        for group in 0..F::GROUPS {
            let w_scale = F::scales(s, &head[group * F::SCALES..]);
            let (offset, sum) = if F::GROUPS == 1 {
                (offset, &sums.block)
            } else {
                (&sums.offset[group], &sums.half[group])
            };
            let from = if S::OFFSET && !F::FOUR {
                *tokens::<_, T>(offset, at.first)
            } else {
                [0; T]
            };
            let dots = dots::<S, F, T>(s, from, weights, q, group);
            for token in 0..T {
                let scale = s.mul(w_scale, s.splat(scale[token]));
                acc[token] = s.fma(dots[token], scale, acc[token]);
            }
            if F::AFFINE {
                let minimum = F::scales(s, &head[(F::GROUPS + group) * F::SCALES..]);
                let sum = tokens::<_, T>(sum, at.first);
                for token in 0..T {
                    acc[token] = s.fma(minimum, s.splat(sum[token]), acc[token]);
                }
            }
        }
    }
    for token in 0..T {
        let mut lanes = [0.0; TILE_ROWS];
        s.store(acc[token], &mut lanes);
        out.put(at.base + at.first + token, at.tile, &lanes);
    }
    T
}

#[inline(always)]
fn tokens<X, const T: usize>(group: &[X; GROUP], first: usize) -> &[X; T] {
    group[first..first + T]
        .try_into()
        .expect("a group has the tokens")
}

/// The exact dot products of one group of columns, as f32.
#[inline(always)]
fn dots<S: Simd, F: Form, const T: usize>(
    s: S,
    from: [i32; T],
    weights: &[u8],
    q: &[[i8; BLOCK]; T],
    group: usize,
) -> [S::F; T] {
    let mut sums = s.start(from);
    for half in 0..2 {
        if F::GROUPS == 2 && half != group {
            continue;
        }
        let mut a: [&Activations; T] = [&[0; 16]; T];
        for token in 0..T {
            a[token] = &q[token].as_chunks().0[half];
        }
        sums = match (F::FOUR, half) {
            (true, 0) => s.dot_nibbles::<T, false>(sums, weights_of(weights, 0), a),
            (true, _) => s.dot_nibbles::<T, true>(sums, weights_of(weights, 0), a),
            (false, _) => s.dot(sums, weights_of(weights, half), a),
        };
    }
    s.finish(sums)
}

/// The 256 bytes number `index` of a block's weights.
#[inline(always)]
fn weights_of(weights: &[u8], index: usize) -> &Weights {
    let rows = weights.as_chunks::<64>().0;
    rows[4 * index..]
        .first_chunk()
        .expect("a block has weights")
}
