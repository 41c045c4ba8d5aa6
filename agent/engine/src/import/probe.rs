//! Finds out by trying what an attention block does: tract runs the block as it is written, on random numbers, and
//! its results are compared with plain attention. Rotary angles, the scale and where a mask begins to hide keys are
//! read off the results. What agrees for several lengths, near and far, is taken for attention; all else is not.

use super::angles;
use super::attention::Region;
use super::extent::{Extents, Lengths};
use crate::onnx::Graph;
use crate::plan;
use std::cell::{Cell, OnceCell};
use std::collections::HashSet;
use tract_onnx::pb::{GraphProto, ModelProto, NodeProto, tensor_proto::DataType};
use tract_onnx::prelude::*;
#[allow(clippy::wildcard_imports)] // tract's macros expect all of it
use tract_onnx::tract_core::internal::*;

/// How far results may be off, relative to the largest number that went in: some rounding.
const TOLERANCE: f32 = 2e-4;
/// A scale this near to 1/√(head size) is that.
const SCALE_TOLERANCE: f32 = 1e-3;
/// Tokens and tokens before them that are tried, and how much larger than one the queries are: at last so large that
/// a limit on products would show.
const CASES: [(usize, usize, f32); 4] = [(5, 0, 3.0), (1, 7, 3.0), (4, 3, 3.0), (4, 3, 40.0)];
/// How much larger than one keys and values are where a limit on them would show.
const LOUD: f32 = 1000.0;
/// Tokens up to which [`CASES`] has shown that attention is plain.
const SHORT: usize = 3;
/// Numbers in one tensor of the long case, at most.
const LONG_MAX: usize = 48 << 20;

/// The sizes of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

/// What a block was found to do.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rotation {
    /// Leading channels of a head that are rotated, channel i with channel i + dims / 2.
    pub(super) dims: usize,
    /// `[positions, dims / 2]`
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
    /// Of products of queries and keys.
    pub(super) scale: f32,
    /// Up to so many tokens it is plain causal attention.
    pub(super) positions: usize,
}

/// A block that can be run.
pub(super) struct Probe<'a> {
    region: &'a Region,
    new_keys: Machine<'a>,
    keys: Machine<'a>,
    values: Machine<'a>,
    whole: Machine<'a>,
}

/// What goes into a run, each `[tokens, heads · head_dim]`, the past `[kv_heads, past, head_dim]`.
struct Case {
    tokens: usize,
    past: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    past_key: Vec<f32>,
    past_value: Vec<f32>,
}

impl Case {
    /// Zeros.
    fn zeros(of: Sizes, tokens: usize, past: usize) -> Self {
        let kv = of.kv_heads * of.head_dim;
        Self {
            tokens,
            past,
            q: vec![0.0; tokens * of.heads * of.head_dim],
            k: vec![0.0; tokens * kv],
            v: vec![0.0; tokens * kv],
            past_key: vec![0.0; past * kv],
            past_value: vec![0.0; past * kv],
        }
    }

    fn parts(&mut self) -> [&mut Vec<f32>; 5] {
        [
            &mut self.q,
            &mut self.k,
            &mut self.v,
            &mut self.past_key,
            &mut self.past_value,
        ]
    }

    /// The same with all numbers larger.
    fn louder(mut self) -> Self {
        for values in self.parts() {
            for value in values {
                *value *= LOUD;
            }
        }
        self
    }
}

