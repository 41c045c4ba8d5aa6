//! What the agent says about a task, and what it looks like in JSON. Consumers ignore fields they don't know there; so does
//! [`decode_event`].
//!
//! [`Clock`], [`Finish`], [`Usage`], [`Timing`], [`Provenance`], [`Partial`] and [`Code`] stand in the compact form as they
//! are and so are frozen: a new code goes last, a new field makes a struct of its own there.

use super::{Key, compact};
use crate::Now;
use serde::{Deserialize, Serialize};

/// One event, as it stands in its payload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub task: String,
    pub sender: String,
    pub gateway: String,
    /// New for each acceptance, refusal or resumption.
    pub run: String,
    /// Rises within a run; may skip.
    pub seq: u64,
    /// Since 1970; in JSON `at`, an RFC 3339 time in UTC.
    #[serde(rename = "at", with = "rfc3339")]
    pub at_ms: u64,
    pub clock: Clock,
    #[serde(flatten)]
    pub body: Body,
}

impl Event {
    pub fn new(key: &Key, gateway: &str, run: &str, seq: u64, now: Now, body: Body) -> Self {
        Self {
            task: key.task.clone(),
            sender: key.sender.clone(),
            gateway: gateway.to_owned(),
            run: run.to_owned(),
            seq,
            at_ms: now.wall_ms,
            clock: if now.synced {
                Clock::Synced
            } else {
                Clock::Unsynced
            },
            body,
        }
    }
}

/// Whether `at` can be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    Synced,
    Unsynced,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Body {
    /// `queue_position` 0 is next; `eta_ms` is absent until a first task has been timed. `base` is the gateway's, where
    /// it is in a pool: its state is there.
    Accepted {
        queue_position: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        eta_ms: Option<u64>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        base: Option<String>,
    },
    Started {},
    /// `offset` is where `text` begins in the answer, in bytes.
    Delta {
        text: String,
        offset: u64,
    },
    Done {
        text: String,
        finish: Finish,
        usage: Usage,
        timing: Timing,
        provenance: Provenance,
    },
    Rejected(Refusal),
    Failed(Refusal),
    Cancelled(Partial),
    Expired(Partial),
    /// Answers to a cancel that stops nothing.
    AlreadyFinal {},
    Unknown {},
}

impl Body {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Accepted { .. } => "accepted",
            Self::Started {} => "started",
            Self::Delta { .. } => "delta",
            Self::Done { .. } => "done",
            Self::Rejected(_) => "rejected",
            Self::Failed(_) => "failed",
            Self::Cancelled(_) => "cancelled",
            Self::Expired(_) => "expired",
            Self::AlreadyFinal {} => "already_final",
            Self::Unknown {} => "unknown",
        }
    }

    /// The name as it stands in the code, if it is one.
    pub fn named(name: &str) -> Option<&'static str> {
        const NAMES: [&str; 10] = [
            "accepted",
            "started",
            "delta",
            "done",
            "rejected",
            "failed",
            "cancelled",
            "expired",
            "already_final",
            "unknown",
        ];
        NAMES.into_iter().find(|known| *known == name)
    }

    /// Whether nothing follows in this run.
    pub fn is_final(&self) -> bool {
        !matches!(
            self,
            Self::Accepted { .. }
                | Self::Started {}
                | Self::Delta { .. }
                | Self::AlreadyFinal {}
                | Self::Unknown {}
        )
    }
}

/// Why an answer ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    Stop,
    Length,
}

/// Tokens. `cached` of the prompt's were not computed anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub generated_tokens: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Timing {
    pub queue_ms: u64,
    pub prefill_ms: u64,
    pub decode_ms: u64,
    /// Tokens after the first, which is the prefill's, per second of decoding; 0 when there were none.
    pub tokens_per_s: f64,
}

/// What made the answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    pub model: String,
    pub digest: String,
    pub engine: String,
    pub seed: u64,
    /// Whether the same task gives the same tokens wherever it runs.
    pub exact: bool,
}

/// What was produced before a task was stopped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Partial {
    pub text: String,
    pub usage: Usage,
    pub reason: String,
}

/// Why a task was refused or failed, and what would help.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub code: Code,
    pub reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needed: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available: Option<u64>,
}

impl Refusal {
    pub fn new(code: Code, reason: String) -> Self {
        Self {
            code,
            reason,
            field: None,
            limit: None,
            retry_after_ms: None,
            eta_ms: None,
            needed: None,
            available: None,
        }
    }

    /// `invalid`, naming the field; `reason` continues the sentence that the field's name begins.
    pub fn field(field: &str, reason: &str) -> Self {
        Self {
            field: Some(field.to_owned()),
            ..Self::new(Code::Invalid, format!("`{field}` {reason}"))
        }
    }

