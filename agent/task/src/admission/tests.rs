//! The policy in simulated time.

use super::*;
use crate::job::Class;
use crate::limits;
use crate::wire::{Finish, Format, Kind, Provenance, Sampling, decode_event};
use proptest::prelude::*;
use std::collections::BTreeSet;

fn at(seconds: u64) -> Now {
    Now {
        own: Duration::from_secs(seconds),
        wall_ms: seconds * 1000,
        synced: true,
    }
}

fn share(tasks_max: usize, priority_max: u8) -> Share {
    Share {
        tasks_max,
        priority_max,
    }
}

fn rules() -> Rules {
    Rules {
        gateway: "gw".into(),
        base: Some("acme/gw".into()),
        run_prefix: "r".into(),
        queue_tasks_max: 2,
        queue_bytes_max: 1000,
        slots: 1,
        kv_tokens_max: 1000,
        deadline_max: Duration::from_secs(100),
        window: Window {
            age_max: Duration::from_secs(1000),
            tasks_max: 100,
            bytes_max: 100_000,
        },
        share: share(2, 9),
        shares: HashMap::from([("hmi".into(), share(2, 3))]),
    }
}

fn reply(topic: &str) -> Reply {
    Reply {
        topic: topic.into(),
        correlation: None,
        format: Format::Json,
    }
}

fn key(id: &str) -> Key {
    Key {
        sender: "mes".into(),
        task: id.into(),
    }
}

fn task(id: &str) -> Task {
    Task {
        key: key(id),
        kind: Kind::Generate { prompt: "x".into() },
        max_tokens: 8,
        stop: vec![],
        sampling: Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            seed: None,
        },
        priority: 5,
        stream: true,
        deadline: Duration::from_mins(1),
        reply: reply(id),
        digest: [1; 32],
        bytes: 100,
    }
}

fn offer(gate: &mut Admission<()>, now: u64, task: Task) -> (Decision, Body) {
    let (decision, post) = gate.offer(at(now), task, |_| Ok(work()));
    (decision, body(&post))
}

fn work() -> ((), Size) {
    let size = Size {
        prompt_tokens: 1,
        answer_tokens: 9,
        kv_tokens: 10,
    };
    ((), size)
}

fn body(post: &Post) -> Body {
    decode_event(&post.bytes).unwrap().body
}

fn done(text: &str) -> Outcome {
    let product = Product {
        text: text.into(),
        ..Product::default()
    };
    let provenance = Provenance {
        model: "m".into(),
        digest: "d".into(),
        engine: "e".into(),
        seed: 0,
        exact: true,
    };
    Outcome::Done {
        finish: Finish::Stop,
        product,
        provenance,
    }
}

fn accepted(decision: Decision) -> Ticket {
    match decision {
        Decision::Accepted(ticket) => ticket,
        other => panic!("not accepted: {other:?}"),
    }
}

#[test]
fn a_task_is_accepted_started_streamed_and_done_in_one_run() {
    let mut gate = Admission::new(rules());
    let (decision, first) = offer(&mut gate, 0, task("a"));
    assert_eq!(
        first,
        Body::Accepted {
            queue_position: 0,
            eta_ms: None,
            base: rules().base
        }
    );
    let (ticket, (), _) = gate.next(at(1)).unwrap();
    assert_eq!(accepted(decision), ticket);
    let posts = [
        gate.started(at(1), ticket).unwrap(),
        gate.text(at(2), ticket, "é".into()).0.unwrap(),
        gate.text(at(2), ticket, "!".into()).0.unwrap(),
        gate.finish(at(3), ticket, done("é!")).unwrap(),
    ];
    let events: Vec<_> = posts
        .iter()
        .map(|p| decode_event(&p.bytes).unwrap())
        .collect();
    assert_eq!(
        events.iter().map(|e| e.seq).collect::<Vec<_>>(),
        [1, 2, 3, 4]
    );
    assert!(events.iter().all(|e| e.run == "r-1" && e.gateway == "gw"));
    assert_eq!(
        events[2].body,
        Body::Delta {
            text: "!".into(),
            offset: 2
        }
    );
    assert!(
        matches!(&events[3].body, Body::Done { text, timing, .. } if text == "é!" && timing.queue_ms == 1000)
    );
    assert_eq!(
        posts.map(|p| p.class),
        [Class::Progress, Class::Delta, Class::Delta, Class::Final]
    );
    assert!(gate.is_idle());
}

#[test]
fn the_queue_is_bounded_and_says_so() {
    let mut gate = Admission::new(rules());
    offer(&mut gate, 0, task("a"));
    gate.next(at(0)).unwrap();
    assert!(gate.next(at(0)).is_none(), "one slot");
    offer(&mut gate, 0, task("b"));
    let (_, body) = offer(&mut gate, 0, task("c"));
    assert_eq!(
        body,
        Body::Accepted {
            queue_position: 1,
            eta_ms: None,
            base: rules().base
        }
    );
    let (decision, body) = offer(&mut gate, 0, task("d"));
    assert_eq!(decision, Decision::Refused(Code::Busy));
    assert!(matches!(body, Body::Rejected(r) if r.limit == Some(2) && r.retry_after_ms.is_some()));

    let mut gate = Admission::new(rules());
    let (decision, _) = offer(
        &mut gate,
        0,
        Task {
            bytes: 1001,
            ..task("big")
        },
    );
    assert_eq!(decision, Decision::Refused(Code::Busy));
    assert!(gate.is_idle());
}

