//! The task number n of a seed: always the same, so that a resent one is. Its text follows from its prompt and its
//! length (temperature 0), so that tasks alike must have answers alike.

use super::chance::Chance;
use crate::BASE;
use serde_json::json;

const SENDERS: [&str; 2] = ["mes", "hmi"];
const PROMPTS: [&str; 6] = [
    "The pump",
    "A valve",
    "Bearing 7",
    "x",
    "Oil, then",
    "Über 90 °C",
];

#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) sender: &'static str,
    pub(super) id: String,
    pub(super) prompt: String,
    /// As a chat's only message.
    pub(super) is_chat: bool,
    pub(super) tokens: u32,
    /// Those of a higher one put others aside that run.
    priority: Option<u64>,
    pub(super) stream: bool,
    /// Where its events go, if not to the default.
    pub(super) reply: Option<String>,
    pub(super) correlation: Option<Vec<u8>>,
}

impl Request {
    pub(super) fn new(seed: u64, n: usize, tokens_max: u32) -> Self {
        let mut chance = Chance::new(seed ^ (n as u64) << 20);
        // Two senders use the same ids.
        let (sender, id) = (SENDERS[n % 2], format!("t-{seed:x}-{}", n / 2));
        let prompt = PROMPTS[chance.below(PROMPTS.len() as u64) as usize];
        // The tiny model's context is 256 tokens, of a byte each or more; a case asks for at most 150 new ones.
        let is_chat = chance.percent(20);
        let repeat = if chance.percent(10) && !is_chat { 6 } else { 1 };
        let reply = n % 8 == 5;
        Self {
            prompt: vec![prompt; repeat].join(" "),
            tokens: 1 + chance.below(u64::from(tokens_max)) as u32,
            stream: chance.percent(30),
            priority: chance.percent(50).then(|| chance.below(10)),
            is_chat,
            reply: reply.then(|| format!("{BASE}/result/{sender}/own/{id}")),
            correlation: (n % 16 != 7).then(|| format!("{n}\0{seed}").into_bytes()),
            sender,
            id,
        }
    }

    pub(super) fn payload(&self) -> String {
        // The deadline is so late that whatever expires has expired too early.
        let mut task = json!({ "id": self.id, "max_tokens": self.tokens, "stream": self.stream, "deadline_ms": 3_600_000 });
        if self.is_chat {
            task["kind"] = "chat".into();
            task["messages"] = json!([{ "role": "user", "content": self.prompt }]);
        } else {
            task["kind"] = "generate".into();
            task["prompt"] = self.prompt.as_str().into();
        }
        if let Some(priority) = self.priority {
            task["priority"] = priority.into();
        }
        task.to_string()
    }

    /// Where the agent answers cancels.
    pub(super) fn default_topic(&self) -> String {
        format!("{BASE}/result/{}/{}", self.sender, self.id)
    }

    pub(super) fn topic(&self) -> String {
        self.reply.clone().unwrap_or_else(|| self.default_topic())
    }
}
