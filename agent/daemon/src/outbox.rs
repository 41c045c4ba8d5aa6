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

/// The broker may refuse for a reason that passes; this often an event is tried. One for which the broker's quota has no room
/// now is tried until it has.
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
        entry.attempts += u32::from(why != PubAckReason::QuotaExceeded);
        if for_good || entry.attempts >= ATTEMPTS_MAX {
            let reason = format!("the broker refused it: {why:?}");
            return self.give_up(at, reason, true);
        }
        if now >= self.hold_until {
            tracing::warn!("the broker refuses an event: {why:?}; nothing is sent for {HOLD:?}");
        }
        self.hold_until = now + HOLD;
        let entry = self.entries.remove(at)?;
        self.sent -= 1;
        self.entries.insert(self.sent, entry);
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
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// Takes what fits and remembers its order.
    struct Wire {
        room: usize,
        limit: usize,
        seen: RefCell<Vec<(Token, String)>>,
    }

    impl Carrier for Wire {
        fn carry(&self, token: Option<Token>, message: &Outgoing) -> Result<(), NotSent> {
            let token = token.unwrap_or(Token(0));
            let bytes = message.payload.len();
            if bytes > self.limit {
                return Err(NotSent::TooLarge {
                    bytes,
                    limit: self.limit,
                });
            }
            if self.seen.borrow().len() >= self.room {
                return Err(NotSent::Full);
            }
            self.seen.borrow_mut().push((token, message.topic.clone()));
            Ok(())
        }
    }

    fn wire(room: usize) -> Wire {
        Wire {
            room,
            limit: 100,
            seen: RefCell::default(),
        }
    }

    fn push(outbox: &mut Outbox, topic: &str, bytes: usize) {
        let key = Key {
            sender: "s".into(),
            task: topic.into(),
        };
        let ticket = Ticket(bytes as u64);
        outbox.push(
            Purpose::Answer { key, ticket },
            Outgoing::json(topic.into(), vec![0; bytes]),
            Mark::default(),
        );
    }

    fn topics(wire: &Wire) -> Vec<String> {
        wire.seen
            .borrow()
            .iter()
            .map(|(_, topic)| topic.clone())
            .collect()
    }

    #[test]
    fn what_was_not_acknowledged_is_sent_again_in_order() {
        let mut outbox = Outbox::default();
        for topic in ["a", "b", "c"] {
            push(&mut outbox, topic, 1);
        }
        let first = wire(2);
        assert!(
            outbox
                .pump(Duration::ZERO, Mark::default(), &first)
                .is_empty()
        );
        assert_eq!(
            (topics(&first), outbox.is_all_sent()),
            (vec!["a".into(), "b".into()], false)
        );
        outbox.delivered(first.seen.borrow()[0].0);
        outbox.offline();
        let second = wire(9);
        outbox.pump(Duration::ZERO, Mark::default(), &second);
        assert_eq!(topics(&second), ["b", "c"]);
        for (token, _) in second.seen.borrow().iter() {
            outbox.delivered(*token);
        }
        assert_eq!(outbox.depth(), (0, 0));
    }

    #[test]
    fn nothing_goes_out_before_the_journal_has_it_and_nothing_overtakes() {
        let mut outbox = Outbox::default();
        push(&mut outbox, "a", 1);
        let message = || Outgoing::json("b".into(), vec![0]);
        outbox.push(Purpose::Progress, message(), Mark::of(1));
        push(&mut outbox, "c", 1);
        let wire = wire(9);
        outbox.pump(Duration::ZERO, Mark::of(0), &wire);
        assert_eq!(topics(&wire), ["a"]);
        // But for how the gateway is: it may be that the disk refuses.
        let state = Outgoing::json("state".into(), vec![0]);
        outbox.push(Purpose::Retained, state, Mark::of(0));
        outbox.pump(Duration::ZERO, Mark::of(0), &wire);
        assert_eq!(topics(&wire), ["a", "state"]);
        assert!(!outbox.is_all_sent());
        outbox.pump(Duration::ZERO, Mark::of(1), &wire);
        assert_eq!(topics(&wire), ["a", "state", "b", "c"]);
        let tokens = wire.seen.borrow();
        let delivered = tokens.iter().map(|(token, _)| outbox.delivered(*token));
        let delivered: Vec<_> = delivered.map(|of| of.map(|(_, ticket)| ticket)).collect();
        assert_eq!(delivered, [Some(Ticket(1)), None, None, Some(Ticket(1))]);
    }

    #[test]
    fn text_goes_once_and_in_its_place() {
        let mut outbox = Outbox::default();
        push(&mut outbox, "a", 1);
        let delta = || Outgoing::json("delta".into(), vec![0]);
        outbox.push(Purpose::Delta, delta(), Mark::default());
        push(&mut outbox, "b", 1);
        let first = wire(9);
        outbox.pump(Duration::ZERO, Mark::default(), &first);
        assert_eq!(topics(&first), ["a", "delta", "b"]);
        outbox.push(Purpose::Delta, delta(), Mark::of(1));
        outbox.offline();
        let second = wire(9);
        outbox.pump(Duration::ZERO, Mark::of(1), &second);
        assert_eq!(topics(&second), ["a", "b"]);
    }

    #[test]
    fn what_the_broker_never_takes_is_given_up_and_the_rest_goes_on() {
        let mut outbox = Outbox::default();
        push(&mut outbox, "large", 101);
        push(&mut outbox, "b", 1);
        let wire = wire(9);
        let lost = outbox.pump(Duration::ZERO, Mark::default(), &wire);
        assert_eq!(
            (lost[0].topic.as_str(), topics(&wire)),
            ("large", vec!["b".into()])
        );
        let token = wire.seen.borrow()[0].0;
        let lost = outbox
            .refused(Duration::ZERO, token, PubAckReason::NotAuthorized)
            .unwrap();
        assert!(lost.reason.contains("NotAuthorized"));
        assert_eq!(outbox.depth(), (0, 0));
    }

    #[test]
    fn a_refusal_that_may_pass_is_tried_again_after_a_while_and_not_for_ever() {
        let mut outbox = Outbox::default();
        push(&mut outbox, "a", 1);
        let mut now = Duration::ZERO;
        for attempt in 1..=ATTEMPTS_MAX {
            let wire = wire(9);
            outbox.pump(now, Mark::default(), &wire);
            let token = wire.seen.borrow()[0].0;
            let lost = outbox.refused(now, token, PubAckReason::UnspecifiedError);
            assert_eq!(lost.is_some(), attempt == ATTEMPTS_MAX);
            outbox.pump(now, Mark::default(), &wire);
            assert_eq!(topics(&wire).len(), 1, "nothing goes out while it holds");
            now += HOLD;
        }
    }

    #[test]
    fn what_a_quota_has_no_room_for_waits_until_it_has() {
        let mut outbox = Outbox::default();
        push(&mut outbox, "a", 1);
        for attempt in 0..100 {
            let wire = wire(9);
            outbox.pump(HOLD * attempt, Mark::default(), &wire);
            let token = wire.seen.borrow()[0].0;
            let lost = outbox.refused(HOLD * attempt, token, PubAckReason::QuotaExceeded);
            assert_eq!((lost, outbox.depth()), (None, (1, 1)));
        }
    }

    #[test]
    fn retained_messages_are_replaced_and_not_sent_again() {
        let mut outbox = Outbox::default();
        for payload in [1, 2] {
            outbox.push(
                Purpose::Retained,
                Outgoing::json("state".into(), vec![0; payload]),
                Mark::default(),
            );
        }
        assert_eq!(outbox.depth(), (1, 2));
        outbox.offline();
        assert_eq!(outbox.depth(), (0, 0));
    }

    #[test]
    fn room_ends_before_the_bound() {
        let mut outbox = Outbox::default();
        while outbox.has_room() {
            push(&mut outbox, "a", 10_000);
        }
        assert!(outbox.depth().1 + OUTBOX_RESERVE_BYTES <= OUTBOX_BYTES_MAX + 10_000);
    }
}
