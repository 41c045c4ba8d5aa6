//! Reads a llama-like model out of a GGUF file: its sizes, its vocabulary, and its weights in ONNX's order.
//! Refuses what it would get wrong.

use crate::gguf::{Gguf, Value};
use crate::llama::{Part, Shape, Weights};
use crate::stored::Stored;
use crate::tokenizer::{Splitting, Vocabulary};
use anyhow::{Context, Result, bail, ensure};
use std::collections::HashSet;
use std::ops::Range;

/// A GGUF file as a source of weights. [`open`](Source::open) has checked that its tensors are just the graph's.
#[derive(Debug)]
pub struct Source<'a> {
    gguf: &'a Gguf<'a>,
    shape: Shape,
}

impl<'a> Source<'a> {
    pub fn open(gguf: &'a Gguf<'a>) -> Result<Self> {
        let architecture = gguf.text("general.architecture")?;
        ensure!(
            architecture == "llama",
            "the architecture {architecture:?} is not \"llama\", the one this forge writes"
        );
        if let Some(scaling) = gguf.get("llama.rope.scaling.type") {
            ensure!(
                *scaling == Value::Text("none".to_owned()),
                "rotary scaling {scaling:?} is not written by this forge"
            );
        }
        let size = |key: &str| gguf.size(&format!("llama.{key}"));
        let (width, heads) = (size("embedding_length")?, size("attention.head_count")?);
        let head_dim = size("rope.dimension_count")?;
        ensure!(
            width == heads * head_dim,
            "{heads} heads of {head_dim} numbers don't make a width of {width}"
        );
        let shape = Shape {
            layers: size("block_count")?,
            width,
            heads,
            kv_heads: size("attention.head_count_kv")?,
            head_dim,
            mlp: size("feed_forward_length")?,
            vocab: gguf.list("tokenizer.ggml.tokens")?.len(),
            context: size("context_length")?,
            rope_base: gguf.float("llama.rope.freq_base")?,
            epsilon: gguf.float("llama.attention.layer_norm_rms_epsilon")?,
        };
        shape.check()?;
        let written: HashSet<String> = shape.parts().into_iter().map(tensor_name).collect();
        for name in gguf.tensor_names() {
            ensure!(
                written.contains(name),
                "the file has a tensor {name:?} that this forge wouldn't write"
            );
        }
        Ok(Self { gguf, shape })
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }
}

impl Weights for Source<'_> {
    fn load(&self, part: Part, rows: Range<usize>) -> Result<Stored> {
        let head_dim = match part {
            Part::Query(_) | Part::Key(_) => Some(self.shape.head_dim),
            _ => None,
        };
        let rows = rows.map(|row| head_dim.map_or(row, |head_dim| interleaved(row, head_dim)));
        self.gguf
            .load(&tensor_name(part), self.shape.of(part), rows)
    }
}

/// Where a row of q or k lies in the file. llama.cpp's converter interleaves the rotary channels (row `2i` and
/// `2i + 1` of a head turn together); ONNX's rotary embedding pairs row `i` with row `i + head_dim / 2`. Rows
/// move whole, so their blocks stay what they are.
fn interleaved(row: usize, head_dim: usize) -> usize {
    let (channel, half) = (row % head_dim, head_dim / 2);
    row - channel + channel % half * 2 + channel / half
}

fn tensor_name(part: Part) -> String {
    let (layer, name) = match part {
        Part::Embed => return "token_embd.weight".to_owned(),
        Part::FinalNorm => return "output_norm.weight".to_owned(),
        Part::AttentionNorm(l) => (l, "attn_norm"),
        Part::Query(l) => (l, "attn_q"),
        Part::Key(l) => (l, "attn_k"),
        Part::Value(l) => (l, "attn_v"),
        Part::Output(l) => (l, "attn_output"),
        Part::MlpNorm(l) => (l, "ffn_norm"),
        Part::Gate(l) => (l, "ffn_gate"),
        Part::Up(l) => (l, "ffn_up"),
        Part::Down(l) => (l, "ffn_down"),
    };
    format!("blk.{layer}.{name}.weight")
}

/// The file's byte-level BPE vocabulary.
pub fn vocabulary(gguf: &Gguf<'_>) -> Result<Vocabulary> {
    let model = gguf.text("tokenizer.ggml.model")?;
    ensure!(
        model == "gpt2",
        "the tokenizer {model:?} is not \"gpt2\", the byte-level BPE this forge writes"
    );
    let bos = gguf.get("tokenizer.ggml.add_bos_token");
    ensure!(
        bos != Some(&Value::Bool(true)),
        "a token before every text is not written by this forge"
    );
    let splitting = match gguf.text("tokenizer.ggml.pre")? {
        "gpt-2" => Splitting::Gpt2,
        "smollm" => Splitting::Gpt2Digits,
        other => bail!("the splitting {other:?} is neither \"smollm\" nor \"gpt-2\""),
    };
    let tokens = gguf.texts("tokenizer.ggml.tokens")?;
    let kinds = gguf.list("tokenizer.ggml.token_type")?;
    ensure!(
        kinds.len() == tokens.len(),
        "{} token types don't match {} tokens",
        kinds.len(),
        tokens.len()
    );
    let mut special = Vec::new();
    for (id, kind) in kinds.iter().enumerate() {
        match kind {
            // Plain text, and places that no text leads to.
            Value::Integer(1 | 5) => {}
            // Control tokens.
            Value::Integer(3) => special.push(id as u32),
            other => bail!(
                "the token {:?} has the type {other:?}, which this forge doesn't know",
                tokens[id]
            ),
        }
    }
    let merges = gguf.texts("tokenizer.ggml.merges")?;
    Ok(Vocabulary {
        tokens,
        merges,
        special,
        splitting,
    })
}

/// The file's chat template, in Jinja.
pub fn chat_template(gguf: &Gguf<'_>) -> Result<String> {
    Ok(gguf
        .text("tokenizer.chat_template")
        .context("the model can't chat")?
        .to_owned())
}

#[cfg(test)]
mod tests;
