//! What the engine needs of a model beside its graph: which weights to pack, which small tables to keep, and the
//! sizes of its attention. Importing fills it, packing follows it.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};
use tract_onnx::pb::NodeProto;

/// A weight to be packed: rows `[rows, cols]` of a stored matrix, one output per row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WeightSource {
    /// The initializer of the weights.
    pub(crate) values: String,
    pub(crate) form: Form,
    /// Outputs in the initializer.
    pub(crate) stored: usize,
    /// The first of them that is this weight's.
    pub(crate) first: usize,
    /// Outputs.
    pub(crate) rows: usize,
    /// Inputs; a multiple of 32.
    pub(crate) cols: usize,
}

/// What the initializers hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Form {
    /// f32, f16 or bf16 numbers, to be quantised while they are packed.
    Floats(Order),
    /// int8, uint8, int4 or uint4, two of the latter in a byte, the first in its low half: `(q − zero point) · scale`.
    Whole { order: Order, scaling: Scaling },
    /// Unsigned numbers of 4 or 8 bits, `[rows, groups, block · bits / 8]`: `(q − zero point) · scale`. A last group
    /// that `cols` doesn't fill is there in full. Two of four bits share a byte, the first in its low half.
    Bits { bits: u8, scaling: Scaling },
}

impl Form {
    /// How the numbers are scaled, where they are not plain.
    pub(crate) fn scaling(&self) -> Option<&Scaling> {
        match self {
            Self::Floats(_) => None,
            Self::Whole { scaling, .. } | Self::Bits { scaling, .. } => Some(scaling),
        }
    }
}

/// Scales and zero points.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scaling {
    pub(crate) scope: Scope,
    /// The initializer of the scales.
    pub(crate) scales: String,
    /// The initializer of the zero points: of the weights' own type, four-bit ones in pairs with rows beginning on
    /// whole bytes, or numbers. Without one they are 0, or the middle of [`Form::Bits`].
    pub(crate) zero_points: Option<String>,
}

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    Matrix,
    /// An output.
    Row,
    /// So many inputs of an output: a multiple of 16. The scales lie in the weights' order.
    Block(usize),
}

/// How a weight lies in its initializer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// `[rows, cols]`, as an embedding table does.
    RowMajor,
    /// `[cols, rows]`, as the second operand of a `MatMul` does.
    ColumnMajor,
}

/// The sizes that the KV arena needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Geometry {
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// No context is longer: the rotary tables end, or attention changes its way there.
    pub(crate) positions: usize,
}

/// All of it. An index into `weights` or `tables` is what our operators carry in the graph.
#[derive(Debug, Default)]
pub(crate) struct Recipe {
    pub(crate) weights: Vec<WeightSource>,
    /// Which of them linears read, in full for each token; of the others an embedding reads single rows.
    pub(crate) linears: BTreeSet<usize>,
    /// Norm gains, biases, cosines and sines.
    pub(crate) tables: Vec<Vec<f32>>,
    /// Of a linear, by its output: the operators that it was recognised in, down to what is stored, where these are
    /// plain enough for tract to read.
    pub(crate) origins: HashMap<String, Vec<NodeProto>>,
    /// Set when every attention block was recognised.
    pub(crate) geometry: Option<Geometry>,
    /// What was left to tract, and why.
    pub(crate) notes: Vec<String>,
}

impl Recipe {
    /// The index of this weight, added at its first mention.
    pub(crate) fn weight(&mut self, source: WeightSource) -> usize {
        position_or_push(&mut self.weights, source)
    }

    /// The index of this table, added at its first mention.
    pub(crate) fn table(&mut self, values: Vec<f32>) -> usize {
        position_or_push(&mut self.tables, values)
    }
}

fn position_or_push<T: PartialEq>(all: &mut Vec<T>, item: T) -> usize {
    let known = all.iter().position(|other| *other == item);
    known.unwrap_or_else(|| {
        all.push(item);
        all.len() - 1
    })
}
