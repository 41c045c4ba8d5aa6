//! The native ONNX form of a llama-like model: operators of opset 23 (and in q4 ONNX Runtime's `MatMulNBits`), so
//! that any runtime that speaks it is an oracle for ours. Where the weights come from is [`Weights`]' business.
//!
//! A layer, each linear being `DequantizeLinear → MatMul` in int8, `MatMulNBits` in q4 and `MatMul` in f32:
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
//! A linear that has a bias is followed by an `Add` of it, an f32 vector in every precision.
//!
//! Attention is causal by its attribute, which counts positions from the past's length. `attention_mask` is
//! an input because every caller of such graphs passes one; nothing reads it, so batches can't be padded.

use crate::Precision;
use crate::llama::{Decoder, Part, Shape, Weights};
use crate::onnx::{Axis, Element, Writer, float, int, ints};
use crate::quant::{self, BLOCK};
use crate::rotary;
use crate::stored::{Eight, Four, Stored};
use anyhow::{Result, ensure};
use indicatif::ProgressBar;
use std::ops::Range;
use std::path::Path;
use tract_onnx::pb::tensor_proto::DataType;

/// Weights that are loaded and quantised at a time.
const PIECE: usize = 1 << 20;
/// Columns that are transposed at a time: the part of a matrix that they touch stays in a core's cache.
const TRANSPOSED: usize = 64;
/// Four-bit linears, and what they ask for: <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>
const MATMUL_N_BITS: &str = "com.microsoft.MatMulNBits";

/// Writes the graph and its weights into `dir`. The bar advances by one for each weight.
///
/// A weight that its source stores in the precision asked for is carried as it is. The most that is in memory at
/// once is the largest of a layer's linears, and the scales of the embedding or the head.
pub fn write(
    dir: &Path,
    name: &str,
    decoder: &Decoder,
    precision: Precision,
    weights: &dyn Weights,
    bar: &ProgressBar,
) -> Result<()> {
    decoder.check()?;
    let onnx = Writer::create(dir, name)?;
    let mut graph = Graph {
        onnx,
        decoder,
        shape: &decoder.shape,
        precision,
        weights,
        bar,
    };
    graph.interface();
    graph.tables()?;
    let mut x = graph.embedding()?;
    for layer in 0..decoder.shape.layers {
        let y = graph.attention(layer, &x)?;
        x = graph.mlp(layer, &y)?;
    }
    let x = graph.norm(Part::FinalNorm, "final_norm", &x)?;
    graph.head(&x)?;
    graph.onnx.finish()
}

/// The bytes that [`write`] takes on disk, to within the graph's own few hundred kilobytes.
pub fn bytes(decoder: &Decoder, precision: Precision) -> u64 {
    let (shape, weights) = (&decoder.shape, decoder.weights());
    let rotary = (shape.context * shape.head_dim * 4) as u64;
    rotary
        + match precision {
            Precision::F32 => weights * 4,
            Precision::Int8 => int8(weights),
            Precision::Q4 => {
                let tables = shape.count(Part::Embed) * if decoder.tied { 1 } else { 2 };
                int8(tables) + (weights - tables) * (BLOCK as u64 / 2 + 8) / BLOCK as u64
            }
        }
}

fn int8(weights: u64) -> u64 {
    weights * (BLOCK as u64 + 4) / BLOCK as u64
}

