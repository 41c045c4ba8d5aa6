//! The native ONNX form of a llama-like model: standard operators of opset 23, so that any runtime that
//! speaks it is an oracle for ours. Where the weights come from is [`Weights`]' business.
//!
//! A layer, each linear being `DequantizeLinear → MatMul` in int8 and `MatMul` in f32:
//!
//! ```text
//! x ─ RMSNormalization ─┬ q ─ RotaryEmbedding ─┐
//!                       ├ k ─ RotaryEmbedding ─┼ Attention ─ o ─ Add(x) = y
//!                       └ v ───────────────────┘
//! y ─ RMSNormalization ─┬ gate ─┬ Sigmoid ─ Mul ─ Mul ─ down ─ Add(y)
//!                       └ up    └────────────┘    │
//!                         └───────────────────────┘
//! ```
//!
//! Attention is causal by its attribute, which counts positions from the past's length. `attention_mask` is
//! an input because every caller of such graphs passes one; nothing reads it, so batches can't be padded.

use crate::Precision;
use crate::llama::{Part, Shape, Weights, rotary_tables};
use crate::onnx::{Axis, Writer, float, int, ints};
use crate::quant::{BLOCK, quantise};
use anyhow::{Result, ensure};
use indicatif::ProgressBar;
use std::path::Path;
use tract_onnx::pb::tensor_proto::DataType;

/// Writes the graph and its weights into `dir`. The bar advances by one for each weight.
pub fn write(
    dir: &Path,
    name: &str,
    shape: &Shape,
    precision: Precision,
    weights: &dyn Weights,
    bar: &ProgressBar,
) -> Result<()> {
    shape.check()?;
    let onnx = Writer::create(dir, name)?;
    let mut graph = Graph {
        onnx,
        shape,
        precision,
        weights,
        bar,
    };
    graph.interface();
    graph.tables()?;
    let mut x = graph.embedding()?;
    for layer in 0..shape.layers {
        let y = graph.attention(layer, &x)?;
        x = graph.mlp(layer, &y)?;
    }
    let x = graph.norm(Part::FinalNorm, "final_norm", &x)?;
    graph.head(&x);
    graph.onnx.finish()
}

/// The bytes that [`write`] takes on disk, to within the graph's own few hundred kilobytes.
pub fn bytes(shape: &Shape, precision: Precision) -> u64 {
    let tables = (shape.context * shape.head_dim * 4) as u64;
    tables
        + match precision {
            Precision::F32 => shape.weights() * 4,
            Precision::Int8 => shape.weights() * (BLOCK as u64 + 4) / BLOCK as u64,
        }
}

struct Graph<'a> {
    onnx: Writer,
    shape: &'a Shape,
    precision: Precision,
    weights: &'a dyn Weights,
    bar: &'a ProgressBar,
}

