//! A model's folder as exporters write it, without a manifest of ours: which graph to take, and what the files beside
//! it say of the model. Knows names and configuration files; never what is inside a graph.
//!
//! Read are Hugging Face's `config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json` and
//! `chat_template.jinja`, and onnxruntime-genai's `genai_config.json`.

use crate::bundle::{BundleError, CHAT_TEMPLATE, FORMAT, FileEntry, Manifest, TOKENIZER};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Configuration files larger than this are refused.
const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// A tokenizer of 250 thousand tokens takes 35 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
/// Places of a file whose bytes stand for all of it, and how many bytes there.
const SAMPLES: u64 = 32;
const SAMPLE_BYTES: u64 = 4096;
/// Hugging Face's file that names the tokens a template may ask for.
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Hugging Face's description of the model, and onnxruntime-genai's.
pub(crate) const CONFIG: &str = "config.json";
pub(crate) const GENAI: &str = "genai_config.json";
/// Where exporters put graphs: beside the other files or one folder down.
const GRAPH_FOLDERS: [&str; 2] = ["", "onnx"];
/// Among several graphs of one model the earlier is taken: plain ones, which are quantised here, are truer than what
/// was quantised by tensor; then eight bits, then four.
const PREFERRED: [&str; 12] = [
    "model",
    "model_fp16",
    "decoder_model_merged",
    "model_q8",
    "model_int8",
    "model_quantized",
    "decoder_model_merged_quantized",
    "model_uint8",
    "model_q4",
    "model_q4f16",
    "model_int4",
    "decoder_with_past_model",
];

/// What a folder without a manifest amounts to.
pub(crate) struct Described {
    pub(crate) manifest: Manifest,
    /// The graph, relative to the folder.
    pub(crate) graph: PathBuf,
    /// Stands for the files: their names, sizes and times of change.
    pub(crate) digest: String,
    pub(crate) chat_template: Option<String>,
    pub(crate) heads: Heads,
}

/// What configuration files say of the cache, where the graph leaves it open.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Heads {
    pub(crate) kv_heads: Option<usize>,
    pub(crate) head_dim: Option<usize>,
}

/// Reads a folder; `file` names the graph where there are several.
pub(crate) fn describe(dir: &Path, file: Option<&str>) -> Result<Described, BundleError> {
    let graph = choose(dir, file)?;
    let files = entries(dir, &graph)?;
    let config: Config = read(dir, CONFIG)?.unwrap_or_default();
    let generation: Generation = read(dir, "generation_config.json")?.unwrap_or_default();
    let genai: Genai = read(dir, GENAI)?.unwrap_or_default();
    let tokens: TokenizerConfig = read(dir, TOKENIZER_CONFIG)?.unwrap_or_default();
    let context = config.context().or(genai.model.context_length);
    // A window that the builder's runtime applies, not the graph: inside it attention is the graph's.
    let window = genai
        .model
        .decoder
        .sliding_window
        .as_ref()
        .and_then(|window| window.window_size);
    let context = context.map(|context| window.map_or(context, |window| context.min(window)));
    let context = context.ok_or_else(|| BundleError::Folder {
        path: dir.to_owned(),
        reason: "neither config.json (max_position_embeddings) nor genai_config.json (context_length) says how long \
                 a context may be"
            .into(),
    })?;
    let ids = [
        &generation.eos_token_id,
        &config.eos_token_id,
        &genai.model.eos_token_id,
    ];
    // Some write −1 for none.
    let ids = ids.iter().flat_map(|ids| ids.iter().flat_map(Ids::all));
    let ids: Vec<u64> = ids.filter_map(|&id| u64::try_from(id).ok()).collect();
    let mut stop_tokens = stop_tokens(dir, &ids)?;
    stop_tokens.extend(
        tokens
            .eos_token
            .as_ref()
            .map(|token| token.text().to_owned()),
    );
    stop_tokens.sort_unstable();
    stop_tokens.dedup();
    let name = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let name = name
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let heads = config.heads().or(genai.model.decoder.heads());
    let architecture = config
        .model_type
        .or(genai.model.family)
        .unwrap_or_else(|| "unknown".into());
    let stem = graph.file_stem().unwrap_or_default().to_string_lossy();
    let template = template(dir, tokens.chat_template)?;
    Ok(Described {
        digest: digest(dir, &files)?,
        manifest: Manifest {
            format: FORMAT,
            name,
            version: String::new(),
            architecture,
            context_length: usize::try_from(context).unwrap_or(usize::MAX).max(2),
            precision: stem
                .strip_prefix("model_")
                .unwrap_or("as exported")
                .to_owned(),
            stop_tokens,
            licence: "unknown".into(),
            source: graph.display().to_string(),
            signature: String::new(),
            import: None,
            files,
        },
        graph,
        chat_template: template,
        heads,
    })
}

