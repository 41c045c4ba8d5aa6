//! A weight as its source stores it, so that a bundle of the same precision carries it without rounding again.
//! Knows no file format; making the quantised forms from f32 is `quant`'s.

use crate::quant::BLOCK;
use half::f16;

/// Whole rows of a matrix `[rows, columns]`, or a vector as one row.
#[derive(Debug, Clone, PartialEq)]
pub enum Stored {
    /// `[rows, columns]`
    Plain(Vec<f32>),
    Eight(Eight),
    Four(Four),
}

/// Blocks of 32 int8 weights with one scale each: `value = weight · scale`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Eight {
    /// `[rows, columns]`
    pub weights: Vec<i8>,
    /// `[rows, columns / 32]`; each value is exact in f16.
    pub scales: Vec<f32>,
}

/// Blocks of 32 four-bit weights: `value = weight · scale + minimum`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Four {
    /// `[rows, columns / 2]`: of two neighbours the first is in the byte's low half.
    pub pairs: Vec<u8>,
    /// `[rows, columns / 32]`
    pub scales: Vec<f16>,
    /// `[rows, columns / 32]`
    pub minima: Vec<f16>,
}

impl Stored {
    /// How many weights there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(values) => values.len(),
            Self::Eight(eight) => eight.weights.len(),
            Self::Four(four) => four.pairs.len() * 2,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether every weight is a number.
    pub fn is_finite(&self) -> bool {
        match self {
            Self::Plain(values) => values.iter().all(|v| v.is_finite()),
            Self::Eight(eight) => eight.scales.iter().all(|v| v.is_finite()),
            Self::Four(four) => four
                .scales
                .iter()
                .chain(&four.minima)
                .all(|v| v.is_finite()),
        }
    }

    /// All weights as f32, row-major.
    pub fn into_values(self) -> Vec<f32> {
        match self {
            Self::Plain(values) => values,
            Self::Eight(Eight { weights, scales }) => {
                let blocks = weights.as_chunks::<BLOCK>().0.iter().zip(scales);
                blocks
                    .flat_map(|(block, scale)| block.map(|w| f32::from(w) * scale))
                    .collect()
            }
            Self::Four(four) => four.values(),
        }
    }
}

impl Four {
    /// All weights as f32, row-major; each is rounded once, by the addition.
    pub fn values(&self) -> Vec<f32> {
        let affine = self.scales.iter().zip(&self.minima);
        let blocks = self.pairs.as_chunks::<{ BLOCK / 2 }>().0.iter().zip(affine);
        blocks
            .flat_map(|(pairs, (scale, minimum))| {
                let (scale, minimum) = (scale.to_f32(), minimum.to_f32());
                std::array::from_fn::<f32, BLOCK, _>(|i| {
                    let weight = (pairs[i / 2] >> (4 * (i % 2))) & 15;
                    f32::from(weight) * scale + minimum
                })
            })
            .collect()
    }

    /// As `MatMulNBits` takes it, `value = (weight − zero point) · scale`: the pairs, the scales and the zero
    /// points, all in f32, the latter two `[rows, columns / 32]`.
    ///
    /// Nothing is lost: the product `zero point · scale`, taken in f64 and rounded to f16, is the minimum's negative.
    /// The zero point is the quotient of two f16 and so far inside f32's normal range; its rounding moves the product
    /// by at most 2⁻²⁴ of the minimum, while the nearest f16 boundary is at least 2⁻¹² of it away. A scale of zero
    /// has no such quotient; a block of one value is written as weights of 1 with that value as their scale.
    pub fn with_zero_points(mut self) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
        let mut zero_points = Vec::with_capacity(self.scales.len());
        let blocks = self.pairs.as_chunks_mut::<{ BLOCK / 2 }>().0.iter_mut();
        for ((pairs, scale), minimum) in blocks.zip(&mut self.scales).zip(&self.minima) {
            if *scale == f16::ZERO {
                (*pairs, *scale) = ([0x11; BLOCK / 2], *minimum);
                zero_points.push(0.0);
            } else {
                zero_points.push(-minimum.to_f32() / scale.to_f32());
            }
        }
        let scales = self.scales.iter().map(|scale| scale.to_f32()).collect();
        (self.pairs, scales, zero_points)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(scale: f16, minimum: f16) -> Four {
        Four {
            pairs: (0..16).map(|i| i * 17).collect(),
            scales: vec![scale],
            minima: vec![minimum],
        }
    }

    #[track_caller]
    fn comes_back(scale: f16, minimum: f16) {
        let four = block(scale, minimum);
        let expected = four.values();
        let (pairs, scales, zero_points) = four.with_zero_points();
        let minimum = -f64::from(zero_points[0]) * f64::from(scales[0]);
        let minimum = f16::from_f64(minimum);
        let scale = f16::from_f32(scales[0]);
        assert_eq!(scale.to_f32().to_bits(), scales[0].to_bits());
        let back = Four {
            pairs,
            scales: vec![scale],
            minima: vec![minimum],
        };
        for (back, expected) in back.values().iter().zip(expected) {
            assert_eq!(back.to_bits(), expected.to_bits(), "{scale} {minimum}");
        }
    }

    fn finite(bits: u16) -> f16 {
        let value = f16::from_bits(bits);
        if value.is_finite() { value } else { f16::ONE }
    }

    #[test]
    fn every_minimum_survives_the_zero_points_of_awkward_scales() {
        // The least subnormal, the greatest, the least normal, one and its neighbour, the greatest of all.
        for scale in [1, 0x3FF, 0x400, 0x3C00, 0x3C01, 0x7BFF, 0x8001] {
            for minimum in 0..=u16::MAX {
                comes_back(f16::from_bits(scale), finite(minimum));
            }
        }
    }

    #[test]
    fn a_block_of_one_value_has_no_scale_and_is_carried_all_the_same() {
        for minimum in [f16::ZERO, f16::from_f32(-0.3), f16::MAX] {
            comes_back(f16::ZERO, minimum);
        }
    }

    proptest! {
        #[test]
        fn any_scale_and_minimum_survive(scale: u16, minimum: u16) {
            comes_back(finite(scale), finite(minimum));
        }
    }
}
