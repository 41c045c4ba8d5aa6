//! The engine: requests in, events out, one flat batch of tokens a step. Decides which tokens ride in the next
//! batch; knows neither what a token costs nor who asked.

use crate::forward::Forward;
use crate::open::{Card, Model, OpenError, Options};
use crate::sampler::{Sampler, Sampling};
use crate::text::{Message, Text, TextError, TextStream};
use crate::turn::{Batch, Row};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Rows whose logits are held at once while scoring a text.
const SCORE_CHUNK: usize = 64;

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

/// A request that was tokenised and fits the model's context.
#[derive(Debug)]
pub struct Prepared {
    tokens: Vec<u32>,
    max_tokens: usize,
    sampling: Sampling,
    stop: Vec<String>,
    ignore_eos: bool,
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
}

/// Turns requests into [`Prepared`] ones, on any thread, while the engine runs on its own.
#[derive(Clone)]
pub struct Preparer {
    text: Arc<Text>,
    context_length: usize,
    vocab: usize,
}

impl Preparer {
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
        })
    }
}

/// An answer in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(u32);

/// What a step brought for a slot.
#[derive(Debug)]
pub enum Event {
    /// Its prefill begins.
    Started,
    /// New text: whole characters, never what may turn out to be a stop text.
    Text(String),
    /// Its answer is complete; the slot is free.
    Done(Completion),
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// An end token or a stop text.
    Stop,
    /// `max_tokens` were made.
    Length,
    Cancelled,
}

/// A whole answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    pub text: String,
    /// The tokens made, the end token included.
    pub tokens: Vec<u32>,
    pub finish: Finish,
    pub prompt_tokens: usize,
    /// From the start of prefill to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error("the forward pass failed: {0}")]
    Forward(String),
    #[error("the engine is busy with answers")]
    Busy,
    #[error("token {0} is beyond the model's vocabulary")]
    Token(u32),
    #[error("a text of {tokens} tokens is beyond the context of {available}")]
    TooLong { tokens: usize, available: usize },
}

/// What the engine holds and uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub slots_used: usize,
    pub slots_max: usize,
    pub kv_tokens_used: usize,
    pub kv_tokens_max: usize,
    /// The mapped weights.
    pub packed_bytes: usize,
    /// An estimate of the tokenizer's heap.
    pub tokenizer_bytes: usize,
    /// Weight bytes that one decoded token reads.
    pub bytes_per_token: usize,
}

/// A model with its cache and its answers in progress. One thread owns it.
pub struct Engine {
    card: Card,
    text: Arc<Text>,
    forward: Box<dyn Forward>,
    vocab: usize,
    slots: Vec<Option<Sequence>>,
    prefill_chunk: usize,
    packed_bytes: usize,
    bytes_per_token: usize,
    batch: Batch,
    logits: Vec<f32>,
}

