//! Linears with f32 activations, for comparisons with engines that do not quantise them. The weights are the same;
//! the result is not bit-equal to the other kernels', nor meant to be fast.

use crate::matmul::Output;
use crate::packed::{BLOCK, Packed, SCALE_BYTES, TILE_ROWS};
use crate::quantised::Quantised;
use std::ops::Range;

/// Every output is Σ over blocks of (Σ over the block of weight · activation) · scale, in f32.
pub(crate) fn tiles(w: Packed, tiles: Range<usize>, a: &Quantised, out: &Output) {
    for tile in tiles {
        for token in 0..a.m() {
            let x = &a.plain[token * a.k()..][..a.k()];
            let mut sums = [0.0; TILE_ROWS];
            for (block, x) in w.tile(tile).iter().zip(x.as_chunks::<BLOCK>().0) {
                let (scales, weights) = block.split_at(SCALE_BYTES);
                let mut dots = [0.0; TILE_ROWS];
                for (w, x) in weights.as_chunks::<64>().0.iter().zip(x.as_chunks::<4>().0) {
                    for (w, dot) in w.as_chunks::<4>().0.iter().zip(&mut dots) {
                        for (w, x) in w.iter().zip(x) {
                            *dot += f32::from(w.cast_signed()) * x;
                        }
                    }
                }
                for ((sum, dot), scale) in sums.iter_mut().zip(dots).zip(scales.as_chunks().0) {
                    *sum += dot * crate::math::f16_to_f32(u16::from_le_bytes(*scale));
                }
            }
            out.put(token, tile, &sums);
        }
    }
}