#[test]
fn higher_priority_runs_first_and_is_capped_by_sender() {
    let mut gate = Admission::new(rules());
    let low = accepted(
        offer(
            &mut gate,
            0,
            Task {
                priority: 4,
                ..task("low")
            },
        )
        .0,
    );
    let hmi = Task {
        key: Key {
            sender: "hmi".into(),
            task: "h".into(),
        },
        priority: 9,
        ..task("h")
    };
    let capped = accepted(offer(&mut gate, 0, hmi).0);
    assert_eq!(gate.next(at(0)).unwrap().0, low);
    gate.finish(at(1), low, done("")).unwrap();
    let high = accepted(
        offer(
            &mut gate,
            1,
            Task {
                priority: 9,
                ..task("high")
            },
        )
        .0,
    );
    assert_eq!(gate.next(at(1)).unwrap().0, high);
    gate.finish(at(2), high, done("")).unwrap();
    assert_eq!(gate.next(at(2)).unwrap().0, capped);
}

#[test]
fn a_resent_task_runs_once_and_is_answered_with_the_same_bytes() {
    let mut gate = Admission::new(rules());
    offer(&mut gate, 0, task("a"));
    let resent = Task {
        reply: reply("elsewhere"),
        deadline: Duration::from_secs(90),
        ..task("a")
    };
    let moved = Decision::Repeated { moved: true };
    assert_eq!(offer(&mut gate, 1, resent.clone()).0, moved);
    let (ticket, (), _) = gate.next(at(1)).unwrap();
    let last = gate.finish(at(2), ticket, done("text")).unwrap();
    assert_eq!(last.reply.topic, "elsewhere");
    let (decision, again) = gate.offer(at(3), task("a"), |_| panic!("prepared twice"));
    assert_eq!(
        (decision, &again.bytes, again.reply.topic.as_str()),
        (Decision::Recalled, &last.bytes, "a")
    );
    assert_eq!(
        offer(
            &mut gate,
            3,
            Task {
                digest: [2; 32],
                ..task("a")
            }
        )
        .0,
        Decision::Refused(Code::Conflict)
    );
    assert!(
        matches!(
            offer(&mut gate, 2000, task("a")).0,
            Decision::Ended("expired")
        ),
        "forgotten after the window"
    );
}

#[test]
fn a_task_resent_in_the_other_form_is_answered_in_the_newest_while_it_runs_and_in_the_stored_one_after()
 {
    let compact = |id: &str| Task {
        reply: Reply {
            format: Format::Postcard,
            ..reply("elsewhere")
        },
        ..task(id)
    };
    let mut gate = Admission::new(rules());
    offer(&mut gate, 0, task("a"));
    let (decision, said) = gate.offer(at(1), compact("a"), |_| panic!("prepared twice"));
    assert_eq!(
        (decision, said.reply.format, said.bytes[0]),
        (Decision::Repeated { moved: true }, Format::Postcard, 1)
    );
    let (ticket, (), _) = gate.next(at(1)).unwrap();
    let last = gate.finish(at(2), ticket, done("text")).unwrap();
    assert_eq!((last.reply.format, last.bytes[0]), (Format::Postcard, 1));
    let (decision, again) = gate.offer(at(3), task("a"), |_| panic!("prepared twice"));
    assert_eq!(decision, Decision::Recalled);
    assert_eq!(
        (&again.bytes, again.reply),
        (
            &last.bytes,
            Reply {
                format: Format::Postcard,
                ..reply("a")
            }
        )
    );
}

#[test]
fn another_task_under_a_running_id_is_a_conflict() {
    let mut gate = Admission::new(rules());
    offer(&mut gate, 0, task("a"));
    assert_eq!(
        offer(
            &mut gate,
            0,
            Task {
                digest: [2; 32],
                ..task("a")
            }
        )
        .0,
        Decision::Refused(Code::Conflict)
    );
    let other = Task {
        key: Key {
            sender: "hmi".into(),
            task: "a".into(),
        },
        ..task("a")
    };
    accepted(offer(&mut gate, 0, other).0);
}

#[test]
fn refusals_are_not_remembered() {
    let mut gate = Admission::new(rules());
    let refuse = |_: &Task| Err(Refusal::context_overflow(9, 8));
    let (decision, post) = gate.offer(at(0), task("a"), refuse);
    assert_eq!(decision, Decision::Refused(Code::ContextOverflow));
    assert!(
        matches!(body(&post), Body::Rejected(r) if r.needed == Some(9) && r.available == Some(8))
    );
    accepted(offer(&mut gate, 0, task("a")).0);
}

#[test]
fn deadlines_end_the_waiting_at_once_and_stop_the_running_once() {
    let mut gate = Admission::new(rules());
    offer(&mut gate, 0, task("runs"));
    offer(
        &mut gate,
        0,
        Task {
            deadline: Duration::from_secs(50),
            ..task("waits")
        },
    );
    let (ticket, (), _) = gate.next(at(0)).unwrap_or_else(|| panic!("a slot is free"));
    assert_eq!(gate.next_deadline(), Some(Duration::from_secs(50)));
    assert_eq!(gate.tick(at(49)), Due::default());
    let due = gate.tick(at(50));
    assert!(due.stop.is_empty());
    assert_eq!(
        due.posts.iter().map(|p| p.event).collect::<Vec<_>>(),
        ["expired"]
    );
    assert_eq!(
        gate.tick(at(60)),
        Due {
            posts: vec![],
            stop: vec![ticket]
        }
    );
    assert_eq!(gate.tick(at(61)), Due::default());
    let product = Product {
        text: "so far".into(),
        ..Product::default()
    };
    let post = gate
        .finish(at(61), ticket, Outcome::Stopped(product))
        .unwrap();
    assert!(matches!(body(&post), Body::Expired(p) if p.text == "so far"));
    assert_eq!(offer(&mut gate, 61, task("waits")).0, Decision::Recalled);
}

