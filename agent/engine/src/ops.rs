//! Our tract operators: embedding, projection (norm, quantise, linears, SwiGLU, residual) and attention. They hold
//! indices and sizes; what they work on comes through [`Turn`]. Activations are `[1, tokens, width]` f32.

use crate::import::{ATTEND, EMBED, PROJECT};
use crate::observer::Part;
use crate::onnx::{float, ints};
use crate::turn::{Scratch, Turn};
use millwright_kernels::packed::dequantise_row;
use millwright_kernels::{Heads, Job, Rows, Token};
use tract_onnx::pb::NodeProto;
use tract_onnx::prelude::*;
#[allow(clippy::wildcard_imports)] // tract's macros expect all of it
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::EvalOp;
use tract_onnx::tract_hir::infer::{InferenceOp, InferenceResult, Solver, TensorProxy};
use tract_onnx::tract_hir::internal::{Expansion, expand};

/// An ONNX reader that knows our operators.
pub(crate) fn reader() -> tract_onnx::Onnx {
    let mut onnx = tract_onnx::onnx().with_ignore_value_info(true);
    onnx.op_register
        .insert(EMBED, |_, node| parsed(node, Embed::parse(node)));
    onnx.op_register
        .insert(PROJECT, |_, node| parsed(node, Project::parse(node)));
    onnx.op_register
        .insert(ATTEND, |_, node| parsed(node, Attend::parse(node)));
    onnx
}

pub(crate) type Parsed = (Box<dyn InferenceOp>, Vec<String>);

pub(crate) fn parsed<T: Ours>(node: &NodeProto, op: Option<T>) -> TractResult<Parsed> {
    let op = op.with_context(|| format!("{} lacks an attribute", node.name))?;
    Ok((expand(Lifted(op)), vec![]))
}

/// What all our operators have in common.
pub(crate) trait Ours: TypedOp + Clone + PartialEq {
    /// The last dimension of each output.
    fn widths(&self) -> TVec<usize>;

    /// The inputs' dimensions: ids have no width.
    fn input_rank(&self) -> i64 {
        3
    }

    /// The middle dimension of the outputs, where it isn't the input's.
    fn rows(&mut self, _model: &mut TypedModel) {}
}

/// An operator of ours as tract's parser wants it.
#[derive(Debug, Clone)]
struct Lifted<T>(T);

impl<T: Ours> Expansion for Lifted<T> {
    fn name(&self) -> StaticName {
        self.0.name()
    }

    fn nboutputs(&self) -> TractResult<usize> {
        Ok(self.0.widths().len())
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        for input in inputs {
            solver.equals(&input.rank, self.0.input_rank())?;
            if self.0.input_rank() == 3 {
                solver.equals(&input.datum_type, f32::datum_type())?;
            }
        }
        for (output, width) in outputs.iter().zip(self.0.widths()) {
            solver.equals(&output.datum_type, f32::datum_type())?;
            solver.equals(&output.rank, 3)?;
            solver.equals(&output.shape[2], width.to_dim())?;
        }
        Ok(())
    }

    fn wire(
        &self,
        prefix: &str,
        model: &mut TypedModel,
        inputs: &[OutletId],
    ) -> TractResult<TVec<OutletId>> {
        let mut op = self.0.clone();
        op.rows(model);
        model.wire_node(prefix, op, inputs)
    }
}

/// Token ids to embeddings: rows of the packed table. `[1, tokens]` i64 to `[1, tokens, width]`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Embed {
    weight: usize,
    width: usize,
}

impl Embed {
    fn parse(node: &NodeProto) -> Option<Self> {
        Some(Self {
            weight: index(node, "weights", 0)?,
            width: index(node, "widths", 0)?,
        })
    }
}

impl Ours for Embed {
    fn widths(&self) -> TVec<usize> {
        tvec![self.width]
    }

    fn input_rank(&self) -> i64 {
        2
    }
}

impl Op for Embed {
    fn name(&self) -> StaticName {
        EMBED.into()
    }

