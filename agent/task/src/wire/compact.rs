//! The compact form, version 1: a version byte, then a struct frozen for that version, in
//! [postcard](https://postcard.jamesmunns.com/wire-format). Nothing is left out: what may be absent is an option. A change of
//! a struct is a new version with a content type of its own; a test has the bytes. Bounds lists before it reads them; other
//! checks are those of JSON, and not here.

mod event;
mod reader;

pub(super) use event::{decode_event, encode_event};

use super::event::Refusal;
use super::task::{Kind, Message, unknown_kind};
use crate::limits::{MESSAGES_MAX, STOPS_MAX};
use reader::Reader;
use serde::Serialize;

/// Leads each payload.
const VERSION: u8 = 1;

/// A task as its sender writes it, nothing checked: the compact form's struct, and what JSON is read into.
///
/// A client makes one, publishes its bytes with the content type, and reads what comes back:
///
/// ```
/// use millwright_task::wire::{Body, Format, Kind, TaskV1, decode_event};
///
/// let task = TaskV1 {
///     id: Some("wo-4711".into()),
///     kind: Kind::Generate { prompt: "The bearing of pump 7".into() },
///     max_tokens: Some(60),
///     stream: true,
///     ..TaskV1::default()
/// };
/// assert_eq!(task.encode().len(), 47);
/// assert_eq!(Format::Postcard.content_type(), "application/vnd.millwright.v1+postcard");
///
/// # let incoming = b"\x01\x07wo-4711\x03mes\x05gw-07\x03r-1\x02\xe8\x07\x00\x02\x07 is hot\x00";
/// let event = decode_event(incoming)?;
/// if let Body::Delta { text, offset } = event.body {
///     assert_eq!((event.task.as_str(), text.as_str(), offset), ("wo-4711", " is hot", 0));
/// }
/// # Ok::<(), millwright_task::wire::EventError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct TaskV1 {
    /// `None`: the Correlation Data in hex.
    pub id: Option<String>,
    /// Where the answer goes when there is no Response Topic.
    pub reply_to: Option<String>,
    pub kind: Kind,
    pub max_tokens: Option<u64>,
    pub stop: Vec<String>,
    pub temperature: Option<f32>,
    pub top_k: Option<u64>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repeat_penalty: Option<f32>,
    pub seed: Option<u64>,
    /// From receipt.
    pub deadline_ms: Option<u64>,
    /// Since 1970; `expires_at` in JSON.
    pub expires_at_ms: Option<u64>,
    pub priority: Option<u64>,
    pub stream: bool,
}

/// A cancel: the id of one of the sender's own tasks.
///
/// ```
/// use millwright_task::wire::CancelV1;
///
/// assert_eq!(CancelV1 { task: "wo-4711".into() }.encode(), b"\x01\x07wo-4711");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CancelV1 {
    pub task: String,
}

impl TaskV1 {
    /// The payload, for content type [`Format::Postcard`](super::Format::Postcard).
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Fills in what a payload says, in its order, up to the first field that can't be read.
    pub(super) fn read_compact(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        let mut reader = Reader::open(payload)?;
        self.id = reader.next("id")?;
        self.reply_to = reader.next("reply_to")?;
        self.kind = kind(&mut reader)?;
        self.max_tokens = reader.next("max_tokens")?;
        self.stop = reader.list("stop", STOPS_MAX, Reader::next)?;
        self.temperature = reader.next("temperature")?;
        self.top_k = reader.next("top_k")?;
        self.top_p = reader.next("top_p")?;
        self.min_p = reader.next("min_p")?;
        self.repeat_penalty = reader.next("repeat_penalty")?;
        self.seed = reader.next("seed")?;
        self.deadline_ms = reader.next("deadline_ms")?;
        self.expires_at_ms = reader.next("expires_at")?;
        self.priority = reader.next("priority")?;
        self.stream = reader.next("stream")?;
        reader.end()
    }
}

impl CancelV1 {
    /// The payload, for content type [`Format::Postcard`](super::Format::Postcard).
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    pub(super) fn from_compact(payload: &[u8]) -> Result<Self, Refusal> {
        let mut reader = Reader::open(payload)?;
        let task = reader.next("task")?;
        reader.end()?;
        Ok(Self { task })
    }
}

fn kind(reader: &mut Reader<'_>) -> Result<Kind, Refusal> {
    match reader.next::<u32>("kind")? {
        0 => Ok(Kind::Generate {
            prompt: reader.next("prompt")?,
        }),
        1 => Ok(Kind::Chat {
            messages: reader.list("messages", MESSAGES_MAX, message)?,
        }),
        other => Err(unknown_kind(&format!("number {other}"))),
    }
}

fn message(reader: &mut Reader<'_>, name: &str) -> Result<Message, Refusal> {
    Ok(Message {
        role: reader.next(&format!("{name}.role"))?,
        content: reader.next(&format!("{name}.content"))?,
    })
}

fn encode(frozen: &impl Serialize) -> Vec<u8> {
    // Into memory, of plain data: it can't fail.
    postcard::to_extend(frozen, vec![VERSION]).unwrap_or_default()
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