/// Two seconds for the prompt's token and for each of the answer's.
fn slowly() -> Outcome {
    let Outcome::Done {
        finish, provenance, ..
    } = done("")
    else {
        unreachable!()
    };
    let usage = Usage {
        prompt_tokens: 1,
        generated_tokens: 9,
        ..Usage::default()
    };
    let product = Product {
        text: String::new(),
        usage,
        prefill: Duration::from_secs(2),
        decode: Duration::from_secs(16),
    };
    Outcome::Done {
        finish,
        product,
        provenance,
    }
}

#[test]
fn a_task_that_cannot_be_done_in_time_is_told_at_once() {
    let mut gate = Admission::new(rules());
    offer(&mut gate, 0, task("a"));
    let (ticket, (), _) = gate.next(at(0)).unwrap();
    gate.finish(at(20), ticket, slowly()).unwrap();
    assert_eq!(gate.estimate_error(), None, "nothing was estimated yet");
    offer(&mut gate, 20, task("b"));
    let (ticket, (), _) = gate.next(at(20)).unwrap();
    let (decision, body) = offer(
        &mut gate,
        20,
        Task {
            deadline: Duration::from_secs(59),
            ..task("c")
        },
    );
    assert_eq!(decision, Decision::Refused(Code::DeadlineUnreachable));
    assert!(matches!(body, Body::Rejected(r) if r.eta_ms == Some(40_000)));
    let (_, body) = offer(&mut gate, 20, task("d"));
    assert_eq!(
        body,
        Body::Accepted {
            queue_position: 0,
            eta_ms: Some(40_000),
            base: rules().base
        }
    );
    // It took half as long again as was thought.
    gate.finish(at(50), ticket, slowly()).unwrap();
    let error = gate.estimate_error().unwrap();
    assert!((error - 1.0 / 3.0).abs() < 1e-9, "{error}");
}

fn roomy() -> Rules {
    Rules {
        queue_tasks_max: 40,
        queue_bytes_max: 4000,
        share: share(30, 9),
        ..rules()
    }
}

fn of(sender: &str, id: &str, priority: u8) -> Task {
    let key = Key {
        sender: sender.into(),
        task: id.into(),
    };
    Task {
        key,
        priority,
        deadline: Duration::from_hours(1),
        ..task(id)
    }
}

/// Runs what waits, one after the other, for `seconds` each; the ids in the order in which they ran.
fn order(gate: &mut Admission<()>, mut now: u64, seconds: u64) -> Vec<String> {
    let mut ids = Vec::new();
    while let Some((ticket, (), _)) = gate.next(at(now)) {
        ids.push(gate.job(ticket).unwrap().task.key.task.clone());
        now += seconds;
        gate.finish(at(now), ticket, done("")).unwrap();
    }
    ids
}

#[test]
fn who_floods_waits_behind_his_own() {
    let mut gate = Admission::new(roomy());
    for i in 0..30 {
        accepted(offer(&mut gate, 0, of("mes", &format!("m{i}"), 5)).0);
    }
    let (decision, body) = offer(&mut gate, 0, of("mes", "more", 5));
    assert_eq!(decision, Decision::Refused(Code::Busy));
    assert!(matches!(body, Body::Rejected(r) if r.limit == Some(30)));
    // He may still say that one of his is urgent, and another has room.
    accepted(offer(&mut gate, 2, of("ops", "o1", 5)).0);
    accepted(offer(&mut gate, 2, of("ops", "o2", 5)).0);
    let ran = order(&mut gate, 2, 1);
    assert_eq!(ran.len(), 32);
    let place = |id: &str| ran.iter().position(|ran| ran == id).unwrap();
    assert!(place("o1") <= 3 && place("o2") <= 5, "{ran:?}");
    assert!(place("m0") < place("m1") && place("m28") < place("m29"));
}

#[test]
fn his_own_urgent_task_passes_the_flood() {
    let mut gate = Admission::new(roomy());
    for i in 0..20 {
        accepted(offer(&mut gate, 0, of("mes", &format!("m{i}"), 5)).0);
    }
    accepted(offer(&mut gate, 1, of("mes", "urgent", 6)).0);
    assert_eq!(order(&mut gate, 1, 1)[0], "urgent");
}

#[test]
fn low_priority_is_late_and_never_starves() {
    let mut gate = Admission::new(roomy());
    accepted(offer(&mut gate, 0, of("mes", "low", 0)).0);
    // Each second another urgent one, as fast as they are done.
    let mut now = 0;
    let waited = loop {
        accepted(offer(&mut gate, now, of(&format!("s{now}"), "high", 9)).0);
        let (ticket, (), _) = gate.next(at(now)).unwrap();
        if gate.job(ticket).unwrap().task.key.task == "low" {
            break now;
        }
        now += 1;
        gate.finish(at(now), ticket, done("")).unwrap();
    };
    assert!((130..=140).contains(&waited), "{waited}");
}

