//! Reads a llama-like model out of a GGUF file: its sizes, its vocabulary, and its weights in ONNX's order.
//! Refuses what it would get wrong.

use crate::gguf::{Gguf, Value};
use crate::llama::{Architecture, Biases, Decoder, Part, Shape, Weights};
use crate::rotary::Scaling;
use crate::stored::Stored;
use crate::tokenizer::{Splitting, Vocabulary};
use anyhow::{Context, Result, bail, ensure};
use std::collections::HashSet;
use std::ops::Range;

/// Control tokens that end an answer in every vocabulary that has them: files name one of several at most.
const ENDS: [&str; 5] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
];

/// A GGUF file as a source of weights. [`open`](Source::open) has checked that its tensors are just the graph's.
#[derive(Debug)]
pub struct Source<'a> {
    gguf: &'a Gguf<'a>,
    decoder: Decoder,
}

impl<'a> Source<'a> {
    pub fn open(gguf: &'a Gguf<'a>) -> Result<Self> {
        let decoder = decoder(gguf)?;
        decoder.check()?;
        let parts = decoder.parts();
        let written: HashSet<String> = parts.iter().copied().map(tensor_name).collect();
        for name in gguf.tensor_names() {
            ensure!(
                written.contains(name),
                "the file has a tensor {name:?} that this forge wouldn't write"
            );
        }
        for part in parts {
            gguf.expect(&tensor_name(part), decoder.shape.of(part))?;
        }
        Ok(Self { gguf, decoder })
    }

    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }
}

fn decoder(gguf: &Gguf<'_>) -> Result<Decoder> {
    let architecture = match gguf.text("general.architecture")? {
        "llama" => Architecture::Llama,
        "qwen2" => Architecture::Qwen2,
        other => {
            bail!(
                "the architecture {other:?} is neither \"llama\" nor \"qwen2\", those this forge writes"
            )
        }
    };
    let key = |key: &str| format!("{architecture}.{key}");
    if let Some(scaling) = gguf.get(&key("rope.scaling.type")) {
        ensure!(
            *scaling == Value::Text("none".to_owned()),
            "rotary scaling {scaling:?} is not written by this forge"
        );
    }
    let size = |name: &str| gguf.size(&key(name));
    let (width, heads) = (size("embedding_length")?, size("attention.head_count")?);
    // Files of qwen2 leave it out where it follows from the others.
    let head_dim = match gguf.get(&key("rope.dimension_count")) {
        Some(_) => size("rope.dimension_count")?,
        None => width / heads,
    };
    ensure!(
        width == heads * head_dim,
        "{heads} heads of {head_dim} numbers don't make a width of {width}"
    );
    Ok(Decoder {
        architecture,
        shape: Shape {
            layers: size("block_count")?,
            width,
            heads,
            kv_heads: size("attention.head_count_kv")?,
            head_dim,
            mlp: size("feed_forward_length")?,
            vocab: gguf.list("tokenizer.ggml.tokens")?.len(),
            context: size("context_length")?,
            rope_base: gguf.float(&key("rope.freq_base"))?,
            epsilon: gguf.float(&key("attention.layer_norm_rms_epsilon"))?,
        },
        biases: match architecture {
            Architecture::Llama => Biases::None,
            Architecture::Qwen2 => Biases::Inputs,
        },
        tied: gguf
            .tensor_names()
            .all(|name| name != tensor_name(Part::Head)),
        scaling: Scaling::None,
    })
}

impl Weights for Source<'_> {
    fn load(&self, part: Part, rows: Range<usize>) -> Result<Stored> {
        let Decoder {
            architecture,
            shape,
            ..
        } = &self.decoder;
        let turned = *architecture == Architecture::Llama;
        let head_dim = match part {
            Part::Query(_) | Part::Key(_) if turned => Some(shape.head_dim),
            _ => None,
        };
        let rows = rows.map(|row| head_dim.map_or(row, |head_dim| interleaved(row, head_dim)));
        self.gguf.load(&tensor_name(part), shape.of(part), rows)
    }
}

