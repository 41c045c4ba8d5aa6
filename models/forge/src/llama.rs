//! What a llama-like model is made of: its sizes, the names of its parts, and the seam through which a source
//! of weights hands them over. Writes nothing and reads no file.

use crate::stored::Stored;
use anyhow::{Result, ensure};
use std::ops::Range;

/// The sizes of a model; all that the graph needs beside the weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    pub layers: usize,
    /// Numbers in a token's state between layers.
    pub width: usize,
    pub heads: usize,
    /// Heads of key and value; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Numbers inside a layer's gated part.
    pub mlp: usize,
    pub vocab: usize,
    /// Positions that the model was trained for, and the length of the rotary tables.
    pub context: usize,
    pub rope_base: f32,
    pub epsilon: f32,
}

/// A weight, named by its role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// `[vocab, width]`; the head is tied to it.
    Embed,
    /// `[width]`
    FinalNorm,
    /// `[width]`, before attention.
    AttentionNorm(usize),
    /// `[heads · head_dim, width]`
    Query(usize),
    /// `[kv_heads · head_dim, width]`
    Key(usize),
    /// `[kv_heads · head_dim, width]`
    Value(usize),
    /// `[width, heads · head_dim]`
    Output(usize),
    /// `[width]`, before the gated part.
    MlpNorm(usize),
    /// `[mlp, width]`
    Gate(usize),
    /// `[mlp, width]`
    Up(usize),
    /// `[width, mlp]`
    Down(usize),
}

/// Where weights come from.
pub trait Weights {
    /// Rows of one weight as they are stored: a matrix is `[outputs, inputs]`, rotary channels in halves.
    fn load(&self, part: Part, rows: Range<usize>) -> Result<Stored>;
}

impl Shape {
    /// Rows and columns of a matrix, or one row for a vector.
    pub fn of(&self, part: Part) -> [usize; 2] {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match part {
            Part::Embed => [self.vocab, self.width],
            Part::FinalNorm | Part::AttentionNorm(_) | Part::MlpNorm(_) => [1, self.width],
            Part::Query(_) => [queries, self.width],
            Part::Key(_) | Part::Value(_) => [keys, self.width],
            Part::Output(_) => [self.width, queries],
            Part::Gate(_) | Part::Up(_) => [self.mlp, self.width],
            Part::Down(_) => [self.width, self.mlp],
        }
    }

    /// Every part, in the order in which the graph takes them.
    pub fn parts(&self) -> Vec<Part> {
        let layer = |l| {
            use Part::{AttentionNorm, Down, Gate, Key, MlpNorm, Output, Query, Up, Value};
            [
                AttentionNorm(l),
                Query(l),
                Key(l),
                Value(l),
                Output(l),
                MlpNorm(l),
                Gate(l),
                Up(l),
                Down(l),
            ]
        };
        let layers = (0..self.layers).flat_map(layer);
        std::iter::once(Part::Embed)
            .chain(layers)
            .chain([Part::FinalNorm])
            .collect()
    }

    /// The number of weights.
    pub fn weights(&self) -> u64 {
        self.parts().into_iter().map(|part| self.count(part)).sum()
    }

    /// The number of a part's weights.
    pub fn count(&self, part: Part) -> u64 {
        self.of(part).iter().map(|&n| n as u64).product()
    }

    /// Checks what the graph's writer relies on.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            self.layers,
            self.width,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.mlp,
            self.vocab,
            self.context,
        ];
        ensure!(
            sizes.iter().all(|n| (1..1 << 24).contains(n)),
            "a size of the model is out of range: {self:?}"
        );
        ensure!(
            self.heads.is_multiple_of(self.kv_heads),
            "{} heads can't share {} key heads",
            self.heads,
            self.kv_heads
        );
        ensure!(
            self.head_dim.is_multiple_of(2),
            "a head of {} numbers has no rotary halves",
            self.head_dim
        );
        for inner in [self.width, self.heads * self.head_dim, self.mlp] {
            ensure!(
                inner.is_multiple_of(crate::quant::BLOCK),
                "rows of {inner} weights can't be cut into blocks of {}",
                crate::quant::BLOCK
            );
        }
        ensure!(
            self.rope_base.is_finite() && self.rope_base > 1.0,
            "the rotary base is {}",
            self.rope_base
        );
        ensure!(
            self.epsilon.is_finite() && self.epsilon > 0.0,
            "the norm's epsilon is {}",
            self.epsilon
        );
        Ok(())
    }
}

/// The rotary tables, cosine and sine, each `[context, head_dim / 2]`.
pub fn rotary_tables(shape: &Shape) -> (Vec<f32>, Vec<f32>) {
    let half = shape.head_dim / 2;
    let angle = |i: usize| {
        let (position, channel) = ((i / half) as f64, (i % half) as f64);
        position * f64::from(shape.rope_base).powf(-2.0 * channel / shape.head_dim as f64)
    };
    // In f64, so that far positions are as exact as near ones.
    let angles = (0..shape.context * half).map(angle);
    angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip()
}
