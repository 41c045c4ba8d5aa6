//! What a llama-like model is made of: its sizes, the names of its parts, and the seam through which a source
//! of weights hands them over. Writes nothing and reads no file.

use crate::rotary::Scaling;
use crate::stored::Stored;
use anyhow::{Result, ensure};
use std::fmt;
use std::ops::Range;

/// More layers than any model has.
const LAYERS_MAX: usize = 4096;

/// A model but for its weights; all that the graph needs beside them.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoder {
    pub architecture: Architecture,
    pub shape: Shape,
    pub biases: Biases,
    /// Whether the embedding's table serves as the head. If not, the head is a table of its own.
    pub tied: bool,
    pub scaling: Scaling,
}

/// Whose layers they are, as the manifest has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Qwen2,
}

/// Which of attention's linears add a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Biases {
    None,
    /// Query, key and value.
    Inputs,
    /// The output too.
    All,
}

/// The sizes of a model, and the two numbers that its norms and its rotation need.
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
    /// Positions that a prompt and its answer may take, and the length of the rotary tables.
    pub context: usize,
    pub rope_base: f32,
    pub epsilon: f32,
}

/// A weight, named by its role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// `[vocab, width]`
    Embed,
    /// `[width]`
    FinalNorm,
    /// `[vocab, width]`, where it is not the embedding's.
    Head,
    /// `[width]`, before attention.
    AttentionNorm(usize),
    /// `[heads · head_dim, width]`
    Query(usize),
    /// `[heads · head_dim]`
    QueryBias(usize),
    /// `[kv_heads · head_dim, width]`
    Key(usize),
    /// `[kv_heads · head_dim]`
    KeyBias(usize),
    /// `[kv_heads · head_dim, width]`
    Value(usize),
    /// `[kv_heads · head_dim]`
    ValueBias(usize),
    /// `[width, heads · head_dim]`
    Output(usize),
    /// `[width]`
    OutputBias(usize),
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

impl Decoder {
    /// A llama without biases, whose head is its embedding.
    pub fn llama(shape: Shape) -> Self {
        Self {
            architecture: Architecture::Llama,
            shape,
            biases: Biases::None,
            tied: true,
            scaling: Scaling::None,
        }
    }

    /// Every part, in the order in which the graph takes them.
    pub fn parts(&self) -> Vec<Part> {
        let mut parts = vec![Part::Embed];
        for layer in 0..self.shape.layers {
            parts.push(Part::AttentionNorm(layer));
            for linear in [Part::Query, Part::Key, Part::Value, Part::Output] {
                parts.push(linear(layer));
                parts.extend(self.bias(linear(layer)));
            }
            let mlp = [Part::MlpNorm, Part::Gate, Part::Up, Part::Down];
            parts.extend(mlp.map(|part| part(layer)));
        }
        parts.push(Part::FinalNorm);
        if !self.tied {
            parts.push(Part::Head);
        }
        parts
    }

    /// What is added to a linear's outputs, if anything is.
    pub fn bias(&self, linear: Part) -> Option<Part> {
        let inputs = self.biases != Biases::None;
        match linear {
            Part::Query(l) if inputs => Some(Part::QueryBias(l)),
            Part::Key(l) if inputs => Some(Part::KeyBias(l)),
            Part::Value(l) if inputs => Some(Part::ValueBias(l)),
            Part::Output(l) if self.biases == Biases::All => Some(Part::OutputBias(l)),
            _ => None,
        }
    }

    /// The number of weights.
    pub fn weights(&self) -> u64 {
        let counts = self.parts().into_iter().map(|part| self.shape.count(part));
        counts.sum()
    }

    /// Checks what the graph's writer relies on.
    pub fn check(&self) -> Result<()> {
        self.shape.check()?;
        self.scaling.check()
    }
}

impl Shape {
    /// Rows and columns of a matrix, or one row for a vector.
    pub fn of(&self, part: Part) -> [usize; 2] {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match part {
            Part::Embed | Part::Head => [self.vocab, self.width],
            Part::FinalNorm | Part::AttentionNorm(_) | Part::MlpNorm(_) | Part::OutputBias(_) => {
                [1, self.width]
            }
            Part::Query(_) => [queries, self.width],
            Part::QueryBias(_) => [1, queries],
            Part::Key(_) | Part::Value(_) => [keys, self.width],
            Part::KeyBias(_) | Part::ValueBias(_) => [1, keys],
            Part::Output(_) => [self.width, queries],
            Part::Gate(_) | Part::Up(_) => [self.mlp, self.width],
            Part::Down(_) => [self.width, self.mlp],
        }
    }

    /// The number of a part's weights.
    pub fn count(&self, part: Part) -> u64 {
        self.of(part).iter().map(|&n| n as u64).product()
    }

    /// Checks the sizes, each by itself and together.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            self.width,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.mlp,
            self.vocab,
            self.context,
        ];
        ensure!(
            sizes.iter().all(|n| (1..1 << 24).contains(n))
                && (1..=LAYERS_MAX).contains(&self.layers),
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

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        })
    }
}
