//! A model's folder as the forge writes it and the agent reads it: a manifest and the files it names.
//! Knows names, sizes and digests; never what is inside a graph or a tokenizer.

use crate::folder::{self, Heads};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The manifest's file name inside a bundle.
pub const MANIFEST: &str = "manifest.toml";
/// The graph, with its weights beside it in [`WEIGHTS`].
pub const GRAPH: &str = "model.onnx";
/// The graph's external data.
pub const WEIGHTS: &str = "model.onnx.data";
/// The tokenizer, in Hugging Face's `tokenizers` format.
pub const TOKENIZER: &str = "tokenizer.json";
/// The chat template, in Jinja; a bundle without one takes no `chat` tasks.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The manifest format written and read by this version.
pub const FORMAT: u32 = 1;
/// A chat template larger than this is refused.
const TEMPLATE_BYTES_MAX: u64 = 1 << 20;
/// A manifest larger than this is refused unread.
const MANIFEST_BYTES_MAX: u64 = 64 * 1024;

/// What a bundle says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The format of this file: [`FORMAT`].
    pub format: u32,
    /// The catalogue's name, `smollm2-135m`.
    pub name: String,
    pub version: String,
    /// The family of the graph: `llama`.
    pub architecture: String,
    /// Tokens that prompt and answer may take together.
    pub context_length: usize,
    /// `int8`, `q4` or `f32`.
    pub precision: String,
    /// Tokens, as written in the vocabulary, that end an answer.
    pub stop_tokens: Vec<String>,
    pub licence: String,
    /// Where the weights came from, with a digest where there is one.
    pub source: String,
    /// Reserved: the signature over the other fields. Not checked yet; the files' digests are.
    #[serde(default)]
    pub signature: String,
    /// Of a bundle that was made of an exporter's folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import: Option<Import>,
    /// Every file of the bundle but the manifest.
    #[serde(rename = "file")]
    pub files: Vec<FileEntry>,
}

/// Where a bundle comes from that was made of an exporter's folder, and how it was checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Import {
    /// What its graph holds, and what each is packed as.
    pub form: Vec<String>,
    pub guard: Guard,
}

/// What the accuracy guard said of an import.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Guard {
    /// It was not asked.
    Skipped,
    /// There is nothing to compare with: tract can't run the graph in f32, for this reason.
    Unable(String),
    Passed(Check),
}

impl fmt::Display for Guard {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Skipped => f.write_str("not checked against f32 arithmetic"),
            Self::Unable(why) => write!(
                f,
                "not checked against f32 arithmetic, in which tract can't run it: {why}"
            ),
            Self::Passed(check) => {
                write!(
                    f,
                    "{:.4} nats a token from the same weights in f32 arithmetic ({} tokens; linears by {})",
                    check.divergence, check.tokens, check.oracle
                )?;
                if check.plain {
                    f.write_str("; fused attention would diverge and stays with tract")?;
                }
                check.kept.iter().try_for_each(|kept| {
                    let percent = 100.0 * kept.error;
                    write!(
                        f,
                        "; {} stays in f32, eight bits change it by {percent:.0} %",
                        kept.linear
                    )
                })
            }
        }
    }
}

/// How near an import is to the same weights in f32 arithmetic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Check {
    /// The mean KL divergence of a token, in nats.
    pub divergence: f64,
    /// Tokens it was measured with.
    pub tokens: usize,
    /// Whether attention has to stay with tract, ours having diverged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plain: bool,
    /// Who says what linears compute: `tract`, or our `own` arithmetic where tract can't read the file's form.
    pub oracle: String,
    /// The linear that eight bits change most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst: Option<Change>,
    /// Linears that would change too much, and so stay in f32; their weights by their names in this bundle.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<Change>,
}

/// A linear, and what packing changes of its result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// Its output's name in the graph.
    pub linear: String,
    /// Its weight's.
    pub weight: String,
    /// The change, as a share of the result: root of the summed squares.
    pub error: f64,
}

/// One file of a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// A plain name: no folder, no `..`.
    pub name: String,
    /// Lower-case hexadecimal.
    pub sha256: String,
    pub bytes: u64,
}

