//! The engine: requests in, events out, one flat batch of tokens a step. Decides which tokens ride in the next
//! batch; knows neither what a token costs nor who asked.

use crate::bundle::Bundle;
use crate::forward::Forward;
use crate::guard;
use crate::observer::Observer;
use crate::open::{Card, Model, OpenError, Options};
use crate::request::{Begun, Prepared, Preparer};
use crate::sampler::Sampler;
use crate::share::share;
use crate::text::{Text, TextStream};
use crate::tuning::Threads;
use crate::turn::{Batch, Row};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Rows whose logits are held at once while scoring a text.
const SCORE_CHUNK: usize = 64;

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
    /// Cache bytes that it reads for each position before it; 0 in the plain plan, where they are tract's.
    pub kv_bytes_per_position: usize,
}

/// What the steps that only decoded have read since the model was opened, and how long they took: what of the
/// memory's bandwidth was used. Steps with prompt tokens are bound by arithmetic and don't count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reads {
    /// Weights once a step, keys and values for each answer.
    pub bytes: u64,
    pub time: Duration,
    /// Tokens made meanwhile.
    pub tokens: u64,
}

/// A model with its cache and its answers in progress. One thread owns it.
pub struct Engine {
    card: Card,
    text: Arc<Text>,
    forward: Box<dyn Forward>,
    vocab: usize,
    slots: Vec<Option<Sequence>>,
    prefill_chunk: usize,
    threads: Threads,
    /// How many of the four quarters of both are used.
    quarters: usize,
    packed_bytes: usize,
    bytes_per_token: usize,
    /// Steps done.
    steps: u64,
    reads: Reads,
    batch: Batch,
    logits: Vec<f32>,
}