impl<'a> Probe<'a> {
    /// `effort` is what may be spent on trying.
    pub(super) fn new(graph: &'a Graph, region: &'a Region, effort: &'a Cell<u64>) -> Self {
        let machine = |output: &'a str| Machine {
            graph,
            region,
            effort,
            output,
            needed: region.behind(output),
            compiled: OnceCell::new(),
        };
        Self {
            region,
            new_keys: machine(&region.new_keys),
            keys: machine(&region.present[0]),
            values: machine(&region.present[1]),
            whole: machine(&region.output),
        }
    }

    /// What the block does up to `positions` tokens, or why that is not attention.
    pub(super) fn recognise(&self, positions: usize) -> Result<Rotation, String> {
        let failed = |e: TractError| format!("can't be run by itself: {e:#}");
        let random = &mut Random(7);
        if !self.passes_values(random).map_err(failed)? {
            return Err("does not keep values as they are".into());
        }
        let found = self.rotation(positions, random).map_err(failed)?;
        let mut found =
            found.ok_or("rotates keys in a way that is not rotary embedding by halves")?;
        found.scale = self.scale(&found, random).map_err(failed)?;
        for (tokens, past, size) in CASES {
            let mut case = self
                .whole
                .random(self.sizes(), tokens, past, random)
                .map_err(failed)?;
            for value in &mut case.q {
                *value *= size;
            }
            if !self.agrees(&found, &case).map_err(failed)? {
                return Err("is not causal attention over all earlier tokens".into());
            }
        }
        found.positions = self.reach(&found, random).map_err(failed)?;
        Ok(found)
    }

    fn sizes(&self) -> Sizes {
        self.region.sizes
    }

    /// Sizes of long cases of which keys alone are read: no queries, where they have a linear of their own.
    fn without_queries(&self) -> Sizes {
        let heads = if self.region.linears.len() == 1 {
            self.sizes().heads
        } else {
            0
        };
        Sizes {
            heads,
            ..self.sizes()
        }
    }

    fn passes_values(&self, random: &mut Random) -> TractResult<bool> {
        let of = self.sizes();
        let case = self.values.random(of, 5, 3, random)?.louder();
        let present = self.values.run(&case)?;
        Ok(close(
            &present,
            &cache(of, &case.past_value, &case.v, case.past),
        ))
    }

    /// Channels that are rotated, cosines and sines, without the scale. `None` where no such rotation explains what
    /// the cache gets.
    fn rotation(&self, positions: usize, random: &mut Random) -> TractResult<Option<Rotation>> {
        let of = self.sizes();
        let dim = of.head_dim;
        let case = self
            .new_keys
            .random(self.without_queries(), positions, 0, random)?;
        let rotated = self.new_keys.run(&case)?;
        for dims in [dim, dim / 2, dim / 4, dim / 4 * 3, 0] {
            if !dims.is_multiple_of(2) {
                continue;
            }
            let found = self.angles(dims, positions)?;
            let wanted = found.turned(&case.k, 0, of.kv_heads, dim);
            if !close(&rotated, &cache(of, &[], &wanted, 0)) {
                continue;
            }
            // By place alone, wherever a step begins, and earlier keys stay.
            let later = self.keys.random(of, 3, 1, random)?.louder();
            let wanted = found.turned(&later.k, later.past, of.kv_heads, dim);
            let wanted = cache(of, &later.past_key, &wanted, later.past);
            return Ok(close(&self.keys.run(&later)?, &wanted).then_some(found));
        }
        Ok(None)
    }

    /// Cosines and sines as they come out when keys are one in the first half of the rotated channels, else zero.
    fn angles(&self, dims: usize, positions: usize) -> TractResult<Rotation> {
        let (of, half) = (self.sizes(), dims / 2);
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        if half > 0 {
            let mut ones = self.new_keys.zeros(self.without_queries(), positions, 0)?;
            for head in ones.k.chunks_mut(of.head_dim) {
                head[..half].fill(1.0);
            }
            let turned = self.new_keys.run(&ones)?;
            ensure!(turned.len() == ones.k.len(), "keys of another size");
            for head in turned.chunks(of.head_dim).take(positions) {
                cos.extend_from_slice(&head[..half]);
                sin.extend_from_slice(&head[half..dims]);
            }
        }
        Ok(Rotation {
            dims,
            cos,
            sin,
            scale: 0.0,
            positions,
        })
    }

    /// The factor on products, from how two keys share the attention.
    fn scale(&self, found: &Rotation, random: &mut Random) -> TractResult<f32> {
        let of = self.sizes();
        let dim = of.head_dim;
        let mut case = self.whole.random(of, 1, 1, random)?;
        case.v.fill(1.0);
        case.past_value.fill(0.0);
        let shares = self.whole.run(&case)?;
        ensure!(shares.len() == of.heads * dim, "an output of another size");
        let q = found.turned(&case.q, case.past, of.heads, dim);
        let k = found.turned(&case.k, case.past, of.kv_heads, dim);
        let mut scales: Vec<f32> = Vec::new();
        for head in 0..of.heads {
            let key = head / (of.heads / of.kv_heads) * dim;
            let query = &q[head * dim..][..dim];
            let apart = dot(query, &k[key..][..dim]) - dot(query, &case.past_key[key..][..dim]);
            let share = shares[head * dim];
            scales.push((share / (1.0 - share)).ln() / apart);
        }
        scales.sort_by(f32::total_cmp);
        let scale = scales[scales.len() / 2];
        let usual = 1.0 / (dim as f32).sqrt();
        Ok(if (scale / usual - 1.0).abs() < SCALE_TOLERANCE {
            usual
        } else {
            scale
        })
    }

    /// Whether the block's result is plain attention's.
    fn agrees(&self, found: &Rotation, case: &Case) -> TractResult<bool> {
        let of = self.sizes();
        let pairs = case.tokens.saturating_mul(case.past + case.tokens);
        self.whole.charge([pairs, of.heads, 2 * of.head_dim])?;
        Ok(close(&self.whole.run(case)?, &found.attend(of, case)))
    }

    /// Up to how many tokens it agrees: all that can be tried, or as many as a sliding window shows.
    fn reach(&self, found: &Rotation, random: &mut Random) -> TractResult<usize> {
        let of = self.sizes();
        let longest = found.positions.min(LONG_MAX / (of.heads * of.head_dim));
        if longest <= SHORT {
            return Ok(longest);
        }
        let mut agrees =
            |length| self.agrees(found, &self.whole.random(of, 2, length - 2, random)?);
        if agrees(longest)? {
            return Ok(longest);
        }
        let (mut good, mut bad) = (SHORT, longest);
        while bad - good > 1 {
            let middle = usize::midpoint(good, bad);
            if agrees(middle)? {
                good = middle;
            } else {
                bad = middle;
            }
        }
        Ok(good)
    }
}