struct Graph<'a> {
    onnx: Writer,
    decoder: &'a Decoder,
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
        let (cos, sin) = rotary::tables(self.shape, &self.decoder.scaling);
        let size = [self.shape.context, self.shape.head_dim / 2];
        self.onnx.matrix("rope.cos", &size, &cos)?;
        self.onnx.matrix("rope.sin", &size, &sin)
    }

    fn embedding(&mut self) -> Result<String> {
        self.table(Part::Embed, "embed")?;
        let mut gather = |table: &str, out: &str| {
            self.onnx
                .node("Gather", &[table, "input_ids"], &[out], vec![]);
        };
        if self.precision == Precision::F32 {
            gather("embed.weight", "embed.out");
        } else {
            gather("embed.q", "embed.rows.q");
            gather("embed.scale", "embed.rows.scale");
            self.dequantise("embed.rows", "embed.out", 2);
        }
        Ok("embed.out".to_owned())
    }

    /// The head reads a table, transposed: the embedding's own, which is stored once, or another.
    fn head(&mut self, x: &str) -> Result<()> {
        let table = if self.decoder.tied {
            "embed"
        } else {
            self.table(Part::Head, "lm_head")?;
            "lm_head"
        };
        let mut transpose = |part: &str| {
            let (from, to) = (format!("{table}.{part}"), format!("head.{part}"));
            let perm = vec![ints("perm", &[1, 0])];
            self.onnx.node("Transpose", &[&from], &[&to], perm);
        };
        if self.precision == Precision::F32 {
            transpose("weight");
        } else {
            transpose("q");
            transpose("scale");
            self.dequantise("head", "head.weight", 0);
        }
        self.onnx
            .node("MatMul", &[x, "head.weight"], &["logits"], vec![]);
        Ok(())
    }

    /// Adds `{name}.weight`, or `{name}.q` and `{name}.scale`, one row for each token. In four bits a table is int8
    /// all the same.
    fn table(&mut self, part: Part, name: &str) -> Result<()> {
        let [rows, columns] = self.shape.of(part);
        if self.precision == Precision::F32 {
            let weight = format!("{name}.weight");
            self.onnx.begin::<f32>(&weight, &[rows, columns])?;
            return self.each(part, |onnx, piece| onnx.append(&piece.into_values()));
        }
        self.onnx
            .begin::<i8>(&format!("{name}.q"), &[rows, columns])?;
        let mut scales = Vec::with_capacity(rows * columns / BLOCK);
        self.each(part, |onnx, piece| {
            let piece = eight(piece, columns);
            scales.extend_from_slice(&piece.scales);
            onnx.append(&piece.weights)
        })?;
        let scale = format!("{name}.scale");
        self.onnx.matrix(&scale, &[rows, columns / BLOCK], &scales)
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
        self.vector(part, &gamma)?;
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

    fn linear(&mut self, part: Part, name: &str, x: &str) -> Result<String> {
        let out = format!("{name}.out");
        match self.precision {
            Precision::F32 => self.linear_f32(part, name, x, &out)?,
            Precision::Int8 => self.linear_int8(part, name, x, &out)?,
            Precision::Q4 => self.linear_q4(part, name, x, &out)?,
        }
        let Some(bias) = self.decoder.bias(part) else {
            return Ok(out);
        };
        let vector = format!("{name}.bias");
        self.vector(bias, &vector)?;
        Ok(self.binary("Add", &format!("{name}.biased"), &out, &vector))
    }

    /// `x · W` with W stored as `[inputs, outputs]`, as ONNX's MatMul wants it.
    fn linear_f32(&mut self, part: Part, name: &str, x: &str, out: &str) -> Result<()> {
        let [rows, columns] = self.shape.of(part);
        let mut values = Vec::with_capacity(rows * columns);
        self.each(part, |_, piece| {
            values.append(&mut piece.into_values());
            Ok(())
        })?;
        let weight = format!("{name}.weight");
        self.transposed(&weight, &values, columns)?;
        self.onnx.node("MatMul", &[x, &weight], &[out], vec![]);
        Ok(())
    }

    /// The same, with int8 weights and their scales dequantised in the graph.
    fn linear_int8(&mut self, part: Part, name: &str, x: &str, out: &str) -> Result<()> {
        let [rows, columns] = self.shape.of(part);
        let mut whole = Eight::default();
        whole.weights.reserve_exact(rows * columns);
        self.each(part, |_, piece| {
            let mut piece = eight(piece, columns);
            whole.weights.append(&mut piece.weights);
            whole.scales.append(&mut piece.scales);
            Ok(())
        })?;
        self.transposed(&format!("{name}.q"), &whole.weights, columns)?;
        self.transposed(&format!("{name}.scale"), &whole.scales, columns / BLOCK)?;
        let weight = format!("{name}.weight");
        self.dequantise(name, &weight, 0);
        self.onnx.node("MatMul", &[x, &weight], &[out], vec![]);
        Ok(())
    }

    /// `MatMulNBits` with zero points in f32, which carry any minimum.
    fn linear_q4(&mut self, part: Part, name: &str, x: &str, out: &str) -> Result<()> {
        let [rows, columns] = self.shape.of(part);
        let blocks = columns / BLOCK;
        let tensors = ["q", "scale", "zero_point"].map(|tensor| format!("{name}.{tensor}"));
        let [q, scale, zero_point] = tensors.each_ref().map(String::as_str);
        self.onnx.begin::<u8>(q, &[rows, blocks, BLOCK / 2])?;
        let (mut scales, mut zero_points) = (Vec::new(), Vec::new());
        self.each(part, |onnx, piece| {
            let (pairs, mut of_scales, mut of_zeros) = four(piece).with_zero_points();
            scales.append(&mut of_scales);
            zero_points.append(&mut of_zeros);
            onnx.append(&pairs)
        })?;
        self.onnx.matrix(scale, &[rows, blocks], &scales)?;
        self.onnx
            .matrix(zero_point, &[rows, blocks], &zero_points)?;
        let attributes = vec![
            int("K", columns as i64),
            int("N", rows as i64),
            int("bits", 4),
            int("block_size", BLOCK as i64),
        ];
        self.onnx.node(
            MATMUL_N_BITS,
            &[x, q, scale, zero_point],
            &[out],
            attributes,
        );
        Ok(())
    }

    fn vector(&mut self, part: Part, name: &str) -> Result<()> {
        let mut values = Vec::new();
        self.each(part, |_, piece| {
            values = piece.into_values();
            Ok(())
        })?;
        self.onnx.vector(name, &values);
        Ok(())
    }

    /// Adds `[rows, columns]` as `[columns, rows]`.
    fn transposed<T: Element>(&mut self, name: &str, values: &[T], columns: usize) -> Result<()> {
        let rows = values.len() / columns;
        self.onnx.begin::<T>(name, &[columns, rows])?;
        for first in (0..columns).step_by(TRANSPOSED) {
            let part = first..columns.min(first + TRANSPOSED);
            self.onnx.append(&transposed(values, columns, part))?;
        }
        Ok(())
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

    /// Loads a weight in pieces of whole rows, and checks each.
    fn each(
        &mut self,
        part: Part,
        mut take: impl FnMut(&mut Writer, Stored) -> Result<()>,
    ) -> Result<()> {
        let [rows, columns] = self.shape.of(part);
        let step = (PIECE / columns).max(1);
        for first in (0..rows).step_by(step) {
            let range = first..rows.min(first + step);
            let (wanted, piece) = (range.len() * columns, self.weights.load(part, range)?);
            ensure!(
                piece.len() == wanted,
                "{part:?} has {} weights where the model's sizes ask for {wanted}",
                piece.len(),
            );
            ensure!(
                piece.is_finite(),
                "{part:?} holds a weight that is not a number"
            );
            take(&mut self.onnx, piece)?;
            self.bar.inc(wanted as u64);
        }
        Ok(())
    }
}

/// As int8, carried if it is that already and within ±127.
fn eight(piece: Stored, columns: usize) -> Eight {
    match piece {
        Stored::Eight(eight) if !eight.weights.contains(&i8::MIN) => eight,
        other => quant::eight(&other.into_values(), columns),
    }
}

/// In four bits, carried if it is that already.
fn four(piece: Stored) -> Four {
    match piece {
        Stored::Four(four) => four,
        other => quant::four(&other.into_values()),
    }
}

/// These columns of `[rows, columns]` as `[columns, rows]`.
fn transposed<T: Copy>(values: &[T], columns: usize, part: Range<usize>) -> Vec<T> {
    let rows = values.len() / columns;
    let mut out = Vec::with_capacity(rows * part.len());
    for column in part {
        out.extend((0..rows).map(|row| values[row * columns + column]));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::transposed;

    #[test]
    fn transposing_swaps_rows_and_columns() {
        let values = [1, 2, 3, 4, 5, 6];
        assert_eq!(transposed(&values, 3, 0..3), [1, 4, 2, 5, 3, 6]);
        assert_eq!(transposed(&values, 3, 1..2), [2, 5]);
    }
}
