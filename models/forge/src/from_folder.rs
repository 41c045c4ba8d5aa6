//! Reads a llama-like model out of a folder as Hugging Face's transformers saves it: its sizes, its weights and its
//! texts. Refuses what it would get wrong.

mod config;
mod shards;
mod text;

use crate::llama::{Decoder, Part, Weights};
use crate::stored::Stored;
use anyhow::{Context, Result, ensure};
use config::Settings;
use serde::de::DeserializeOwned;
use shards::Shards;
use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;
pub use text::Texts;

const CONFIG: &str = "config.json";
/// A text of a folder larger than this is refused; the largest vocabularies take a third of it.
const TEXT_BYTES_MAX: u64 = 100_000_000;

/// A folder as a source of weights. [`open`](Source::open) has checked that its tensors are just the graph's.
#[derive(Debug)]
pub struct Source {
    decoder: Decoder,
    shards: Shards,
    /// As `config.json` has them.
    stop_ids: Vec<u32>,
}

impl Source {
    pub fn open(dir: &Path) -> Result<Self> {
        let settings: Settings =
            json(dir, CONFIG)?.with_context(|| format!("there is no {CONFIG}"))?;
        let shards = Shards::open(dir)?;
        let says_config = || format!("{CONFIG} is not of a model that this forge writes");
        let has_head = shards.names().any(|name| name == tensor_name(Part::Head));
        let decoder = settings.decoder(has_head).with_context(says_config)?;
        decoder.check().with_context(says_config)?;
        let parts = decoder.parts();
        let written: HashSet<String> = parts.iter().copied().map(tensor_name).collect();
        // Older folders store the rotary frequencies, which follow from the configuration.
        let known = |name: &str| written.contains(name) || name.ends_with(".rotary_emb.inv_freq");
        for name in shards.names() {
            ensure!(
                known(name),
                "the folder has a tensor {name:?} for which its {CONFIG} leaves no place"
            );
        }
        for part in parts {
            shards.expect(&tensor_name(part), decoder.shape.of(part))?;
        }
        Ok(Self {
            decoder,
            shards,
            stop_ids: settings.stop_ids(),
        })
    }

    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The folder's tokenizer, template, stop tokens and licence.
    pub fn texts(&self, dir: &Path) -> Result<Texts> {
        text::read_all(dir, &self.stop_ids)
    }

    /// The files that hold the weights, by name.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.shards.files()
    }
}

impl Weights for Source {
    fn load(&self, part: Part, rows: Range<usize>) -> Result<Stored> {
        let shape = self.decoder.shape.of(part);
        self.shards.load(&tensor_name(part), shape, rows)
    }
}

fn tensor_name(part: Part) -> String {
    let (layer, name) = match part {
        Part::Embed => return "model.embed_tokens.weight".to_owned(),
        Part::FinalNorm => return "model.norm.weight".to_owned(),
        Part::Head => return "lm_head.weight".to_owned(),
        Part::AttentionNorm(l) => (l, "input_layernorm.weight"),
        Part::Query(l) => (l, "self_attn.q_proj.weight"),
        Part::QueryBias(l) => (l, "self_attn.q_proj.bias"),
        Part::Key(l) => (l, "self_attn.k_proj.weight"),
        Part::KeyBias(l) => (l, "self_attn.k_proj.bias"),
        Part::Value(l) => (l, "self_attn.v_proj.weight"),
        Part::ValueBias(l) => (l, "self_attn.v_proj.bias"),
        Part::Output(l) => (l, "self_attn.o_proj.weight"),
        Part::OutputBias(l) => (l, "self_attn.o_proj.bias"),
        Part::MlpNorm(l) => (l, "post_attention_layernorm.weight"),
        Part::Gate(l) => (l, "mlp.gate_proj.weight"),
        Part::Up(l) => (l, "mlp.up_proj.weight"),
        Part::Down(l) => (l, "mlp.down_proj.weight"),
    };
    format!("model.layers.{layer}.{name}")
}

/// What a JSON file of the folder says, if the file is there.
fn json<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>> {
    let Some(text) = read(dir, name)? else {
        return Ok(None);
    };
    let value = serde_json::from_str(&text);
    value.with_context(|| format!("{name} can't be understood"))
}

/// A text file of the folder, if it is there.
fn read(dir: &Path, name: &str) -> Result<Option<String>> {
    let file = match File::open(dir.join(name)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.with_context(|| format!("{name} can't be opened"))?,
    };
    let mut text = String::new();
    file.take(TEXT_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("{name} can't be read as text"))?;
    ensure!(
        text.len() as u64 <= TEXT_BYTES_MAX,
        "{name} is larger than {} MB",
        TEXT_BYTES_MAX / 1_000_000
    );
    Ok(Some(text))
}
