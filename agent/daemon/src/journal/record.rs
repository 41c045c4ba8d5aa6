//! What the journal's rows look like on disk: a version byte, then a struct frozen for that version, in postcard. A
//! change of a struct is a new version beside the old one. Never touches a file.

use millwright_task::admission::Kept;
use millwright_task::job::{Class, Post, Ticket};
use millwright_task::recall::Recalled;
use millwright_task::wire::{Body, Format, Key, Kind, Message, Reply, Sampling, Task};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Leads each row.
const VERSION: u8 = 1;

/// Why a row can't be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unreadable(pub(super) String);

/// An accepted task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct TaskRow {
    sender: String,
    task: String,
    prompt: PromptRow,
    max_tokens: u64,
    stop: Vec<String>,
    temperature: f32,
    top_k: u64,
    top_p: f32,
    min_p: f32,
    repeat_penalty: f32,
    asked_seed: Option<u64>,
    seed: u64,
    priority: u8,
    stream: bool,
    deadline_ms: u64,
    reply: ReplyRow,
    digest: [u8; 32],
    bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum PromptRow {
    Generate(String),
    /// Role and content.
    Chat(Vec<(String, String)>),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReplyRow {
    topic: String,
    correlation: Option<Vec<u8>>,
    format: FormatRow,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum FormatRow {
    Json,
    Postcard,
}

/// What happened to an accepted task since.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NoteRow {
    pub(super) begun: u32,
    pub(super) cancelled: bool,
    /// Where its sender last wanted the answer.
    reply: Option<ReplyRow>,
}

/// What was said once and must arrive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SaidRow {
    sender: String,
    task: String,
    event: String,
    at_ms: u64,
    /// Its format is that of `bytes`.
    reply: ReplyRow,
    /// Of the task, where the event is to be remembered.
    remembered: Option<[u8; 32]>,
    bytes_len: u64,
    /// Absent once it had to go.
    bytes: Option<Vec<u8>>,
}

/// When the journal was last written, by all clocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    pub boot_id: String,
    pub boot_ms: u64,
    pub own_ms: u64,
    pub wall_ms: u64,
    pub synced: bool,
}

/// A row's bytes.
pub(super) fn encode(row: &impl Serialize) -> Vec<u8> {
    // Into memory, of plain data: it can't fail.
    postcard::to_extend(row, vec![VERSION]).unwrap_or_default()
}

/// A row out of its bytes.
pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Unreadable> {
    match bytes.split_first() {
        Some((&VERSION, rest)) => match postcard::take_from_bytes(rest) {
            Ok((row, [])) => Ok(row),
            Ok((_, more)) => Err(Unreadable(format!("{} bytes too many", more.len()))),
            Err(e) => Err(Unreadable(e.to_string())),
        },
        Some((version, _)) => Err(Unreadable(format!(
            "version {version}, which this program does not know"
        ))),
        None => Err(Unreadable("an empty row".into())),
    }
}

/// Whether bytes are no row of any kind, or one that is written as it was read.
pub(super) fn is_sound(bytes: &[u8]) -> bool {
    fn again<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Option<(T, bool)> {
        let row: T = decode(bytes).ok()?;
        let written = encode(&row);
        let is_same = decode::<T>(&written).is_ok_and(|row| encode(&row) == written);
        Some((row, is_same))
    }
    let task = again::<TaskRow>(bytes).is_none_or(|(row, is_same)| {
        let (kept, seed) = row.clone().kept(Ticket(1), NoteRow::default());
        is_same && encode(&TaskRow::new(&kept.task, seed)) == encode(&row)
    });
    let said = again::<SaidRow>(bytes).is_none_or(|(row, is_same)| {
        let _ = (row.recalled(Ticket(1)), row.post(Ticket(1)));
        is_same
    });
    let note = again::<NoteRow>(bytes).is_none_or(|(_, is_same)| is_same);
    let stamp = again::<Stamp>(bytes).is_none_or(|(_, is_same)| is_same);
    task && said && note && stamp
}

impl TaskRow {
    pub(super) fn new(task: &Task, seed: u64) -> Self {
        let pair = |m: &Message| (m.role.clone(), m.content.clone());
        let s = &task.sampling;
        Self {
            sender: task.key.sender.clone(),
            task: task.key.task.clone(),
            prompt: match &task.kind {
                Kind::Generate { prompt } => PromptRow::Generate(prompt.clone()),
                Kind::Chat { messages } => PromptRow::Chat(messages.iter().map(pair).collect()),
            },
            max_tokens: task.max_tokens as u64,
            stop: task.stop.clone(),
            temperature: s.temperature,
            top_k: s.top_k as u64,
            top_p: s.top_p,
            min_p: s.min_p,
            repeat_penalty: s.repeat_penalty,
            asked_seed: s.seed,
            seed,
            priority: task.priority,
            stream: task.stream,
            deadline_ms: task.deadline.as_millis() as u64,
            reply: ReplyRow::new(&task.reply),
            digest: task.digest,
            bytes: task.bytes as u64,
        }
    }

