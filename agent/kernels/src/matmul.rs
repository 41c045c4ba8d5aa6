//! Linears over packed weights: how tiles and tokens are walked and where results go.
//! What a tile computes is in `generic`.

use crate::generic::{self, GROUP, GroupView};
use crate::packed::{BLOCK_BYTES, Packed, TILE_ROWS};
use crate::pool::Shareable;
use crate::quantised::Quantised;
use crate::simd::Simd;
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

/// Computes `tiles` for all tokens. Tiles are the outer loop: one stays in the first cache while the tokens pass.
#[inline(always)]
pub(crate) fn tiles<S: Simd>(s: S, w: Packed, tiles: Range<usize>, a: &Quantised, out: &Output) {
    for tile in tiles {
        let blocks = w.tile(tile);
        for group in 0..a.m().div_ceil(GROUP) {
            let (view, base) = (a.group(group), group * GROUP);
            let tokens = GROUP.min(a.m() - base);
            let mut first = 0;
            while first < tokens {
                let at = Place { tile, base, first };
                first += match tokens - first {
                    8.. if S::TOKENS >= 8 => step::<S, 8>(s, blocks, view, at, out),
                    4.. => step::<S, 4>(s, blocks, view, at, out),
                    2.. => step::<S, 2>(s, blocks, view, at, out),
                    _ => step::<S, 1>(s, blocks, view, at, out),
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

#[inline(always)]
fn step<S: Simd, const T: usize>(
    s: S,
    w: &[[u8; BLOCK_BYTES]],
    a: GroupView,
    at: Place,
    out: &Output,
) -> usize {
    let mut sums = [[0.0; TILE_ROWS]; T];
    generic::tile(s, w, a, at.first, &mut sums);
    for (token, sums) in sums.iter().enumerate() {
        out.put(at.base + at.first + token, at.tile, sums);
    }
    T
}
