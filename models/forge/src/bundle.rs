//! Writes a whole bundle into a folder: graph, tokenizer, template, licence, and last the manifest that names
//! them. Where the folder lies and how it gets there at once is the cache's.

use crate::cache::write_synced;
use crate::llama::{Decoder, Weights};
use crate::{Precision, graph};
use anyhow::{Context, Result, anyhow, ensure};
use indicatif::ProgressBar;
use millwright_engine::bundle::{
    CHAT_TEMPLATE, FORMAT, FileEntry, GRAPH, MANIFEST, Manifest, TOKENIZER, WEIGHTS,
};
use std::path::Path;
use tokenizers::Tokenizer;

/// The licence's file name inside a bundle, unless its makers have another.
const LICENCE: &str = "LICENSE";
/// The text of the one licence that the catalogue's models have, which is also this project's.
const APACHE_2_0: &str = include_str!("../../../LICENSE");

/// Everything that a bundle is made of but its weights.
#[derive(Debug)]
pub struct Description {
    pub name: String,
    pub version: String,
    pub decoder: Decoder,
    /// The text of `tokenizer.json`.
    pub tokenizer: String,
    /// In Jinja; a model without one can't chat.
    pub chat_template: Option<String>,
    /// As written in the vocabulary.
    pub stop_tokens: Vec<String>,
    pub licence: Licence,
    /// Where the weights came from.
    pub source: String,
    /// Further files, by name: their texts.
    pub others: Vec<(String, String)>,
}

/// Under what the weights are given away.
#[derive(Debug, Clone)]
pub struct Licence {
    /// Its SPDX name, or what is known of it.
    pub name: String,
    /// Its files, by name: their texts.
    pub files: Vec<(String, String)>,
}

impl Licence {
    pub fn apache() -> Self {
        Self {
            name: "Apache-2.0".to_owned(),
            files: vec![(LICENCE.to_owned(), APACHE_2_0.to_owned())],
        }
    }
}

impl Description {
    /// Checks that the tokenizer can be loaded and fits the model, and that it knows the tokens named.
    pub(crate) fn checked_tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer: Tokenizer = self
            .tokenizer
            .parse()
            .map_err(|e| anyhow!("the tokenizer can't be loaded: {e}"))?;
        let vocab = self.decoder.shape.vocab;
        let ids = tokenizer.get_vocab(true).into_values();
        let last = ids.max().context("the tokenizer has no tokens")?;
        ensure!(
            (last as usize) < vocab,
            "the tokenizer has a token {last} where the model has {vocab} outputs"
        );
        for token in &self.stop_tokens {
            ensure!(
                tokenizer.token_to_id(token).is_some(),
                "the stop token {token:?} is not in the vocabulary"
            );
        }
        Ok(tokenizer)
    }
}

/// Writes a bundle into `dir`, which exists. Nothing but `dir` is touched.
pub fn write(
    dir: &Path,
    description: &Description,
    precision: Precision,
    weights: &dyn Weights,
    bar: &ProgressBar,
) -> Result<()> {
    description.checked_tokenizer()?;
    let Description { name, decoder, .. } = description;
    let mut files = vec![GRAPH, WEIGHTS];
    let template = description.chat_template.as_deref();
    let others = description.licence.files.iter().chain(&description.others);
    let texts = [(TOKENIZER, description.tokenizer.as_str())]
        .into_iter()
        .chain(template.map(|text| (CHAT_TEMPLATE, text)))
        .chain(others.map(|(name, text)| (name.as_str(), text.as_str())));
    for (file, text) in texts {
        write_synced(&dir.join(file), text.as_bytes())?;
        files.push(file);
    }
    graph::write(dir, name, decoder, precision, weights, bar)?;
    let entry =
        |file| FileEntry::of(&dir.join(file)).with_context(|| format!("{file} can't be read back"));
    let manifest = Manifest {
        format: FORMAT,
        name: name.clone(),
        version: description.version.clone(),
        architecture: decoder.architecture.to_string(),
        context_length: decoder.shape.context,
        precision: precision.to_string(),
        stop_tokens: description.stop_tokens.clone(),
        licence: description.licence.name.clone(),
        source: description.source.clone(),
        signature: String::new(),
        import: None,
        files: files.into_iter().map(entry).collect::<Result<_>>()?,
    };
    let text = manifest.to_text()?;
    // Read as the agent will, so that nothing is made that it refuses.
    Manifest::parse(&text).map_err(|reason| anyhow!("the manifest is not valid: {reason}"))?;
    write_synced(&dir.join(MANIFEST), text.as_bytes())
}
