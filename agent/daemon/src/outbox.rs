//! Events on their way to the broker: kept until acknowledged, sent in order and not before the journal has what they
//! tell, sent again after a lost connection. Knows topics and tokens; not what an event means.

use crate::broker::{Link, NotSent, Outgoing, Token};
use crate::crash;
use crate::journal::Mark;
use millwright_task::job::Ticket;
use millwright_task::limits::{
    INFLIGHT_MAX, OUTBOX_BYTES_MAX, OUTBOX_EVENTS_MAX, OUTBOX_RESERVE_BYTES, OUTBOX_RESERVE_EVENTS,
};
use millwright_task::wire::{Format, Key};
use rumqttc::v5::mqttbytes::v5::PubAckReason;
use std::collections::VecDeque;
use std::time::Duration;

/// The broker may refuse for a reason that passes; this often a message is tried. What its quota has no room for now is tried
/// until it has, but for events that a sender can do without.
const ATTEMPTS_MAX: u32 = 5;
/// How long nothing is sent after such a refusal.
const HOLD: Duration = Duration::from_secs(5);

/// Whether a link takes a message. The outbox's only view of the connection.
pub trait Carrier {
    /// At least once and reported under a token, or at most once.
    fn carry(&self, token: Option<Token>, message: &Outgoing) -> Result<(), NotSent>;
}

impl Carrier for Link {
    fn carry(&self, token: Option<Token>, message: &Outgoing) -> Result<(), NotSent> {
        self.publish(token, message)
    }
}

/// What an entry is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    /// State and card: said anew on each connection, so never sent again from here.
    Retained,
    /// An event that the sender can do without.
    Progress,
    /// Text at most once, in its place among the others.
    Delta,
    /// What the journal keeps until it is delivered: a final event, a refusal.
    Answer { key: Key, ticket: Ticket },
    /// Says that an answer can't be delivered. If it can't either, it is set aside.
    LastWord { key: Key, ticket: Ticket },
}

impl Purpose {
    /// The answer that this is, or stands for.
    fn answer(self) -> Option<(Key, Ticket)> {
        match self {
            Self::Answer { key, ticket } | Self::LastWord { key, ticket } => Some((key, ticket)),
            Self::Retained | Self::Progress | Self::Delta => None,
        }
    }
}

/// An answer that can't be delivered where it should go, and why.
#[derive(Debug, PartialEq, Eq)]
pub struct Undeliverable {
    pub key: Key,
    pub ticket: Ticket,
    /// It was the last word already.
    pub is_last_word: bool,
    pub topic: String,
    pub format: Format,
    pub reason: String,
    /// The broker doesn't let us publish there.
    pub forbidden: bool,
}

#[derive(Debug)]
struct Entry {
    token: Token,
    purpose: Purpose,
    message: Outgoing,
    /// What the journal must have before this is sent.
    after: Mark,
    attempts: u32,
}

/// Messages not yet acknowledged, oldest first; the first `sent` are with the client.
#[derive(Debug, Default)]
pub struct Outbox {
    entries: VecDeque<Entry>,
    sent: usize,
    bytes: usize,
    tokens: u64,
    hold_until: Duration,
    /// Since the broker last took something.
    is_refused: bool,
}

