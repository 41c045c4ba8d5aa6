//! A task message, field by field. A refusal knows where it may be answered: the reply topic as soon as that
//! is known to be allowed, the default topic before.

use super::event::{Code, Refusal};
use super::fields::{Fields, wrong};
use super::{Envelope, Format, Key, Reply, echo, id_is_plain};
use crate::limits::{
    CORRELATION_BYTES_MAX, MESSAGES_MAX, PRIORITY_DEFAULT, PRIORITY_MAX, SEED_MAX, STOP_BYTES_MAX,
    STOPS_MAX,
};
use crate::topic::{Base, INVALID_TASK, ReplyRules};
use crate::{Now, calendar};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
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

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Generate { prompt: String },
    Chat { messages: Vec<Message> },
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
        let fields = &mut Fields::parse(envelope.payload)?;
        // Id and reply topic first: whatever else is wrong is then said where the sender listens.
        if let Some(id) = fields.text("id")? {
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
        let reply_to = fields.text("reply_to")?;
        if envelope.response_topic.is_none() {
            address.claim_topic(reply_to.as_deref(), "`reply_to`")?;
        }
        fields.only(&FIELDS)?;
        if address.id.is_none() {
            return Err(Refusal::field(
                "id",
                "is missing, and there is no Correlation Data of 1 to 32 bytes instead",
            ));
        }
        let kind = kind(fields)?;
        let max_tokens = fields.integer("max_tokens", 1..=self.bounds.tokens_max as u64)?;
        let stop = stops(fields)?;
        let sampling = Sampling {
            temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(0.0),
            top_k: fields.integer("top_k", 0..=1_000_000)?.unwrap_or(0) as usize,
            top_p: fields
                .number("top_p", f64::from(f32::MIN_POSITIVE)..=1.0)?
                .unwrap_or(1.0),
            min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
            repeat_penalty: fields.number("repeat_penalty", 0.1..=10.0)?.unwrap_or(1.0),
            seed: fields.integer("seed", 0..=SEED_MAX)?,
        };
        let priority = fields
            .integer("priority", 0..=u64::from(PRIORITY_MAX))?
            .unwrap_or(u64::from(PRIORITY_DEFAULT));
        let stream = fields.flag("stream")?.unwrap_or(false);
        let deadline = self.deadline(now, envelope.expiry, fields)?;
        let max_tokens = max_tokens.map_or(self.bounds.tokens_default, |n| n as usize);
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
        fields: &mut Fields,
    ) -> Result<Duration, Refusal> {
        let longest = self.bounds.deadline_max.as_millis() as u64;
        let relative = fields
            .integer("deadline_ms", 1..=longest)?
            .map(Duration::from_millis);
        let absolute = match fields.text("expires_at")? {
            None => None,
            Some(text) => {
                let at = calendar::parse(&text).ok_or_else(|| {
                    Refusal::field(
                        "expires_at",
                        &format!("is no RFC 3339 time: {}", echo(&text)),
                    )
                })?;
                if !now.synced {
                    let reason = "this gateway's clock is not synchronised: use deadline_ms".into();
                    return Err(Refusal {
                        field: Some("expires_at".into()),
                        ..Refusal::new(Code::ClockUnsynced, reason)
                    });
                }
                Some(Duration::from_millis(at.saturating_sub(now.wall_ms)))
            }
        };
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
            format: Format::Json,
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

fn kind(fields: &mut Fields) -> Result<Kind, Refusal> {
    let kind = fields
        .text("kind")?
        .ok_or_else(|| Refusal::field("kind", "is missing: generate or chat"))?;
    let (prompt, messages) = (fields.text("prompt")?, fields.take("messages"));
    match (kind.as_str(), prompt, messages) {
        ("generate", Some(prompt), None) if prompt.is_empty() => {
            Err(Refusal::field("prompt", "is empty"))
        }
        ("generate", Some(prompt), None) => Ok(Kind::Generate { prompt }),
        ("generate", None, _) => Err(Refusal::field("prompt", "is missing")),
        ("generate", _, Some(_)) => Err(Refusal::field(
            "messages",
            "belongs to kind chat, not to generate",
        )),
        ("chat", None, Some(list)) => Ok(Kind::Chat {
            messages: messages_of(list)?,
        }),
        ("chat", _, None) => Err(Refusal::field("messages", "is missing")),
        ("chat", Some(_), _) => Err(Refusal::field(
            "prompt",
            "belongs to kind generate, not to chat",
        )),
        _ => {
            let reason = format!("`kind` must be generate or chat, not {}", echo(&kind));
            Err(Refusal {
                field: Some("kind".into()),
                ..Refusal::new(Code::Unsupported, reason)
            })
        }
    }
}

fn messages_of(list: Value) -> Result<Vec<Message>, Refusal> {
    let Value::Array(list) = list else {
        return Err(wrong("messages", "an array", &list));
    };
    if list.is_empty() {
        return Err(Refusal::field("messages", "is empty"));
    }
    if list.len() > MESSAGES_MAX {
        let reason = format!("has {} entries; {MESSAGES_MAX} are allowed", list.len());
        return Err(Refusal::field("messages", &reason).with_limit(MESSAGES_MAX as u64));
    }
    let message = |(i, value)| {
        let path = format!("messages[{i}]");
        let mut fields = Fields::of(&path, value)?;
        fields.only(&["role", "content"])?;
        let mut text = |name: &str| {
            fields
                .text(name)?
                .ok_or_else(|| Refusal::field(&format!("{path}.{name}"), "is missing"))
        };
        let (role, content) = (text("role")?, text("content")?);
        if !matches!(role.as_str(), "system" | "user" | "assistant") {
            let reason = format!("must be system, user or assistant, not {}", echo(&role));
            return Err(Refusal::field(&format!("{path}.role"), &reason));
        }
        Ok(Message { role, content })
    };
    list.into_iter().enumerate().map(message).collect()
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, Refusal> {
    let list = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(one)) => vec![Value::String(one)],
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong("stop", "a string or an array of strings", &other)),
    };
    if list.len() > STOPS_MAX {
        let reason = format!("has {} entries; {STOPS_MAX} are allowed", list.len());
        return Err(Refusal::field("stop", &reason).with_limit(STOPS_MAX as u64));
    }
    let stop = |(i, value)| match value {
        Value::String(text) if (1..=STOP_BYTES_MAX).contains(&text.len()) => Ok(text),
        Value::String(_) => Err(Refusal::field(
            &format!("stop[{i}]"),
            &format!("must have 1 to {STOP_BYTES_MAX} bytes"),
        )),
        other => Err(wrong(&format!("stop[{i}]"), "a string", &other)),
    };
    list.into_iter().enumerate().map(stop).collect()
}

fn digest(content: &impl Serialize) -> [u8; 32] {
    // Plain data under string keys: serialising it can't fail.
    Sha256::digest(serde_json::to_vec(content).unwrap_or_default()).into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
