//! Tasks and cancels in JSON, read into the structs that the compact form has. Knows types and which fields belong
//! together; bounds are checked afterwards, for both forms alike.

use super::compact::{CancelV1, TaskV1};
use super::echo;
use super::event::Refusal;
use super::fields::{Fields, wrong};
use super::task::{FIELDS, Kind, Message, few, unknown_kind};
use crate::calendar;
use crate::limits::{MESSAGES_MAX, STOPS_MAX};
use serde_json::Value;

impl TaskV1 {
    /// Fills in what a payload says, up to the first field that can't be read; id and reply topic first.
    pub(super) fn read_json(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        let fields = &mut Fields::parse(payload)?;
        self.id = fields.text("id")?;
        self.reply_to = fields.text("reply_to")?;
        fields.only(&FIELDS)?;
        self.kind = kind(fields)?;
        self.max_tokens = fields.whole("max_tokens")?;
        self.stop = stops(fields)?;
        self.temperature = fields.number("temperature")?;
        self.top_k = fields.whole("top_k")?;
        self.top_p = fields.number("top_p")?;
        self.min_p = fields.number("min_p")?;
        self.repeat_penalty = fields.number("repeat_penalty")?;
        self.seed = fields.whole("seed")?;
        self.deadline_ms = fields.whole("deadline_ms")?;
        self.expires_at_ms = expires_at(fields)?;
        self.priority = fields.whole("priority")?;
        self.stream = fields.flag("stream")?.unwrap_or(false);
        Ok(())
    }
}

impl CancelV1 {
    pub(super) fn from_json(payload: &[u8]) -> Result<Self, Refusal> {
        let mut fields = Fields::parse(payload)?;
        fields.only(&["task"])?;
        let task = fields.text("task")?;
        let task = task.ok_or_else(|| Refusal::field("task", "is missing"))?;
        Ok(Self { task })
    }
}

fn kind(fields: &mut Fields) -> Result<Kind, Refusal> {
    let kind = fields
        .text("kind")?
        .ok_or_else(|| Refusal::field("kind", "is missing: generate or chat"))?;
    let (prompt, messages) = (fields.text("prompt")?, fields.take("messages"));
    match (kind.as_str(), prompt, messages) {
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
        _ => Err(unknown_kind(&echo(&kind))),
    }
}

fn messages_of(list: Value) -> Result<Vec<Message>, Refusal> {
    let Value::Array(list) = list else {
        return Err(wrong("messages", "an array", &list));
    };
    few("messages", list.len() as u64, MESSAGES_MAX)?;
    let message = |(i, value)| {
        let path = format!("messages[{i}]");
        let mut fields = Fields::of(&path, value)?;
        fields.only(&["role", "content"])?;
        let mut text = |name: &str| {
            fields
                .text(name)?
                .ok_or_else(|| Refusal::field(&format!("{path}.{name}"), "is missing"))
        };
        Ok(Message {
            role: text("role")?,
            content: text("content")?,
        })
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
    few("stop", list.len() as u64, STOPS_MAX)?;
    let stop = |(i, value)| match value {
        Value::String(text) => Ok(text),
        other => Err(wrong(&format!("stop[{i}]"), "a string", &other)),
    };
    list.into_iter().enumerate().map(stop).collect()
}

fn expires_at(fields: &mut Fields) -> Result<Option<u64>, Refusal> {
    let at = |text: String| {
        let reason = || format!("is no RFC 3339 time: {}", echo(&text));
        calendar::parse(&text).ok_or_else(|| Refusal::field("expires_at", &reason()))
    };
    fields.text("expires_at")?.map(at).transpose()
}