/// One answer in progress.
struct Sequence {
    /// Prompt, then answer.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    tokens_max: usize,
    /// How many of `tokens` are in the cache.
    cached: usize,
    ignore_eos: bool,
    sampler: Sampler,
    stream: TextStream,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Engine {
    /// Opens a bundle; packs its weights first where that was not done yet.
    pub fn open(bundle: &Path, options: &Options) -> Result<Self, OpenError> {
        let model = Model::open(bundle, options)?;
        Ok(Self {
            card: model.card,
            text: model.text,
            forward: model.forward,
            vocab: model.vocab,
            slots: (0..model.slots).map(|_| None).collect(),
            prefill_chunk: options.prefill_chunk,
            packed_bytes: model.packed_bytes,
            bytes_per_token: model.bytes_per_token,
            batch: Batch::default(),
            logits: Vec::new(),
        })
    }

    pub fn card(&self) -> &Card {
        &self.card
    }

    pub fn text(&self) -> &Arc<Text> {
        &self.text
    }

    pub fn preparer(&self) -> Preparer {
        Preparer {
            text: Arc::clone(&self.text),
            context_length: self.card.context_length,
            vocab: self.vocab,
        }
    }

    pub fn usage(&self) -> Usage {
        let (kv_tokens_used, kv_tokens_max) = self.forward.kv_tokens();
        Usage {
            slots_used: self.slots.iter().flatten().count(),
            slots_max: self.slots.len(),
            kv_tokens_used,
            kv_tokens_max,
            packed_bytes: self.packed_bytes,
            tokenizer_bytes: self.text.bytes(),
            bytes_per_token: self.bytes_per_token,
        }
    }

    /// Answers in progress that have their first token.
    pub fn answers_begun(&self) -> usize {
        self.slots
            .iter()
            .flatten()
            .filter(|s| s.first_token.is_some())
            .count()
    }

    /// Tokens made so far by the answers in progress.
    pub fn tokens_made(&self) -> usize {
        self.slots
            .iter()
            .flatten()
            .map(|s| s.tokens.len() - s.prompt_tokens)
            .sum()
    }

    pub fn is_idle(&self) -> bool {
        self.slots.iter().all(Option::is_none)
    }

    /// Whether a slot and the cache this request may need are free now.
    pub fn fits(&self, prepared: &Prepared) -> bool {
        self.slots.iter().any(Option::is_none) && self.forward.fits(prepared.tokens_max())
    }

    /// Gives a request a slot; hands it back if none is free or the cache is full.
    pub fn start(&mut self, prepared: Prepared) -> Result<Slot, Prepared> {
        let Some(slot) = self.slots.iter().position(Option::is_none) else {
            return Err(prepared);
        };
        if !self.forward.reserve(slot, prepared.tokens_max()) {
            return Err(prepared);
        }
        let tokens_max = prepared.tokens_max();
        self.slots[slot] = Some(Sequence {
            prompt_tokens: prepared.tokens.len(),
            tokens: prepared.tokens,
            tokens_max,
            cached: 0,
            ignore_eos: prepared.ignore_eos,
            sampler: Sampler::new(prepared.sampling),
            stream: TextStream::new(Arc::clone(&self.text), prepared.stop),
            started: None,
            first_token: None,
            last_token: None,
        });
        Ok(Slot(slot as u32))
    }

    /// Ends an answer: what was made until now. The slot is free at once.
    ///
    /// # Panics
    /// If the slot holds no answer.
    pub fn cancel(&mut self, slot: Slot) -> Completion {
        self.finish(slot.0 as usize, Finish::Cancelled)
    }

    /// Runs one batch: a token for each answer in progress and up to `prefill_chunk` tokens of prompts, so that
    /// a long prompt does not hold the others up. After an error the answers in progress can only be cancelled.
    pub fn step(&mut self) -> Result<Vec<(Slot, Event)>, StepError> {
        let mut events = Vec::new();
        self.gather(&mut events);
        if self.batch.rows.is_empty() {
            return Ok(events);
        }
        self.logits.clear();
        self.forward
            .forward(&self.batch, &mut self.logits)
            .map_err(|e| StepError::Forward(format!("{e:#}")))?;
        let batch = std::mem::take(&mut self.batch);
        for row in &batch.rows {
            if let Some(sequence) = &mut self.slots[row.slot] {
                sequence.cached = row.position + 1;
            }
        }
        let mut logits = std::mem::take(&mut self.logits);
        for (&row, logits) in batch.sample.iter().zip(logits.chunks_exact_mut(self.vocab)) {
            self.advance(batch.rows[row].slot, logits, &mut events);
        }
        (self.batch, self.logits) = (batch, logits);
        Ok(events)
    }

    /// The logits after each token of a text, `[vocab]` each, teacher-forced. Needs an idle engine.
    pub fn score(
        &mut self,
        tokens: &[u32],
        on_row: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), StepError> {
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= self.vocab) {
            return Err(StepError::Token(token));
        }
        if !self.is_idle() {
            return Err(StepError::Busy);
        }
        let available = self.card.context_length;
        if tokens.len() > available || !self.forward.reserve(0, tokens.len()) {
            return Err(StepError::TooLong {
                tokens: tokens.len(),
                available,
            });
        }
        let result = self.score_reserved(tokens, on_row);
        self.forward.release(0);
        result
    }

