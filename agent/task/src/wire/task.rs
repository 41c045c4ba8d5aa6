//! A task message, checked field by field, in whatever form it came. A refusal knows where it may be answered: the
//! reply topic as soon as that is known to be allowed, the default topic before.

use super::compact::TaskV1;
use super::event::{Code, Refusal};
use super::{Envelope, Format, Key, Reply, echo, id_is_plain};
use crate::Now;
use crate::limits::{
    CORRELATION_BYTES_MAX, PRIORITY_DEFAULT, PRIORITY_MAX, SEED_MAX, STOP_BYTES_MAX,
};
use crate::topic::{Base, INVALID_TASK, ReplyRules};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::fmt::{Display, Write as _};
use std::ops::RangeInclusive;
use std::time::Duration;

/// The fields of a task; the card lists them.
pub const FIELDS: [&str; 17] = [
    "id",
    "kind",
    "prompt",
    "messages",
    "max_tokens",
    "stop",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repeat_penalty",
    "seed",
    "deadline_ms",
    "expires_at",
    "priority",
    "stream",
    "reply_to",
];

/// A task whose form is right and whose numbers are within bounds.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    pub key: Key,
    pub kind: Kind,
    pub max_tokens: usize,
    pub stop: Vec<String>,
    pub sampling: Sampling,
    pub priority: u8,
    pub stream: bool,
    /// By the gateway's own time.
    pub deadline: Duration,
    pub reply: Reply,
    /// Of all but id, reply topic, correlation and deadline: what makes a resent task the same.
    pub digest: [u8; 32],
    /// The payload's size, for the queue's byte bound.
    pub bytes: usize,
}

/// Frozen: it stands in the compact form and, as JSON, in the digests that the journal keeps. A new kind goes last.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Generate { prompt: String },
    Chat { messages: Vec<Message> },
}

