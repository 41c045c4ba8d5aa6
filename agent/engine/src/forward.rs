//! The forward pass, behind one trait: the flat plan (any slots in one batch, our attention) and the plain plan
//! (one sequence, tract's attention). Knows nothing of requests or text.

use crate::arena::{Arena, KvPrecision};
use crate::onnx::{Graph, GraphError, input_dims};
use crate::ops::reader;
use crate::pack::Weights;
use crate::recipe::Recipe;
use crate::turn::{Batch, Scratch, Turn};
use millwright_kernels::{Kernel, Pool};
use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;
use tract_onnx::prelude::*;
#[allow(clippy::wildcard_imports)] // tract's macros expect all of it
use tract_onnx::tract_core::internal::*;

/// What a step of the engine needs of a model.
pub(crate) trait Forward: Send {
    /// Runs one batch and appends the sampled rows' logits, `[sample, vocab]`.
    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> TractResult<()>;

    /// The width of a row of logits.
    fn vocab(&self) -> usize;

    /// Whether a slot could hold this many positions now.
    fn fits(&self, tokens: usize) -> bool;

    /// Reserves room for a slot's positions; `false` if there is none.
    fn reserve(&mut self, slot: usize, tokens: usize) -> bool;

    /// Forgets a slot.
    fn release(&mut self, slot: usize);

    /// Positions reserved and positions there are.
    fn kv_tokens(&self) -> (usize, usize);
}

/// What both plans are made from.
pub(crate) struct Parts<'a> {
    pub(crate) graph: Graph,
    pub(crate) folder: &'a Path,
    pub(crate) weights: Arc<Weights>,
    pub(crate) kernel: Kernel,
    pub(crate) pool: Pool,
}

type State = TypedSimpleState;

impl Parts<'_> {
    /// Reads the rewritten graph through tract, with these facts for its inputs, and installs the turn.
    fn into_state(
        mut self,
        arena: Option<Arena>,
        fact: impl Fn(&str, &[Option<usize>], &SymbolScope) -> Result<InferenceFact, GraphError>,
    ) -> TractResult<(State, usize)> {
        self.graph.strip();
        let folder = self
            .folder
            .to_str()
            .context("the model's folder has no UTF-8 name")?;
        let parsed = reader().parse(&self.graph.model, Some(folder))?;
        ensure!(
            parsed.unresolved_inputs.is_empty(),
            "nothing makes {:?}",
            parsed.unresolved_inputs
        );
        let mut model = parsed.model;
        for (index, input) in self.graph.proto().input.iter().enumerate() {
            let fact = fact(&input.name, &input_dims(input), &model.symbols)?;
            model.set_input_fact(index, fact)?;
        }
        let model = model.into_optimized()?;
        let vocab = vocab(&model)?;
        let plan = SimplePlan::new(model)?;
        let mut state = plan.spawn()?;
        state.turn_state.shared.insert(Turn {
            weights: self.weights,
            kernel: self.kernel,
            pool: self.pool,
            arena: RefCell::new(arena),
            batch: RefCell::default(),
            scratch: RefCell::new(Scratch::default()),
        });
        Ok((state, vocab))
    }
}

fn vocab(model: &TypedModel) -> TractResult<usize> {
    let fact = model.output_fact(0)?;
    Ok(fact
        .shape
        .last()
        .context("logits without a width")?
        .to_usize()?)
}

fn turn(state: &State) -> &Turn {
    state
        .turn_state
        .shared
        .get::<Turn>()
        .expect("installed when the plan was made")
}

/// Runs a plan; after an error nothing of that turn is left.
fn run(state: &mut State, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
    state.run(inputs).inspect_err(|_| {
        state.turn_state.values.clear();
        state.turn_state.resolved_symbols = SymbolValues::default();
        state.turn_state.scenario = None;
    })
}

/// Appends the sampled rows. A head of ours makes them alone, one of tract's makes all.
fn append_sampled(batch: &Batch, output: &Tensor, logits: &mut Vec<f32>) -> TractResult<()> {
    let &[1, made, vocab] = output.shape() else {
        bail!("logits of shape {:?}", output.shape())
    };
    let all = output.try_as_plain_ram()?.as_slice::<f32>()?;
    if made == batch.sample.len() {
        logits.extend_from_slice(all);
    } else {
        ensure!(
            made == batch.rows.len(),
            "{made} rows of logits for {} tokens",
            batch.rows.len()
        );
        batch
            .sample
            .iter()
            .for_each(|&row| logits.extend_from_slice(&all[row * vocab..][..vocab]));
    }
    Ok(())
}

/// All attention is ours: tokens of any slots ride in one batch.
pub(crate) struct Flat {
    state: State,
    vocab: usize,
}

impl Flat {
    pub(crate) fn new(
        parts: Parts,
        recipe: &Recipe,
        slots: usize,
        kv_tokens: usize,
    ) -> TractResult<Self> {
        let geometry = recipe
            .geometry
            .context("not every attention block was recognised")?;
        let arena = Arena::new(geometry, KvPrecision::F16, slots, kv_tokens);
        let (state, vocab) = parts.into_state(Some(arena), |name, _, symbols| match name {
            "input_ids" => Ok(i64::fact([1.to_dim(), symbols.sym("tokens").to_dim()]).into()),
            other => Err(GraphError::Input(other.into())),
        })?;
        Ok(Self { state, vocab })
    }

    fn arena<T>(&self, f: impl FnOnce(&mut Arena) -> T) -> T {
        f(turn(&self.state)
            .arena
            .borrow_mut()
            .as_mut()
            .expect("a flat plan has an arena"))
    }
}