impl Graph<'_> {
    fn interface(&mut self) {
        use Axis::{Fixed, Named};
        let (onnx, shape) = (&mut self.onnx, self.shape);
        let (batch, sequence) = (Named("batch"), Named("sequence"));
        onnx.input("input_ids", DataType::Int64, &[batch, sequence]);
        onnx.input("attention_mask", DataType::Int64, &[batch, Named("total")]);
        onnx.input("position_ids", DataType::Int64, &[batch, sequence]);
        onnx.output(
            "logits",
            DataType::Float,
            &[batch, sequence, Fixed(shape.vocab)],
        );
        let cache = |length| {
            [
                batch,
                Fixed(shape.kv_heads),
                Named(length),
                Fixed(shape.head_dim),
            ]
        };
        for layer in 0..shape.layers {
            for kind in ["key", "value"] {
                onnx.input(
                    &format!("past_key_values.{layer}.{kind}"),
                    DataType::Float,
                    &cache("past"),
                );
                onnx.output(
                    &format!("present.{layer}.{kind}"),
                    DataType::Float,
                    &cache("total"),
                );
            }
        }
    }

    fn tables(&mut self) -> Result<()> {
        let (cos, sin) = rotary_tables(self.shape);
        let size = [self.shape.context, self.shape.head_dim / 2];
        self.onnx.matrix_f32("rope.cos", size, &cos)?;
        self.onnx.matrix_f32("rope.sin", size, &sin)
    }

    fn embedding(&mut self) -> Result<String> {
        let [rows, columns] = self.shape.of(Part::Embed);
        let table = self.load(Part::Embed)?;
        match self.precision {
            Precision::F32 => {
                self.onnx
                    .matrix_f32("embed.weight", [rows, columns], &table)?;
                self.onnx.node(
                    "Gather",
                    &["embed.weight", "input_ids"],
                    &["embed.out"],
                    vec![],
                );
            }
            Precision::Int8 => {
                let table = quantise(&table, columns);
                self.onnx
                    .matrix_i8("embed.q", [rows, columns], &table.weights)?;
                self.onnx
                    .matrix_f32("embed.scale", [rows, columns / BLOCK], &table.scales)?;
                self.onnx.node(
                    "Gather",
                    &["embed.q", "input_ids"],
                    &["embed.rows.q"],
                    vec![],
                );
                self.onnx.node(
                    "Gather",
                    &["embed.scale", "input_ids"],
                    &["embed.rows.scale"],
                    vec![],
                );
                self.dequantise("embed.rows", "embed.out", 2);
            }
        }
        Ok("embed.out".to_owned())
    }

    /// The head reads the embedding's own table, transposed, so that it is stored once.
    fn head(&mut self, x: &str) {
        let perm = || vec![ints("perm", &[1, 0])];
        match self.precision {
            Precision::F32 => {
                self.onnx
                    .node("Transpose", &["embed.weight"], &["head.weight"], perm());
            }
            Precision::Int8 => {
                self.onnx
                    .node("Transpose", &["embed.q"], &["head.q"], perm());
                self.onnx
                    .node("Transpose", &["embed.scale"], &["head.scale"], perm());
                self.dequantise("head", "head.weight", 0);
            }
        }
        self.onnx
            .node("MatMul", &[x, "head.weight"], &["logits"], vec![]);
    }

    fn attention(&mut self, layer: usize, x: &str) -> Result<String> {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let normed = self.norm(Part::AttentionNorm(layer), &name("attn_norm"), x)?;
        let q = self.linear(Part::Query(layer), &name("q_proj"), &normed)?;
        let k = self.linear(Part::Key(layer), &name("k_proj"), &normed)?;
        let v = self.linear(Part::Value(layer), &name("v_proj"), &normed)?;
        let q = self.rotary(&name("q_rope"), &q, self.shape.heads);
        let k = self.rotary(&name("k_rope"), &k, self.shape.kv_heads);
        let attended = name("attn.out");
        let past = |kind| format!("past_key_values.{layer}.{kind}");
        let present = |kind| format!("present.{layer}.{kind}");
        self.onnx.node(
            "Attention",
            &[&q, &k, &v, "", &past("key"), &past("value")],
            &[&attended, &present("key"), &present("value")],
            vec![
                int("is_causal", 1),
                int("q_num_heads", self.shape.heads as i64),
                int("kv_num_heads", self.shape.kv_heads as i64),
                float("scale", 1.0 / (self.shape.head_dim as f32).sqrt()),
            ],
        );
        let out = self.linear(Part::Output(layer), &name("o_proj"), &attended)?;
        Ok(self.binary("Add", &name("attn_residual"), x, &out))
    }

    fn mlp(&mut self, layer: usize, x: &str) -> Result<String> {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let normed = self.norm(Part::MlpNorm(layer), &name("mlp_norm"), x)?;
        let gate = self.linear(Part::Gate(layer), &name("gate_proj"), &normed)?;
        let up = self.linear(Part::Up(layer), &name("up_proj"), &normed)?;
        let sigmoid = name("mlp.sigmoid.out");
        self.onnx.node("Sigmoid", &[&gate], &[&sigmoid], vec![]);
        let silu = self.binary("Mul", &name("mlp.silu"), &gate, &sigmoid);
        let gated = self.binary("Mul", &name("mlp.gated"), &silu, &up);
        let out = self.linear(Part::Down(layer), &name("down_proj"), &gated)?;
        Ok(self.binary("Add", &name("mlp_residual"), x, &out))
    }

    fn norm(&mut self, part: Part, name: &str, x: &str) -> Result<String> {
        let (gamma, out) = (format!("{name}.gamma"), format!("{name}.out"));
        let values = self.load(part)?;
        self.onnx.vector(&gamma, &values);
        let attributes = vec![int("axis", -1), float("epsilon", self.shape.epsilon)];
        self.onnx
            .node("RMSNormalization", &[x, &gamma], &[&out], attributes);
        Ok(out)
    }

    fn rotary(&mut self, name: &str, x: &str, heads: usize) -> String {
        let out = format!("{name}.out");
        let attributes = vec![int("interleaved", 0), int("num_heads", heads as i64)];
        let inputs = [x, "rope.cos", "rope.sin", "position_ids"];
        self.onnx
            .node("RotaryEmbedding", &inputs, &[&out], attributes);
        out
    }

    /// `x · W` with W stored as `[inputs, outputs]`, as ONNX's MatMul wants it.
    fn linear(&mut self, part: Part, name: &str, x: &str) -> Result<String> {
        let [rows, columns] = self.shape.of(part);
        let values = self.load(part)?;
        let (weight, out) = (format!("{name}.weight"), format!("{name}.out"));
        match self.precision {
            Precision::F32 => {
                self.onnx
                    .matrix_f32(&weight, [columns, rows], &transposed(&values, columns))?;
            }
            Precision::Int8 => {
                let quantised = quantise(&values, columns);
                let weights = transposed(&quantised.weights, columns);
                let scales = transposed(&quantised.scales, columns / BLOCK);
                self.onnx
                    .matrix_i8(&format!("{name}.q"), [columns, rows], &weights)?;
                self.onnx
                    .matrix_f32(&format!("{name}.scale"), [columns / BLOCK, rows], &scales)?;
                self.dequantise(name, &weight, 0);
            }
        }
        self.onnx.node("MatMul", &[x, &weight], &[&out], vec![]);
        Ok(out)
    }

    /// Multiplies `{source}.q` with `{source}.scale`, whose blocks lie along `axis`.
    fn dequantise(&mut self, source: &str, out: &str, axis: i64) {
        let (q, scale) = (format!("{source}.q"), format!("{source}.scale"));
        let attributes = vec![int("axis", axis), int("block_size", BLOCK as i64)];
        self.onnx
            .node("DequantizeLinear", &[&q, &scale], &[out], attributes);
    }

    fn binary(&mut self, operator: &str, name: &str, a: &str, b: &str) -> String {
        let out = format!("{name}.out");
        self.onnx.node(operator, &[a, b], &[&out], vec![]);
        out
    }

    fn load(&self, part: Part) -> Result<Vec<f32>> {
        let values = self.weights.load(part)?;
        let [rows, columns] = self.shape.of(part);
        ensure!(
            values.len() == rows * columns,
            "{part:?} has {} weights where the model's sizes ask for {rows} × {columns}",
            values.len()
        );
        ensure!(
            values.iter().all(|v| v.is_finite()),
            "{part:?} holds a weight that is not a number"
        );
        self.bar.inc(values.len() as u64);
        Ok(values)
    }
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    let rows = values.len() / columns;
    let mut out = Vec::with_capacity(values.len());
    for column in 0..columns {
        out.extend((0..rows).map(|row| values[row * columns + column]));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::transposed;

    #[test]
    fn transposing_swaps_rows_and_columns() {
        assert_eq!(transposed(&[1, 2, 3, 4, 5, 6], 3), [1, 4, 2, 5, 3, 6]);
    }
}