    fn score_reserved(
        &mut self,
        tokens: &[u32],
        on_row: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), StepError> {
        let chunk = SCORE_CHUNK.min(self.prefill_chunk);
        for (index, tokens) in tokens.chunks(chunk).enumerate() {
            let first = index * chunk;
            let row = |(i, &token)| Row {
                token,
                slot: 0,
                position: first + i,
            };
            let rows: Vec<Row> = tokens.iter().enumerate().map(row).collect();
            let batch = Batch {
                sample: (0..rows.len()).collect(),
                rows,
            };
            self.logits.clear();
            self.forward
                .forward(&batch, &mut self.logits)
                .map_err(|e| StepError::Forward(format!("{e:#}")))?;
            for (i, logits) in self.logits.chunks_exact(self.vocab).enumerate() {
                on_row(first + i, logits);
            }
        }
        Ok(())
    }

    /// Fills the batch: answers first, then prompts in slot order.
    fn gather(&mut self, events: &mut Vec<(Slot, Event)>) {
        self.batch.rows.clear();
        self.batch.sample.clear();
        let mut room = self.prefill_chunk;
        let decoding = |s: &Sequence| s.cached >= s.prompt_tokens;
        for pass_decodes in [true, false] {
            for (slot, sequence) in self.slots.iter_mut().enumerate() {
                let Some(sequence) = sequence.as_mut().filter(|s| decoding(s) == pass_decodes)
                else {
                    continue;
                };
                let due = sequence.tokens.len() - sequence.cached;
                let count = if pass_decodes { due } else { due.min(room) };
                if !pass_decodes {
                    room -= count;
                }
                if count > 0 && sequence.started.is_none() {
                    sequence.started = Some(Instant::now());
                    events.push((Slot(slot as u32), Event::Started));
                }
                for position in sequence.cached..sequence.cached + count {
                    self.batch.rows.push(Row {
                        token: sequence.tokens[position],
                        slot,
                        position,
                    });
                }
                if count == due {
                    self.batch.sample.push(self.batch.rows.len() - 1);
                }
            }
        }
    }

    /// Samples a slot's next token and says what came of it.
    fn advance(&mut self, slot: usize, logits: &mut [f32], events: &mut Vec<(Slot, Event)>) {
        let Some(sequence) = &mut self.slots[slot] else {
            return;
        };
        let token = sequence.sampler.sample(logits, &sequence.tokens);
        let now = Instant::now();
        sequence.first_token.get_or_insert(now);
        sequence.last_token = Some(now);
        sequence.tokens.push(token);
        let finish = if self.text.is_stop(token) && !sequence.ignore_eos {
            Some(Finish::Stop)
        } else {
            let pushed = sequence.stream.push(token);
            if !pushed.text.is_empty() {
                events.push((Slot(slot as u32), Event::Text(pushed.text)));
            }
            match pushed.stopped {
                true => Some(Finish::Stop),
                false if sequence.tokens.len() == sequence.tokens_max => Some(Finish::Length),
                false => None,
            }
        };
        if let Some(finish) = finish {
            let before = sequence.stream.text().len();
            let completion = self.finish(slot, finish);
            if let Some(rest) = completion
                .text
                .get(before..)
                .filter(|rest| !rest.is_empty())
            {
                events.push((Slot(slot as u32), Event::Text(rest.to_owned())));
            }
            events.push((Slot(slot as u32), Event::Done(completion)));
        }
    }

    fn finish(&mut self, slot: usize, finish: Finish) -> Completion {
        let mut sequence = self.slots[slot]
            .take()
            .expect("a slot holds an answer until it is finished");
        self.forward.release(slot);
        sequence.stream.finish();
        let since = |from: Option<Instant>, to: Option<Instant>| {
            to.zip(from)
                .map_or(Duration::ZERO, |(to, from)| to.duration_since(from))
        };
        Completion {
            text: sequence.stream.text().to_owned(),
            tokens: sequence.tokens.split_off(sequence.prompt_tokens),
            finish,
            prompt_tokens: sequence.prompt_tokens,
            prefill: since(sequence.started, sequence.first_token),
            decode: since(sequence.first_token, sequence.last_token),
        }
    }
}