impl Forward for Flat {
    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> TractResult<()> {
        turn(&self.state).batch.borrow_mut().clone_from(batch);
        let ids: Vec<i64> = batch.rows.iter().map(|row| i64::from(row.token)).collect();
        let outputs = run(
            &mut self.state,
            tvec![tensor1(&ids).into_shape(&[1, ids.len()])?.into_tvalue()],
        )?;
        append_sampled(batch, &outputs[0], logits)
    }

    fn vocab(&self) -> usize {
        self.vocab
    }

    fn fits(&self, tokens: usize) -> bool {
        self.arena(|arena| arena.fits(tokens))
    }

    fn reserve(&mut self, slot: usize, tokens: usize) -> bool {
        self.arena(|arena| arena.reserve(slot, tokens))
    }

    fn release(&mut self, slot: usize) {
        self.arena(|arena| arena.release(slot));
    }

    fn kv_tokens(&self) -> (usize, usize) {
        self.arena(|arena| (arena.tokens_used(), arena.tokens_max()))
    }
}

/// tract runs the attention: one sequence, its past carried as tensors. Also the f32 reference.
pub(crate) struct Plain {
    state: State,
    vocab: usize,
    inputs: Vec<PlainInput>,
    /// `present` outputs in the order of the `past` inputs, `None` before the first token.
    past: Option<Vec<TValue>>,
    empty: Vec<TValue>,
    reserved: usize,
    tokens_max: usize,
}

enum PlainInput {
    Ids,
    Mask,
    Positions,
    /// The n-th past, fed from this output.
    Past(usize, usize),
}

impl Plain {
    pub(crate) fn new(parts: Parts, tokens_max: usize) -> TractResult<Self> {
        let outputs: Vec<String> = parts
            .graph
            .proto()
            .output
            .iter()
            .map(|o| o.name.clone())
            .collect();
        ensure!(
            outputs.first().is_some_and(|name| name == "logits"),
            "the first output is not logits"
        );
        let (mut inputs, mut empty) = (Vec::new(), Vec::new());
        for input in &parts.graph.proto().input {
            inputs.push(match input.name.as_str() {
                "input_ids" => PlainInput::Ids,
                "attention_mask" => PlainInput::Mask,
                "position_ids" => PlainInput::Positions,
                other => {
                    let unknown = || GraphError::Input(other.into());
                    let rest = other.strip_prefix("past_key_values").ok_or_else(unknown)?;
                    let present = outputs
                        .iter()
                        .position(|name| *name == format!("present{rest}"));
                    let [_, Some(heads), _, Some(dim)] = input_dims(input)[..] else {
                        return Err(unknown().into());
                    };
                    empty.push(Tensor::zero::<f32>(&[1, heads, 0, dim])?.into_tvalue());
                    PlainInput::Past(empty.len() - 1, present.ok_or_else(unknown)?)
                }
            });
        }
        let (state, vocab) = parts.into_state(None, |name, dims, symbols| {
            let (s, p) = (symbols.sym("S").to_dim(), symbols.sym("P").to_dim());
            Ok(match (name, dims) {
                ("input_ids" | "position_ids", _) => i64::fact([1.to_dim(), s]).into(),
                ("attention_mask", _) => i64::fact([1.to_dim(), p + s]).into(),
                (_, &[_, Some(heads), _, Some(dim)]) => {
                    f32::fact([1.to_dim(), heads.to_dim(), p, dim.to_dim()]).into()
                }
                _ => return Err(GraphError::Input(name.into())),
            })
        })?;
        Ok(Self {
            state,
            vocab,
            inputs,
            past: None,
            empty,
            reserved: 0,
            tokens_max,
        })
    }
}

impl Forward for Plain {
    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> TractResult<()> {
        turn(&self.state).batch.borrow_mut().clone_from(batch);
        let rows = &batch.rows;
        let first = rows.first().context("an empty batch")?.position;
        let past = self
            .past
            .as_ref()
            .filter(|_| first > 0)
            .unwrap_or(&self.empty);
        let row = |values: Vec<i64>| {
            tensor1(&values)
                .into_shape(&[1, values.len()])
                .map(Tensor::into_tvalue)
        };
        let inputs = self.inputs.iter().map(|input| match *input {
            PlainInput::Ids => row(rows.iter().map(|row| i64::from(row.token)).collect()),
            PlainInput::Mask => row(vec![1; first + rows.len()]),
            PlainInput::Positions => row(rows.iter().map(|row| row.position as i64).collect()),
            PlainInput::Past(index, _) => Ok(past[index].clone()),
        });
        let inputs = inputs.collect::<TractResult<TVec<_>>>()?;
        let outputs = run(&mut self.state, inputs)?;
        append_sampled(batch, &outputs[0], logits)?;
        let presents = self.inputs.iter().filter_map(|input| match input {
            PlainInput::Past(_, output) => Some(outputs[*output].clone()),
            _ => None,
        });
        self.past = Some(presents.collect());
        Ok(())
    }

    fn vocab(&self) -> usize {
        self.vocab
    }

    fn fits(&self, tokens: usize) -> bool {
        self.reserved == 0 && tokens <= self.tokens_max
    }

    fn reserve(&mut self, _slot: usize, tokens: usize) -> bool {
        let fits = self.fits(tokens);
        if fits {
            self.reserved = tokens;
        }
        fits
    }

    fn release(&mut self, _slot: usize) {
        (self.past, self.reserved) = (None, 0);
    }

    fn kv_tokens(&self) -> (usize, usize) {
        (self.reserved, self.tokens_max)
    }
}
