//! Between text and tokens: the tokenizer, the chat template and the stream of an answer. Knows nothing
//! of the graph, of slots or of time (but for a template that asks for the date).
//!
//! Control tokens (`<|im_start|>`) have a meaning only where the template, or the author of a whole prompt,
//! wrote them. In the content of a chat message they are data, however the content is cut up: see [`control`].

mod control;
mod stream;
mod table;
mod template;

pub(crate) use template::bounded;

pub use stream::{Pushed, TextStream};

use crate::bundle::{self, Bundle};
use crate::folder::TOKENIZER_CONFIG;
use control::{Control, Part};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::PathBuf;
use table::ByteTable;
use template::{SpecialNames, Template};
use tokenizers::{AddedToken, ModelWrapper, Tokenizer};

/// A template or configuration larger than this is refused.
const SIDE_FILE_BYTES_MAX: u64 = 4 << 20;

/// One turn of a chat.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user` or `assistant`, as the model's template understands it.
    pub role: String,
    pub content: String,
}

/// Why text can't become tokens, or a model's text files can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("{path} can't be read: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("{path} is not a tokenizer this version understands: {reason}")]
    Tokenizer { path: PathBuf, reason: String },
    #[error("{path} is not a valid chat template: {reason}")]
    BadTemplate { path: PathBuf, reason: String },
    #[error(
        "the manifest's stop token {token:?} is not in the tokenizer's vocabulary; pull the model again"
    )]
    StopToken { token: String },
    #[error("the model has no chat template; send a prompt (kind generate) instead")]
    NoTemplate,
    /// The template refused these messages, or could not deal with them.
    #[error("{0}")]
    Template(String),
    #[error("the tokenizer failed on this text: {0}")]
    Encode(String),
}

/// A model's tokenizer and chat template. Immutable, so it is shared by `Arc`.
pub struct Text {
    tokenizer: Tokenizer,
    control: Control,
    table: Option<ByteTable>,
    template: Option<Template>,
    /// Sorted.
    stop: Vec<u32>,
    bytes: usize,
}

impl Text {
    /// Reads the tokenizer and, where there is one, the chat template.
    pub fn open(bundle: &Bundle) -> Result<Self, TextError> {
        let tokenizer = open_tokenizer(bundle)?;
        let stop = stop_ids(bundle, &tokenizer)?;
        let template = bundle.chat_template();
        let template = template
            .map(|source| open_template(bundle, source))
            .transpose()?;
        let table = ByteTable::of(&tokenizer);
        let bytes = estimate_bytes(&tokenizer) + table.as_ref().map_or(0, ByteTable::bytes);
        Ok(Self {
            control: Control::of(&tokenizer),
            table,
            template,
            stop,
            bytes,
            tokenizer,
        })
    }

    /// The tokens of `text`, with nothing added. Control tokens written in it count as such, except where
    /// [`render`](Self::render) marked them as a message's content.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let mut tokens = Vec::with_capacity(text.len() / 3);
        for part in self.control.split(text) {
            match part {
                Part::Control(id) => tokens.push(id),
                Part::Text(text) => {
                    let encoding = self
                        .tokenizer
                        .encode_fast(text, false)
                        .map_err(|e| TextError::Encode(template::bounded(&e.to_string())))?;
                    tokens.extend_from_slice(encoding.get_ids());
                }
            }
        }
        Ok(tokens)
    }

    /// The prompt that the model's template makes of `messages`, ending where the answer begins. It is meant
    /// for [`encode`](Self::encode): content that looks like a control token carries a mark.
    pub fn render(&self, messages: &[Message]) -> Result<String, TextError> {
        let template = self.template.as_ref().ok_or(TextError::NoTemplate)?;
        let marked: Vec<_> = messages
            .iter()
            .map(|message| Message {
                role: self.control.mark(&message.role),
                content: self.control.mark(&message.content),
            })
            .collect();
        template.render(&marked).map_err(TextError::Template)
    }

    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Whether this token ends an answer.
    pub fn is_stop(&self, token: u32) -> bool {
        self.stop.binary_search(&token).is_ok()
    }

    /// An estimate of the heap this holds, in bytes; nearly all of it is the vocabulary.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