    op_as_typed_op!();
}

impl EvalOp for Embed {
    not_out_of_plan!();

    fn eval(&self, ctx: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let turn = turn(ctx)?;
        let _part = turn.part(Part::Embedding);
        let ids = inputs[0].cast_to::<i64>()?;
        let ids = ids.try_as_plain_ram()?.as_slice::<i64>()?;
        let table = turn.weights().weight(self.weight);
        let rows = table.shape().rows();
        ensure!(
            ids.iter().all(|&id| (0..rows as i64).contains(&id)),
            "a token beyond the table's {rows}"
        );
        let buffers = &mut *turn.buffers.borrow_mut();
        let mut out = buffers.take(ids.len(), self.width)?;
        let mut view = writable(&mut out)?;
        for (id, row) in ids
            .iter()
            .zip(view.as_slice_mut()?.chunks_exact_mut(self.width))
        {
            dequantise_row(table, *id as usize, row);
        }
        Ok(tvec![buffers.lend(out)])
    }
}

impl TypedOp for Embed {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec![f32::fact([
            inputs[0].shape[0].clone(),
            inputs[0].shape[1].clone(),
            self.width.to_dim()
        ])])
    }
}

/// `[norm or SwiGLU →] quantise → linears [→ + bias] [→ + residual]`: inputs x `[1, tokens, cols]`, or gate and up of that
/// shape, and perhaps the residual; one output `[1, tokens, rows]` a linear.
#[derive(Debug, Clone, PartialEq)]
struct Project {
    /// The gain's table, and epsilon.
    norm: Option<(usize, f32)>,
    /// Whether the first two inputs are gate and up.
    gated: bool,
    weights: TVec<usize>,
    /// Their tables, where they have one.
    biases: TVec<Option<usize>>,
    /// Which of them take the activations' remainders too.
    fine: TVec<bool>,
    widths: TVec<usize>,
    /// Set for the head: only the rows that are sampled, this symbol many.
    head: bool,
    sampled: Option<Symbol>,
}

impl Eq for Project {}

impl Project {
    fn parse(node: &NodeProto) -> Option<Self> {
        let project = Self {
            norm: index(node, "norm", 0).zip(float(node, "epsilon")),
            weights: ints(node, "weights").iter().map(|&v| v as usize).collect(),
            biases: ints(node, "biases")
                .iter()
                .map(|&v| usize::try_from(v).ok()?.checked_sub(1))
                .collect(),
            fine: ints(node, "fine").iter().map(|&v| v != 0).collect(),
            widths: ints(node, "widths").iter().map(|&v| v as usize).collect(),
            gated: index(node, "gated", 0)? == 1,
            head: index(node, "head", 0)? == 1,
            sampled: None,
        };
        let each = [
            project.widths.len(),
            project.biases.len(),
            project.fine.len(),
        ];
        let is_whole = each == [project.weights.len(); 3] && !project.weights.is_empty();
        is_whole.then_some(project)
    }
}

impl Ours for Project {
    fn widths(&self) -> TVec<usize> {
        self.widths.clone()
    }

    fn rows(&mut self, model: &mut TypedModel) {
        self.sampled = self.head.then(|| model.symbols.sym("sampled"));
    }
}

impl Op for Project {
    fn name(&self) -> StaticName {
        PROJECT.into()
    }

    op_as_typed_op!();
}

impl EvalOp for Project {
    not_out_of_plan!();