impl Default for Kind {
    fn default() -> Self {
        Self::Generate {
            prompt: String::new(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// How tokens are drawn; `None` means the sender left it to us.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: usize,
    /// 1 is off.
    pub top_p: f32,
    pub min_p: f32,
    /// 1 is off.
    pub repeat_penalty: f32,
    /// Drawn at acceptance when absent.
    pub seed: Option<u64>,
}

/// The configured part of the bounds.
#[derive(Debug, Clone)]
pub struct Bounds {
    pub payload_bytes_max: usize,
    pub tokens_default: usize,
    pub tokens_max: usize,
    pub deadline_default: Duration,
    pub deadline_max: Duration,
}

/// A message that isn't a task, and where to say so.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    pub key: Key,
    pub reply: Reply,
    pub refusal: Refusal,
}

/// Reads task messages for one base.
#[derive(Debug, Clone)]
pub struct Decoder {
    pub base: Base,
    pub rules: ReplyRules,
    pub bounds: Bounds,
}

impl Decoder {
    /// Reads a task, or says why it isn't one and where to answer.
    pub fn decode(&self, now: Now, envelope: &Envelope<'_>) -> Result<Task, Box<Refused>> {
        let mut address = Address::new(self, envelope);
        let read = self.read(now, envelope, &mut address);
        read.map_err(|refusal| Box::new(address.refused(refusal)))
    }

    /// What must hold before the payload is looked into.
    fn judge_envelope(&self, envelope: &Envelope<'_>) -> Result<Format, Refusal> {
        if envelope
            .correlation
            .is_some_and(|c| c.len() > CORRELATION_BYTES_MAX)
        {
            let reason =
                format!("the Correlation Data is longer than {CORRELATION_BYTES_MAX} bytes");
            return Err(
                Refusal::new(Code::TooLarge, reason).with_limit(CORRELATION_BYTES_MAX as u64)
            );
        }
        envelope.judge(self.bounds.payload_bytes_max)
    }

    fn read(
        &self,
        now: Now,
        envelope: &Envelope<'_>,
        address: &mut Address<'_>,
    ) -> Result<Task, Refusal> {
        let response_topic = address.claim_topic(envelope.response_topic, "the Response Topic");
        self.judge_envelope(envelope)?;
        let mut raw = TaskV1::default();
        let read = match address.format {
            Format::Json => raw.read_json(envelope.payload),
            Format::Postcard => raw.read_compact(envelope.payload),
        };
        // Id and reply topic first: whatever else is wrong is then said where the sender listens.
        if let Some(id) = raw.id.take() {
            if !id_is_plain(&id) {
                let reason = format!("must be 1 to 64 of A-Z a-z 0-9 _ - . and is {}", echo(&id));
                return Err(Refusal::field("id", &reason));
            }
            address.id = Some(id);
        }
        response_topic?;
        if envelope.retain {
            return Err(Refusal::new(
                Code::Invalid,
                "a task must not be published with RETAIN".into(),
            ));
        }
        if envelope.response_topic.is_none() {
            address.claim_topic(raw.reply_to.as_deref(), "`reply_to`")?;
        }
        read?;
        if address.id.is_none() {
            return Err(Refusal::field(
                "id",
                "is missing, and there is no Correlation Data of 1 to 32 bytes instead",
            ));
        }
        self.judge(now, envelope, raw, address)
    }

    /// Whether what was written is within bounds, whatever form it was written in.
    fn judge(
        &self,
        now: Now,
        envelope: &Envelope<'_>,
        raw: TaskV1,
        address: &Address<'_>,
    ) -> Result<Task, Refusal> {
        judge_kind(&raw.kind)?;
        let tokens_max = self.bounds.tokens_max as u64;
        let max_tokens = integer("max_tokens", raw.max_tokens, 1..=tokens_max)?;
        judge_stops(&raw.stop)?;
        let sampling = Sampling {
            temperature: within("temperature", raw.temperature, 0.0..=2.0)?.unwrap_or(0.0),
            top_k: integer("top_k", raw.top_k, 0..=1_000_000)?.unwrap_or(0) as usize,
            top_p: within("top_p", raw.top_p, f32::MIN_POSITIVE..=1.0)?.unwrap_or(1.0),
            min_p: within("min_p", raw.min_p, 0.0..=1.0)?.unwrap_or(0.0),
            repeat_penalty: within("repeat_penalty", raw.repeat_penalty, 0.1..=10.0)?
                .unwrap_or(1.0),
            seed: integer("seed", raw.seed, 0..=SEED_MAX)?,
        };
        let priority = integer("priority", raw.priority, 0..=u64::from(PRIORITY_MAX))?
            .unwrap_or(u64::from(PRIORITY_DEFAULT));
        let deadline = self.deadline(now, envelope.expiry, &raw)?;
        let max_tokens = max_tokens.map_or(self.bounds.tokens_default, |n| n as usize);
        let (kind, stop, stream) = (raw.kind, raw.stop, raw.stream);
        let digest = digest(&(&kind, max_tokens, &stop, &sampling, priority, stream));
        let (key, reply) = address.resolve();
        Ok(Task {
            key,
            kind,
            max_tokens,
            stop,
            sampling,
            priority: priority as u8,
            stream,
            deadline,
            reply,
            digest,
            bytes: envelope.payload.len(),
        })
    }

    /// The earliest of `deadline_ms`, `expires_at` and the message's expiry; the configured default when
    /// there is none; never beyond the configured maximum.
    fn deadline(
        &self,
        now: Now,
        expiry: Option<Duration>,
        raw: &TaskV1,
    ) -> Result<Duration, Refusal> {
        let longest = self.bounds.deadline_max.as_millis() as u64;
        let relative = integer("deadline_ms", raw.deadline_ms, 1..=longest)?;
        let relative = relative.map(Duration::from_millis);
        if raw.expires_at_ms.is_some() && !now.synced {
            let reason = "this gateway's clock is not synchronised: use deadline_ms".into();
            return Err(Refusal {
                field: Some("expires_at".into()),
                ..Refusal::new(Code::ClockUnsynced, reason)
            });
        }
        let absolute = raw.expires_at_ms.map(|at| at.saturating_sub(now.wall_ms));
        let absolute = absolute.map(Duration::from_millis);
        let left = [relative, absolute, expiry]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(self.bounds.deadline_default);
        Ok(now.own + left.min(self.bounds.deadline_max))
    }
}

/// What is known so far about who asks and where the answer may go.
struct Address<'a> {
    decoder: &'a Decoder,
    sender: &'a str,
    correlation: Option<Vec<u8>>,
    id: Option<String>,
    topic: Option<String>,
    /// The question's, and so the answer's; JSON where it has a form that we don't know.
    format: Format,
}

impl<'a> Address<'a> {
    fn new(decoder: &'a Decoder, envelope: &Envelope<'a>) -> Self {
        let usable = envelope
            .correlation
            .filter(|c| c.len() <= CORRELATION_BYTES_MAX);
        let id = usable.filter(|c| (1..=32).contains(&c.len())).map(hex);
        Self {
            decoder,
            sender: envelope.sender,
            correlation: usable.map(<[u8]>::to_vec),
            id,
            topic: None,
            format: Format::of(envelope.content_type).unwrap_or(Format::Json),
        }
    }

