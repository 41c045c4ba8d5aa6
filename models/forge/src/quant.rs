//! From f32 rows to blocks of 32 weights. To eight bits the engine's way, with a search for the scale. To four plainly:
//! they are meant for weights that are published so, which never come here. Knows no file format.

use crate::stored::{Eight, Four};
use half::f16;
pub use millwright_engine::quant::BLOCK;

/// Quantises `[rows, columns]` along its columns.
///
/// # Panics
/// If `columns` is not a multiple of [`BLOCK`] or `values` is not whole rows: callers check shapes first.
pub fn eight(values: &[f32], columns: usize) -> Eight {
    assert!(columns > 0 && columns.is_multiple_of(BLOCK) && values.len().is_multiple_of(columns));
    let (weights, scales) = millwright_engine::quant::eight(values);
    Eight { weights, scales }
}

/// Quantises f32 rows, in whole blocks, to four bits between each block's least and greatest value.
pub fn four(values: &[f32]) -> Four {
    let mut four = Four::default();
    for block in values.as_chunks::<BLOCK>().0 {
        let (least, greatest) = block
            .iter()
            .fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), v| {
                (a.min(*v), b.max(*v))
            });
        let minimum = f16::from_f32(least);
        let scale = f16::from_f32((greatest - minimum.to_f32()) / 15.0);
        let inverse = inverse(scale.to_f32());
        let weight = |i: usize| {
            ((block[i] - minimum.to_f32()) * inverse)
                .round()
                .clamp(0.0, 15.0)
        };
        let pair = |pair: usize| weight(2 * pair) as u8 | (weight(2 * pair + 1) as u8) << 4;
        four.pairs.extend((0..BLOCK / 2).map(pair));
        four.scales.push(scale);
        four.minima.push(minimum);
    }
    four
}

/// A scale too small for f16 is zero: its block is written as zeros.
fn inverse(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn four_bits_are_off_by_half_a_step_at_most(values in prop::collection::vec(-3.0f32..3.0, 64)) {
            let four = four(&values);
            for (i, (value, back)) in values.iter().zip(four.values()).enumerate() {
                // Half a step, and what rounding scale and minimum to f16 costs at the far end.
                let (scale, minimum) = (four.scales[i / 32].to_f32(), four.minima[i / 32].to_f32());
                let off = 0.5 * scale + (15.0 * scale + minimum.abs()) / 1024.0;
                prop_assert!((value - back).abs() <= off, "{} {}", value, back);
            }
        }
    }
}