    fn eval(&self, ctx: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let turn = turn(ctx)?;
        let _part = turn.part(if self.head { Part::Head } else { Part::Linears });
        let Scratch {
            sampled, quantised, ..
        } = &mut *turn.scratch.borrow_mut();
        let input = |i: usize| inputs[i].try_as_plain_ram()?.as_slice::<f32>();
        let width = *inputs[0]
            .shape()
            .last()
            .context("a scalar where activations belong")?;
        for &weight in &self.weights {
            let cols = turn.weights().weight(weight).shape().cols();
            ensure!(
                width == cols,
                "activations of {width} for a weight of {cols} columns"
            );
        }
        let mut x = input(0)?;
        if self.head {
            let batch = turn.batch.borrow();
            let made = x.len() / width;
            // Some exports cut the last row out themselves; before a prompt's end nobody samples it.
            let is_cut = made == 1 && batch.sample.iter().all(|&row| row + 1 == batch.rows.len());
            if made != batch.sample.len() && !is_cut {
                ensure!(
                    made == batch.rows.len(),
                    "logits of {made} tokens where {} came in",
                    batch.rows.len()
                );
                sampled.clear();
                for row in &batch.sample {
                    sampled.extend_from_slice(&x[row * width..][..width]);
                }
                x = sampled.as_slice();
            }
        }
        let rows = match self.norm {
            Some((gain, eps)) => Rows::Normed {
                x,
                gamma: turn.weights().table(gain),
                eps,
            },
            None if self.gated => Rows::Gated {
                gate: x,
                up: input(1)?,
            },
            None => Rows::Plain(x),
        };
        let weight = |&index: &usize| turn.weights().weight(index);
        quantised.keep_sums(self.weights.iter().any(|w| weight(w).kind().needs_sums()));
        quantised.keep_remainders(self.fine.contains(&true));
        turn.kernel
            .quantise_rows(rows, width, quantised, &turn.pool);
        let count = x.len() / width;
        let buffers = &mut *turn.buffers.borrow_mut();
        let outputs = self.widths.iter().map(|&w| buffers.take(count, w));
        let mut outputs = outputs.collect::<TractResult<TVec<_>>>()?;
        {
            let views = outputs.iter_mut().map(writable);
            let mut views = views.collect::<TractResult<TVec<_>>>()?;
            let mut jobs = TVec::<Job>::new();
            let linears = self.weights.iter().zip(&self.biases).zip(&self.fine);
            for (view, ((&weight, bias), &fine)) in views.iter_mut().zip(linears) {
                jobs.push(Job {
                    weight: turn.weights().weight(weight),
                    y: view.as_slice_mut()?,
                    bias: bias.map(|table| turn.weights().table(table)),
                    residual: None,
                    fine,
                });
            }
            if inputs.len() > 1 + usize::from(self.gated) {
                let residual = input(inputs.len() - 1)?;
                ensure!(
                    jobs[0].y.len() == residual.len(),
                    "a residual of another shape"
                );
                jobs[0].residual = Some(residual);
            }
            turn.kernel.matmuls(&mut jobs, quantised, &turn.pool);
        }
        Ok(outputs.into_iter().map(|out| buffers.lend(out)).collect())
    }
}

impl TypedOp for Project {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let rows = match &self.sampled {
            Some(symbol) => symbol.to_dim(),
            None => inputs[0].shape[1].clone(),
        };
        let fact =
            |width: &usize| f32::fact([inputs[0].shape[0].clone(), rows.clone(), width.to_dim()]);
        Ok(self.widths.iter().map(fact).collect())
    }
}

/// Rotary embedding, the cache's write and causal attention, for the rows of a flat batch. Inputs q
/// `[1, tokens, heads · head_dim]`, k and v `[1, tokens, kv_heads · head_dim]`, before rotation.
#[derive(Debug, Clone, PartialEq)]
struct Attend {
    layer: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Leading channels of a head that are rotated.
    rotary: usize,
    scale: f32,
    /// Tables of `[positions, rotary / 2]`.
    cos: usize,
    sin: usize,
}

impl Eq for Attend {}

impl Attend {
    fn parse(node: &NodeProto) -> Option<Self> {
        Some(Self {
            layer: index(node, "shape", 0)?,
            heads: index(node, "shape", 1)?,
            kv_heads: index(node, "shape", 2)?,
            head_dim: index(node, "shape", 3)?,
            rotary: index(node, "shape", 4)?,
            scale: float(node, "scale")?,
            cos: index(node, "tables", 0)?,
            sin: index(node, "tables", 1)?,
        })
    }
}