fn started(gate: &mut Admission<()>, now: u64) -> Ticket {
    gate.next(at(now)).unwrap().0
}

#[test]
fn a_higher_priority_takes_the_slot_of_a_lower_one_and_gives_it_back() {
    let mut gate = Admission::new(roomy());
    accepted(offer(&mut gate, 0, of("mes", "low", 4)).0);
    let low = started(&mut gate, 0);
    gate.text(at(1), low, "one ".into());
    accepted(offer(&mut gate, 1, of("mes", "same", 4)).0);
    assert_eq!(gate.yielding(at(1)), [], "not for one like it");
    let high = accepted(offer(&mut gate, 2, of("ops", "high", 6)).0);
    assert_eq!(gate.yielding(at(2)), [low]);
    assert_eq!(gate.yielding(at(2)), [], "one is enough, and is told once");
    assert!(gate.next(at(2)).is_none(), "it has its slot until then");
    let product = Product {
        text: "one ".into(),
        ..Product::default()
    };
    let waits = Some(Suspended::Waiting { begun: 0 });
    assert_eq!(gate.suspend(at(2), low, (), product.clone()), waits);
    assert_eq!(started(&mut gate, 2), high);
    gate.finish(at(10), high, done("")).unwrap();
    // Before those that came later, and where it was.
    assert_eq!(gate.next(at(10)), Some((low, (), 1)));
    let (delta, _) = gate.text(at(10), low, "two".into());
    let offset = |post: Post| match body(&post) {
        Body::Delta { offset, .. } => offset,
        other => panic!("{other:?}"),
    };
    assert_eq!(offset(delta.unwrap()), 4);
    let last = gate.finish(at(12), low, done("one two")).unwrap();
    assert!(matches!(body(&last), Body::Done { timing, .. } if timing.queue_ms == 8000));
}

#[test]
fn one_that_was_put_aside_ends_with_what_it_has() {
    let part = |text: &str| Product {
        text: text.into(),
        ..Product::default()
    };
    let text = |post: &Post| match body(post) {
        Body::Cancelled(partial) | Body::Expired(partial) => partial.text,
        other => panic!("{other:?}"),
    };
    let yielding = |gate: &mut Admission<()>| {
        let seconds = Duration::from_secs(30);
        let low = Task {
            deadline: seconds,
            ..of("mes", "low", 4)
        };
        accepted(offer(gate, 0, low).0);
        let low = started(gate, 0);
        accepted(offer(gate, 0, of("ops", "high", 6)).0);
        assert_eq!(gate.yielding(at(0)), [low]);
        low
    };
    let mut gate = Admission::new(roomy());
    let low = yielding(&mut gate);
    gate.suspend(at(1), low, (), part("half")).unwrap();
    match gate.cancel(at(2), &key("low"), &reply("x")) {
        Cancelled::Waiting(post) => assert_eq!(text(&post), "half"),
        other => panic!("{other:?}"),
    }
    let mut gate = Admission::new(roomy());
    let low = yielding(&mut gate);
    gate.suspend(at(1), low, (), part("half")).unwrap();
    assert_eq!(text(&gate.tick(at(30)).posts[0]), "half");
    // Cancelled after it was told and before it was heard.
    let mut gate = Admission::new(roomy());
    let low = yielding(&mut gate);
    let cancelled = gate.cancel(at(0), &key("low"), &reply("x"));
    assert_eq!(cancelled, Cancelled::Running(low));
    match gate.suspend(at(1), low, (), part("half")) {
        Some(Suspended::Ended(post)) => assert_eq!(text(&post), "half"),
        other => panic!("{other:?}"),
    }
    assert_eq!(gate.suspend(at(1), low, (), part("")), None);
}

#[test]
fn a_stream_of_higher_ones_holds_none_up_for_ever() {
    let mut gate = Admission::new(roomy());
    accepted(offer(&mut gate, 0, of("mes", "low", 5)).0);
    let low = started(&mut gate, 0);
    let (mut had, mut now) = (0, 0);
    while had < 10 {
        now += 1;
        accepted(offer(&mut gate, now, of(&format!("s{now}"), "high", 7)).0);
        for ticket in gate.yielding(at(now)) {
            gate.suspend(at(now), ticket, (), Product::default())
                .unwrap();
        }
        match gate.next(at(now)) {
            None => had += 1,
            Some((ticket, ..)) if ticket == low => had += 1,
            Some((ticket, ..)) => drop(gate.finish(at(now), ticket, done("")).unwrap()),
        }
        assert!(now < 60, "it had {had} of its ten seconds");
    }
    // Two steps of priority are thirty seconds.
    assert!(now > 30);
}

#[test]
fn as_many_give_way_as_are_needed_and_none_in_vain() {
    let sized = |gate: &mut Admission<()>, id: &str, priority, kv_tokens| {
        let size = Size {
            kv_tokens,
            ..work().1
        };
        let (decision, _) = gate.offer(at(0), of(id, id, priority), |_| Ok(((), size)));
        accepted(decision)
    };
    let gate = |kept: u8| {
        let mut gate = Admission::new(Rules {
            slots: 4,
            ..roomy()
        });
        for (id, priority) in [("a", 3), ("b", 3), ("c", kept)] {
            sized(&mut gate, id, priority, 300);
            started(&mut gate, 0);
        }
        gate
    };
    // A slot is free, and the cache is not: one of 400 needs one of them, 600 two, 900 all.
    for (kv_tokens, kept, wanted) in [
        (100, 3, 0),
        (400, 3, 1),
        (600, 3, 2),
        (900, 3, 3),
        (900, 8, 0),
    ] {
        let mut gate = gate(kept);
        sized(&mut gate, "high", 8, kv_tokens);
        let yielding = gate.yielding(at(0));
        assert_eq!(yielding.len(), wanted, "{kv_tokens} beside {kept}");
        if wanted > 0 {
            assert!(gate.next(at(0)).is_none());
        }
        for ticket in yielding {
            gate.suspend(at(0), ticket, (), Product::default()).unwrap();
        }
        assert_eq!(gate.next(at(0)).is_some(), kept == 3);
    }
}