    fn claim_topic(&mut self, topic: Option<&str>, named: &str) -> Result<(), Refusal> {
        let Some(topic) = topic else { return Ok(()) };
        self.decoder.rules.check(self.sender, topic).map_err(|e| {
            let reason = format!("{named} can't be used: {e}: {}", echo(topic));
            Refusal::new(Code::ForbiddenReplyTopic, reason)
        })?;
        self.topic = Some(topic.to_owned());
        Ok(())
    }

    fn resolve(&self) -> (Key, Reply) {
        let task = self.id.clone().unwrap_or_else(|| INVALID_TASK.to_owned());
        let topic = self
            .topic
            .clone()
            .unwrap_or_else(|| self.decoder.base.result(self.sender, &task));
        let reply = Reply {
            topic,
            correlation: self.correlation.clone(),
            format: self.format,
        };
        (
            Key {
                sender: self.sender.to_owned(),
                task,
            },
            reply,
        )
    }

    fn refused(self, refusal: Refusal) -> Refused {
        let (key, reply) = self.resolve();
        Refused {
            key,
            reply,
            refusal,
        }
    }
}

/// What must hold of a text to go on with.
fn judge_kind(kind: &Kind) -> Result<(), Refusal> {
    match kind {
        Kind::Generate { prompt } if prompt.is_empty() => Err(Refusal::field("prompt", "is empty")),
        Kind::Generate { .. } => Ok(()),
        Kind::Chat { messages } if messages.is_empty() => {
            Err(Refusal::field("messages", "is empty"))
        }
        Kind::Chat { messages } => {
            let known = |role: &str| matches!(role, "system" | "user" | "assistant");
            let wrong = |(i, m): (usize, &Message)| {
                let reason = format!("must be system, user or assistant, not {}", echo(&m.role));
                Refusal::field(&format!("messages[{i}].role"), &reason)
            };
            let found = messages.iter().enumerate().find(|(_, m)| !known(&m.role));
            found.map_or(Ok(()), |found| Err(wrong(found)))
        }
    }
}

fn judge_stops(stop: &[String]) -> Result<(), Refusal> {
    let fits = |text: &String| (1..=STOP_BYTES_MAX).contains(&text.len());
    match stop.iter().position(|text| !fits(text)) {
        None => Ok(()),
        Some(i) => Err(Refusal::field(
            &format!("stop[{i}]"),
            &format!("must have 1 to {STOP_BYTES_MAX} bytes"),
        )),
    }
}

/// Bounds a list before it is read.
pub(super) fn few(field: &str, len: u64, max: usize) -> Result<(), Refusal> {
    if len <= max as u64 {
        return Ok(());
    }
    let reason = format!("has {len} entries; {max} are allowed");
    Err(Refusal::field(field, &reason).with_limit(max as u64))
}

pub(super) fn unknown_kind(kind: &str) -> Refusal {
    let reason = format!("`kind` must be generate or chat, not {kind}");
    Refusal {
        field: Some("kind".into()),
        ..Refusal::new(Code::Unsupported, reason)
    }
}

fn integer(
    field: &str,
    n: Option<u64>,
    range: RangeInclusive<u64>,
) -> Result<Option<u64>, Refusal> {
    let limit = *range.end();
    within(field, n, range).map_err(|refusal| refusal.with_limit(limit))
}

/// A number in its range, where there is one. NaN is in none.
fn within<N: PartialOrd + Display>(
    field: &str,
    n: Option<N>,
    range: RangeInclusive<N>,
) -> Result<Option<N>, Refusal> {
    match n {
        Some(n) if !range.contains(&n) => {
            let reason = format!("is {n}; it must be {} to {}", range.start(), range.end());
            Err(Refusal::field(field, &reason))
        }
        n => Ok(n),
    }
}

fn digest(content: &impl Serialize) -> [u8; 32] {
    // Plain data under string keys: serialising it can't fail.
    Sha256::digest(serde_json::to_vec(content).unwrap_or_default()).into()
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
