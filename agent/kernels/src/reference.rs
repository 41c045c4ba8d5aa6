//! Linears with f32 activations, for comparisons with engines that do not quantise them. The weights are the same;
//! the result is not bit-equal to the other kernels', nor meant to be fast.

use crate::matmul::Output;
use crate::packed::{BLOCK, Packed, TILE_ROWS};
use crate::quantised::Quantised;
use crate::scalar::Scalar;
use std::ops::Range;

/// Every output is Σ over groups of (Σ of weight · activation) · scale and, in affine kinds,
/// (Σ of activation) · minimum, in f32.
pub(crate) fn tiles(w: Packed, tiles: Range<usize>, a: &Quantised, out: &Output) {
    let size = w.kind().group();
    for tile in tiles {
        for token in 0..a.m() {
            let x = &a.plain[token * a.k()..][..a.k()];
            let mut sums = [0.0; TILE_ROWS];
            for (index, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
                let block = w.block(tile, index);
                for (group, x) in x.chunks_exact(size).enumerate() {
                    let total: f32 = x.iter().sum();
                    for (row, sum) in sums.iter_mut().enumerate() {
                        let mut dot = 0.0;
                        for (k, x) in x.iter().enumerate() {
                            dot += f32::from(block.weight(row, group * size + k)) * x;
                        }
                        *sum += dot * block.scale(row, group);
                        if w.kind().is_affine() {
                            *sum += total * block.minimum(row, group);
                        }
                    }
                }
            }
            out.put(Scalar, token, tile, sums);
        }
    }
}