impl Rotation {
    /// Rows `[tokens, heads · dim]` as they are after rotation, the first of them at this position.
    fn turned(&self, rows: &[f32], first: usize, heads: usize, dim: usize) -> Vec<f32> {
        let half = self.dims / 2;
        let mut rows = rows.to_vec();
        for (at, head) in rows.chunks_mut(dim).enumerate() {
            let angle = (first + at / heads) * half;
            let angles = self.cos[angle..].iter().zip(&self.sin[angle..]);
            for (i, (cos, sin)) in angles.take(half).enumerate() {
                let (a, b) = (head[i], head[i + half]);
                head[i] = a * cos - b * sin;
                head[i + half] = b * cos + a * sin;
            }
        }
        rows
    }

    /// Causal attention as textbooks have it, `[tokens, heads · head_dim]`.
    fn attend(&self, of: Sizes, case: &Case) -> Vec<f32> {
        let dim = of.head_dim;
        let q = self.turned(&case.q, case.past, of.heads, dim);
        let k = self.turned(&case.k, case.past, of.kv_heads, dim);
        let keys = cache(of, &case.past_key, &k, case.past);
        let values = cache(of, &case.past_value, &case.v, case.past);
        let all = case.past + case.tokens;
        let mut out = vec![0.0; q.len()];
        for (at, (query, out)) in q.chunks(dim).zip(out.chunks_mut(dim)).enumerate() {
            let (token, head) = (at / of.heads, at % of.heads);
            let first = head / (of.heads / of.kv_heads) * all;
            let seen = case.past + token + 1;
            let key = |j: usize| &keys[(first + j) * dim..][..dim];
            let products: Vec<f32> = (0..seen).map(|j| dot(query, key(j)) * self.scale).collect();
            let largest = products.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights: Vec<f32> = products.iter().map(|p| (p - largest).exp()).collect();
            let sum: f32 = weights.iter().sum();
            for (j, weight) in weights.iter().enumerate() {
                let value = &values[(first + j) * dim..][..dim];
                out.iter_mut()
                    .zip(value)
                    .for_each(|(out, value)| *out += weight / sum * value);
            }
        }
        out
    }
}

