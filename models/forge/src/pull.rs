//! Makes a catalogue entry's bundle in the cache, unless it is there. The whole way of a model reads down here.

use crate::bundle::{self, Description};
use crate::cache::{Cache, Claim, is_full};
use crate::catalogue::{Entry, Package};
use crate::convert::{Source, chat_template, vocabulary};
use crate::fetch::fetch;
use crate::gguf::Gguf;
use crate::like::Like;
use crate::llama::Shape;
use crate::{Precision, graph, like, tiny};
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
        explained(written, workshop, &tiny::shape(), precision)?;
        claim.install(workshop)?;
        return Ok(Pulled { path, made: true });
    };
    let bytes = fetch(cache, package)?;
    let failed = || format!("{} can't be converted", package.file());
    let gguf = Gguf::parse(&bytes).with_context(failed)?;
    let source = Source::open(&gguf).with_context(failed)?;
    let description = describe(entry, package, &gguf, source.shape()).with_context(failed)?;
    let workshop = claim.workshop()?;
    let bar = bar(source.shape().weights(), &format!("writing {precision}"));
    let written = bundle::write(workshop, &description, precision, &source, &bar);
    bar.finish_and_clear();
    explained(written, workshop, source.shape(), precision).with_context(failed)?;
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
    shape: &Shape,
) -> Result<Description> {
    Ok(Description {
        name: entry.name.clone(),
        version: entry.version.clone(),
        shape: shape.clone(),
        vocabulary: vocabulary(gguf)?,
        chat_template: chat_template(gguf)?,
        stop_tokens: entry.stop_tokens.clone(),
        source: format!(
            "Python package {}, {} (sha256 {})",
            package.requirement,
            package.file(),
            package.member_sha256
        ),
    })
}

/// Makes a random model in a folder of the caller's, which must be new or empty: in the shape of a real one, or tiny.
pub fn random(dir: &Path, like: Option<Like>, precision: Precision) -> Result<()> {
    check_new(dir)?;
    let Some(like) = like else {
        return explained(tiny::write(dir, precision), dir, &tiny::shape(), precision);
    };
    let shape = like.shape();
    let bar = bar(shape.weights(), &format!("writing {precision}"));
    let written = like::write(dir, &like.name(), &shape, precision, &bar);
    bar.finish_and_clear();
    explained(written, dir, &shape, precision)
}

/// Checks that a folder of the caller's is new or empty.
pub(crate) fn check_new(dir: &Path) -> Result<()> {
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

fn explained(
    written: Result<()>,
    workshop: &Path,
    shape: &Shape,
    precision: Precision,
) -> Result<()> {
    written.map_err(|error| {
        if is_full(&error) {
            let needed = graph::bytes(shape, precision).div_ceil(1_000_000);
            return error.context(format!(
                "the disk is full: the bundle needs {needed} MB at {}",
                workshop.display()
            ));
        }
        error
    })
}

pub(crate) fn bar(length: u64, message: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {percent}% {eta}")
        .expect("the template is a constant");
    ProgressBar::new(length)
        .with_style(style)
        .with_message(message.to_owned())
}