#[test]
fn nobody_gives_way_beside_one_who_is_leaving_or_where_it_would_not_do() {
    let slots = limits::SUSPENDED_TASKS_MAX + 2;
    let gate = || {
        let mut gate = Admission::new(Rules { slots, ..roomy() });
        for i in 0..slots {
            accepted(offer(&mut gate, 0, of("mes", &format!("m{i}"), 3)).0);
            started(&mut gate, 0);
        }
        gate
    };
    let mut cancelled = gate();
    cancelled.cancel(at(0), &of("mes", "m0", 3).key, &reply("x"));
    accepted(offer(&mut cancelled, 0, of("ops", "high", 8)).0);
    assert_eq!(cancelled.yielding(at(0)), []);
    // More than may be put aside would have to leave.
    let mut large = gate();
    let size = Size {
        kv_tokens: 1000,
        ..work().1
    };
    let (decision, _) = large.offer(at(0), of("ops", "high", 8), |_| Ok(((), size)));
    accepted(decision);
    assert_eq!(large.yielding(at(0)), []);
    // Slots were taken away: what runs goes on.
    let mut eased = gate();
    accepted(offer(&mut eased, 0, of("ops", "high", 8)).0);
    eased.ease(Level::Critical);
    assert_eq!(eased.yielding(at(0)), []);
}

#[test]
fn one_gives_way_as_long_as_it_has_not_waited_for_it() {
    let yields = |begun: u64, asked: u64| {
        let mut gate = Admission::new(roomy());
        accepted(offer(&mut gate, 0, of("mes", "low", 3)).0);
        started(&mut gate, begun);
        accepted(offer(&mut gate, asked, of("ops", "high", 5)).0);
        gate.yielding(at(asked)).len() == 1
    };
    // Two steps are thirty seconds of waiting; how long it ran doesn't count.
    assert!(yields(0, 500) && yields(29, 500));
    assert!(!yields(31, 31) && !yields(31, 500));
}

#[test]
fn a_sender_has_his_share_of_half_a_queue() {
    let mut gate = Admission::new(Rules {
        queue_tasks_max: 16,
        queue_bytes_max: 4000,
        share: share(12, 9),
        ..rules()
    });
    gate.ease(Level::Strained);
    let flood = (0..12).filter(|i| {
        let (decision, _) = offer(&mut gate, 0, of("mes", &format!("m{i}"), 5));
        gate.next(at(0));
        matches!(decision, Decision::Accepted(_))
    });
    assert_eq!(flood.count(), 1 + 6);
    accepted(offer(&mut gate, 0, of("ops", "o", 5)).0);
}

#[test]
fn a_hard_pressed_gateway_takes_less() {
    let mut gate = Admission::new(Rules {
        slots: 4,
        queue_tasks_max: 4,
        share: share(4, 9),
        ..rules()
    });
    let mut n = 0;
    let mut offer = |gate: &mut Admission<()>, priority| {
        n += 1;
        offer(gate, 0, of("mes", &n.to_string(), priority)).1
    };
    let is_refused = |body: &Body| matches!(body, Body::Rejected(r) if r.code == Code::Busy && r.retry_after_ms.is_some());
    let running = |gate: &mut Admission<()>| {
        while gate.next(at(0)).is_some() {}
        gate.running()
    };
    gate.ease(Level::Eased);
    (0..4).for_each(|_| assert!(!is_refused(&offer(&mut gate, 0))));
    assert_eq!(running(&mut gate), 3);
    gate.ease(Level::Strained);
    assert!(is_refused(&offer(&mut gate, 4)), "low priority");
    assert!(!is_refused(&offer(&mut gate, 5)));
    assert!(is_refused(&offer(&mut gate, 5)), "half of the queue");
    assert_eq!(
        running(&mut gate),
        3,
        "what runs goes on, and nothing is begun"
    );
    gate.ease(Level::Critical);
    assert!(is_refused(&offer(&mut gate, 9)));
    gate.ease(Level::Normal);
    assert!(!is_refused(&offer(&mut gate, 0)));
    assert_eq!(running(&mut gate), 4);
}

#[test]
fn only_so_many_are_put_aside() {
    let slots = limits::SUSPENDED_TASKS_MAX + 2;
    let mut gate = Admission::new(Rules { slots, ..roomy() });
    for i in 0..slots {
        accepted(offer(&mut gate, 0, of("mes", &format!("m{i}"), 3)).0);
        started(&mut gate, 0);
    }
    for i in 0..slots {
        accepted(offer(&mut gate, 0, of("ops", &format!("o{i}"), 8)).0);
    }
    let mut aside = 0;
    loop {
        let yielding = gate.yielding(at(0));
        if yielding.is_empty() {
            break;
        }
        for ticket in yielding {
            gate.suspend(at(0), ticket, (), Product::default()).unwrap();
            aside += 1;
        }
        while gate.next(at(0)).is_some() {}
    }
    assert_eq!(aside, limits::SUSPENDED_TASKS_MAX);
}

