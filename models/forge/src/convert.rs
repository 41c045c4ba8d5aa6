//! Makes a bundle of somebody's own weights: a Hugging Face folder or a GGUF file. What either holds is for
//! `from_folder` and `from_gguf`; here it becomes a description, and the description a bundle.

use crate::bundle::{self, Description, Licence};
use crate::gguf::{Gguf, Value};
use crate::llama::{Decoder, Weights};
use crate::pull::{bar, explained, vacant};
use crate::{Precision, from_folder, from_gguf, tokenizer};
use anyhow::{Context, Result, ensure};
use millwright_engine::bundle::sha256_of;
use std::fs;
use std::path::Path;

/// The longest context that a bundle gets unasked: its rotary tables are stored, and a gateway has no room for more.
const CONTEXT_MAX: usize = 32_768;

/// What to make, and of what.
#[derive(Debug)]
pub struct Order<'a> {
    /// A folder, or a GGUF file.
    pub source: &'a Path,
    /// The bundle's folder, new or empty.
    pub output: &'a Path,
    pub precision: Precision,
    /// The source's own name otherwise.
    pub name: Option<&'a str>,
    pub version: &'a str,
    /// Positions; the model's own, up to 32,768, otherwise.
    pub context: Option<usize>,
}

/// Writes the bundle, or nothing: all that can be refused is refused before, and what a failure leaves is removed.
pub fn convert(order: &Order<'_>) -> Result<()> {
    vacant(order.output)?;
    let failed = || format!("{} can't be converted", order.source.display());
    if order.source.is_dir() {
        let source = from_folder::Source::open(order.source).with_context(failed)?;
        let description = of_folder(order, &source).with_context(failed)?;
        return write(order, &description, &source).with_context(failed);
    }
    let bytes = fs::read(order.source).with_context(failed)?;
    let gguf = Gguf::parse(&bytes).with_context(failed)?;
    let source = from_gguf::Source::open(&gguf).with_context(failed)?;
    let description = of_gguf(order, &gguf, source.decoder()).with_context(failed)?;
    write(order, &description, &source).with_context(failed)
}

fn of_folder(order: &Order<'_>, source: &from_folder::Source) -> Result<Description> {
    let texts = source.texts(order.source)?;
    let mut files = Vec::new();
    for file in source.files() {
        let digest = sha256_of(&order.source.join(file));
        let digest = digest.with_context(|| format!("{file} can't be read"))?;
        files.push(format!("{file} (sha256 {digest})"));
    }
    Ok(Description {
        name: name(order)?,
        version: order.version.to_owned(),
        decoder: cut(source.decoder(), order.context)?,
        tokenizer: texts.tokenizer,
        chat_template: texts.chat_template,
        stop_tokens: texts.stop_tokens,
        licence: texts.licence,
        source: format!("Hugging Face folder: {}", files.join(", ")),
        others: texts.others,
    })
}

fn of_gguf(order: &Order<'_>, gguf: &Gguf<'_>, decoder: &Decoder) -> Result<Description> {
    let vocabulary = from_gguf::vocabulary(gguf)?;
    let file = order.source.file_name().unwrap_or_default();
    Ok(Description {
        name: name(order)?,
        version: order.version.to_owned(),
        decoder: cut(decoder, order.context)?,
        tokenizer: tokenizer::build(&vocabulary)?,
        chat_template: from_gguf::chat_template(gguf)?,
        stop_tokens: from_gguf::stop_tokens(gguf, &vocabulary)?,
        licence: Licence {
            name: match gguf.get("general.license") {
                Some(Value::Text(name)) => name.clone(),
                _ => "unknown".to_owned(),
            },
            files: vec![],
        },
        source: format!(
            "GGUF file {} (sha256 {})",
            file.to_string_lossy(),
            sha256_of(order.source)?
        ),
        others: vec![],
    })
}

/// As asked for, or the source's, without a file's ending.
fn name(order: &Order<'_>) -> Result<String> {
    if let Some(name) = order.name {
        ensure!(!name.trim().is_empty(), "--name is empty");
        return Ok(name.to_owned());
    }
    let path = order.source.canonicalize()?;
    let own = if path.is_dir() {
        path.file_name()
    } else {
        path.file_stem()
    };
    let own = own.context("the source has no name; give one with --name")?;
    Ok(own.to_string_lossy().to_lowercase())
}

/// The model with the context that the bundle gets.
fn cut(decoder: &Decoder, wanted: Option<usize>) -> Result<Decoder> {
    let mut decoder = decoder.clone();
    let own = decoder.shape.context;
    decoder.shape.context = wanted.unwrap_or(own.min(CONTEXT_MAX));
    let context = decoder.shape.context;
    ensure!(
        (2..=own).contains(&context),
        "a context of {context} positions can't be had: the model has {own}, and two are the least"
    );
    if wanted.is_none() && context < own {
        eprintln!("the context is cut from {own} positions to {context}; --context asks for more");
    }
    Ok(decoder)
}

fn write(order: &Order<'_>, description: &Description, weights: &dyn Weights) -> Result<()> {
    let (dir, precision) = (order.output, order.precision);
    fs::create_dir_all(dir).with_context(|| format!("{} can't be created", dir.display()))?;
    let bar = bar(
        description.decoder.weights(),
        &format!("writing {precision}"),
    );
    let written = bundle::write(dir, description, precision, weights, &bar);
    bar.finish_and_clear();
    if written.is_err() {
        // It was empty before, so that all in it is ours. What can't be removed is without a manifest: no bundle.
        let _ = fs::remove_dir_all(dir);
    }
    explained(written, dir, &description.decoder, precision)
}