/// What a bundle's own configuration files say of the cache, those that it `has`.
pub(crate) fn heads(dir: &Path, has: impl Fn(&str) -> bool) -> Result<Heads, BundleError> {
    let config: Option<Config> = has(CONFIG)
        .then(|| read(dir, CONFIG))
        .transpose()?
        .flatten();
    let genai: Option<Genai> = has(GENAI).then(|| read(dir, GENAI)).transpose()?.flatten();
    let config = config.unwrap_or_default().heads();
    Ok(config.or(genai.unwrap_or_default().model.decoder.heads()))
}

/// The graph to take, relative to the folder.
fn choose(dir: &Path, file: Option<&str>) -> Result<PathBuf, BundleError> {
    let wrong = |reason: String| BundleError::Folder {
        path: dir.to_owned(),
        reason,
    };
    let mut found: Vec<PathBuf> = Vec::new();
    for folder in GRAPH_FOLDERS {
        let entries = fs::read_dir(dir.join(folder))
            .into_iter()
            .flatten()
            .flatten();
        let graphs = entries.map(|entry| Path::new(folder).join(entry.file_name()));
        found.extend(graphs.filter(|path| path.extension().is_some_and(|e| e == "onnx")));
    }
    found.sort();
    let names = || {
        let names = found.iter().map(|path| path.display().to_string());
        names.collect::<Vec<_>>().join(", ")
    };
    if let Some(file) = file {
        let named = |path: &&PathBuf| {
            path.as_path() == Path::new(file) || path.file_name().is_some_and(|n| n == file)
        };
        let chosen = found.iter().find(named).cloned();
        return chosen
            .ok_or_else(|| wrong(format!("there is no graph {file}; there are: {}", names())));
    }
    let rank = |path: &&PathBuf| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        PREFERRED.iter().position(|known| *known == stem)
    };
    match &found[..] {
        [] => Err(BundleError::NoModel(dir.to_owned())),
        [only] => Ok(only.clone()),
        _ => {
            let best = found
                .iter()
                .filter(|path| rank(path).is_some())
                .min_by_key(|path| rank(path));
            let best = best
                .cloned()
                .ok_or_else(|| wrong(format!("name one of its graphs with --file: {}", names())))?;
            tracing::info!("{} is taken of {}", best.display(), names());
            Ok(best)
        }
    }
}

