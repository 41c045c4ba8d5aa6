//! What the engine needs of a model beside its graph: which weights to pack, which small tables to keep, and the
//! sizes of its attention. Lowering fills it, packing follows it.

use std::collections::HashSet;

/// A weight to be packed: `[rows, cols]`, one output per row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WeightSource {
    /// The initializer of the weights.
    pub(crate) values: String,
    /// The initializer with one scale per group of inputs and output.
    pub(crate) scales: String,
    /// Outputs.
    pub(crate) rows: usize,
    /// Inputs; a multiple of 32.
    pub(crate) cols: usize,
    pub(crate) form: Form,
}

/// What the initializers hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Form {
    /// int8 with an f32 scale per 32 columns.
    Eight(Order),
    /// Pairs of four bits, `[rows, groups, block / 2]`, with a scale, f32 or f16, per `block` columns: a power of
    /// two from 16. A last group that `cols` doesn't fill is there in full.
    Four {
        block: usize,
        zero_points: ZeroPoints,
    },
}

impl Form {
    /// Columns that share a scale.
    pub(crate) fn block(&self) -> usize {
        match self {
            Self::Eight(_) => millwright_kernels::packed::BLOCK,
            Self::Four { block, .. } => *block,
        }
    }
}

/// What four-bit weights are counted from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ZeroPoints {
    /// 8 everywhere.
    Absent,
    /// The initializer of pairs of four bits, `[rows, groups / 2 rounded up]`.
    Packed(String),
    /// The initializer of numbers, f32 or f16, `[rows, groups]`.
    Floats(String),
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Rows of the shortest rotary table: no context is longer.
    pub(crate) positions: usize,
}

/// All of it. An index into `weights` or `tables` is what our operators carry in the graph.
#[derive(Debug, Default)]
pub(crate) struct Recipe {
    pub(crate) weights: Vec<WeightSource>,
    /// Which of them linears read, in full for each token; of the others an embedding reads single rows.
    pub(crate) linears: HashSet<usize>,
    /// Names of f32 initializers: norm gains, cosines and sines.
    pub(crate) tables: Vec<String>,
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
    pub(crate) fn table(&mut self, name: &str) -> usize {
        position_or_push(&mut self.tables, name.to_owned())
    }
}

fn position_or_push<T: PartialEq>(all: &mut Vec<T>, item: T) -> usize {
    all.iter()
        .position(|other| *other == item)
        .unwrap_or_else(|| {
            all.push(item);
            all.len() - 1
        })
}
