//! Makes a bundle of an exporter's folder: checks the import once, where there is time for it, and writes down what
//! was found, so that a gateway need not.

mod narrow;

use crate::bundle::{
    Bundle, BundleError, CHAT_TEMPLATE, Change, FileEntry, GRAPH, Guard, Import, MANIFEST,
    Manifest, TOKENIZER, WEIGHTS,
};
use crate::folder::{CONFIG, GENAI, TOKENIZER_CONFIG};
use crate::guard::{self, Progress, Reference};
use crate::import::kept_matrix;
use crate::inspect::{Part, inspect};
use crate::onnx::Graph;
use crate::open::{OpenError, Options};
use narrow::{Floats, WriteError};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a licence's files begin with, how large they may be, and how many are taken.
const LICENCE: &str = "LICENSE";
const LICENCE_BYTES_MAX: u64 = 1 << 20;
const LICENCES_MAX: usize = 8;

/// What only people know of a model.
#[derive(Debug, Clone, Default)]
pub struct Naming {
    /// The folder's name unless given.
    pub name: Option<String>,
    /// `1` unless given.
    pub version: Option<String>,
    /// Under what the weights are given away, by its SPDX name; `unknown` unless given.
    pub licence: Option<String>,
}

/// What is being done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Looking at the graph.
    Reading,
    /// Checking the linear of this number, of so many.
    Checking(usize, usize),
    /// Writing this file of so many bytes.
    Writing(String, u64),
    /// Packing what was written and running it.
    Trying,
}

/// Why a folder can't be made a bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundlingError {
    #[error("{0} is a bundle already: it has a {MANIFEST}")]
    Already(PathBuf),
    #[error("{0} is there already, and is no empty folder that could be replaced; name a new one")]
    Occupied(PathBuf),
    #[error("the graph's data lies in {0}, a name that a bundle needs itself")]
    Reserved(String),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("{path} can't be read: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} can't be written: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("the manifest can't be written: {0}")]
    Manifest(String),
}

impl From<BundleError> for BundlingError {
    fn from(error: BundleError) -> Self {
        Self::Open(error.into())
    }
}

/// Writes a bundle into `out`, which is new or an empty folder and holds all of it afterwards or nothing. `options`
/// say which graph is taken and whether the guard is asked.
pub fn make(
    source: &Path,
    naming: &Naming,
    options: &Options,
    out: &Path,
    progress: &Progress,
) -> Result<Manifest, BundlingError> {
    let bundle = Bundle::open_file(source, options.file.as_deref())?;
    if bundle.is_stated() {
        return Err(BundlingError::Already(source.to_owned()));
    }
    progress(Stage::Reading);
    let found = inspect(source, options.file.as_deref())?;
    let data = data_files(&bundle.graph())?;
    let mut partial = Partial::of(out)?;
    let options = Options {
        state_dir: partial.packed(),
        file: None,
        ..options.clone()
    };
    let (mut guard, mut reference) = (Guard::Skipped, None);
    if options.guard {
        match Reference::of(&bundle, &options, Arc::clone(progress))? {
            Err(why) => guard = Guard::Unable(why),
            Ok(run) => reference = Some(run),
        }
    }
    let kept = reference.as_mut().map_or(&mut [][..], Reference::kept);
    partial.graph(&bundle, &data, kept, progress)?;
    for name in [TOKENIZER, TOKENIZER_CONFIG, CONFIG, GENAI] {
        if source.join(name).is_file() {
            partial.copy(&source.join(name), name, progress)?;
        }
    }
    for name in licences(source)? {
        partial.copy(&source.join(&name), &name, progress)?;
    }
    if let Some(template) = bundle.chat_template() {
        partial.write(CHAT_TEMPLATE, template)?;
        partial.add(CHAT_TEMPLATE)?;
    }
    partial.files.sort_by(|a, b| a.name.cmp(&b.name));
    let naming = naming.clone();
    let described = &bundle.manifest;
    let mut manifest = Manifest {
        name: naming.name.unwrap_or_else(|| described.name.clone()),
        version: naming.version.unwrap_or_else(|| "1".into()),
        licence: naming.licence.unwrap_or_else(|| described.licence.clone()),
        precision: found.precision.into(),
        files: std::mem::take(&mut partial.files),
        ..described.clone()
    };
    // What is tried is what was written.
    progress(Stage::Trying);
    partial.manifest(&manifest)?;
    let written = Bundle::open(&partial.bundle())?;
    let tried = match reference {
        Some(reference) => reference.hold(&written, &options).map(Guard::Passed),
        None => guard::runs(&written, &options).map(|()| guard),
    };
    manifest.import = Some(Import {
        form: found.parts.iter().map(form).collect(),
        guard: tried.map_err(|error| error.at(source))?,
    });
    partial.manifest(&manifest)?;
    partial.finish(out)?;
    Ok(manifest)
}

fn form(part: &Part) -> String {
    format!("{}: {}", part.role, part.content())
}

fn failed(path: &Path, source: io::Error) -> BundlingError {
    BundlingError::Write {
        path: path.to_owned(),
        source,
    }
}

/// The files beside the graph that its weights are in.
fn data_files(graph: &Path) -> Result<Vec<String>, BundlingError> {
    let opened = Graph::open(graph).map_err(OpenError::from)?;
    let itself = graph.file_name().and_then(OsStr::to_str);
    let names = opened.files().filter(|&name| Some(name) != itself);
    let names: Vec<String> = names.map(str::to_owned).collect();
    let own = [
        GRAPH,
        MANIFEST,
        TOKENIZER,
        TOKENIZER_CONFIG,
        CHAT_TEMPLATE,
        CONFIG,
        GENAI,
    ];
    let is_own = |name: &&String| own.contains(&name.as_str()) || name.starts_with(LICENCE);
    match names.iter().find(is_own) {
        Some(name) => Err(BundlingError::Reserved(name.clone())),
        None => Ok(names),
    }
}

