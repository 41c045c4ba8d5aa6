//! The numbers that a form writes: the model's own, and seeded ones where an architecture wants more than the model
//! has. Writes nothing.

use super::form::Architecture;
use crate::llama::{Decoder, Part, Shape, Weights};
use crate::tiny::{hash, normal};
use anyhow::{Result, ensure};
use indicatif::ProgressBar;

/// Weights loaded at a time, so that the bar moves.
const PIECE: usize = 1 << 20;
/// The deviation of seeded biases; q's, k's and v's are far from small in real models.
const BIAS: f32 = 0.3;

/// A model that is to be written in some form.
pub(super) struct Model<'a> {
    pub(super) decoder: &'a Decoder,
    /// The decoder's.
    pub(super) shape: &'a Shape,
    pub(super) weights: &'a dyn Weights,
    /// Adds seeded biases to q, k and v, unless they have their own.
    pub(super) bias: bool,
    /// Advances by one for each weight loaded.
    pub(super) bar: &'a ProgressBar,
}

impl Model<'_> {
    /// All values of a part, row-major.
    pub(super) fn values(&self, part: Part) -> Result<Vec<f32>> {
        let [rows, columns] = self.shape.of(part);
        let mut values = Vec::with_capacity(rows * columns);
        let step = (PIECE / columns).max(1);
        for first in (0..rows).step_by(step) {
            let range = first..rows.min(first + step);
            let wanted = range.len() * columns;
            let piece = self.weights.load(part, range)?.into_values();
            ensure!(
                piece.len() == wanted,
                "{part:?} has {} weights where the model's sizes ask for {wanted}",
                piece.len()
            );
            ensure!(
                piece.iter().all(|v| v.is_finite()),
                "{part:?} holds a weight that is not a number"
            );
            values.extend_from_slice(&piece);
            self.bar.inc(wanted as u64);
        }
        Ok(values)
    }

    /// Matrices of as many columns, one below the other.
    pub(super) fn stacked(&self, parts: &[Part]) -> Result<Vec<f32>> {
        let mut values = self.values(parts[0])?;
        for part in &parts[1..] {
            values.extend(self.values(*part)?);
        }
        Ok(values)
    }

    /// Whether such a stack has biases: its own, or seeded ones.
    pub(super) fn has_bias(&self, parts: &[Part], architecture: Architecture) -> bool {
        let seeded = |part: &Part| {
            let inputs = matches!(part, Part::Query(_) | Part::Key(_) | Part::Value(_));
            architecture == Architecture::Phi || inputs && self.bias
        };
        let mut parts = parts.iter();
        parts.all(|part| self.decoder.bias(*part).is_some() || seeded(part))
    }

    /// The biases of a stack that has some.
    pub(super) fn bias(&self, parts: &[Part]) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for part in parts {
            all.extend(match self.decoder.bias(*part) {
                Some(own) => self.values(own)?,
                None => seeded(
                    &format!("{part:?}.bias"),
                    self.shape.of(*part)[0],
                    0.0,
                    BIAS,
                ),
            });
        }
        Ok(all)
    }
}

/// Nearly normal numbers, always the same for a name.
pub(super) fn seeded(name: &str, length: usize, mean: f32, deviation: f32) -> Vec<f32> {
    let seed = name
        .bytes()
        .fold(0, |seed, byte| hash(seed ^ u64::from(byte)));
    let draw = |i| mean + deviation * normal(seed.wrapping_add(i as u64));
    (0..length).map(draw).collect()
}