#[test]
fn one_sender_takes_its_share_of_the_bytes_and_no_more() {
    let mut gate = Admission::new(roomy());
    let large = |sender: &str, id: &str| Task {
        bytes: 1500,
        ..of(sender, id, 5)
    };
    accepted(offer(&mut gate, 0, large("mes", "a")).0);
    accepted(offer(&mut gate, 0, large("mes", "b")).0);
    let (decision, _) = offer(&mut gate, 0, large("mes", "c"));
    assert_eq!(decision, Decision::Refused(Code::Busy));
    accepted(
        offer(
            &mut gate,
            0,
            Task {
                bytes: 900,
                ..of("ops", "d", 5)
            },
        )
        .0,
    );
}

#[test]
fn cancels_reach_the_waiting_the_running_the_finished_and_the_not_yet_arrived() {
    let mut gate = Admission::new(rules());
    offer(&mut gate, 0, task("runs"));
    let (ticket, (), _) = gate.next(at(0)).unwrap();
    offer(&mut gate, 0, task("waits"));
    let cancel = |id: &str, gate: &mut Admission<()>| gate.cancel(at(1), &key(id), &reply("x"));
    assert!(
        matches!(cancel("waits", &mut gate), Cancelled::Waiting(post) if post.event == "cancelled")
    );
    assert_eq!(cancel("runs", &mut gate), Cancelled::Running(ticket));
    let post = gate
        .finish(at(1), ticket, Outcome::Stopped(Product::default()))
        .unwrap();
    assert_eq!(post.event, "cancelled");
    assert!(
        matches!(cancel("runs", &mut gate), Cancelled::AlreadyFinal(post) if post.event == "already_final")
    );
    assert!(
        matches!(cancel("later", &mut gate), Cancelled::Unknown(post) if post.event == "unknown")
    );
    assert_eq!(
        offer(&mut gate, 2, task("later")).0,
        Decision::Ended("cancelled")
    );
    assert!(matches!(
        cancel("too-late", &mut gate),
        Cancelled::Unknown(_)
    ));
    accepted(
        offer(
            &mut gate,
            200,
            Task {
                deadline: Duration::from_mins(5),
                ..task("too-late")
            },
        )
        .0,
    );
}

#[test]
fn a_finish_that_crosses_the_cancel_is_done() {
    let mut gate = Admission::new(rules());
    offer(&mut gate, 0, task("a"));
    let (ticket, (), _) = gate.next(at(0)).unwrap();
    assert_eq!(
        gate.cancel(at(1), &key("a"), &reply("x")),
        Cancelled::Running(ticket)
    );
    assert_eq!(
        gate.finish(at(1), ticket, done("whole")).unwrap().event,
        "done"
    );
}

#[test]
fn a_closed_gate_still_answers_what_it_knows() {
    let mut gate = Admission::new(rules());
    offer(&mut gate, 0, task("runs"));
    let (ticket, (), _) = gate.next(at(0)).unwrap();
    offer(&mut gate, 0, task("waits"));
    gate.close(Some(Refusal::new(Code::Draining, "shutting down".into())));
    assert_eq!(
        offer(&mut gate, 1, task("new")).0,
        Decision::Refused(Code::Draining)
    );
    let again = Decision::Repeated { moved: false };
    assert_eq!(offer(&mut gate, 1, task("waits")).0, again);
    let post = gate.finish(at(10), ticket, done("x")).unwrap();
    assert_eq!(post.event, "done");
    assert_eq!(gate.waiting(), 1, "it waits for the next start");
}

#[test]
fn an_answer_beyond_its_bound_fails_and_is_never_cut() {
    let mut gate = Admission::new(rules());
    offer(&mut gate, 0, task("a"));
    let (ticket, (), _) = gate.next(at(0)).unwrap();
    let (post, stop) = gate.text(at(1), ticket, "x".repeat(limits::ANSWER_BYTES_MAX));
    assert!(post.is_some() && !stop);
    assert_eq!(gate.text(at(1), ticket, "x".into()), (None, true));
    assert_eq!(
        gate.text(at(1), ticket, "x".into()),
        (None, false),
        "told to stop once"
    );
    let post = gate
        .finish(at(1), ticket, Outcome::Stopped(Product::default()))
        .unwrap();
    assert!(matches!(body(&post), Body::Failed(r) if r.code == Code::TooLarge));
}

#[test]
fn a_task_that_takes_the_gateway_down_each_time_fails_in_the_end() {
    let kept = |begun| Kept {
        ticket: Ticket(7),
        task: task("a"),
        begun,
        cancelled: false,
    };
    let mut gate = Admission::new(rules());
    let post = gate
        .resume(at(0), kept(limits::BEGUN_MAX - 1), |_| Ok(work()))
        .unwrap();
    assert_eq!((post.event, post.ticket), ("accepted", Ticket(7)));
    let mut gate = Admission::new(rules());
    let post = gate
        .resume(at(0), kept(limits::BEGUN_MAX), |_| Ok(work()))
        .unwrap_err();
    assert!(matches!(body(&post), Body::Failed(r) if r.code == Code::Internal));
    // Resent, it is answered with that.
    assert_eq!(offer(&mut gate, 1, task("a")).0, Decision::Recalled);
    // Later runs have other names.
    let decision = offer(&mut gate, 1, task("b")).0;
    assert_eq!(decision, Decision::Accepted(Ticket(8)));
}

