//! The plan that others are measured by: each linear and embedding in f32 arithmetic on the very numbers of the
//! model's file, which are read and dequantised a panel at a time. Slow, and right to the order of sums.

use crate::import::{EMBED, LINEAR};
use crate::onnx::{Graph, ints};
use crate::ops::{Ours, index, parsed};
use crate::recipe::{Recipe, WeightSource};
use crate::source::Source;
use std::cell::RefCell;
use tract_onnx::pb::NodeProto;
use tract_onnx::prelude::tract_ndarray::{ArrayView2, ArrayViewMut2, s};
use tract_onnx::prelude::*;
#[allow(clippy::wildcard_imports)] // tract's macros expect all of it
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::EvalOp;

/// Numbers of a weight that are in memory at a time.
const PANEL: usize = 1 << 20;

/// What the operators read: shared through tract's `TurnShared`.
pub(crate) struct Exact {
    pub(crate) graph: Graph,
    pub(crate) recipe: Recipe,
    pub(crate) witness: Option<RefCell<Box<dyn Witness>>>,
}

/// Sees each linear as it is computed.
pub(crate) trait Witness: Send {
    fn linear(&mut self, exact: &Exact, seen: &Seen) -> TractResult<()>;
}

/// A linear's numbers, before its bias.
pub(crate) struct Seen<'a> {
    /// The name of its output.
    pub(crate) name: &'a str,
    pub(crate) weight: &'a WeightSource,
    /// `[tokens, cols]`
    pub(crate) x: &'a [f32],
    /// `[tokens, rows]`
    pub(crate) y: &'a [f32],
}

/// An ONNX reader that knows linears and embeddings by their sources.
pub(crate) fn reader() -> tract_onnx::Onnx {
    let mut onnx = tract_onnx::onnx().with_ignore_value_info(true);
    onnx.op_register
        .insert(EMBED, |_, node| parsed(node, ExactEmbed::parse(node)));
    onnx.op_register
        .insert(LINEAR, |_, node| parsed(node, ExactLinear::parse(node)));
    onnx
}

/// Token ids to embeddings, `[1, tokens]` to `[1, tokens, width]`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ExactEmbed {
    weight: usize,
    width: usize,
}

impl ExactEmbed {
    fn parse(node: &NodeProto) -> Option<Self> {
        Some(Self {
            weight: index(node, "weights", 0)?,
            width: index(node, "widths", 0)?,
        })
    }
}

impl Ours for ExactEmbed {
    fn widths(&self) -> TVec<usize> {
        tvec![self.width]
    }

    fn input_rank(&self) -> i64 {
        2
    }
}

impl Op for ExactEmbed {
    fn name(&self) -> StaticName {
        "MillwrightExactEmbed".into()
    }

    op_as_typed_op!();
}

impl EvalOp for ExactEmbed {
    not_out_of_plan!();

    fn eval(&self, ctx: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let exact = exact(ctx)?;
        let of = &exact.recipe.weights[self.weight];
        let table = Source::open(&exact.graph, of)?;
        let ids = inputs[0].cast_to::<i64>()?;
        let ids = ids.try_as_plain_ram()?.as_slice::<i64>()?;
        let mut out = Vec::with_capacity(ids.len() * self.width);
        let mut row = Vec::new();
        for &id in ids {
            let at = usize::try_from(id).ok().filter(|&id| id < of.rows);
            let at = at.with_context(|| format!("a token beyond the table's {}", of.rows))?;
            table.values(at..at + 1, &mut row);
            out.extend_from_slice(&row);
        }
        Ok(tvec![
            Tensor::from_shape(&[1, ids.len(), self.width], &out)?.into_tvalue()
        ])
    }
}

impl TypedOp for ExactEmbed {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let [batch, tokens] = [0, 1].map(|axis| inputs[0].shape[axis].clone());
        Ok(tvec![f32::fact([batch, tokens, self.width.to_dim()])])
    }
}

/// `x · Wᵀ + bias`, `[1, tokens, cols]` to `[1, tokens, rows]`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ExactLinear {
    output: String,
    weight: usize,
    bias: Option<usize>,
    width: usize,
}

impl ExactLinear {
    fn parse(node: &NodeProto) -> Option<Self> {
        Some(Self {
            output: node.output.first()?.clone(),
            weight: index(node, "weights", 0)?,
            bias: ints(node, "bias").first().map(|&table| table as usize),
            width: index(node, "widths", 0)?,
        })
    }
}

impl Ours for ExactLinear {
    fn widths(&self) -> TVec<usize> {
        tvec![self.width]
    }
}

impl Op for ExactLinear {
    fn name(&self) -> StaticName {
        "MillwrightExactLinear".into()
    }

    op_as_typed_op!();
}

impl EvalOp for ExactLinear {
    not_out_of_plan!();

    fn eval(&self, ctx: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let exact = exact(ctx)?;
        let of = &exact.recipe.weights[self.weight];
        let weight = Source::open(&exact.graph, of)?;
        let input = inputs[0].try_as_plain_ram()?.as_slice::<f32>()?;
        let tokens = input.len() / of.cols;
        let x = ArrayView2::from_shape((tokens, of.cols), input)?;
        let mut out = vec![0.0; tokens * of.rows];
        let mut y = ArrayViewMut2::from_shape((tokens, of.rows), &mut out)?;
        let mut panel = Vec::new();
        let step = (PANEL / of.cols).max(1);
        for first in (0..of.rows).step_by(step) {
            let rows = first..of.rows.min(first + step);
            weight.values(rows.clone(), &mut panel);
            let w = ArrayView2::from_shape((rows.len(), of.cols), &panel)?;
            y.slice_mut(s![.., rows]).assign(&x.dot(&w.t()));
        }
        if let Some(witness) = &exact.witness {
            let seen = Seen {
                name: &self.output,
                weight: of,
                x: input,
                y: &out,
            };
            witness.borrow_mut().linear(exact, &seen)?;
        }
        if let Some(table) = self.bias {
            let bias = &exact.recipe.tables[table];
            for row in out.chunks_exact_mut(of.rows) {
                row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
        exact.graph.forget();
        Ok(tvec![
            Tensor::from_shape(&[1, tokens, of.rows], &out)?.into_tvalue()
        ])
    }
}

impl TypedOp for ExactLinear {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let [batch, tokens] = [0, 1].map(|axis| inputs[0].shape[axis].clone());
        Ok(tvec![f32::fact([batch, tokens, self.width.to_dim()])])
    }
}

fn exact<'a>(ctx: &'a EvalContext) -> TractResult<&'a Exact> {
    ctx.shared
        .and_then(|shared| shared.get::<Exact>())
        .context("no source was installed")
}
