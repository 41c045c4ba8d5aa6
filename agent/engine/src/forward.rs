//! The forward pass, behind one trait: the flat plan (any slots in one batch, our attention) and the plain plan
//! (one sequence, tract's attention). Knows nothing of requests or text.

use crate::arena::Arena;
use crate::cores::Stay;
use crate::observer::{Observer, Part};
use crate::onnx::{GraphError, input_dims, input_type};
use crate::ops;
use crate::pack::Weights;
use crate::plan;
use crate::reference::{self, Exact};
use crate::turn::{Batch, Scratch, Turn};
use millwright_kernels::{Kernel, Pool};
use std::cell::RefCell;
use std::sync::Arc;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{GraphProto, ModelProto, ValueInfoProto};
use tract_onnx::prelude::*;
#[allow(clippy::wildcard_imports)] // tract's macros expect all of it
use tract_onnx::tract_core::internal::*;

/// What a step of the engine needs of a model.
pub(crate) trait Forward: Send {
    /// Runs one batch with this many threads at most and appends the sampled rows' logits, `[sample, vocab]`.
    fn forward(&mut self, batch: &Batch, threads: usize, logits: &mut Vec<f32>) -> TractResult<()>;

    /// Has the parts of each pass told to this one from now on.
    fn observe(&mut self, observer: Box<dyn Observer>);

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

    /// Cache bytes that a token reads for each position before it.
    fn kv_bytes_per_position(&self) -> usize;
}

/// What a plan is made from.
pub(crate) struct Parts {
    /// The graph, whole.
    pub(crate) model: ModelProto,
    /// What its operators of ours work on: packed weights, or the sources themselves.
    pub(crate) numbers: Numbers,
    pub(crate) kernel: Kernel,
    pub(crate) pool: Pool,
    /// The cores that the thread which steps keeps to meanwhile.
    pub(crate) kept_to: Option<Vec<usize>>,
}

/// Where weights come from.
pub(crate) enum Numbers {
    Packed(Arc<Weights>),
    Exact(Box<Exact>),
}

type State = TypedSimpleState;

impl Parts {
    fn graph(&self) -> TractResult<&GraphProto> {
        self.model.graph.as_ref().context("a model without a graph")
    }

    /// The graph as tract plans it.
    fn read(
        &self,
        fact: impl Fn(&ValueInfoProto, &SymbolScope) -> Result<InferenceFact, GraphError>,
    ) -> TractResult<TypedModel> {
        let reader = match self.numbers {
            Numbers::Packed(_) => ops::reader(),
            Numbers::Exact(_) => reference::reader(),
        };
        let parsed = reader.parse(&self.model, None)?;
        ensure!(
            parsed.unresolved_inputs.is_empty(),
            "nothing makes {:?}",
            parsed.unresolved_inputs
        );
        let mut model = parsed.model;
        for (index, input) in self.graph()?.input.iter().enumerate() {
            let fact = fact(input, &model.symbols)?;
            model.set_input_fact(index, fact)?;
        }
        plan::optimised(model)
    }