    #[must_use]
    pub fn with_limit(self, limit: u64) -> Self {
        Self {
            limit: Some(limit),
            ..self
        }
    }

    /// `context_overflow`, in tokens.
    pub fn context_overflow(needed: u64, available: u64) -> Self {
        let reason =
            format!("prompt and max_tokens need {needed} tokens; there is room for {available}");
        Self {
            needed: Some(needed),
            available: Some(available),
            ..Self::new(Code::ContextOverflow, reason)
        }
    }
}

/// The closed list of reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    Invalid,
    TooLarge,
    ContextOverflow,
    Busy,
    DeadlineUnreachable,
    Conflict,
    Unsupported,
    Draining,
    NoModel,
    ForbiddenReplyTopic,
    ClockUnsynced,
    ReplyUndeliverable,
    Internal,
}

impl Code {
    pub fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::TooLarge => "too_large",
            Self::ContextOverflow => "context_overflow",
            Self::Busy => "busy",
            Self::DeadlineUnreachable => "deadline_unreachable",
            Self::Conflict => "conflict",
            Self::Unsupported => "unsupported",
            Self::Draining => "draining",
            Self::NoModel => "no_model",
            Self::ForbiddenReplyTopic => "forbidden_reply_topic",
            Self::ClockUnsynced => "clock_unsynced",
            Self::ReplyUndeliverable => "reply_undeliverable",
            Self::Internal => "internal",
        }
    }
}

/// Why bytes are no event.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    #[error("it is no event in JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it is no event in the compact form: {0}")]
    Postcard(#[from] postcard::Error),
    #[error("it is of version {0} of the compact form, and this reads 1")]
    Version(u8),
    #[error("{0} bytes follow the event")]
    Trailing(usize),
    #[error("its tokens_per_s is no number")]
    NotFinite,
}

/// An event out of its payload, in either form. They can't be mistaken for each other: no JSON begins with a version byte.
pub fn decode_event(payload: &[u8]) -> Result<Event, EventError> {
    match payload.split_first() {
        Some((&version, rest)) if version < b'\t' => compact::decode_event(version, rest),
        _ => Ok(serde_json::from_slice(payload)?),
    }
}

/// Milliseconds since 1970 as JSON has them.
mod rfc3339 {
    use crate::calendar;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    #[allow(clippy::trivially_copy_pass_by_ref)] // serde calls it so
    pub(super) fn serialize<S: Serializer>(ms: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&calendar::format(*ms))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        calendar::parse(&text).ok_or_else(|| D::Error::custom("`at` is no RFC 3339 time"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Format;
    use proptest::prelude::*;
    use std::time::Duration;

    fn event(body: Body) -> Event {
        let key = Key {
            sender: "mes".into(),
            task: "t1".into(),
        };
        let now = Now {
            own: Duration::ZERO,
            wall_ms: 1_000,
            synced: true,
        };
        Event::new(&key, "gw-07", "r1", 3, now, body)
    }

    #[test]
    fn the_wire_form_is_flat() {
        let bytes = Format::Json.encode(&event(Body::Delta {
            text: "é".into(),
            offset: 2,
        }));
        assert_eq!(
            String::from_utf8(bytes).unwrap(),
            r#"{"task":"t1","sender":"mes","gateway":"gw-07","run":"r1","seq":3,"at":"1970-01-01T00:00:01.000Z","clock":"synced","event":"delta","text":"é","offset":2}"#
        );
    }

    #[test]
    fn events_survive_the_trip_and_unknown_fields_are_ignored() {
        let bodies = [
            Body::Accepted {
                queue_position: 2,
                eta_ms: None,
                base: Some("acme/gw-07".into()),
            },
            Body::Started {},
            Body::Rejected(Refusal::context_overflow(9000, 8192)),
            Body::Cancelled(Partial {
                text: "so far".into(),
                usage: Usage::default(),
                reason: "asked".into(),
            }),
        ];
        for body in bodies {
            let name = body.name();
            let event = event(body);
            let mut json: serde_json::Value =
                serde_json::from_slice(&Format::Json.encode(&event)).unwrap();
            assert_eq!(json["event"], name);
            json["new_in_v9"] = serde_json::json!([1]);
            assert_eq!(decode_event(json.to_string().as_bytes()).unwrap(), event);
        }
    }

    #[test]
    fn codes_are_named_as_on_the_wire() {
        for code in [
            Code::TooLarge,
            Code::ForbiddenReplyTopic,
            Code::ClockUnsynced,
            Code::NoModel,
            Code::Internal,
        ] {
            assert_eq!(serde_json::to_value(code).unwrap(), code.name());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_get_a_verdict(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_event(&payload);
        }
    }
}