/// One answer in progress.
struct Sequence {
    /// Prompt, then answer.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    tokens_max: usize,
    /// How many of `tokens` were there when it got its slot: the prompt, and the answer so far if it was put aside.
    given: usize,
    /// How many of `tokens` are in the cache.
    cached: usize,
    /// The last step in which its prompt got more than an even share, or the one before it came.
    favoured: u64,
    ignore_eos: bool,
    sampler: Sampler,
    stream: TextStream,
    /// It was said that its prefill begins.
    announced: bool,
    /// The time it had before it was put aside.
    prefill: Duration,
    decode: Duration,
    /// In the slot that it has now.
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Sequence {
    /// Tokens that are not in the cache yet.
    fn due(&self) -> usize {
        self.tokens.len() - self.cached
    }

    /// Whether all that it began with is in the cache, so that it makes a token each step.
    fn decodes(&self) -> bool {
        self.cached >= self.given
    }

    /// All that it has until now, what is withheld too.
    fn completion(&self, finish: Finish) -> Completion {
        let (prefill, decode) = self.times();
        let mut stream = self.stream.clone();
        stream.finish();
        Completion {
            text: stream.text().to_owned(),
            tokens: self.tokens[self.prompt_tokens..].to_vec(),
            finish,
            prompt_tokens: self.prompt_tokens,
            prefill,
            decode,
        }
    }

    /// Of prefill and of decode.
    fn times(&self) -> (Duration, Duration) {
        let since = |from: Option<Instant>, to: Option<Instant>| {
            to.zip(from)
                .map_or(Duration::ZERO, |(to, from)| to.duration_since(from))
        };
        (
            self.prefill + since(self.started, self.first_token),
            self.decode + since(self.first_token, self.last_token),
        )
    }
}

impl Engine {
    /// Opens a bundle; checks its import and packs its weights first where that was not done yet.
    pub fn open(folder: &Path, options: &Options) -> Result<Self, OpenError> {
        let bundle = Bundle::open_file(folder, options.file.as_deref())?;
        let guard = guard::settled(&bundle, options)?;
        let target = guard::target(&bundle, options.plan, guard.as_ref());
        let mut model = Model::of(&bundle, options, &target, None)?;
        model.card.guard = guard;
        Ok(Self {
            text: model.text,
            forward: model.forward,
            vocab: model.vocab,
            slots: (0..model.slots).map(|_| None).collect(),
            prefill_chunk: options.prefill_chunk,
            quarters: 4,
            threads: model.card.threads,
            card: model.card,
            packed_bytes: model.packed_bytes,
            bytes_per_token: model.bytes_per_token,
            steps: 0,
            reads: Reads::default(),
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
        Preparer::new(Arc::clone(&self.text), self.card.context_length, self.vocab)
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
            kv_bytes_per_position: self.forward.kv_bytes_per_position(),
        }
    }

    /// What decoding has read of memory until now.
    pub fn reads(&self) -> Reads {
        self.reads
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
        let given = prepared.tokens.len();
        let begun = prepared.begun.unwrap_or_else(|| {
            Box::new(Begun {
                prompt_tokens: given,
                stream: TextStream::new(Arc::clone(&self.text), prepared.stop),
                started: false,
                prefill: Duration::ZERO,
                decode: Duration::ZERO,
            })
        });
        self.slots[slot] = Some(Sequence {
            tokens: prepared.tokens,
            prompt_tokens: begun.prompt_tokens,
            tokens_max,
            given,
            cached: 0,
            favoured: self.steps,
            ignore_eos: prepared.ignore_eos,
            sampler: Sampler::new(prepared.sampling),
            stream: begun.stream,
            announced: begun.started,
            prefill: begun.prefill,
            decode: begun.decode,
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

    /// Puts an answer aside: its slot and its cache are free at once, and it goes on from here when it is started again,
    /// with the tokens it would have had; what it has until now is computed once more as a prompt is. Also says what that is.
    ///
    /// # Panics
    /// If the slot holds no answer.
    pub fn suspend(&mut self, slot: Slot) -> (Prepared, Completion) {
        let sequence = self.take(slot.0 as usize);
        let completion = sequence.completion(Finish::Cancelled);
        let (prefill, decode) = sequence.times();
        let prepared = Prepared {
            max_tokens: sequence.tokens_max - sequence.tokens.len(),
            tokens: sequence.tokens,
            sampling: sequence.sampler.into_sampling(),
            stop: Vec::new(),
            ignore_eos: sequence.ignore_eos,
            begun: Some(Box::new(Begun {
                prompt_tokens: sequence.prompt_tokens,
                stream: sequence.stream,
                started: sequence.announced,
                prefill,
                decode,
            })),
        };
        (prepared, completion)
    }

    /// Uses so many quarters of its threads and of a step's room for prompts from now on, 1 to 4: to spare a machine that is
    /// hard pressed. The tokens stay the same.
    pub fn ease(&mut self, quarters: usize) {
        self.quarters = quarters.clamp(1, 4);
    }

    fn eased(&self, whole: usize) -> usize {
        (whole * self.quarters / 4).max(1)
    }

    fn threads_for(&self, prompt_tokens: usize) -> usize {
        match prompt_tokens {
            0 => self.eased(self.threads.decode),
            _ => self.eased(self.threads.prefill),
        }
    }

    /// Has the parts of each step told to this one from now on: for measuring.
    pub fn observe(&mut self, observer: Box<dyn Observer>) {
        self.forward.observe(observer);
    }

    /// Runs one batch: a token for each answer in progress and up to `prefill_chunk` tokens of prompts, which share
    /// them, so that a long prompt holds neither the answers up nor the other prompts. After an error the answers in progress can only be cancelled.
    pub fn step(&mut self) -> Result<Vec<(Slot, Event)>, StepError> {
        let start = Instant::now();
        let mut events = Vec::new();
        let prompts = self.gather(&mut events);
        if self.batch.rows.is_empty() {
            return Ok(events);
        }
        self.logits.clear();
        let threads = self.threads_for(prompts);
        self.forward
            .forward(&self.batch, threads, &mut self.logits)
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
        if prompts == 0 {
            self.note(start);
        }
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
                .forward(&batch, self.threads.prefill, &mut self.logits)
                .map_err(|e| StepError::Forward(format!("{e:#}")))?;
            for (i, logits) in self.logits.chunks_exact(self.vocab).enumerate() {
                on_row(first + i, logits);
            }
        }
        Ok(())
    }

    /// Fills the batch: answers first, then prompts; how many tokens of prompts.
    fn gather(&mut self, events: &mut Vec<(Slot, Event)>) -> usize {
        self.batch.rows.clear();
        self.batch.sample.clear();
        self.steps += 1;
        for slot in 0..self.slots.len() {
            if let Some(sequence) = &self.slots[slot]
                && sequence.decodes()
            {
                self.add(slot, 1);
            }
        }
        let answers = self.batch.rows.len();
        let prompts = self.prompts();
        let even = self.eased(self.prefill_chunk) / prompts.len().max(1);
        for (slot, tokens) in prompts.into_iter().filter(|(_, tokens)| *tokens > 0) {
            if let Some(sequence) = &mut self.slots[slot] {
                if tokens > even {
                    sequence.favoured = self.steps;
                }
                sequence.started.get_or_insert_with(Instant::now);
                if !sequence.announced {
                    sequence.announced = true;
                    events.push((Slot(slot as u32), Event::Started));
                }
            }
            self.add(slot, tokens);
        }
        self.batch.rows.len() - answers
    }

    /// Adds a step that only decoded to what was read.
    fn note(&mut self, start: Instant) {
        let rows = &self.batch.rows;
        let positions: usize = rows.iter().map(|row| row.position + 1).sum();
        let kv = positions * self.forward.kv_bytes_per_position();
        self.reads.bytes += (self.bytes_per_token + kv) as u64;
        self.reads.time += start.elapsed();
        self.reads.tokens += rows.len() as u64;
    }

    /// The prompts in progress and how many tokens of each ride in this step: first who was favoured longest ago.
    fn prompts(&self) -> Vec<(usize, usize)> {
        let slots = self.slots.iter().enumerate();
        let mut prompts: Vec<(u64, usize, usize)> = slots
            .filter_map(|(slot, sequence)| Some((slot, sequence.as_ref()?)))
            .filter(|(_, sequence)| !sequence.decodes())
            .map(|(slot, sequence)| (sequence.favoured, slot, sequence.due()))
            .collect();
        prompts.sort_unstable();
        let due: Vec<usize> = prompts.iter().map(|(.., due)| *due).collect();
        let shares = share(self.eased(self.prefill_chunk), &due);
        let slots = prompts.into_iter().map(|(_, slot, _)| slot);
        slots.zip(shares).collect()
    }

    /// Puts a slot's next tokens into the batch; the last that is due is sampled.
    fn add(&mut self, slot: usize, tokens: usize) {
        let Some(sequence) = &self.slots[slot] else {
            return;
        };
        let rows = (sequence.cached..sequence.cached + tokens).map(|position| Row {
            token: sequence.tokens[position],
            slot,
            position,
        });
        self.batch.rows.extend(rows);
        if tokens == sequence.due() {
            self.batch.sample.push(self.batch.rows.len() - 1);
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
        self.take(slot).completion(finish)
    }

    /// Frees a slot and its cache.
    fn take(&mut self, slot: usize) -> Sequence {
        let sequence = self.slots[slot].take();
        self.forward.release(slot);
        sequence.expect("a slot holds an answer until it is finished")
    }
}

#[cfg(test)]
mod tests;
