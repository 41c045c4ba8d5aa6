//! What the engine is asked: requests, and the check that makes them tokens. Runs nothing.

use crate::arena::BLOCK_TOKENS;
use crate::sampler::Sampling;
use crate::text::{Message, Text, TextError, TextStream};
use std::sync::Arc;
use std::time::Duration;

/// What to answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// A text as it stands.
    Text(String),
    /// Messages, through the model's template.
    Chat(Vec<Message>),
    /// Token ids, for measuring.
    Tokens(Vec<u32>),
}

/// One request, not yet checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub prompt: Prompt,
    pub max_tokens: usize,
    pub sampling: Sampling,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
}

/// Why a request can't be answered, whatever the load.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("prompt and answer need {needed} tokens, the model has {available}")]
    ContextOverflow { needed: usize, available: usize },
    #[error("{field}: {reason}")]
    Invalid { field: &'static str, reason: String },
    #[error("this model has no chat template; send a prompt instead of messages")]
    NoTemplate,
    #[error("the chat template refused the messages: {0}")]
    Template(String),
}

/// A request that was tokenised and fits the model's context, or an answer that was put aside.
pub struct Prepared {
    /// The prompt, and what the answer has already.
    pub(crate) tokens: Vec<u32>,
    pub(crate) max_tokens: usize,
    pub(crate) sampling: Sampling,
    pub(crate) stop: Vec<String>,
    pub(crate) ignore_eos: bool,
    pub(crate) begun: Option<Box<Begun>>,
}

/// What an answer that was put aside has beside its tokens.
pub(crate) struct Begun {
    pub(crate) prompt_tokens: usize,
    pub(crate) stream: TextStream,
    /// Whether its prefill began, which is said once.
    pub(crate) started: bool,
    /// The time it has had.
    pub(crate) prefill: Duration,
    pub(crate) decode: Duration,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Prepared({} tokens, {} more)",
            self.tokens.len(),
            self.max_tokens
        )
    }
}

impl Prepared {
    /// The same, but an end token does not end the answer: for measuring.
    #[must_use]
    pub fn ignoring_eos(mut self) -> Self {
        self.ignore_eos = true;
        self
    }

    pub fn prompt_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Positions that prompt and answer may take together.
    pub fn tokens_max(&self) -> usize {
        self.tokens.len() + self.max_tokens
    }

    /// Positions of the cache that are reserved for it while it runs: whole blocks.
    pub fn kv_tokens(&self) -> usize {
        self.tokens_max().next_multiple_of(BLOCK_TOKENS)
    }
}

/// Turns requests into [`Prepared`] ones, on any thread, while the engine runs on its own.
#[derive(Clone)]
pub struct Preparer {
    text: Arc<Text>,
    context_length: usize,
    vocab: usize,
}

impl Preparer {
    pub(crate) fn new(text: Arc<Text>, context_length: usize, vocab: usize) -> Self {
        Self {
            text,
            context_length,
            vocab,
        }
    }

    pub fn prepare(&self, request: Request) -> Result<Prepared, RequestError> {
        let Request {
            prompt,
            max_tokens,
            sampling,
            stop,
        } = request;
        let invalid = |field, reason: String| RequestError::Invalid { field, reason };
        sampling
            .check()
            .map_err(|(field, reason)| invalid(field, reason))?;
        if max_tokens == 0 {
            return Err(invalid("max_tokens", "must be at least 1".into()));
        }
        if stop.iter().any(String::is_empty) {
            return Err(invalid(
                "stop",
                "an empty text would end every answer".into(),
            ));
        }
        let tokens = match &prompt {
            Prompt::Text(text) => self
                .text
                .encode(text)
                .map_err(|e| invalid("prompt", e.to_string()))?,
            Prompt::Tokens(tokens) => tokens.clone(),
            Prompt::Chat(_) if !self.text.has_template() => return Err(RequestError::NoTemplate),
            Prompt::Chat(messages) => {
                let rendered = self
                    .text
                    .render(messages)
                    .and_then(|text| self.text.encode(&text));
                rendered.map_err(|e| match e {
                    TextError::Template(why) => RequestError::Template(why),
                    other => invalid("messages", other.to_string()),
                })?
            }
        };
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= self.vocab) {
            return Err(invalid(
                "prompt",
                format!("token {id} is beyond the model's {}", self.vocab),
            ));
        }
        if tokens.is_empty() {
            return Err(invalid("prompt", "holds no token".into()));
        }
        let needed = tokens.len().saturating_add(max_tokens);
        if needed > self.context_length {
            return Err(RequestError::ContextOverflow {
                needed,
                available: self.context_length,
            });
        }
        Ok(Prepared {
            tokens,
            max_tokens,
            sampling,
            stop,
            ignore_eos: false,
            begun: None,
        })
    }
}