    /// Reads the rewritten graph through tract, with these facts for its inputs, and installs the turn.
    fn into_state(
        self,
        arena: Option<Arena>,
        fact: impl Fn(&ValueInfoProto, &SymbolScope) -> Result<InferenceFact, GraphError>,
    ) -> TractResult<(State, usize)> {
        let model = plan::caught(|| self.read(fact))?;
        let vocab = vocab(&model)?;
        let plan = SimplePlan::new(model)?;
        let mut state = plan.spawn()?;
        let weights = match self.numbers {
            Numbers::Packed(weights) => Some(weights),
            Numbers::Exact(exact) => {
                state.turn_state.shared.insert(*exact);
                None
            }
        };
        state.turn_state.shared.insert(Turn {
            weights,
            kernel: self.kernel,
            pool: self.pool,
            arena: RefCell::new(arena),
            batch: RefCell::default(),
            scratch: RefCell::new(Scratch::default()),
            buffers: RefCell::default(),
            kept_to: self.kept_to,
            observer: RefCell::default(),
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

fn observe(state: &State, observer: Box<dyn Observer>) {
    *turn(state).observer.borrow_mut() = Some(observer);
}

/// Runs a plan; after an error nothing of that turn is left.
fn run(state: &mut State, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
    let _stay = Stay::on(turn(state).kept_to.as_deref());
    turn(state).begin(Part::Forward);
    let outputs = plan::caught(|| state.run(inputs));
    turn(state).end(Part::Forward);
    outputs.inspect_err(|_| {
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
    let is_cut = made == 1 && batch.sample.is_empty();
    if is_cut {
        // The export cut out a row that nobody samples.
    } else if made == batch.sample.len() {
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
    pub(crate) fn new(parts: Parts, arena: Arena) -> TractResult<Self> {
        let (state, vocab) =
            parts.into_state(Some(arena), |input, symbols| match input.name.as_str() {
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
    fn observe(&mut self, observer: Box<dyn Observer>) {
        observe(&self.state, observer);
    }

    fn forward(&mut self, batch: &Batch, threads: usize, logits: &mut Vec<f32>) -> TractResult<()> {
        turn(&self.state).install(batch, threads);
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

    fn kv_bytes_per_position(&self) -> usize {
        self.arena(|arena| arena.bytes_per_position())
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

/// The type of an input of whole numbers.
fn whole(input: &ValueInfoProto) -> DatumType {
    if input_type(input) == Some(DataType::Int32 as i32) {
        i32::datum_type()
    } else {
        i64::datum_type()
    }
}

enum PlainInput {
    /// Whole numbers of this type.
    Ids(DatumType),
    Mask(DatumType),
    Positions(DatumType),
    /// The n-th past, fed from this output.
    Past(usize, usize),
}

impl Plain {
    pub(crate) fn new(parts: Parts, tokens_max: usize) -> TractResult<Self> {
        let outputs = parts.graph()?.output.iter();
        let outputs: Vec<String> = outputs.map(|o| o.name.clone()).collect();
        ensure!(
            outputs.first().is_some_and(|name| name == "logits"),
            "the first output is not logits"
        );
        let (mut inputs, mut empty) = (Vec::new(), Vec::new());
        for input in &parts.graph()?.input {
            inputs.push(match input.name.as_str() {
                "input_ids" => PlainInput::Ids(whole(input)),
                "attention_mask" => PlainInput::Mask(whole(input)),
                "position_ids" => PlainInput::Positions(whole(input)),
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
        let (state, vocab) = parts.into_state(None, |input, symbols| {
            let (s, p) = (symbols.sym("S").to_dim(), symbols.sym("P").to_dim());
            Ok(match (input.name.as_str(), &input_dims(input)[..]) {
                ("input_ids" | "position_ids", _) => whole(input).fact([1.to_dim(), s]).into(),
                ("attention_mask", _) => whole(input).fact([1.to_dim(), p + s]).into(),
                (_, &[_, Some(heads), _, Some(dim)]) => {
                    f32::fact([1.to_dim(), heads.to_dim(), p, dim.to_dim()]).into()
                }
                (name, _) => return Err(GraphError::Input(name.into())),
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
    fn observe(&mut self, observer: Box<dyn Observer>) {
        observe(&self.state, observer);
    }

    fn forward(&mut self, batch: &Batch, threads: usize, logits: &mut Vec<f32>) -> TractResult<()> {
        turn(&self.state).install(batch, threads);
        let rows = &batch.rows;
        let first = rows.first().context("an empty batch")?.position;
        let past = self
            .past
            .as_ref()
            .filter(|_| first > 0)
            .unwrap_or(&self.empty);
        let row = |of: DatumType, values: Vec<i64>| -> TractResult<TValue> {
            let tensor = tensor1(&values).into_shape(&[1, values.len()])?;
            Ok(tensor.cast_to_dt(of)?.into_owned().into_tvalue())
        };
        let inputs = self.inputs.iter().map(|input| match *input {
            PlainInput::Ids(of) => row(of, rows.iter().map(|row| i64::from(row.token)).collect()),
            PlainInput::Mask(of) => row(of, vec![1; first + rows.len()]),
            PlainInput::Positions(of) => {
                row(of, rows.iter().map(|row| row.position as i64).collect())
            }
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

    fn kv_bytes_per_position(&self) -> usize {
        0
    }
}
