//! The rotary tables: the angle of each position and channel, and how models stretch them beyond the context they
//! were first trained for. Just numbers; the graph looks them up.

use crate::llama::Shape;
use anyhow::{Result, ensure};
use std::f64::consts::TAU;

/// How a channel's frequency is changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    None,
    /// Every frequency is divided by the factor (Chen et al.: Extending Context Window of Large Language Models via
    /// Positional Interpolation, 2023).
    Linear {
        factor: f64,
    },
    /// Low frequencies are divided, high ones kept, and those between interpolated: Llama 3.1's way, as defined by
    /// `rope_type` `llama3` in Hugging Face's transformers.
    Llama3 {
        factor: f64,
        /// Channels that turn fewer times than this in the original context are divided in full.
        low: f64,
        /// Channels that turn more often than this are kept.
        high: f64,
        /// Positions.
        original_context: f64,
    },
}

impl Scaling {
    /// Checks that every frequency stays a number.
    pub fn check(&self) -> Result<()> {
        let positive = |name: &str, value: f64| {
            ensure!(
                value.is_finite() && value > 0.0,
                "the rotary scaling's {name} is {value}, which is not a positive number"
            );
            Ok(())
        };
        match *self {
            Self::None => Ok(()),
            Self::Linear { factor } => positive("factor", factor),
            Self::Llama3 {
                factor,
                low,
                high,
                original_context,
            } => {
                positive("factor", factor)?;
                positive("low frequency factor", low)?;
                positive("high frequency factor", high)?;
                positive("original context", original_context)?;
                ensure!(
                    low < high,
                    "the rotary scaling's low frequency factor {low} is not below the high one {high}"
                );
                Ok(())
            }
        }
    }

    /// The frequency, in radians a position, that takes the place of `frequency`.
    fn apply(&self, frequency: f64) -> f64 {
        match *self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 {
                factor,
                low,
                high,
                original_context,
            } => {
                let turns = original_context * frequency / TAU;
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (kept + (1.0 - kept) / factor)
            }
        }
    }
}

/// The frequency of each pair of channels, `[head_dim / 2]`.
pub fn frequencies(shape: &Shape, scaling: &Scaling) -> Vec<f64> {
    let frequency = |channel: usize| {
        let exponent = -2.0 * channel as f64 / shape.head_dim as f64;
        scaling.apply(f64::from(shape.rope_base).powf(exponent))
    };
    (0..shape.head_dim / 2).map(frequency).collect()
}

/// Cosine and sine, each `[context, head_dim / 2]`.
pub fn tables(shape: &Shape, scaling: &Scaling) -> (Vec<f32>, Vec<f32>) {
    let (half, frequencies) = (shape.head_dim / 2, frequencies(shape, scaling));
    // In f64, so that far positions are as exact as near ones.
    let angles = (0..shape.context * half).map(|i| (i / half) as f64 * frequencies[i % half]);
    angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA3: Scaling = Scaling::Llama3 {
        factor: 32.0,
        low: 1.0,
        high: 4.0,
        original_context: 8192.0,
    };

    #[test]
    fn llama3_keeps_fast_channels_and_divides_slow_ones() {
        let near = |found: f64, expected: f64| {
            assert!((found / expected - 1.0).abs() < 1e-12, "{found} {expected}");
        };
        let turning = |turns: f64| turns * TAU / 8192.0;
        near(LLAMA3.apply(turning(5.0)), turning(5.0));
        near(LLAMA3.apply(turning(0.5)), turning(0.5) / 32.0);
        // Halfway between one turn and four, the two are mixed evenly.
        near(
            LLAMA3.apply(turning(2.5)),
            turning(2.5) * (0.5 + 0.5 / 32.0),
        );
    }

    #[test]
    fn a_linear_factor_is_a_slower_walk() {
        let shape = Shape {
            context: 9,
            ..crate::tiny::shape()
        };
        let (plain, _) = tables(&shape, &Scaling::None);
        let (slow, _) = tables(&shape, &Scaling::Linear { factor: 2.0 });
        let half = shape.head_dim / 2;
        assert_eq!(plain[4 * half..][..half], slow[8 * half..][..half]);
    }

    #[test]
    fn factors_that_make_no_numbers_are_refused() {
        let error = Scaling::Linear { factor: 0.0 }.check().unwrap_err();
        assert!(error.to_string().contains("factor is 0"), "{error}");
        let backwards = Scaling::Llama3 {
            factor: 8.0,
            low: 4.0,
            high: 1.0,
            original_context: 8192.0,
        };
        assert!(backwards.check().is_err());
        LLAMA3.check().unwrap();
    }
}