#[test]
fn a_task_that_the_model_no_longer_takes_says_so_after_a_restart() {
    let mut gate: Admission<()> = Admission::new(rules());
    let kept = Kept {
        ticket: Ticket(1),
        task: task("a"),
        begun: 0,
        cancelled: false,
    };
    let refusal = |_: &Task| Err(Refusal::context_overflow(9000, 100));
    let post = gate.resume(at(0), kept, refusal).unwrap_err();
    assert!(matches!(body(&post), Body::Failed(r) if r.code == Code::ContextOverflow));
}

#[derive(Debug, Clone)]
enum Op {
    Offer(u8, u8, u64),
    Cancel(u8),
    Next,
    Finish(bool),
    /// One is told to give way.
    Yield,
    /// The model put one aside that was told to.
    Suspend,
    Pass(u64),
    /// The answer outgrows its bound.
    Outgrow,
    /// With a model that takes the tasks of before, or doesn't.
    Restart(bool),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        5 => (0u8..12, 0u8..10, 1u64..80).prop_map(|(id, p, d)| Op::Offer(id, p, d)),
        2 => (0u8..12).prop_map(Op::Cancel),
        4 => Just(Op::Next),
        4 => any::<bool>().prop_map(Op::Finish),
        3 => Just(Op::Yield),
        3 => Just(Op::Suspend),
        3 => (0u64..20).prop_map(Op::Pass),
        1 => Just(Op::Outgrow),
        1 => (0u8..5).prop_map(|n| Op::Restart(n > 0)),
    ];
    proptest::collection::vec(op, 0..120)
}

/// A gate, and what a journal would hold of it.
struct Life {
    rules: Rules,
    gate: Admission<()>,
    now: u64,
    open: HashMap<String, Kept>,
    finals: Vec<(Key, Recalled)>,
    running: Vec<Ticket>,
    yielding: Vec<Ticket>,
}

impl Life {
    fn new(rules: Rules) -> Self {
        Self {
            gate: Admission::new(rules.clone()),
            rules,
            now: 0,
            open: HashMap::new(),
            finals: Vec::new(),
            running: Vec::new(),
            yielding: Vec::new(),
        }
    }

    fn obey(&mut self, op: &Op) {
        match *op {
            Op::Offer(id, priority, seconds) => self.offer(&id.to_string(), priority, seconds),
            Op::Cancel(id) => self.cancel(&id.to_string()),
            Op::Next => {
                if let Some((ticket, (), begun)) = self.gate.next(at(self.now)) {
                    let kept = self.kept(ticket);
                    kept.begun += 1;
                    assert_eq!(kept.begun, begun);
                    self.running.push(ticket);
                }
            }
            Op::Finish(whole) => {
                if let Some(ticket) = self.running.pop() {
                    let nothing = Outcome::Stopped(Product::default());
                    let outcome = if whole { done("x") } else { nothing };
                    let post = self.gate.finish(at(self.now), ticket, outcome).unwrap();
                    self.end(&post);
                    assert!(self.gate.finish(at(self.now), ticket, done("x")).is_none());
                }
            }
            Op::Yield => {
                let more = self.gate.yielding(at(self.now));
                assert!(!more.iter().any(|ticket| self.yielding.contains(ticket)));
                self.yielding.extend(more);
            }
            Op::Suspend => {
                if let Some(ticket) = self.yielding.pop() {
                    self.suspend(ticket);
                }
            }
            Op::Pass(seconds) => {
                self.now += seconds;
                let due = self.gate.tick(at(self.now));
                due.posts.iter().for_each(|post| self.end(post));
                assert!(due.stop.iter().all(|t| self.running.contains(t)));
            }
            Op::Outgrow => {
                if let Some(&ticket) = self.running.first() {
                    let text = "x".repeat(limits::ANSWER_BYTES_MAX + 1);
                    self.gate.text(at(self.now), ticket, text);
                }
            }
            Op::Restart(takes) => self.restart(takes),
        }
    }

    /// Or it was done before the model heard of it.
    fn suspend(&mut self, ticket: Ticket) {
        let ran = self.running.len();
        self.running.retain(|running| *running != ticket);
        let is_stopping = self.gate.job(ticket).is_some_and(|job| job.stop.is_some());
        let product = Product::default();
        match self.gate.suspend(at(self.now), ticket, (), product) {
            None => assert_eq!(self.running.len(), ran),
            Some(Suspended::Ended(post)) => {
                assert!(is_stopping);
                self.end(&post);
            }
            Some(Suspended::Waiting { begun }) => {
                assert!(!is_stopping);
                self.kept(ticket).begun = begun;
            }
        }
    }

    fn offer(&mut self, id: &str, priority: u8, seconds: u64) {
        let deadline = Duration::from_secs(self.now + seconds);
        let task = Task {
            priority,
            deadline,
            ..task(id)
        };
        let (decision, post) = self.gate.offer(at(self.now), task.clone(), |_| Ok(work()));
        if let Decision::Ended(_) = decision {
            self.remember(&post);
        }
        if let Decision::Accepted(ticket) = decision {
            let kept = Kept {
                ticket,
                task,
                begun: 0,
                cancelled: false,
            };
            assert!(self.open.insert(id.into(), kept).is_none());
        }
    }

