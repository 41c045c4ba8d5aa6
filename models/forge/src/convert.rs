//! Makes a bundle of somebody's own weights: a Hugging Face folder or a GGUF file.

use crate::bundle::{self, Description};
use crate::llama::{Decoder, Weights};
use crate::pull::{bar, explained, vacant, whole_or_nothing};
use crate::{Precision, own};
use anyhow::{Context, Result, ensure};
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
    let made = own::open(order.source, |description, weights| {
        write(order, &ordered(order, description)?, weights)
    });
    made.with_context(|| format!("{} can't be converted", order.source.display()))
}

/// The source's description with what the order says instead.
fn ordered(order: &Order<'_>, own: Description) -> Result<Description> {
    let name = order.name.map_or(own.name, str::to_owned);
    ensure!(!name.trim().is_empty(), "--name is empty");
    Ok(Description {
        name,
        version: order.version.to_owned(),
        decoder: cut(own.decoder, order.context)?,
        ..own
    })
}

/// The model with the context that the bundle gets.
fn cut(mut decoder: Decoder, wanted: Option<usize>) -> Result<Decoder> {
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
    let written = whole_or_nothing(dir, written);
    explained(written, dir, &description.decoder, precision)
}