/// `[kv_heads, past + tokens, head_dim]` from the past and new rows `[tokens, kv_heads · head_dim]`.
fn cache(of: Sizes, past: &[f32], new: &[f32], past_len: usize) -> Vec<f32> {
    let dim = of.head_dim;
    let mut all = Vec::with_capacity(past.len() + new.len());
    for head in 0..of.kv_heads {
        all.extend_from_slice(&past[head * past_len * dim..][..past_len * dim]);
        for row in new.chunks(of.kv_heads * dim) {
            all.extend_from_slice(&row[head * dim..][..dim]);
        }
    }
    all
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn close(a: &[f32], b: &[f32]) -> bool {
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= TOLERANCE * b.abs().max(1.0);
    a.len() == b.len() && a.iter().zip(b).all(near)
}

/// SplitMix64: <https://prng.di.unimi.it/splitmix64.c>
struct Random(u64);

impl Random {
    /// From 0 up to 1.
    fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    }
}

/// One result of a block, by tract.
struct Machine<'a> {
    graph: &'a Graph,
    region: &'a Region,
    /// Numbers that may still be made to try things out.
    effort: &'a Cell<u64>,
    output: &'a str,
    /// All values that the result is made of.
    needed: HashSet<&'a str>,
    /// The plan for any length, once it was tried; `None` where tract can't make it.
    compiled: OnceCell<Option<Arc<TypedRunnableModel>>>,
}

