//! Writes a whole bundle into a folder: graph, tokenizer, template, licence, and last the manifest that names
//! them. Where the folder lies and how it gets there at once is the cache's.

use crate::cache::write_synced;
use crate::llama::{Shape, Weights};
use crate::tokenizer::Vocabulary;
use crate::{Precision, graph, tokenizer};
use anyhow::{Context, Result};
use indicatif::ProgressBar;
use millwright_engine::bundle::{
    CHAT_TEMPLATE, FORMAT, FileEntry, GRAPH, MANIFEST, Manifest, TOKENIZER, WEIGHTS,
};
use std::path::Path;

/// The licence's file name inside a bundle.
pub const LICENCE: &str = "LICENSE";
/// The text of the one licence that the catalogue's models have, which is also this project's.
const APACHE_2_0: &str = include_str!("../../../LICENSE");

/// Everything that a bundle is made of but its weights.
#[derive(Debug)]
pub struct Description {
    pub name: String,
    pub version: String,
    pub shape: Shape,
    pub vocabulary: Vocabulary,
    pub chat_template: String,
    pub stop_tokens: Vec<String>,
    pub source: String,
}

/// Writes a bundle into `dir`, which exists. Nothing but `dir` is touched.
pub fn write(
    dir: &Path,
    description: &Description,
    precision: Precision,
    weights: &dyn Weights,
    bar: &ProgressBar,
) -> Result<()> {
    let Description {
        name,
        shape,
        vocabulary,
        ..
    } = description;
    anyhow::ensure!(
        vocabulary.tokens.len() == shape.vocab,
        "the vocabulary has {} tokens where the model has {} outputs",
        vocabulary.tokens.len(),
        shape.vocab
    );
    for token in &description.stop_tokens {
        anyhow::ensure!(
            vocabulary.tokens.contains(token),
            "the stop token {token:?} is not in the vocabulary"
        );
    }
    write_synced(
        &dir.join(TOKENIZER),
        tokenizer::build(vocabulary)?.as_bytes(),
    )?;
    write_synced(
        &dir.join(CHAT_TEMPLATE),
        description.chat_template.as_bytes(),
    )?;
    write_synced(&dir.join(LICENCE), APACHE_2_0.as_bytes())?;
    graph::write(dir, name, shape, precision, weights, bar)?;
    let entry =
        |file| FileEntry::of(&dir.join(file)).with_context(|| format!("{file} can't be read back"));
    let files = [GRAPH, WEIGHTS, TOKENIZER, CHAT_TEMPLATE, LICENCE].map(entry);
    let manifest = Manifest {
        format: FORMAT,
        name: name.clone(),
        version: description.version.clone(),
        architecture: "llama".to_owned(),
        context_length: shape.context,
        precision: precision.to_string(),
        stop_tokens: description.stop_tokens.clone(),
        licence: "Apache-2.0".to_owned(),
        source: description.source.clone(),
        signature: String::new(),
        files: files.into_iter().collect::<Result<_>>()?,
    };
    write_synced(&dir.join(MANIFEST), manifest.to_text()?.as_bytes())
}
