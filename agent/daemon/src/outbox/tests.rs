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
fn what_was_refused_is_sent_again_in_order() {
    let mut outbox = Outbox::default();
    for topic in ["a", "b", "c", "d"] {
        push(&mut outbox, topic, 1);
    }
    let refuse = |outbox: &mut Outbox, token| {
        outbox.refused(Duration::ZERO, token, PubAckReason::QuotaExceeded)
    };
    let retain = |outbox: &mut Outbox, bytes| {
        let message = Outgoing::json("state".into(), vec![0; bytes]);
        outbox.push(Purpose::Retained, message, Mark::default());
    };
    let first = wire(4);
    retain(&mut outbox, 1);
    outbox.pump(Duration::ZERO, Mark::default(), &first);
    assert_eq!(topics(&first), ["state", "a", "b", "c"]);
    let tokens: Vec<_> = first.seen.borrow().iter().map(|(t, _)| *t).collect();
    refuse(&mut outbox, tokens[1]);
    // A later state comes before the others, and takes the place of the one that is refused now.
    retain(&mut outbox, 2);
    for token in [tokens[0], tokens[2], tokens[3]] {
        refuse(&mut outbox, token);
    }
    let second = wire(9);
    outbox.pump(HOLD, Mark::default(), &second);
    assert_eq!(topics(&second), ["state", "a", "b", "c", "d"]);
    assert_eq!(outbox.depth(), (5, 2 + 4));
    // Also those that were refused while others were on their way.
    let token = second.seen.borrow()[1].0;
    refuse(&mut outbox, token);
    outbox.offline();
    let third = wire(9);
    outbox.pump(2 * HOLD, Mark::default(), &third);
    assert_eq!(topics(&third), ["a", "b", "c", "d"]);
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
    // How the gateway is waits too; not what a sender can do without.
    let mut outbox = Outbox::default();
    let message = Outgoing::json("b".into(), vec![0]);
    outbox.push(Purpose::Progress, message, Mark::default());
    for attempt in 0..ATTEMPTS_MAX {
        let wire = wire(9);
        outbox.pump(HOLD * attempt, Mark::default(), &wire);
        let token = wire.seen.borrow()[0].0;
        outbox.refused(HOLD * attempt, token, PubAckReason::QuotaExceeded);
    }
    assert!(outbox.is_empty());
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