impl Machine<'_> {
    /// Numbers up to one in size, for one run.
    fn random(
        &self,
        of: Sizes,
        tokens: usize,
        past: usize,
        random: &mut Random,
    ) -> TractResult<Case> {
        let mut case = self.zeros(of, tokens, past)?;
        for values in case.parts() {
            for value in values {
                *value = 2.0 * random.unit() - 1.0;
            }
        }
        Ok(case)
    }

    /// Zeros, for one run.
    fn zeros(&self, of: Sizes, tokens: usize, past: usize) -> TractResult<Case> {
        self.spend(of, Lengths { tokens, past })?;
        Ok(Case::zeros(of, tokens, past))
    }

    /// Refuses runs that take or make too much, before there is anything to run on.
    fn spend(&self, case: Sizes, lengths: Lengths) -> TractResult<()> {
        let Lengths { tokens, past } = lengths;
        let mut extents = Extents::new(self.graph, self.effort.get());
        let of = self.region.sizes;
        let wrong = |what: String| format_err!("it has {what}");
        // The case has numbers for what this machine doesn't read, too.
        let rows = [
            (case.heads, tokens),
            (case.kv_heads, tokens),
            (case.kv_heads, past),
        ];
        for (heads, rows) in rows {
            extents
                .put("", &[heads, rows, case.head_dim])
                .map_err(wrong)?;
            self.charge([heads, rows, case.head_dim])?;
        }
        for name in self.names() {
            let mut linears = self.region.linears.iter();
            let fed = if let Some((_, width)) = linears.find(|(linear, _)| linear == name) {
                extents.put(name, &[1, tokens, *width])
            } else {
                let cache = [1, of.kv_heads, past, of.head_dim].map(Some);
                extents.feed(name, &cache, Some(self.element(name)), lengths)
            };
            fed.map_err(wrong)?;
        }
        let stored = self.region.stored.iter();
        let stored = stored.filter_map(|name| self.graph.initializer(name));
        extents.follow(self.nodes(), stored).map_err(wrong)?;
        self.take(extents.effort())
    }

    /// Takes what is computed beside tract from the effort that is left: the product of these.
    fn charge(&self, sizes: [usize; 3]) -> TractResult<()> {
        let sizes = sizes.iter().map(|&n| n as u64);
        self.take(sizes.fold(1, u64::saturating_mul))
    }

    fn take(&self, effort: u64) -> TractResult<()> {
        let left = self.effort.get().checked_sub(effort);
        self.effort.set(left.context("that takes too long")?);
        Ok(())
    }

    /// Runs it for any length, or, where tract can't plan that, for these lengths alone.
    ///
    /// tract panics at some graphs and sizes; here that is a block that can't be run.
    fn run(&self, case: &Case) -> TractResult<Vec<f32>> {
        plan::caught(|| self.run_or_panic(case))
    }

    /// Those that its result hangs on, in order.
    fn nodes(&self) -> impl Iterator<Item = &NodeProto> {
        let needed = |node: &&NodeProto| node.output.iter().any(|name| self.needs(name));
        self.region.nodes.iter().filter(needed)
    }

    fn needs(&self, name: &str) -> bool {
        self.needed.contains(name)
    }

    fn run_or_panic(&self, case: &Case) -> TractResult<Vec<f32>> {
        let any = self.compiled.get_or_init(|| self.compile(None).ok());
        if let Some(model) = any
            && let Ok(out) = self.run_on(model, case)
        {
            return Ok(out);
        }
        let model = self.compile(Some((case.tokens, case.past)))?;
        self.run_on(&model, case)
    }

    fn compile(&self, lengths: Option<(usize, usize)>) -> TractResult<Arc<TypedRunnableModel>> {
        let model = ModelProto {
            opset_import: self.graph.model.opset_import.clone(),
            ir_version: self.graph.model.ir_version,
            graph: Some(self.proto()?),
            ..ModelProto::default()
        };
        let onnx = angles::reader();
        let mut parsed = onnx.parse(&model, None)?;
        ensure!(
            parsed.unresolved_inputs.is_empty(),
            "nothing makes {:?}",
            parsed.unresolved_inputs
        );
        let symbols = &parsed.model.symbols;
        let (tokens, past) = lengths.map_or_else(
            || (symbols.sym("S").to_dim(), symbols.sym("P").to_dim()),
            |(tokens, past)| (tokens.to_dim(), past.to_dim()),
        );
        for (index, name) in self.names().enumerate() {
            let fact = self.fact(name, &tokens, &past)?;
            parsed.model.set_input_fact(index, fact)?;
        }
        plan::optimised(parsed.model)?.into_runnable()
    }

    /// The inputs that its result hangs on, in order.
    fn names(&self) -> impl Iterator<Item = &str> {
        let linears = self.region.linears.iter().map(|(name, _)| name);
        let all = linears.chain(&self.region.inputs).map(String::as_str);
        all.filter(|name| self.needed.contains(*name))
    }

    fn proto(&self) -> TractResult<GraphProto> {
        let stored = self.region.stored.iter().filter(|name| self.needs(name));
        let stored = stored.map(|name| {
            let tensor = self
                .graph
                .initializer(name)
                .context("a stored tensor is missing")?;
            Ok(self.graph.resident(tensor)?)
        });
        Ok(GraphProto {
            node: self.graph.settled(self.nodes())?,
            initializer: stored.collect::<TractResult<_>>()?,
            input: self
                .names()
                .map(|name| crate::onnx::value_info(name, self.element(name)))
                .collect(),
            output: vec![crate::onnx::value_info(self.output, DataType::Float as i32)],
            ..GraphProto::default()
        })
    }

    fn element(&self, name: &str) -> i32 {
        let stated = self
            .graph
            .proto()
            .input
            .iter()
            .find(|input| input.name == name);
        stated
            .and_then(crate::onnx::input_type)
            .unwrap_or(DataType::Float as i32)
    }

    fn fact(&self, name: &str, tokens: &TDim, past: &TDim) -> TractResult<InferenceFact> {
        let of = self.region.sizes;
        if let Some((_, width)) = self
            .region
            .linears
            .iter()
            .find(|(linear, _)| linear == name)
        {
            return Ok(f32::fact([1.to_dim(), tokens.clone(), width.to_dim()]).into());
        }
        let int = if self.element(name) == DataType::Int32 as i32 {
            i32::datum_type()
        } else {
            i64::datum_type()
        };
        Ok(match name {
            "input_ids" | "position_ids" => int.fact([1.to_dim(), tokens.clone()]).into(),
            "attention_mask" => int.fact([1.to_dim(), past.clone() + tokens]).into(),
            name if name.starts_with("past_key_values.") => f32::fact([
                1.to_dim(),
                of.kv_heads.to_dim(),
                past.clone(),
                of.head_dim.to_dim(),
            ])
            .into(),
            other => bail!("it reads the input {other}"),
        })
    }

    fn run_on(&self, model: &Arc<TypedRunnableModel>, case: &Case) -> TractResult<Vec<f32>> {
        let of = self.region.sizes;
        let mut inputs = TVec::new();
        for name in self.names() {
            let int = |values: Vec<i64>| -> TractResult<Tensor> {
                let tensor = tensor1(&values).into_shape(&[1, values.len()])?;
                let narrow = self.element(name) == DataType::Int32 as i32;
                Ok(if narrow {
                    tensor.cast_to::<i32>()?.into_owned()
                } else {
                    tensor
                })
            };
            let floats = |shape: &[usize], values: &[f32]| Tensor::from_shape(shape, values);
            let past = [1, of.kv_heads, case.past, of.head_dim];
            let linear = self
                .region
                .linears
                .iter()
                .position(|(linear, _)| linear == name);
            let tensor = match (name, linear) {
                (_, Some(index)) => {
                    let width = self.region.linears[index].1;
                    floats(&[1, case.tokens, width], &self.fed(index, case))?
                }
                ("input_ids", _) => int(vec![0; case.tokens])?,
                ("position_ids", _) => int((case.past..case.past + case.tokens)
                    .map(|p| p as i64)
                    .collect())?,
                ("attention_mask", _) => int(vec![1; case.past + case.tokens])?,
                (name, _) if *name == self.region.past[0] => floats(&past, &case.past_key)?,
                (name, _) if *name == self.region.past[1] => floats(&past, &case.past_value)?,
                // Another layer's, for its length.
                _ => Tensor::zero::<f32>(&past)?,
            };
            inputs.push(tensor.into_tvalue());
        }
        let outputs = model.run(inputs)?;
        let values = outputs[0].try_as_plain_ram()?.as_slice::<f32>()?;
        let parted = outputs[0].rank() == 4 || self.output == self.region.output;
        Ok(if parted {
            values.to_vec()
        } else {
            cache(of, &[], values, 0)
        })
    }

    /// What a linear's value holds, `[tokens, width]`.
    fn fed(&self, index: usize, case: &Case) -> Vec<f32> {
        let of = self.region.sizes;
        if self.region.linears.len() == 3 {
            return [&case.q, &case.k, &case.v][index].clone();
        }
        let (wide, narrow) = (of.heads * of.head_dim, of.kv_heads * of.head_dim);
        let rows = case
            .q
            .chunks(wide)
            .zip(case.k.chunks(narrow))
            .zip(case.v.chunks(narrow));
        rows.flat_map(|((q, k), v)| [q, k, v].concat()).collect()
    }
}
