//! Reads a llama-like model out of a GGUF file: its sizes, its vocabulary, and its weights in ONNX's order.
//! Refuses what it would get wrong.

use crate::gguf::{Gguf, Value};
use crate::llama::{Part, Shape, Weights};
use crate::tokenizer::{Splitting, Vocabulary};
use anyhow::{Context, Result, bail, ensure};
use std::collections::HashSet;

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
    fn load(&self, part: Part) -> Result<Vec<f32>> {
        let size = self.shape.of(part);
        let values = self.gguf.load(&tensor_name(part), size)?;
        Ok(match part {
            Part::Query(_) | Part::Key(_) => halves(&values, size[1], self.shape.head_dim),
            _ => values,
        })
    }
}

/// llama.cpp's converter interleaves the rotary channels of q and k (row `2i` and `2i + 1` of a head turn
/// together); ONNX's rotary embedding pairs row `i` with row `i + head_dim / 2`.
fn halves(values: &[f32], columns: usize, head_dim: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim * columns) {
        for side in 0..2 {
            for pair in 0..head_dim / 2 {
                let row = 2 * pair + side;
                out.extend_from_slice(&head[row * columns..(row + 1) * columns]);
            }
        }
    }
    out
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
mod tests {
    use super::*;
    use crate::gguf::testing::{entry, file, text, texts};

    #[test]
    fn interleaved_rows_become_halves() {
        // One head of four rows of one column: (0, 1) turn together, then (2, 3).
        assert_eq!(halves(&[0.0, 1.0, 2.0, 3.0], 1, 4), [0.0, 2.0, 1.0, 3.0]);
        assert_eq!(
            halves(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 2, 2),
            [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        );
    }

    fn header(heads: u32, tensors: &[(&str, &[u64], u32, &[u8])]) -> Vec<u8> {
        let size = |key: &str, n: u32| entry(&format!("llama.{key}"), 4, &n.to_le_bytes());
        let float = |key: &str, x: f32| entry(&format!("llama.{key}"), 6, &x.to_le_bytes());
        let entries = [
            entry("general.architecture", 8, &text("llama")),
            size("embedding_length", 64),
            size("attention.head_count", heads),
            size("attention.head_count_kv", 2),
            size("rope.dimension_count", 16),
            size("block_count", 1),
            size("feed_forward_length", 64),
            size("context_length", 32),
            float("rope.freq_base", 10_000.0),
            float("attention.layer_norm_rms_epsilon", 1e-5),
            texts("tokenizer.ggml.tokens", &["a", "b"]),
        ];
        file(&entries, tensors)
    }

    #[test]
    fn a_model_that_would_come_out_wrong_is_refused() {
        let says = |bytes: &[u8], part: &str| {
            let gguf = Gguf::parse(bytes).unwrap();
            let error = format!("{:#}", Source::open(&gguf).unwrap_err());
            assert!(error.contains(part), "{error}");
        };
        says(&header(3, &[]), "don't make a width of 64");
        says(
            &header(4, &[("blk.0.attn_q.bias", &[64], 0, &[0; 256])]),
            "blk.0.attn_q.bias",
        );
        let bytes = header(4, &[]);
        let gguf = Gguf::parse(&bytes).unwrap();
        let source = Source::open(&gguf).unwrap();
        let error = source.load(Part::Query(0)).unwrap_err().to_string();
        assert_eq!(error, "the file has no tensor \"blk.0.attn_q.weight\"");
    }
}
