//! Events in the compact form: what is said is [`Event`]'s, and only its bytes are here.

use super::{VERSION, encode};
use crate::wire::event::{
    Body, Clock, Code, Event, EventError, Finish, Partial, Provenance, Refusal, Timing, Usage,
};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

#[derive(Serialize, Deserialize)]
struct EventV1<'a> {
    task: &'a str,
    sender: &'a str,
    gateway: &'a str,
    run: &'a str,
    seq: u64,
    at_ms: u64,
    clock: Clock,
    #[serde(borrow)]
    body: BodyV1<'a>,
}

/// Numbered in this order, from 0.
#[derive(Serialize, Deserialize)]
enum BodyV1<'a> {
    Accepted {
        queue_position: u64,
        eta_ms: Option<u64>,
        base: Option<&'a str>,
    },
    Started,
    Delta {
        text: &'a str,
        offset: u64,
    },
    Done {
        text: &'a str,
        finish: Finish,
        usage: Usage,
        timing: Timing,
        provenance: Cow<'a, Provenance>,
    },
    Rejected(#[serde(borrow)] RefusalV1<'a>),
    Failed(#[serde(borrow)] RefusalV1<'a>),
    Cancelled(Cow<'a, Partial>),
    Expired(Cow<'a, Partial>),
    AlreadyFinal,
    Unknown,
}

#[derive(Serialize, Deserialize)]
struct RefusalV1<'a> {
    code: Code,
    reason: &'a str,
    field: Option<&'a str>,
    limit: Option<u64>,
    retry_after_ms: Option<u64>,
    eta_ms: Option<u64>,
    needed: Option<u64>,
    available: Option<u64>,
}

pub(in crate::wire) fn encode_event(event: &Event) -> Vec<u8> {
    encode(&EventV1::from(event))
}

/// An event out of what follows the version byte.
pub(in crate::wire) fn decode_event(version: u8, rest: &[u8]) -> Result<Event, EventError> {
    if version != VERSION {
        return Err(EventError::Version(version));
    }
    let (event, rest) = postcard::take_from_bytes::<EventV1<'_>>(rest)?;
    if !rest.is_empty() {
        return Err(EventError::Trailing(rest.len()));
    }
    match event.body {
        BodyV1::Done { timing, .. } if !timing.tokens_per_s.is_finite() => {
            Err(EventError::NotFinite)
        }
        _ => Ok(event.into()),
    }
}

impl<'a> From<&'a Event> for EventV1<'a> {
    fn from(event: &'a Event) -> Self {
        Self {
            task: &event.task,
            sender: &event.sender,
            gateway: &event.gateway,
            run: &event.run,
            seq: event.seq,
            at_ms: event.at_ms,
            clock: event.clock,
            body: BodyV1::from(&event.body),
        }
    }
}

impl From<EventV1<'_>> for Event {
    fn from(event: EventV1<'_>) -> Self {
        Self {
            task: event.task.into(),
            sender: event.sender.into(),
            gateway: event.gateway.into(),
            run: event.run.into(),
            seq: event.seq,
            at_ms: event.at_ms,
            clock: event.clock,
            body: event.body.into(),
        }
    }
}

impl<'a> From<&'a Body> for BodyV1<'a> {
    fn from(body: &'a Body) -> Self {
        match body {
            Body::Accepted {
                queue_position,
                eta_ms,
                base,
            } => Self::Accepted {
                queue_position: *queue_position,
                eta_ms: *eta_ms,
                base: base.as_deref(),
            },
            Body::Started {} => Self::Started,
            Body::Delta { text, offset } => Self::Delta {
                text,
                offset: *offset,
            },
            Body::Done {
                text,
                finish,
                usage,
                timing,
                provenance,
            } => Self::Done {
                text,
                finish: *finish,
                usage: *usage,
                timing: *timing,
                provenance: Cow::Borrowed(provenance),
            },
            Body::Rejected(refusal) => Self::Rejected(refusal.into()),
            Body::Failed(refusal) => Self::Failed(refusal.into()),
            Body::Cancelled(partial) => Self::Cancelled(Cow::Borrowed(partial)),
            Body::Expired(partial) => Self::Expired(Cow::Borrowed(partial)),
            Body::AlreadyFinal {} => Self::AlreadyFinal,
            Body::Unknown {} => Self::Unknown,
        }
    }
}

impl From<BodyV1<'_>> for Body {
    fn from(body: BodyV1<'_>) -> Self {
        match body {
            BodyV1::Accepted {
                queue_position,
                eta_ms,
                base,
            } => Self::Accepted {
                queue_position,
                eta_ms,
                base: base.map(Into::into),
            },
            BodyV1::Started => Self::Started {},
            BodyV1::Delta { text, offset } => Self::Delta {
                text: text.into(),
                offset,
            },
            BodyV1::Done {
                text,
                finish,
                usage,
                timing,
                provenance,
            } => Self::Done {
                text: text.into(),
                finish,
                usage,
                timing,
                provenance: provenance.into_owned(),
            },
            BodyV1::Rejected(refusal) => Self::Rejected(refusal.into()),
            BodyV1::Failed(refusal) => Self::Failed(refusal.into()),
            BodyV1::Cancelled(partial) => Self::Cancelled(partial.into_owned()),
            BodyV1::Expired(partial) => Self::Expired(partial.into_owned()),
            BodyV1::AlreadyFinal => Self::AlreadyFinal {},
            BodyV1::Unknown => Self::Unknown {},
        }
    }
}

impl<'a> From<&'a Refusal> for RefusalV1<'a> {
    fn from(refusal: &'a Refusal) -> Self {
        Self {
            code: refusal.code,
            reason: &refusal.reason,
            field: refusal.field.as_deref(),
            limit: refusal.limit,
            retry_after_ms: refusal.retry_after_ms,
            eta_ms: refusal.eta_ms,
            needed: refusal.needed,
            available: refusal.available,
        }
    }
}

impl From<RefusalV1<'_>> for Refusal {
    fn from(refusal: RefusalV1<'_>) -> Self {
        Self {
            code: refusal.code,
            reason: refusal.reason.into(),
            field: refusal.field.map(Into::into),
            limit: refusal.limit,
            retry_after_ms: refusal.retry_after_ms,
            eta_ms: refusal.eta_ms,
            needed: refusal.needed,
            available: refusal.available,
        }
    }
}