/// Why a bundle can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error(
        "there is no model at {0}: neither {MANIFEST} nor an .onnx file is there (`cargo forge pull smollm2-135m` makes one)"
    )]
    NoModel(PathBuf),
    #[error("{path} can't be used as a model: {reason}")]
    Folder { path: PathBuf, reason: String },
    #[error("{path} can't be read: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is not a valid manifest: {reason}")]
    Manifest { path: PathBuf, reason: String },
    #[error("{path} is missing, though the manifest names it; pull the model again")]
    Missing { path: PathBuf },
    #[error(
        "{path} has {found} bytes where the manifest says {expected}: it is truncated or altered; pull the model again"
    )]
    Size {
        path: PathBuf,
        expected: u64,
        found: u64,
    },
    #[error(
        "{path} does not match its digest (sha256 {found}, manifest {expected}): it was altered; pull the model again"
    )]
    Digest {
        path: PathBuf,
        expected: String,
        found: String,
    },
}

/// An opened bundle: its manifest is valid and its files are there at their stated sizes. Digests are
/// checked when the weights are packed ([`Bundle::verify`]), not at every start: hashing 1.5 GB costs a
/// small board ten seconds.
///
/// An exporter's folder without a manifest is one too: what a manifest would say is read from the files beside the
/// graph, and there are no digests to check.
#[derive(Debug, Clone)]
pub struct Bundle {
    dir: PathBuf,
    pub manifest: Manifest,
    graph: PathBuf,
    /// Of a folder without a manifest.
    described: Option<String>,
    chat_template: Option<String>,
    heads: Heads,
}

impl Bundle {
    /// Reads the manifest in `dir` and checks that each file is there at its size; or, without one, what the
    /// exporter wrote there.
    pub fn open(dir: &Path) -> Result<Self, BundleError> {
        Self::open_file(dir, None)
    }

    /// The same with the graph of this name, where a folder without a manifest has several.
    pub fn open_file(dir: &Path, graph: Option<&str>) -> Result<Self, BundleError> {
        if graph.is_none() && dir.join(MANIFEST).exists() {
            return Self::stated(dir);
        }
        let described = folder::describe(dir, graph)?;
        Ok(Self {
            dir: dir.to_owned(),
            manifest: described.manifest,
            graph: described.graph,
            described: Some(described.digest),
            chat_template: described.chat_template,
            heads: described.heads,
        })
    }