impl Ours for Attend {
    fn widths(&self) -> TVec<usize> {
        tvec![self.heads * self.head_dim]
    }
}

impl Op for Attend {
    fn name(&self) -> StaticName {
        ATTEND.into()
    }

    op_as_typed_op!();
}

impl EvalOp for Attend {
    not_out_of_plan!();

    fn eval(&self, ctx: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let turn = turn(ctx)?;
        let _part = turn.part(Part::Attention);
        let batch = turn.batch.borrow();
        let rows = batch.rows.as_slice();
        let mut arena = turn.arena.borrow_mut();
        let arena = arena
            .as_mut()
            .context("attention in a plan without a KV arena")?;
        let scratch = &mut *turn.scratch.borrow_mut();
        let [q, k, v] = [&inputs[0], &inputs[1], &inputs[2]];
        let v = v.try_as_plain_ram()?.as_slice::<f32>()?;
        scratch.q.clear();
        scratch
            .q
            .extend_from_slice(q.try_as_plain_ram()?.as_slice::<f32>()?);
        scratch.k.clear();
        scratch
            .k
            .extend_from_slice(k.try_as_plain_ram()?.as_slice::<f32>()?);
        let (dim, half) = (self.head_dim, self.rotary / 2);
        let (cos, sin) = (
            turn.weights().table(self.cos),
            turn.weights().table(self.sin),
        );
        let (width, kv_width) = (self.heads * dim, self.kv_heads * dim);
        let fit = scratch.q.len() == rows.len() * width
            && scratch.k.len() == rows.len() * kv_width
            && v.len() == rows.len() * kv_width;
        ensure!(
            fit,
            "a batch of {} rows, q, k and v of other sizes",
            rows.len()
        );
        // All keys and values are in the cache, rounded, before any is read.
        for (i, row) in rows.iter().enumerate() {
            let angle = row.position * half..(row.position + 1) * half;
            let (cos, sin) = (&cos[angle.clone()], &sin[angle]);
            for head in scratch.q[i * width..][..width].chunks_exact_mut(dim) {
                turn.kernel.rope(head, cos, sin);
            }
            for head in 0..self.kv_heads {
                let at = i * kv_width + head * dim;
                let (key, value) = (&mut scratch.k[at..at + dim], &v[at..at + dim]);
                turn.kernel.rope(key, cos, sin);
                let kernel = turn.kernel;
                arena.store(kernel, row.slot, row.position, self.layer, head, key, value);
            }
        }
        scratch.tokens.clear();
        scratch.tokens.extend(rows.iter().map(|row| Token {
            sequence: row.slot,
            keys: row.position + 1,
        }));
        let heads = Heads {
            query: self.heads,
            kv: self.kv_heads,
            dim,
            scale: self.scale,
        };
        let (arena, layer) = (&*arena, self.layer);
        let buffers = &mut *turn.buffers.borrow_mut();
        let mut out = buffers.take(rows.len(), width)?;
        turn.kernel.attend(
            heads,
            &scratch.tokens,
            &scratch.q,
            &|slot, block, head| arena.block(slot, block, layer, head),
            writable(&mut out)?.as_slice_mut::<f32>()?,
            &turn.pool,
        );
        Ok(tvec![buffers.lend(out)])
    }
}

impl TypedOp for Attend {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec![f32::fact(&*inputs[0].shape)])
    }
}

fn turn<'a>(ctx: &'a EvalContext) -> TractResult<&'a Turn> {
    ctx.shared
        .and_then(|shared| shared.get::<Turn>())
        .context("no turn was installed")
}

pub(crate) fn index(node: &NodeProto, name: &str, at: usize) -> Option<usize> {
    ints(node, name).get(at).map(|&v| v as usize)
}

/// A buffer that is still its taker's alone, to write in.
fn writable(buffer: &mut Arc<Tensor>) -> TractResult<PlainViewMut<'_>> {
    let tensor = Arc::get_mut(buffer).context("a buffer is in use elsewhere")?;
    tensor.try_as_plain_ram_mut()
}
