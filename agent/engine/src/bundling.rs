//! Makes a bundle of an exporter's folder: checks the import once, where there is time for it, and writes down what
//! was found, so that a gateway need not.

use crate::bundle::{
    Bundle, BundleError, CHAT_TEMPLATE, FileEntry, GRAPH, Guard, Import, MANIFEST, Manifest,
    TOKENIZER,
};
use crate::folder::{CONFIG, GENAI, TOKENIZER_CONFIG};
use crate::guard::{self, Progress};
use crate::inspect::{Part, inspect};
use crate::onnx::Graph;
use crate::open::{OpenError, Options};
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
    let partial = Partial::beside(out)?;
    let guard = if options.guard {
        let found = guard::measured(
            &bundle,
            options,
            &partial.path("packed"),
            Arc::clone(progress),
        )?;
        let packed = partial.path("packed");
        fs::remove_dir_all(&packed).map_err(|source| failed(&packed, source))?;
        found
    } else {
        Guard::Skipped
    };
    let import = Import {
        graph: bundle.graph_name(),
        form: found.parts.iter().map(form).collect(),
        guard,
    };
    let mut files = Vec::new();
    let mut add = |name: &str, from: Content| {
        progress(Stage::Writing(name.to_owned(), from.bytes()));
        let path = partial.path(name);
        let written = from.write(&path).and_then(|()| FileEntry::of(&path));
        files.push(written.map_err(|source| failed(&path, source))?);
        Ok::<(), BundlingError>(())
    };
    let graph = bundle.graph();
    add(GRAPH, Content::File(graph.clone()))?;
    let beside = graph.parent().unwrap_or(Path::new("."));
    for name in data_files(&graph)? {
        add(&name, Content::File(beside.join(&name)))?;
    }
    for entry in fs::read_dir(source).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let wanted = [TOKENIZER, TOKENIZER_CONFIG, CONFIG, GENAI].contains(&name.as_str());
        if wanted || name.starts_with("LICENSE") {
            add(&name, Content::File(entry.path()))?;
        }
    }
    if let Some(template) = bundle.chat_template() {
        add(CHAT_TEMPLATE, Content::Text(template.to_owned()))?;
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let Naming {
        name,
        version,
        licence,
    } = naming.clone();
    let described = bundle.manifest;
    let manifest = Manifest {
        name: name.unwrap_or(described.name),
        version: version.unwrap_or_else(|| "1".into()),
        licence: licence.unwrap_or(described.licence),
        precision: found.precision.into(),
        import: Some(import),
        files,
        ..described
    };
    let text = Content::Text(manifest.to_text()?);
    let path = partial.path(MANIFEST);
    text.write(&path).map_err(|source| failed(&path, source))?;
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
    match names.iter().find(|name| own.contains(&name.as_str())) {
        Some(name) => Err(BundlingError::Reserved(name.clone())),
        None => Ok(names),
    }
}

/// What a file is to hold.
enum Content {
    Text(String),
    File(PathBuf),
}

impl Content {
    fn bytes(&self) -> u64 {
        match self {
            Self::Text(text) => text.len() as u64,
            Self::File(path) => path.metadata().map_or(0, |metadata| metadata.len()),
        }
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        match self {
            Self::Text(text) => fs::write(path, text)?,
            Self::File(from) => drop(fs::copy(from, path)?),
        }
        File::open(path)?.sync_all()
    }
}

/// A folder in the making, removed unless it is finished.
struct Partial(PathBuf);

impl Partial {
    fn beside(out: &Path) -> Result<Self, BundlingError> {
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        let path = out.with_file_name(format!(".{name}.{}.partial", std::process::id()));
        fs::create_dir_all(&path).map_err(|source| failed(&path, source))?;
        Ok(Self(path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn finish(self, out: &Path) -> Result<(), BundlingError> {
        // An empty folder gives way to it.
        fs::rename(&self.0, out).map_err(|source| failed(out, source))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
