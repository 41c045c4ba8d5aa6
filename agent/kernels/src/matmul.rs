//! Linears over packed weights: how tiles and tokens are walked, what a tile computes, where results go.
//! Knows every kind, and no CPU.

use crate::packed::{BLOCK, Bits, Packed, Scales, TILE_ROWS};
use crate::pool::{Pool, Shareable};
use crate::quantised::{OCTET, OctetView, Quantised};
use crate::simd::{self, Activations, Simd, Weights};
use std::ops::Range;

/// One linear of several that share their activations.
pub struct Job<'a> {
    pub weight: Packed<'a>,
    /// `[m, rows]`, overwritten.
    pub y: &'a mut [f32],
    /// `[rows]`, added to every token's result.
    pub bias: Option<&'a [f32]>,
    /// `[m, rows]`, added after that.
    pub residual: Option<&'a [f32]>,
    /// Whether the activations' remainders are added too: twice the arithmetic, with weights that are read once.
    pub fine: bool,
}

/// Where the results of one linear go, `[m, rows]`; workers write disjoint tiles of it.
pub(crate) struct Output<'a> {
    y: Shareable<f32>,
    bias: Option<&'a [f32]>,
    residual: Option<*const f32>,
    m: usize,
    rows: usize,
    fine: bool,
}

impl<'a> Output<'a> {
    /// # Safety
    /// `y` points to `len` elements that stay mutably borrowed while this is used, and `residual` has as many; no tile is
    /// written by two threads.
    pub(crate) unsafe fn new(
        y: *mut f32,
        len: usize,
        rows: usize,
        bias: Option<&'a [f32]>,
        residual: Option<&'a [f32]>,
        fine: bool,
    ) -> Self {
        Self {
            bias,
            residual: residual.map(<[f32]>::as_ptr),
            m: len / rows,
            rows,
            y: Shareable(y),
            fine,
        }
    }

    /// Rows of activations that go into it: tokens, and remainders.
    #[inline(always)]
    pub(crate) fn activations(&self) -> usize {
        self.m * (1 + usize::from(self.fine))
    }

