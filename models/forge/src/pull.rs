//! Makes a catalogue entry's bundle in the cache, unless it is there. The whole way of a model reads down here.

use crate::bundle::{self, Description, Licence};
use crate::cache::{Cache, Claim, is_full};
use crate::catalogue::{Entry, Package};
use crate::fetch::fetch;
use crate::from_gguf::{Source, chat_template, vocabulary};
use crate::gguf::Gguf;
use crate::like::Like;
use crate::llama::Decoder;
use crate::{Precision, graph, like, tiny, tokenizer};
use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use millwright_engine::bundle::Bundle;
use std::path::{Path, PathBuf};

/// Where a model's bundle is, and whether this call made it.
#[derive(Debug)]
pub struct Pulled {
    pub path: PathBuf,
    pub made: bool,
}

/// Brings a model's bundle into the cache. Bars are drawn on stderr when that is a terminal. Safe to call from
/// several processes at once; after a crash the cache holds the whole bundle or none.
pub fn pull(cache: &Cache, entry: &Entry, precision: Precision) -> Result<Pulled> {
    let path = cache.bundle(&entry.name, precision);
    if is_current(&path, entry) {
        return Ok(Pulled { path, made: false });
    }
    let claim = Claim::take(&path, || {
        eprintln!("waiting for another pull of {} to end", entry.name);
    })?;
    if is_current(&path, entry) {
        return Ok(Pulled { path, made: false });
    }
    let Some(package) = &entry.package else {
        let workshop = claim.workshop()?;
        let written = tiny::write(workshop, precision);
        let decoder = Decoder::llama(tiny::shape());
        explained(written, workshop, &decoder, precision)?;
        claim.install(workshop)?;
        return Ok(Pulled { path, made: true });
    };
    let bytes = fetch(cache, package)?;
    let failed = || format!("{} can't be converted", package.file());
    let gguf = Gguf::parse(&bytes).with_context(failed)?;
    let source = Source::open(&gguf).with_context(failed)?;
    let description = describe(entry, package, &gguf, source.decoder()).with_context(failed)?;
    let workshop = claim.workshop()?;
    let bar = bar(source.decoder().weights(), &format!("writing {precision}"));
    let written = bundle::write(workshop, &description, precision, &source, &bar);
    bar.finish_and_clear();
    explained(written, workshop, source.decoder(), precision).with_context(failed)?;
    claim.install(workshop)?;
    Ok(Pulled { path, made: true })
}

/// Whether a whole bundle of the entry's version is at `path`. Sizes are checked, digests are not: the agent
/// checks those when it packs.
pub fn is_current(path: &Path, entry: &Entry) -> bool {
    Bundle::open(path).is_ok_and(|bundle| bundle.manifest.version == entry.version)
}

pub(crate) fn describe(
    entry: &Entry,
    package: &Package,
    gguf: &Gguf<'_>,
    decoder: &Decoder,
) -> Result<Description> {
    let template = chat_template(gguf)?.context("the model can't chat: it has no template")?;
    Ok(Description {
        name: entry.name.clone(),
        version: entry.version.clone(),
        decoder: decoder.clone(),
        tokenizer: tokenizer::build(&vocabulary(gguf)?)?,
        chat_template: Some(template),
        stop_tokens: entry.stop_tokens.clone(),
        licence: Licence::apache(),
        source: format!(
            "Python package {}, {} (sha256 {})",
            package.requirement,
            package.file(),
            package.member_sha256
        ),
        others: vec![],
    })
}

/// Makes a random model in a folder of the caller's, which must be new or empty: in the shape of a real one, or tiny.
pub fn random(dir: &Path, like: Option<Like>, precision: Precision) -> Result<()> {
    vacant(dir)?;
    let shape = like.map_or_else(tiny::shape, Like::shape);
    let decoder = Decoder::llama(shape);
    let Some(like) = like else {
        return explained(tiny::write(dir, precision), dir, &decoder, precision);
    };
    let bar = bar(decoder.weights(), &format!("writing {precision}"));
    let written = like::write(dir, &like.name(), &decoder.shape, precision, &bar);
    bar.finish_and_clear();
    explained(written, dir, &decoder, precision)
}

/// Checks that `dir` holds nothing.
pub(crate) fn vacant(dir: &Path) -> Result<()> {
    let taken = match dir.read_dir() {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    };
    ensure!(
        !taken,
        "{} is not a new or empty folder; name one that is",
        dir.display()
    );
    Ok(())
}

/// Removes what a failure has left in `dir`, which was [`vacant`], so that all in it is ours.
pub(crate) fn whole_or_nothing(dir: &Path, written: Result<()>) -> Result<()> {
    if written.is_err() {
        // What can't be removed stays; the error that matters is the one there was.
        let _ = std::fs::remove_dir_all(dir);
    }
    written
}

/// Says how much room the bundle needs, if it was room that it lacked.
pub(crate) fn explained(
    written: Result<()>,
    workshop: &Path,
    decoder: &Decoder,
    precision: Precision,
) -> Result<()> {
    written.map_err(|error| {
        if is_full(&error) {
            let needed = graph::bytes(decoder, precision).div_ceil(1_000_000);
            return error.context(format!(
                "the disk is full: the bundle needs {needed} MB at {}",
                workshop.display()
            ));
        }
        error
    })
}

/// Of so many weights to write.
pub(crate) fn bar(weights: u64, message: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {percent}% {eta}")
        .expect("the template is a constant");
    ProgressBar::new(weights)
        .with_style(style)
        .with_message(message.to_owned())
}