/// The files that make up the model: the graph, what lies beside it and could be its weights, and what is read of it.
fn entries(dir: &Path, graph: &Path) -> Result<Vec<FileEntry>, BundleError> {
    let mut names: Vec<PathBuf> = vec![graph.to_owned(), TOKENIZER.into()];
    let beside = dir.join(graph);
    let beside = beside.parent().unwrap_or(dir);
    for entry in fs::read_dir(beside).into_iter().flatten().flatten() {
        let name = Path::new(&entry.file_name()).to_owned();
        let other_graph = name.extension().is_some_and(|e| e == "onnx");
        if !other_graph && entry.path().is_file() {
            names.push(graph.with_file_name(name));
        }
    }
    for name in [
        TOKENIZER_CONFIG,
        CHAT_TEMPLATE,
        CONFIG,
        "generation_config.json",
        GENAI,
    ] {
        if dir.join(name).is_file() {
            names.push(name.into());
        }
    }
    names.sort();
    names.dedup();
    let entry = |name: PathBuf| {
        let path = dir.join(&name);
        match path.metadata() {
            Ok(metadata) => Ok(FileEntry {
                name: name.display().to_string(),
                sha256: String::new(),
                bytes: metadata.len(),
            }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(BundleError::Folder {
                path: dir.to_owned(),
                reason: format!(
                    "{} is missing; copy it from where the model was exported",
                    name.display()
                ),
            }),
            Err(source) => Err(BundleError::Read { path, source }),
        }
    };
    names.into_iter().map(entry).collect()
}

/// Names, sizes, times of change and samples: hashing the contents at every start would take a small board ten
/// seconds, and times alone may be the same for all (images that are built to the same bytes).
fn digest(dir: &Path, files: &[FileEntry]) -> Result<String, BundleError> {
    let mut hash = Sha256::new();
    for entry in files {
        let path = dir.join(&entry.name);
        let sampled = File::open(&path).and_then(|mut file| {
            let changed = file.metadata()?.modified()?;
            let changed = changed
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
            hash.update(format!(
                "{} {} {}\n",
                entry.name,
                entry.bytes,
                changed.as_nanos()
            ));
            for sample in 0..SAMPLES {
                file.seek(SeekFrom::Start(entry.bytes / SAMPLES * sample))?;
                let mut bytes = Vec::with_capacity(SAMPLE_BYTES as usize);
                file.by_ref().take(SAMPLE_BYTES).read_to_end(&mut bytes)?;
                hash.update(bytes);
            }
            Ok(())
        });
        sampled.map_err(|source| BundleError::Read { path, source })?;
    }
    Ok(crate::bundle::hex(&hash.finalize()))
}

/// The chat template, from its own file or from the tokenizer's configuration.
fn template(dir: &Path, inside: Option<Templates>) -> Result<Option<String>, BundleError> {
    let path = dir.join(CHAT_TEMPLATE);
    if path.is_file() {
        return text(&path, CONFIG_BYTES_MAX).map(Some);
    }
    Ok(inside.and_then(|inside| match inside {
        Templates::One(template) => Some(template),
        Templates::Named(all) => {
            let default = all.iter().position(|t| t.name == "default").unwrap_or(0);
            all.into_iter().nth(default).map(|t| t.template)
        }
    }))
}

/// The texts of the tokens that end an answer.
fn stop_tokens(dir: &Path, ids: &[u64]) -> Result<Vec<String>, BundleError> {
    let path = dir.join(TOKENIZER);
    let wrong = |reason: String| BundleError::Folder {
        path: path.clone(),
        reason,
    };
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let tokenizer: Tokenizer = serde_json::from_str(&text(&path, TOKENIZER_BYTES_MAX)?)
        .map_err(|e| wrong(e.to_string()))?;
    let mut texts = Vec::new();
    for &id in ids {
        let token = tokenizer.added_tokens.iter().find(|token| token.id == id);
        let token = token
            .ok_or_else(|| wrong(format!("the stop token {id} is none of its added tokens")))?;
        texts.push(token.content.clone());
    }
    Ok(texts)
}

fn read<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>, BundleError> {
    let path = dir.join(name);
    if !path.is_file() {
        return Ok(None);
    }
    let parsed = serde_json::from_str(&text(&path, CONFIG_BYTES_MAX)?);
    parsed.map(Some).map_err(|e| BundleError::Folder {
        path,
        reason: e.to_string(),
    })
}

/// A file's text, if it has no more than this many bytes.
pub(crate) fn text(path: &Path, bytes_max: u64) -> Result<String, BundleError> {
    let failed = |source| BundleError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(bytes_max + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > bytes_max {
        return Err(BundleError::Folder {
            path: path.to_owned(),
            reason: format!("it is larger than {bytes_max} bytes"),
        });
    }
    Ok(text)
}

/// One token id or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(i64),
    Several(Vec<i64>),
}

impl Ids {
    fn all(&self) -> &[i64] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Several(ids) => ids,
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Config {
    model_type: Option<String>,
    max_position_embeddings: Option<u64>,
    n_positions: Option<u64>,
    /// MPT's.
    max_seq_len: Option<u64>,
    /// BLOOM's.
    seq_length: Option<u64>,
    eos_token_id: Option<Ids>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    hidden_size: Option<usize>,
    head_dim: Option<usize>,
    /// Of models that read more than text.
    #[serde(rename = "text_config")]
    text: Option<Box<Config>>,
}

impl Heads {
    /// These, and the others where these are silent.
    fn or(self, others: Self) -> Self {
        Self {
            kv_heads: self.kv_heads.or(others.kv_heads),
            head_dim: self.head_dim.or(others.head_dim),
        }
    }
}

impl Config {
    fn heads(&self) -> Heads {
        let own = Heads {
            kv_heads: self.num_key_value_heads.or(self.num_attention_heads),
            head_dim: self
                .head_dim
                .or_else(|| self.hidden_size?.checked_div(self.num_attention_heads?)),
        };
        let inner = self.text.as_ref().map(|inner| inner.heads());
        own.or(inner.unwrap_or_default())
    }

    fn context(&self) -> Option<u64> {
        let inner = || self.text.as_ref().and_then(|inner| inner.context());
        self.max_position_embeddings
            .or(self.n_positions)
            .or(self.max_seq_len)
            .or(self.seq_length)
            .or_else(inner)
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Generation {
    eos_token_id: Option<Ids>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Genai {
    model: GenaiModel,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct GenaiModel {
    #[serde(rename = "type")]
    family: Option<String>,
    context_length: Option<u64>,
    eos_token_id: Option<Ids>,
    decoder: GenaiDecoder,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct GenaiDecoder {
    num_key_value_heads: Option<usize>,
    head_size: Option<usize>,
    sliding_window: Option<GenaiWindow>,
}

#[derive(Deserialize)]
struct GenaiWindow {
    window_size: Option<u64>,
}

impl GenaiDecoder {
    fn heads(&self) -> Heads {
        Heads {
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_size,
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct TokenizerConfig {
    eos_token: Option<Token>,
    chat_template: Option<Templates>,
}

/// A token's text, plain or with how it is matched.
#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Plain(String),
    Added { content: String },
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Self::Plain(text) | Self::Added { content: text } => text,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

#[derive(Deserialize)]
struct Tokenizer {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u64,
    content: String,
}
