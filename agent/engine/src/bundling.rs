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
    #[error("{0} is there already and not empty; name a new folder")]
    Occupied(PathBuf),
    #[error("the graph's data lies in {0}, a name that a bundle needs itself")]
    Reserved(String),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("{path} can't be written: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("its matrices can't be written: {0}")]
    Narrow(#[from] WriteError),
    #[error("the manifest can't be written: {0}")]
    Manifest(#[from] toml::ser::Error),
}

impl From<BundleError> for BundlingError {
    fn from(error: BundleError) -> Self {
        Self::Open(error.into())
    }
}

/// Writes a bundle into `out`, which is new or empty and holds all of it afterwards or nothing. `options` say which
/// graph is taken and whether the guard is asked.
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
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(BundlingError::Occupied(out.to_owned()));
    }
    progress(Stage::Reading);
    let found = inspect(source, options.file.as_deref())?;
    let mut folder = Partial::beside(out)?;
    let options = Options {
        state_dir: folder.path("packed"),
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
    folder.graph(&bundle, kept, progress)?;
    for entry in fs::read_dir(source).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let wanted = [TOKENIZER, TOKENIZER_CONFIG, CONFIG, GENAI].contains(&name.as_str());
        if wanted || name.starts_with("LICENSE") {
            folder.copy(&entry.path(), &name, progress)?;
        }
    }
    if let Some(template) = bundle.chat_template() {
        folder.write(CHAT_TEMPLATE, template)?;
        folder.add(CHAT_TEMPLATE)?;
    }
    folder.files.sort_by(|a, b| a.name.cmp(&b.name));
    let naming = naming.clone();
    let described = &bundle.manifest;
    let mut manifest = Manifest {
        name: naming.name.unwrap_or_else(|| described.name.clone()),
        version: naming.version.unwrap_or_else(|| "1".into()),
        licence: naming.licence.unwrap_or_else(|| described.licence.clone()),
        precision: found.precision.into(),
        files: std::mem::take(&mut folder.files),
        ..described.clone()
    };
    // What is tried is what was written.
    progress(Stage::Trying);
    folder.write(MANIFEST, &manifest.to_text()?)?;
    let written = Bundle::open(&folder.place)?;
    let tried = match reference {
        Some(reference) => reference.hold(&written, &options).map(Guard::Passed),
        None => guard::runs(&written, &options).map(|()| guard),
    };
    let guard = tried.map_err(|error| error.at(source))?;
    let packed = &options.state_dir;
    fs::remove_dir_all(packed).map_err(|source| failed(packed, source))?;
    manifest.import = Some(Import {
        graph: bundle.graph_name(),
        form: found.parts.iter().map(form).collect(),
        guard,
    });
    folder.write(MANIFEST, &manifest.to_text()?)?;
    folder.finish(out)?;
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
    match names.iter().find(|name| own.contains(&name.as_str())) {
        Some(name) => Err(BundlingError::Reserved(name.clone())),
        None => Ok(names),
    }
}

/// A folder in the making, removed unless it is finished.
struct Partial {
    place: PathBuf,
    files: Vec<FileEntry>,
}

impl Partial {
    fn beside(out: &Path) -> Result<Self, BundlingError> {
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        let place = out.with_file_name(format!(".{name}.{}.partial", std::process::id()));
        fs::create_dir_all(&place).map_err(|source| failed(&place, source))?;
        Ok(Self {
            place,
            files: Vec::new(),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    /// Writes the graph and its data: floats quantised, all else as it is. Names what is kept anew where that changes.
    fn graph(
        &mut self,
        bundle: &Bundle,
        kept: &mut [Change],
        progress: &Progress,
    ) -> Result<(), BundlingError> {
        let weights = kept.iter().map(|kept| kept.weight.clone()).collect();
        if let Some(floats) = Floats::of(bundle, &weights).map_err(OpenError::from)? {
            progress(Stage::Writing(WEIGHTS.into(), floats.bytes()));
            floats.write(&self.path(GRAPH), &self.path(WEIGHTS))?;
            for kept in kept {
                kept.weight = kept_matrix(&kept.linear);
            }
            self.add(GRAPH)?;
            return self.add(WEIGHTS);
        }
        let graph = bundle.graph();
        let beside = graph.parent().unwrap_or(Path::new("."));
        let data = data_files(&graph)?;
        self.copy(&graph, GRAPH, progress)?;
        for name in data {
            self.copy(&beside.join(&name), &name, progress)?;
        }
        Ok(())
    }

    fn copy(&mut self, from: &Path, name: &str, progress: &Progress) -> Result<(), BundlingError> {
        let bytes = from.metadata().map_or(0, |metadata| metadata.len());
        progress(Stage::Writing(name.to_owned(), bytes));
        let to = self.path(name);
        fs::copy(from, &to).map_err(|source| failed(&to, source))?;
        self.add(name)
    }

    fn write(&self, name: &str, text: &str) -> Result<(), BundlingError> {
        let path = self.path(name);
        let written = fs::write(&path, text).and_then(|()| File::open(&path)?.sync_all());
        written.map_err(|source| failed(&path, source))
    }

    /// Takes a file that was written into the manifest.
    fn add(&mut self, name: &str) -> Result<(), BundlingError> {
        let path = self.path(name);
        let entry = File::open(&path)
            .and_then(|file| file.sync_all())
            .and_then(|()| FileEntry::of(&path));
        self.files
            .push(entry.map_err(|source| failed(&path, source))?);
        Ok(())
    }

    fn finish(self, out: &Path) -> Result<(), BundlingError> {
        // An empty folder gives way to it.
        fs::rename(&self.place, out).map_err(|source| failed(out, source))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.place);
    }
}