    fn stated(dir: &Path) -> Result<Self, BundleError> {
        let path = dir.join(MANIFEST);
        let read = |source| BundleError::Read {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(read)?;
        let mut text = String::new();
        file.take(MANIFEST_BYTES_MAX + 1)
            .read_to_string(&mut text)
            .map_err(read)?;
        let manifest = Manifest::parse(&text).map_err(|reason| BundleError::Manifest {
            path: path.clone(),
            reason,
        })?;
        let mut bundle = Self {
            dir: dir.to_owned(),
            manifest,
            graph: GRAPH.into(),
            described: None,
            chat_template: None,
            heads: Heads::default(),
        };
        for entry in &bundle.manifest.files {
            let path = bundle.path(&entry.name);
            let found = match path.metadata() {
                Ok(metadata) => metadata.len(),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    return Err(BundleError::Missing { path });
                }
                Err(source) => return Err(BundleError::Read { path, source }),
            };
            if found != entry.bytes {
                return Err(BundleError::Size {
                    path,
                    expected: entry.bytes,
                    found,
                });
            }
        }
        bundle.heads = folder::heads(dir, |name| bundle.has(name))?;
        if bundle.has(CHAT_TEMPLATE) {
            bundle.chat_template = Some(folder::text(
                &bundle.path(CHAT_TEMPLATE),
                TEMPLATE_BYTES_MAX,
            )?);
        }
        Ok(bundle)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where a file of this bundle lies.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where the graph is.
    pub fn graph(&self) -> PathBuf {
        self.dir.join(&self.graph)
    }

    /// The graph's name, relative to the folder.
    pub fn graph_name(&self) -> String {
        self.graph.display().to_string()
    }

    /// What is known of the cache, where the graph leaves it open.
    pub(crate) fn heads(&self) -> Heads {
        self.heads
    }

    /// The chat template's source; a model without one takes no `chat` tasks.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Whether the manifest names this file.
    pub fn has(&self, name: &str) -> bool {
        self.entry(name).is_some()
    }

    /// The digest that stands for this model: the manifest's own entries, hashed. Without a manifest it stands for
    /// the files' names, sizes and times of change.
    pub fn digest(&self) -> String {
        if let Some(described) = &self.described {
            return described.clone();
        }
        let mut hash = Sha256::new();
        for entry in &self.manifest.files {
            hash.update(format!("{} {} {}\n", entry.sha256, entry.bytes, entry.name));
        }
        hex(&hash.finalize())
    }

    /// Whether there is a manifest.
    pub(crate) fn is_stated(&self) -> bool {
        self.described.is_none()
    }

    /// Whether a file beside the graph belongs to the model: the manifest names it, or there is none.
    pub(crate) fn covers(&self, name: &str) -> bool {
        self.described.is_some() || self.has(name)
    }

    /// Hashes every file and compares it with the manifest, if there is one.
    pub fn verify(&self) -> Result<(), BundleError> {
        self.verify_with(|_| {})
    }

    /// The same, telling how many bytes were read so far.
    pub fn verify_with(&self, mut progress: impl FnMut(u64)) -> Result<(), BundleError> {
        if self.described.is_some() {
            return Ok(());
        }
        let mut done = 0;
        for entry in &self.manifest.files {
            let path = self.path(&entry.name);
            let digest = hashed(&path, |bytes| {
                done += bytes;
                progress(done);
            });
            let found = digest.map_err(|source| BundleError::Read {
                path: path.clone(),
                source,
            })?;
            if found != entry.sha256 {
                let expected = entry.sha256.clone();
                return Err(BundleError::Digest {
                    path,
                    expected,
                    found,
                });
            }
        }
        Ok(())
    }

    fn entry(&self, name: &str) -> Option<&FileEntry> {
        self.manifest.files.iter().find(|entry| entry.name == name)
    }
}

impl Manifest {
    /// Parses and checks a manifest's text.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(format!("it is larger than {MANIFEST_BYTES_MAX} bytes"));
        }
        let manifest: Self = toml::from_str(text).map_err(|e| e.to_string())?;
        if manifest.format != FORMAT {
            return Err(format!(
                "format {} is not {FORMAT}, the one this version reads",
                manifest.format
            ));
        }
        if manifest.context_length < 2 {
            return Err("a context of fewer than two tokens holds no answer".into());
        }
        for entry in &manifest.files {
            let plain = !entry.name.is_empty()
                && entry.name != ".."
                && entry.name != "."
                && !entry.name.contains(['/', '\\', '\0']);
            if !plain {
                return Err(format!("{:?} is not a plain file name", entry.name));
            }
        }
        if let Some(Import {
            guard: Guard::Passed(check),
            ..
        }) = &manifest.import
        {
            let errors = check
                .worst
                .iter()
                .chain(&check.kept)
                .map(|change| change.error);
            if !errors.chain([check.divergence]).all(f64::is_finite) {
                return Err("the guard's figures are not all numbers".into());
            }
        }
        for needed in [GRAPH, TOKENIZER] {
            if !manifest.files.iter().any(|entry| entry.name == needed) {
                return Err(format!("it names no {needed}"));
            }
        }
        Ok(manifest)
    }

    /// The manifest as the text of its file.
    pub fn to_text(&self) -> Result<String, toml::ser::Error> {
        toml::to_string_pretty(self)
    }
}

impl FileEntry {
    /// Describes a file on disk, to be named in a manifest.
    pub fn of(path: &Path) -> io::Result<Self> {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Ok(Self {
            name,
            sha256: sha256_of(path)?,
            bytes: path.metadata()?.len(),
        })
    }
}

/// The SHA-256 of a file, streamed, in lower-case hexadecimal.
pub fn sha256_of(path: &Path) -> io::Result<String> {
    hashed(path, |_| {})
}

fn hashed(path: &Path, mut read: impl FnMut(u64)) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            n => {
                hash.update(&buffer[..n]);
                read(n as u64);
            }
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