    fn cancel(&mut self, id: &str) {
        match self.gate.cancel(at(self.now), &key(id), &reply("x")) {
            Cancelled::Waiting(post) => self.end(&post),
            Cancelled::Running(ticket) => {
                assert!(self.running.contains(&ticket));
                self.kept(ticket).cancelled = true;
            }
            Cancelled::AlreadyFinal(post) | Cancelled::Unknown(post) => {
                assert!(!self.open.contains_key(&post.key.task));
            }
        }
    }

    fn kept(&mut self, ticket: Ticket) -> &mut Kept {
        let mut all = self.open.values_mut();
        all.find(|kept| kept.ticket == ticket).unwrap()
    }

    fn end(&mut self, post: &Post) {
        assert_eq!(post.class, Class::Final);
        let kept = self.open.remove(&post.key.task);
        assert_eq!(kept.expect("it ends once").ticket, post.ticket);
        self.remember(post);
    }

    fn remember(&mut self, post: &Post) {
        let now = Duration::from_secs(self.now);
        let (format, bytes) = (post.reply.format, post.bytes.clone());
        let recalled = Recalled::new(post.ticket, now, [1; 32], post.event, format, bytes);
        self.finals.push((post.key.clone(), recalled));
    }

    fn restart(&mut self, takes: bool) {
        let now = at(self.now);
        self.gate = Admission::new(self.rules.clone());
        self.running.clear();
        self.yielding.clear();
        for (key, recalled) in self.finals.clone() {
            self.gate.recall(now, key, recalled);
        }
        let mut open: Vec<_> = self.open.values().cloned().collect();
        open.sort_by_key(|kept| kept.ticket);
        for kept in open {
            let (ticket, must_end) = (kept.ticket, kept.cancelled || kept.begun >= 5);
            let refusal = || Refusal::context_overflow(9, 8);
            let prepare = |_: &Task| takes.then(work).ok_or_else(refusal);
            match self.gate.resume(now, kept, prepare) {
                Ok(post) => assert_eq!((post.ticket, must_end, takes), (ticket, false, true)),
                Err(post) => self.end(&post),
            }
        }
    }

    /// Where a task is, by the names of agent/ARCHITECTURE.md.
    fn state(&mut self, id: &str) -> &'static str {
        let job = self.gate.tickets.get(&key(id));
        match job.and_then(|ticket| self.gate.job(*ticket)) {
            Some(job) if !job.is_running() => "waiting",
            Some(job) if job.stop.is_some() => "stopping",
            Some(_) => "running",
            None => {
                let now = Duration::from_secs(self.now);
                let is_known = self.gate.recall.get(now, &key(id)).is_some();
                if is_known { "final" } else { "new" }
            }
        }
    }
}

/// The states of a task's life and what leads from one to another, as the map has them: from, whether by a restart, to.
fn on_the_map() -> BTreeSet<(&'static str, bool, &'static str)> {
    let map = include_str!("../../../ARCHITECTURE.md");
    let section = map.split("## A task's life").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    let row = |line: &'static str| {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        (cells[0], cells[1].starts_with("a restart"), cells[2])
    };
    rows.map(row).collect()
}

#[test]
fn the_map_shows_the_transitions_that_there_are() {
    const IDS: [&str; 6] = ["0", "1", "2", "3", "4", "5"];
    let rules = Rules {
        slots: 2,
        queue_tasks_max: 3,
        share: share(3, 9),
        window: Window {
            age_max: Duration::from_mins(1),
            ..rules().window
        },
        ..rules()
    };
    let mut life = Life::new(rules);
    let mut seen = BTreeSet::new();
    let mut seed = 7u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    for _ in 0..40_000 {
        let op = match random(20) {
            0..5 => Op::Offer(random(6) as u8, random(10) as u8, 1 + random(40)),
            5..7 => Op::Cancel(random(6) as u8),
            7..10 => Op::Next,
            10..12 => Op::Finish(random(2) == 0),
            12 | 13 => Op::Pass(random(6)),
            14 => Op::Outgrow,
            15 | 16 => Op::Yield,
            17 | 18 => Op::Suspend,
            _ => Op::Restart(random(6) > 0),
        };
        let before = IDS.map(|id| life.state(id));
        life.obey(&op);
        let after = IDS.map(|id| life.state(id));
        let is_restart = matches!(op, Op::Restart(_));
        let moved = before.into_iter().zip(after).filter(|(a, b)| a != b);
        seen.extend(moved.map(|(from, to)| (from, is_restart, to)));
    }
    assert_eq!(seen, on_the_map());
}

proptest! {
    /// Whatever happens, restarts too, each accepted task gets exactly one final event, and the bounds hold.
    #[test]
    fn every_accepted_task_ends_exactly_once(ops in ops()) {
        let rules = Rules { slots: 2, queue_tasks_max: 3, queue_bytes_max: 350, share: share(3, 9), ..rules() };
        let mut life = Life::new(rules);
        for op in ops {
            life.obey(&op);
            let (gate, running) = (&life.gate, life.running.len());
            prop_assert!(gate.running() == running && running <= 2);
            // What ran before a restart waits again.
            prop_assert!(gate.waiting() <= 5 && gate.queue.bytes() <= 550);
            prop_assert_eq!(gate.waiting() + gate.running(), life.open.len());
            prop_assert_eq!(gate.is_idle(), life.open.is_empty());
        }
    }
}
