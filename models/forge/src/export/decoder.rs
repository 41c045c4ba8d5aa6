//! Draws a whole model in a form: interface, embedding, layers, head. How each of these is written down stands in the
//! module of its name.

use super::attention::Shared;
use super::form::{Architecture, Attention, Float, Form, Interface};
use super::linear::Quantised;
use super::model::Model;
use super::norm::Gamma;
use super::tape::{Habit, Tape};
use crate::llama::{Part, Shape};
use crate::onnx::{Axis, Writer, graph_value, int};
use anyhow::Result;
use std::collections::HashMap;
use tract_onnx::pb::tensor_proto::DataType;

pub(super) struct Decoder<'a> {
    pub(super) form: &'a Form,
    pub(super) model: &'a Model<'a>,
    pub(super) tape: Tape,
    /// Whether there is a past to join.
    pub(super) has_past: bool,
    /// Activations that are bytes already.
    pub(super) quantised: HashMap<String, Quantised>,
    /// The embedding dequantised as a whole.
    pub(super) whole_table: Option<String>,
}

/// Draws the model and finishes the file.
pub(super) fn write(onnx: Writer, form: &Form, model: &Model<'_>) -> Result<()> {
    let habit = match form.attention {
        Attention::Grouped { .. } => Habit::Builder,
        _ => Habit::Tracer,
    };
    let kind = match form.float {
        Float::F32 => DataType::Float,
        Float::F16(_) => DataType::Float16,
    };
    let mut decoder = Decoder {
        form,
        model,
        tape: Tape::new(onnx, habit, kind),
        has_past: true,
        quantised: HashMap::new(),
        whole_table: None,
    };
    decoder.interface();
    if form.interface == Interface::Merged {
        decoder.merged()?;
    } else {
        decoder.body()?;
    }
    decoder.tape.onnx.finish()
}