    /// The task, and the seed that was drawn for it.
    pub(super) fn kept(self, ticket: Ticket, note: NoteRow) -> (Kept, u64) {
        let message = |(role, content)| Message { role, content };
        let task = Task {
            key: Key {
                sender: self.sender,
                task: self.task,
            },
            kind: match self.prompt {
                PromptRow::Generate(prompt) => Kind::Generate { prompt },
                PromptRow::Chat(all) => Kind::Chat {
                    messages: all.into_iter().map(message).collect(),
                },
            },
            max_tokens: self.max_tokens as usize,
            stop: self.stop,
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k as usize,
                top_p: self.top_p,
                min_p: self.min_p,
                repeat_penalty: self.repeat_penalty,
                seed: self.asked_seed,
            },
            priority: self.priority,
            stream: self.stream,
            deadline: Duration::from_millis(self.deadline_ms),
            reply: note.reply.unwrap_or(self.reply).reply(),
            digest: self.digest,
            bytes: self.bytes as usize,
        };
        let kept = Kept {
            ticket,
            task,
            begun: note.begun,
            cancelled: note.cancelled,
        };
        (kept, self.seed)
    }
}

impl NoteRow {
    pub(super) fn move_to(&mut self, reply: &Reply) {
        self.reply = Some(ReplyRow::new(reply));
    }
}

impl ReplyRow {
    fn new(reply: &Reply) -> Self {
        Self {
            topic: reply.topic.clone(),
            correlation: reply.correlation.clone(),
            format: match reply.format {
                Format::Json => FormatRow::Json,
                Format::Postcard => FormatRow::Postcard,
            },
        }
    }

    fn reply(self) -> Reply {
        Reply {
            topic: self.topic,
            correlation: self.correlation,
            format: self.format.format(),
        }
    }
}

impl FormatRow {
    fn format(self) -> Format {
        match self {
            Self::Json => Format::Json,
            Self::Postcard => Format::Postcard,
        }
    }
}

impl SaidRow {
    pub(super) fn new(post: &Post, at: Duration) -> Self {
        Self {
            sender: post.key.sender.clone(),
            task: post.key.task.clone(),
            event: post.event.to_owned(),
            at_ms: at.as_millis() as u64,
            reply: ReplyRow::new(&post.reply),
            remembered: post.remembered,
            bytes_len: post.bytes.len() as u64,
            bytes: Some(post.bytes.clone()),
        }
    }

    pub(super) fn is_remembered(&self) -> bool {
        self.remembered.is_some()
    }

    /// Its text goes, its outcome stays.
    pub(super) fn strip(&mut self) {
        self.bytes = None;
    }

    /// It is kept until it is delivered and no longer.
    pub(super) fn forget(&mut self) {
        self.remembered = None;
    }

    /// As the dedup window has it.
    pub(super) fn recalled(&self, ticket: Ticket) -> Result<Option<(Key, Recalled)>, Unreadable> {
        let Some(task_digest) = self.remembered else {
            return Ok(None);
        };
        let recalled = Recalled {
            ticket,
            task_digest,
            event: self.event()?,
            format: self.reply.format.format(),
            bytes_len: self.bytes_len as usize,
            bytes: self.bytes.clone(),
            at: Duration::from_millis(self.at_ms),
        };
        Ok(Some((self.key(), recalled)))
    }

    /// As it goes out; `None` when its text is gone.
    pub(super) fn post(self, ticket: Ticket) -> Result<Option<Post>, Unreadable> {
        let (key, event) = (self.key(), self.event()?);
        let post = |bytes| Post {
            ticket,
            key,
            reply: self.reply.reply(),
            event,
            class: Class::Final,
            bytes,
            remembered: self.remembered,
        };
        Ok(self.bytes.map(post))
    }

    /// When it was said, in milliseconds.
    pub(super) fn at_ms(&self) -> u64 {
        self.at_ms
    }

    fn key(&self) -> Key {
        Key {
            sender: self.sender.clone(),
            task: self.task.clone(),
        }
    }

    fn event(&self) -> Result<&'static str, Unreadable> {
        Body::named(&self.event).ok_or_else(|| Unreadable("an event without a name".into()))
    }
}