/// The texts of its licence: plain files, no links to somewhere else.
fn licences(source: &Path) -> Result<Vec<String>, BundlingError> {
    let read = |error| BundlingError::Read {
        path: source.to_owned(),
        source: error,
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(source).map_err(read)? {
        let entry = entry.map_err(read)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let metadata = entry.metadata().map_err(read)?;
        if name.starts_with(LICENCE) && metadata.is_file() && metadata.len() <= LICENCE_BYTES_MAX {
            names.push(name);
        }
    }
    names.sort_unstable();
    names.truncate(LICENCES_MAX);
    Ok(names)
}

/// A folder in the making beside its place, removed unless it is finished: the bundle, and what is packed to try it.
struct Partial {
    root: PathBuf,
    files: Vec<FileEntry>,
}

impl Partial {
    /// Makes sure that `out` can be put in place at the end: before the work, not after it.
    fn of(out: &Path) -> Result<Self, BundlingError> {
        let occupied = || BundlingError::Occupied(out.to_owned());
        if out.symlink_metadata().is_ok() {
            fs::remove_dir(out).map_err(|_| occupied())?;
        }
        let name = out.file_name().ok_or_else(occupied)?.to_string_lossy();
        let partial = Self {
            root: out.with_file_name(format!(".{name}.partial")),
            files: Vec::new(),
        };
        // Left by a run that was killed.
        if partial.root.exists() {
            fs::remove_dir_all(&partial.root).map_err(|source| failed(&partial.root, source))?;
        }
        let bundle = partial.bundle();
        fs::create_dir_all(&bundle).map_err(|source| failed(&bundle, source))?;
        Ok(partial)
    }

    fn bundle(&self) -> PathBuf {
        self.root.join("bundle")
    }

    fn packed(&self) -> PathBuf {
        self.root.join("packed")
    }

    /// Writes the graph and its data: floats quantised, all else as it is. Names what is kept anew where that changes.
    fn graph(
        &mut self,
        bundle: &Bundle,
        data: &[String],
        kept: &mut [Change],
        progress: &Progress,
    ) -> Result<(), BundlingError> {
        let weights = kept.iter().map(|kept| kept.weight.clone()).collect();
        if let Some(floats) = Floats::of(bundle, &weights).map_err(OpenError::from)? {
            progress(Stage::Writing(WEIGHTS.into(), floats.bytes()));
            let matrices = self.bundle().join(WEIGHTS);
            floats
                .write(&self.bundle().join(GRAPH), &matrices)
                .map_err(|error| match error {
                    WriteError::Graph(error) => BundlingError::Open(error.into()),
                    WriteError::Pack(error) => BundlingError::Open(error.into()),
                    WriteError::Io(source) => failed(&matrices, source),
                })?;
            for kept in kept {
                kept.weight = kept_matrix(&kept.linear);
            }
            self.add(GRAPH)?;
            return self.add(WEIGHTS);
        }
        let graph = bundle.graph();
        let beside = graph.parent().unwrap_or(Path::new("."));
        self.copy(&graph, GRAPH, progress)?;
        data.iter()
            .try_for_each(|name| self.copy(&beside.join(name), name, progress))
    }

    /// Copies a file's bytes, not its permissions.
    fn copy(&mut self, from: &Path, name: &str, progress: &Progress) -> Result<(), BundlingError> {
        let mut file = File::open(from).map_err(|source| BundlingError::Read {
            path: from.to_owned(),
            source,
        })?;
        let bytes = file.metadata().map_or(0, |metadata| metadata.len());
        progress(Stage::Writing(name.to_owned(), bytes));
        let path = self.bundle().join(name);
        let copied = File::create(&path).and_then(|mut to| io::copy(&mut file, &mut to));
        copied.map_err(|source| failed(&path, source))?;
        self.add(name)
    }

    fn write(&self, name: &str, text: &str) -> Result<(), BundlingError> {
        let path = self.bundle().join(name);
        fs::write(&path, text).map_err(|source| failed(&path, source))
    }

    /// Writes the manifest, if it can be read back.
    fn manifest(&self, manifest: &Manifest) -> Result<(), BundlingError> {
        let text = manifest
            .to_text()
            .map_err(|e| BundlingError::Manifest(e.to_string()))?;
        Manifest::parse(&text).map_err(BundlingError::Manifest)?;
        self.write(MANIFEST, &text)
    }

    /// Takes a file that was written into the manifest.
    fn add(&mut self, name: &str) -> Result<(), BundlingError> {
        let path = self.bundle().join(name);
        let entry = FileEntry::of(&path).map_err(|source| failed(&path, source))?;
        self.files.push(entry);
        Ok(())
    }

    /// Puts the bundle in its place when all of it is on disk.
    fn finish(self, out: &Path) -> Result<(), BundlingError> {
        let bundle = self.bundle();
        let sync = |path: PathBuf| File::open(&path).and_then(|file| file.sync_all());
        let entries = fs::read_dir(&bundle).and_then(|entries| {
            let paths = entries.map(|entry| Ok(entry?.path()));
            paths.collect::<io::Result<Vec<_>>>()
        });
        let parent = self
            .root
            .parent()
            .filter(|path| !path.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new(".")).to_owned();
        let done = entries
            .and_then(|paths| paths.into_iter().try_for_each(sync))
            .and_then(|()| fs::rename(&bundle, out))
            .and_then(|()| sync(parent));
        done.map_err(|source| failed(out, source))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}