impl Decoder<'_> {
    pub(super) fn shape(&self) -> &Shape {
        self.model.shape
    }

    fn interface(&mut self) {
        use Axis::{Fixed, Named};
        let shape = self.model.shape;
        let (batch, sequence) = (Named("batch_size"), Named("sequence_length"));
        let total = Named("total_sequence_length");
        let (ids, float) = (DataType::Int64, self.tape.float);
        let onnx = &mut self.tape.onnx;
        onnx.input("input_ids", ids, &[batch, sequence]);
        onnx.input("attention_mask", ids, &[batch, total]);
        if self.form.takes_positions() {
            onnx.input("position_ids", ids, &[batch, sequence]);
        }
        let outside = |cast| if cast { DataType::Float } else { float };
        let logits = outside(self.form.casts_logits());
        onnx.output("logits", logits, &[batch, sequence, Fixed(shape.vocab)]);
        let kept = outside(self.form.casts_cache());
        let cache = |length| [batch, Fixed(shape.kv_heads), length, Fixed(shape.head_dim)];
        for layer in 0..shape.layers {
            for kind in ["key", "value"] {
                let (past, present) = outside_names(layer, kind);
                onnx.input(&past, kept, &cache(Named("past_sequence_length")));
                onnx.output(&present, kept, &cache(total));
            }
        }
        if self.form.interface == Interface::Merged {
            onnx.input("use_cache_branch", DataType::Bool, &[Fixed(1)]);
        }
    }

    /// What the cache's input and output are called inside: after and before their casts, if there are any.
    pub(super) fn cache_names(&self, layer: usize, kind: &str) -> (String, String) {
        if !self.form.casts_cache() {
            return outside_names(layer, kind);
        }
        let place = 2 * layer + usize::from(kind == "value");
        let first = if self.form.takes_positions() { 3 } else { 2 };
        (
            format!("graph_input_cast_{}", first + place),
            format!("graph_output_cast_{}", 1 + place),
        )
    }

    /// The casts of the cache where it enters and, if `leaves`, where it leaves.
    fn border(&mut self, leaves: bool) {
        if !self.form.casts_cache() {
            return;
        }
        for layer in 0..self.shape().layers {
            for kind in ["key", "value"] {
                let (past, present) = outside_names(layer, kind);
                let (inner_past, inner_present) = self.cache_names(layer, kind);
                let (from, to, float) = if leaves {
                    (inner_present, present, DataType::Float)
                } else {
                    (past, inner_past, self.tape.float)
                };
                let attributes = vec![int("to", float as i64)];
                self.tape
                    .op_into("graph_cast", "Cast", &[&from], attributes, &[&to]);
            }
        }
    }

    /// Two branches over the same weights, one for each answer to whether there is a past.
    fn merged(&mut self) -> Result<()> {
        let mut branches = Vec::new();
        for (has_past, attribute) in [(true, "then_branch"), (false, "else_branch")] {
            self.has_past = has_past;
            self.quantised.clear();
            self.whole_table = None;
            self.tape.restart();
            self.body()?;
            let graph = self.tape.onnx.branch(attribute);
            branches.push(graph_value(attribute, graph));
        }
        let outputs = self.tape.onnx.outputs();
        let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
        let inputs = ["use_cache_branch"];
        self.tape
            .onnx
            .named("optimum::if", "If", &inputs, &outputs, branches);
        Ok(())
    }

    fn body(&mut self) -> Result<()> {
        self.border(false);
        let mut x = self.embedding()?;
        if self.form.architecture == Architecture::Gemma {
            let root = self
                .tape
                .number("/model", (self.shape().width as f32).sqrt());
            x = self.tape.op("/model", "Mul", &[&x, &root]);
        }
        let shared = self.shared()?;
        let mut block = None;
        for layer in 0..self.shape().layers {
            (x, block) = match self.form.architecture {
                Architecture::Phi => self.side_by_side(layer, &x, block.as_deref(), &shared)?,
                _ => self.one_by_one(layer, &x, block.as_deref(), &shared)?,
            };
        }
        let last = self.shape().layers - 1;
        let outer = format!("/model/layers.{last}");
        let scope = match self.form.attention {
            Attention::Grouped { .. } => format!("/model/layers.{}/final_norm_layernorm", last + 1),
            _ => "/model/norm".to_owned(),
        };
        let gamma = Gamma::Of(Part::FinalNorm);
        let [x, _] = self.add_norm([&outer, &scope], gamma, &x, block.as_deref())?;
        self.head(&x)?;
        self.border(true);
        Ok(())
    }

    /// A layer: the state that entered it without what it adds last, and that.
    fn one_by_one(
        &mut self,
        layer: usize,
        x: &str,
        block: Option<&str>,
        shared: &Shared,
    ) -> Result<(String, Option<String>)> {
        let gemma = self.form.architecture == Architecture::Gemma;
        let scope = format!("/model/layers.{layer}");
        let module = |name: &str| format!("{scope}/{name}");
        let outer = format!("/model/layers.{}", layer.saturating_sub(1));
        let before = module("input_layernorm");
        let gamma = Gamma::Of(Part::AttentionNorm(layer));
        let [normed, x] = self.add_norm([&outer, &before], gamma, x, block)?;
        let mut block = self.attention(layer, &normed, shared)?;
        let mut between = module("post_attention_layernorm");
        if gemma {
            block = self.norm(&between, Gamma::Seeded, &block)?;
            between = module("pre_feedforward_layernorm");
        }
        let gamma = Gamma::Of(Part::MlpNorm(layer));
        let [normed, x] = self.add_norm([&scope, &between], gamma, &x, Some(&block))?;
        let mut block = self.gated(layer, &normed)?;
        if gemma {
            let after = module("post_feedforward_layernorm");
            block = self.norm(&after, Gamma::Seeded, &block)?;
        }
        Ok((x, Some(block)))
    }

    /// Phi's layer: one norm, and attention and MLP both read it.
    fn side_by_side(
        &mut self,
        layer: usize,
        x: &str,
        block: Option<&str>,
        shared: &Shared,
    ) -> Result<(String, Option<String>)> {
        let scope = format!("/model/layers.{layer}");
        let outer = format!("/model/layers.{}", layer.saturating_sub(1));
        let before = format!("{scope}/input_layernorm");
        let gamma = Gamma::Of(Part::AttentionNorm(layer));
        let [normed, x] = self.add_norm([&outer, &before], gamma, x, block)?;
        let attended = self.attention(layer, &normed, shared)?;
        let mlp = format!("{scope}/mlp");
        let up = self.linear(&format!("{mlp}/fc1"), &normed, &[Part::Up(layer)])?;
        let up = self.gelu(&format!("{mlp}/activation_fn"), &up);
        let down = self.linear(&format!("{mlp}/fc2"), &up, &[Part::Down(layer)])?;
        let both = self.tape.op(&scope, "Add", &[&attended, &down]);
        Ok((x, Some(both)))
    }

    /// `down(act(gate) · up)`.
    fn gated(&mut self, layer: usize, x: &str) -> Result<String> {
        let scope = format!("/model/layers.{layer}/mlp");
        let gate = self.linear(&format!("{scope}/gate_proj"), x, &[Part::Gate(layer)])?;
        let up = self.linear(&format!("{scope}/up_proj"), x, &[Part::Up(layer)])?;
        let inner = format!("{scope}/act_fn");
        let gate = if self.form.architecture == Architecture::Gemma {
            self.tanh_gelu(&inner, &gate)
        } else {
            let sigmoid = self.tape.op(&inner, "Sigmoid", &[&gate]);
            self.tape.op(&inner, "Mul", &[&gate, &sigmoid])
        };
        let gated = self.tape.op(&scope, "Mul", &[&gate, &up]);
        self.linear(&format!("{scope}/down_proj"), &gated, &[Part::Down(layer)])
    }

    /// `x / 2 · (1 + erf(x / √2))`.
    fn gelu(&mut self, scope: &str, x: &str) -> String {
        let tape = &mut self.tape;
        let [root, one, half] = [std::f32::consts::SQRT_2, 1.0, 0.5].map(|v| tape.number(scope, v));
        let inner = tape.op(scope, "Div", &[x, &root]);
        let inner = tape.op(scope, "Erf", &[&inner]);
        let inner = tape.op(scope, "Add", &[&inner, &one]);
        let out = tape.op(scope, "Mul", &[x, &inner]);
        tape.op(scope, "Mul", &[&out, &half])
    }

    /// `x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))`.
    fn tanh_gelu(&mut self, scope: &str, x: &str) -> String {
        let tape = &mut self.tape;
        let root = (2.0 / std::f32::consts::PI).sqrt();
        let [half, three, small, root, one] =
            [0.5, 3.0, 0.044_715, root, 1.0].map(|v| tape.number(scope, v));
        let halved = tape.op(scope, "Mul", &[&half, x]);
        let cube = tape.op(scope, "Pow", &[x, &three]);
        let cube = tape.op(scope, "Mul", &[&small, &cube]);
        let sum = tape.op(scope, "Add", &[x, &cube]);
        let inner = tape.op(scope, "Mul", &[&root, &sum]);
        let inner = tape.op(scope, "Tanh", &[&inner]);
        let inner = tape.op(scope, "Add", &[&one, &inner]);
        tape.op(scope, "Mul", &[&halved, &inner])
    }
}

/// The cache's input and output.
fn outside_names(layer: usize, kind: &str) -> (String, String) {
    (
        format!("past_key_values.{layer}.{kind}"),
        format!("present.{layer}.{kind}"),
    )
}