/// Where a row of q or k lies in a file of the llama architecture. llama.cpp's converter interleaves the rotary
/// channels there (row `2i` and `2i + 1` of a head turn together), and only there; ONNX's rotary embedding pairs row
/// `i` with row `i + head_dim / 2`. Rows move whole, so their blocks stay what they are.
fn interleaved(row: usize, head_dim: usize) -> usize {
    let (channel, half) = (row % head_dim, head_dim / 2);
    row - channel + channel % half * 2 + channel / half
}

fn tensor_name(part: Part) -> String {
    let (layer, name) = match part {
        Part::Embed => return "token_embd.weight".to_owned(),
        Part::FinalNorm => return "output_norm.weight".to_owned(),
        Part::Head => return "output.weight".to_owned(),
        Part::AttentionNorm(l) => (l, "attn_norm.weight"),
        Part::Query(l) => (l, "attn_q.weight"),
        Part::QueryBias(l) => (l, "attn_q.bias"),
        Part::Key(l) => (l, "attn_k.weight"),
        Part::KeyBias(l) => (l, "attn_k.bias"),
        Part::Value(l) => (l, "attn_v.weight"),
        Part::ValueBias(l) => (l, "attn_v.bias"),
        Part::Output(l) => (l, "attn_output.weight"),
        Part::OutputBias(l) => (l, "attn_output.bias"),
        Part::MlpNorm(l) => (l, "ffn_norm.weight"),
        Part::Gate(l) => (l, "ffn_gate.weight"),
        Part::Up(l) => (l, "ffn_up.weight"),
        Part::Down(l) => (l, "ffn_down.weight"),
    };
    format!("blk.{layer}.{name}")
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
        "qwen2" => Splitting::Qwen2,
        other => bail!("the splitting {other:?} is none of \"smollm\", \"gpt-2\" and \"qwen2\""),
    };
    let tokens = gguf.texts("tokenizer.ggml.tokens")?;
    let kinds = gguf.list("tokenizer.ggml.token_type")?;
    ensure!(
        kinds.len() == tokens.len(),
        "{} token types don't match {} tokens",
        kinds.len(),
        tokens.len()
    );
    let (mut special, mut defined) = (Vec::new(), Vec::new());
    for (id, kind) in kinds.iter().enumerate() {
        match kind {
            // Plain text, and places that no text leads to.
            Value::Integer(1 | 5) => {}
            // Control tokens.
            Value::Integer(3) => special.push(id as u32),
            Value::Integer(4) => defined.push(id as u32),
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
        defined,
        splitting,
    })
}

/// The file's chat template, in Jinja, if it has one.
pub fn chat_template(gguf: &Gguf<'_>) -> Result<Option<String>> {
    let key = "tokenizer.chat_template";
    let text = gguf.get(key).map(|_| gguf.text(key));
    Ok(text.transpose()?.map(str::to_owned))
}

/// The tokens that end an answer: those that the file names, then what its vocabulary has of [`ENDS`].
pub fn stop_tokens(gguf: &Gguf<'_>, vocabulary: &Vocabulary) -> Result<Vec<String>> {
    let mut stops: Vec<&String> = Vec::new();
    for role in ["eos", "eot", "eom"] {
        let key = format!("tokenizer.ggml.{role}_token_id");
        let id = match gguf.get(&key) {
            None => continue,
            Some(Value::Integer(id)) => *id,
            Some(other) => bail!("{key:?} is not a token but {other:?}"),
        };
        let token = usize::try_from(id).ok();
        let token = token.and_then(|id| vocabulary.tokens.get(id));
        stops.push(token.with_context(|| format!("{key:?} is {id}, beyond the vocabulary"))?);
    }
    let special = vocabulary.special.iter();
    let special: Vec<&String> = special.map(|&id| &vocabulary.tokens[id as usize]).collect();
    for end in ENDS {
        stops.extend(special.iter().find(|token| **token == end));
    }
    let mut seen = HashSet::new();
    stops.retain(|token| seen.insert(*token));
    ensure!(
        !stops.is_empty(),
        "the file names no token that ends an answer"
    );
    Ok(stops.into_iter().cloned().collect())
}

#[cfg(test)]
mod tests;