    /// Takes the sums of one tile for one token, or for the remainder of one that it has taken.
    #[inline(always)]
    pub(crate) fn put<S: Simd>(&self, s: S, token: usize, tile: usize, sums: S::F) {
        let row = tile * TILE_ROWS;
        assert!(token < self.activations() && row < self.rows);
        let count = TILE_ROWS.min(self.rows - row);
        let (token, bias, residual) = match token.checked_sub(self.m) {
            None => (token, self.bias, self.residual),
            // SAFETY: there is a first element.
            Some(token) => (token, None, Some(unsafe { self.y.at(0) }.cast_const())),
        };
        let at = token * self.rows + row;
        let sums = match bias {
            Some(bias) => s.add(sums, s.load_part(&bias[row..row + count])),
            None => sums,
        };
        // SAFETY: `count` places from here on lie in row `token` of `y`, by the assertion, and of the residual, which is
        // as large. They belong to this tile, which is this thread's.
        let (sums, out) = unsafe {
            let sums = match residual {
                Some(residual) => s.add(
                    sums,
                    s.load_part(std::slice::from_raw_parts(residual.add(at), count)),
                ),
                None => sums,
            };
            (sums, std::slice::from_raw_parts_mut(self.y.at(at), count))
        };
        s.store_part(sums, out);
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
    macro_rules! walk {
        ($four:literal, $affine:literal, $groups:literal, $wide:literal) => {
            walk::<S, Known<$four, $affine, $groups, $wide>>(s, w, tiles, a, out)
        };
    }
    match (kind.bits(), kind.is_affine(), kind.group(), wide) {
        (Bits::Eight, false, 32, false) => walk!(false, false, 1, false),
        (Bits::Eight, false, 32, true) => walk!(false, false, 1, true),
        (Bits::Eight, false, _, false) => walk!(false, false, 2, false),
        (Bits::Eight, false, _, true) => walk!(false, false, 2, true),
        (Bits::Eight, true, 32, false) => walk!(false, true, 1, false),
        (Bits::Eight, true, 32, true) => walk!(false, true, 1, true),
        (Bits::Eight, true, _, false) => walk!(false, true, 2, false),
        (Bits::Eight, true, _, true) => walk!(false, true, 2, true),
        (Bits::Four, _, 32, false) => walk!(true, true, 1, false),
        (Bits::Four, _, 32, true) => walk!(true, true, 1, true),
        (Bits::Four, _, _, false) => walk!(true, true, 2, false),
        (Bits::Four, _, _, true) => walk!(true, true, 2, true),
    }
}

/// Tiles are the outer loop: they stay in the first cache while the tokens pass.
#[inline(always)]
fn walk<S: Simd, F: Form>(s: S, w: Packed, tiles: Range<usize>, a: &Quantised, out: &Output) {
    let mut tile = tiles.start;
    while tile < tiles.end {
        // A few tokens wait for memory, which several streams at once slow down.
        if S::TILES == 3 && out.activations() > OCTET && tile + 3 <= tiles.end {
            tokens::<S, F, 3>(s, w, tile, tiles.end, a, out);
            tile += 3;
        } else {
            tokens::<S, F, 1>(s, w, tile, tiles.end, a, out);
            tile += 1;
        }
    }
}

/// All tokens for `R` tiles, of which the ones up to `end` follow.
#[inline(always)]
fn tokens<S: Simd, F: Form, const R: usize>(
    s: S,
    w: Packed,
    tile: usize,
    end: usize,
    a: &Quantised,
    out: &Output,
) {
    let next = w.tiles(tile + R..end.min(tile + 2 * R));
    let octets = out.activations().div_ceil(OCTET);
    let mut weights: [&[u8]; R] = [&[]; R];
    for index in 0..R {
        weights[index] = w.tile(tile + index);
    }
    for octet in 0..octets {
        // The first octet would otherwise wait for all of it.
        s.prefetch(&next[Pool::split(next.len(), octet, octets)]);
        let (view, base) = (a.octet(octet), octet * OCTET);
        let tokens = OCTET.min(out.activations() - base);
        let mut first = 0;
        while first < tokens {
            let at = Place { tile, base, first };
            first += match tokens - first {
                8.. if S::TOKENS >= 8 && R == 1 => step::<S, F, 8, R>(s, weights, view, at, out),
                4.. if S::TOKENS >= 4 => step::<S, F, 4, R>(s, weights, view, at, out),
                2.. if S::TOKENS >= 4 => step::<S, F, 2, R>(s, weights, view, at, out),
                _ => step::<S, F, 1, R>(s, weights, view, at, out),
            };
        }
    }
}

#[derive(Copy, Clone)]
struct Place {
    /// The first tile.
    tile: usize,
    /// First token of the octet, and of this step within the octet.
    base: usize,
    first: usize,
}

/// `R` tiles of sixteen rows times `T` tokens of an octet.
#[inline(always)]
fn step<S: Simd, F: Form, const T: usize, const R: usize>(
    s: S,
    w: [&[u8]; R],
    a: OctetView,
    at: Place,
    out: &Output,
) -> usize {
    let mut acc = [[s.splat(0.0); T]; R];
    let blocks = a.q.iter().zip(a.scale).zip(a.offset).zip(a.sums);
    for (index, (((q, scale), offset), sums)) in blocks.enumerate() {
        let mut block: [&[u8]; R] = [&[]; R];
        for tile in 0..R {
            block[tile] = &w[tile][index * F::BYTES..][..F::BYTES];
        }
        let (q, scale) = (part::<_, T>(q, at.first), part::<_, T>(scale, at.first));
        for group in 0..F::GROUPS {
            let (offset, sum) = if F::GROUPS == 1 {
                (offset, &sums.block)
            } else {
                (&sums.offset[group], &sums.half[group])
            };
            let from = if S::OFFSET && !F::FOUR {
                *part::<_, T>(offset, at.first)
            } else {
                [0; T]
            };
            let sums = dots::<S, F, T, R>(s, from, block, q, group);
            for tile in 0..R {
                let dots = s.finish(sums[tile]);
                let w_scale = F::scales(s, &block[tile][group * F::SCALES..]);
                for token in 0..T {
                    let scale = s.mul(w_scale, s.splat(scale[token]));
                    acc[tile][token] = s.fma(dots[token], scale, acc[tile][token]);
                }
                if F::AFFINE {
                    let minimum = &block[tile][(F::GROUPS + group) * F::SCALES..];
                    let (minimum, sum) = (F::scales(s, minimum), part::<_, T>(sum, at.first));
                    for token in 0..T {
                        acc[tile][token] = s.fma(minimum, s.splat(sum[token]), acc[tile][token]);
                    }
                }
            }
        }
    }
    for tile in 0..R {
        for token in 0..T {
            out.put(
                s,
                at.base + at.first + token,
                at.tile + tile,
                acc[tile][token],
            );
        }
    }
    T
}

#[inline(always)]
fn part<X, const T: usize>(octet: &[X; OCTET], first: usize) -> &[X; T] {
    octet[first..first + T]
        .try_into()
        .expect("an octet has the tokens")
}

/// The exact dot products of one group of columns.
#[inline(always)]
fn dots<S: Simd, F: Form, const T: usize, const R: usize>(
    s: S,
    from: [i32; T],
    blocks: [&[u8]; R],
    q: &[[i8; BLOCK]; T],
    group: usize,
) -> [[S::Sums; T]; R] {
    let mut sums = [s.start(from); R];
    // Not a loop: where one is left standing, the sums go through memory.
    if F::GROUPS == 1 || group == 0 {
        sums = half::<S, F, T, R, 0>(s, sums, blocks, q);
    }
    if F::GROUPS == 1 || group == 1 {
        sums = half::<S, F, T, R, 1>(s, sums, blocks, q);
    }
    sums
}

/// Adds the products of half a block.
#[inline(always)]
fn half<S: Simd, F: Form, const T: usize, const R: usize, const HALF: usize>(
    s: S,
    sums: [[S::Sums; T]; R],
    blocks: [&[u8]; R],
    q: &[[i8; BLOCK]; T],
) -> [[S::Sums; T]; R] {
    let mut a: [&Activations; T] = [&[0; 16]; T];
    for token in 0..T {
        a[token] = &q[token].as_chunks().0[HALF];
    }
    let mut w: [&Weights; R] = [&[[0; 64]; 4]; R];
    for tile in 0..R {
        // With 4 bits, both halves lie in the same bytes.
        let at = if F::FOUR { 0 } else { 256 * HALF };
        w[tile] = weights(&blocks[tile][F::HEAD + at..]);
    }
    match (F::FOUR, HALF) {
        (false, _) => s.dots::<T, R, { simd::WHOLE }>(sums, w, a),
        (true, 0) => s.dots::<T, R, { simd::LOW }>(sums, w, a),
        (true, _) => s.dots::<T, R, { simd::HIGH }>(sums, w, a),
    }
}

/// The first 256 bytes.
#[inline(always)]
fn weights(bytes: &[u8]) -> &Weights {
    let rows = bytes.as_chunks().0;
    rows.first_chunk().expect("a block has weights")
}