fn open_tokenizer(bundle: &Bundle) -> Result<Tokenizer, TextError> {
    let path = bundle.path(bundle::TOKENIZER);
    let refuse = |reason: String| TextError::Tokenizer {
        path: path.clone(),
        reason: template::bounded(&reason),
    };
    let bytes = fs::read(&path).map_err(|e| TextError::File {
        path: path.clone(),
        reason: e.to_string(),
    })?;
    let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|e| refuse(e.to_string()))?;
    // A tokenizer.json may cut or fill what it encodes; a prompt is never shortened in silence.
    tokenizer
        .with_truncation(None)
        .map_err(|e| refuse(e.to_string()))?;
    tokenizer.with_padding(None);
    // What ends an answer is a control token, even where the file forgot to say so.
    let stop = bundle.manifest.stop_tokens.iter();
    let stop = stop.filter(|token| tokenizer.token_to_id(token).is_some());
    let stop: Vec<_> = stop.map(|s| AddedToken::from(s.clone(), true)).collect();
    tokenizer
        .add_special_tokens(stop)
        .map_err(|e| refuse(e.to_string()))?;
    // Control tokens are cut out before the tokenizer sees the text, so that it can take them as data.
    tokenizer.set_encode_special_tokens(true);
    Ok(tokenizer)
}

fn stop_ids(bundle: &Bundle, tokenizer: &Tokenizer) -> Result<Vec<u32>, TextError> {
    let id_of = |token: &String| {
        let missing = || TextError::StopToken {
            token: token.clone(),
        };
        tokenizer.token_to_id(token).ok_or_else(missing)
    };
    let mut ids = Vec::new();
    for token in &bundle.manifest.stop_tokens {
        ids.push(id_of(token)?);
    }
    ids.sort_unstable();
    Ok(ids)
}

fn open_template(bundle: &Bundle, source: &str) -> Result<Template, TextError> {
    let path = bundle.path(bundle::CHAT_TEMPLATE);
    let names = if bundle.has(TOKENIZER_CONFIG) {
        SpecialNames::parse(&read_side_file(bundle, TOKENIZER_CONFIG)?).map_err(|e| {
            TextError::File {
                path: bundle.path(TOKENIZER_CONFIG),
                reason: template::bounded(&e.to_string()),
            }
        })?
    } else {
        SpecialNames {
            eos_token: bundle.manifest.stop_tokens.first().cloned(),
            ..SpecialNames::default()
        }
    };
    Template::parse(source, names).map_err(|reason| TextError::BadTemplate { path, reason })
}

fn read_side_file(bundle: &Bundle, name: &str) -> Result<String, TextError> {
    let path = bundle.path(name);
    let refuse = |reason: String| TextError::File {
        path: path.clone(),
        reason,
    };
    let bytes = path.metadata().map_err(|e| refuse(e.to_string()))?.len();
    if bytes > SIDE_FILE_BYTES_MAX {
        return Err(refuse(format!(
            "it has {bytes} bytes; {SIDE_FILE_BYTES_MAX} are the most"
        )));
    }
    fs::read_to_string(&path).map_err(|e| refuse(e.to_string()))
}

/// What the library holds, by its data structures: each vocabulary entry as a string in two hash tables,
/// each merge in one. Hash tables are on average three quarters full; a string's buffer takes at least 16.
fn estimate_bytes(tokenizer: &Tokenizer) -> usize {
    const STRING: usize = 24;
    let entry = |payload: usize| (payload + 1) * 4 / 3;
    let vocabulary: usize = (0..tokenizer.get_vocab_size(true) as u32)
        .filter_map(|id| tokenizer.id_to_token(id))
        .map(|token| 2 * (entry(STRING + 8) + token.len().next_multiple_of(16)))
        .sum();
    // A merge makes one new entry of two, so there are about as many of them as entries.
    let merges = match tokenizer.get_model() {
        ModelWrapper::BPE(_) => tokenizer.get_vocab_size(false) * entry(16),
        _ => 0,
    };
    vocabulary + merges
}

#[cfg(test)]
mod tests;