impl Outbox {
    /// Events and bytes not yet acknowledged.
    pub fn depth(&self) -> (usize, usize) {
        (self.entries.len(), self.bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether all that is here is with the client, so that a delta would not overtake anything.
    pub fn is_all_sent(&self) -> bool {
        self.sent == self.entries.len()
    }

    /// Whether a state, card or alarm is on its way.
    pub fn has_retained(&self) -> bool {
        let mut entries = self.entries.iter();
        entries.any(|entry| entry.purpose == Purpose::Retained)
    }

    /// Whether the events of one more message fit. What is promised already always fits: the bounds on tasks
    /// are part of the sum in `limits`.
    pub fn has_room(&self) -> bool {
        self.entries.len() + OUTBOX_RESERVE_EVENTS <= OUTBOX_EVENTS_MAX
            && self.bytes + OUTBOX_RESERVE_BYTES <= OUTBOX_BYTES_MAX
    }

    pub fn push(&mut self, purpose: Purpose, message: Outgoing, after: Mark) {
        if purpose == Purpose::Retained {
            self.drop_unsent_retained(&message.topic);
        }
        self.tokens += 1;
        self.bytes += message.payload.len();
        let is_retained = purpose == Purpose::Retained;
        let entry = Entry {
            token: Token(self.tokens),
            purpose,
            message,
            after,
            attempts: 0,
        };
        // How the gateway is does not wait for events, which may wait for a disk that refuses.
        let at = if is_retained {
            self.sent
        } else {
            self.entries.len()
        };
        self.entries.insert(at, entry);
    }

    /// Hands over as much as goes now, of what the journal has; returns what can't ever be.
    pub fn pump(
        &mut self,
        now: Duration,
        kept: Mark,
        carrier: &impl Carrier,
    ) -> Vec<Undeliverable> {
        let mut lost = Vec::new();
        while let Some(entry) = self.entries.get(self.sent)
            && self.sent < INFLIGHT_MAX
            && now >= self.hold_until
            && entry.after <= kept
        {
            crash::point("before-send");
            let is_delta = entry.purpose == Purpose::Delta;
            let token = (!is_delta).then_some(entry.token);
            match carrier.carry(token, &entry.message) {
                Ok(()) if is_delta => {
                    self.remove(self.sent);
                }
                Ok(()) => {
                    crash::point("after-send");
                    self.sent += 1;
                }
                Err(NotSent::Offline | NotSent::Full) => break,
                Err(NotSent::TooLarge { bytes, limit }) => {
                    let reason =
                        format!("the event has {bytes} bytes and the broker takes {limit}");
                    lost.extend(self.give_up(self.sent, reason, false));
                }
                Err(NotSent::Topic) => {
                    lost.extend(self.give_up(self.sent, "the topic is malformed".into(), true));
                }
            }
        }
        lost
    }

    /// The broker has it: the answer that was delivered, if it is one.
    pub fn delivered(&mut self, token: Token) -> Option<(Key, Ticket)> {
        let at = self.sent_at(token)?;
        self.is_refused = false;
        self.remove(at)?.purpose.answer()
    }

    /// The broker refused it: tried again later where that may help, else given up.
    pub fn refused(
        &mut self,
        now: Duration,
        token: Token,
        why: PubAckReason,
    ) -> Option<Undeliverable> {
        let at = self.sent_at(token)?;
        let for_good = matches!(
            why,
            PubAckReason::NotAuthorized
                | PubAckReason::TopicNameInvalid
                | PubAckReason::PayloadFormatInvalid
        );
        let entry = &mut self.entries[at];
        let waits = why == PubAckReason::QuotaExceeded && entry.purpose != Purpose::Progress;
        entry.attempts += u32::from(!waits);
        if for_good || entry.attempts >= ATTEMPTS_MAX {
            let reason = format!("the broker refused it: {why:?}");
            return self.give_up(at, reason, true);
        }
        if !self.is_refused && now >= self.hold_until {
            tracing::warn!(
                "the broker refuses events: {why:?}; they are tried again each {HOLD:?}"
            );
        }
        self.is_refused = true;
        self.hold_until = now + HOLD;
        let entry = self.remove(at)?;
        self.put_back(entry);
        None
    }

    /// The connection is gone: all that was not acknowledged is to be sent again, in order.
    pub fn offline(&mut self) {
        self.sent = 0;
        let bytes = &mut self.bytes;
        self.entries.retain(|entry| {
            let keep = !matches!(entry.purpose, Purpose::Retained | Purpose::Delta);
            *bytes -= if keep { 0 } else { entry.message.payload.len() };
            keep
        });
        // What was refused had gone behind what was on its way.
        let entries = self.entries.make_contiguous();
        entries.sort_by_key(|entry| entry.token);
    }

    fn sent_at(&self, token: Token) -> Option<usize> {
        self.entries
            .iter()
            .take(self.sent)
            .position(|entry| entry.token == token)
    }

    fn remove(&mut self, at: usize) -> Option<Entry> {
        let entry = self.entries.remove(at)?;
        self.bytes -= entry.message.payload.len();
        self.sent -= usize::from(at < self.sent);
        Some(entry)
    }

    /// What was refused goes to its place among what is unsent. A state or alarm of which there is a later one is not said any more.
    fn put_back(&mut self, entry: Entry) {
        let is_retained = |e: &Entry| e.purpose == Purpose::Retained;
        let place = if is_retained(&entry) {
            let topic = &entry.message.topic;
            let mut others = self.entries.iter().filter(|e| is_retained(e));
            if others.any(|e| e.message.topic == *topic && e.token > entry.token) {
                return;
            }
            self.sent
        } else {
            let later = |e: &Entry| !is_retained(e) && e.token > entry.token;
            let mut unsent = self.sent..self.entries.len();
            unsent
                .find(|&i| later(&self.entries[i]))
                .unwrap_or(self.entries.len())
        };
        self.bytes += entry.message.payload.len();
        self.entries.insert(place, entry);
    }

    fn give_up(&mut self, at: usize, reason: String, forbidden: bool) -> Option<Undeliverable> {
        let entry = self.remove(at)?;
        let Outgoing { topic, format, .. } = entry.message;
        let is_last_word = matches!(entry.purpose, Purpose::LastWord { .. });
        match entry.purpose {
            Purpose::Answer { key, ticket } | Purpose::LastWord { key, ticket } => {
                Some(Undeliverable {
                    key,
                    ticket,
                    is_last_word,
                    topic,
                    format,
                    reason,
                    forbidden,
                })
            }
            Purpose::Progress | Purpose::Retained | Purpose::Delta => {
                tracing::warn!(topic, reason, "an event was set aside");
                None
            }
        }
    }

    fn drop_unsent_retained(&mut self, topic: &str) {
        let old = |e: &Entry| e.purpose == Purpose::Retained && e.message.topic == topic;
        while let Some(at) = (self.sent..self.entries.len()).find(|&i| old(&self.entries[i])) {
            self.remove(at);
        }
    }
}

#[cfg(test)]
mod tests;
