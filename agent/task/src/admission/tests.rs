//! The policy in simulated time.

use super::*;
use crate::job::Class;
use crate::limits;
use crate::wire::{Finish, Format, Kind, Provenance, Sampling, decode_event};

mod life;
mod slots;

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
fn a_model_that_came_leaves_each_his_turn() {
    let mut gate = Admission::new(roomy());
    for i in 0..20 {
        accepted(offer(&mut gate, 0, of("mes", &format!("m{i}"), 5)).0);
    }
    let (slots, kv_tokens) = (gate.rules.slots, gate.rules.kv_tokens_max);
    let ended = gate.equip(at(0), slots, kv_tokens, |_, ()| Ok(work()));
    assert!(ended.is_empty());
    accepted(offer(&mut gate, 1, of("mes", "new", 5)).0);
    assert_eq!(order(&mut gate, 1, 1).last().unwrap(), "new");
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
    let cancel = |id: &str, gate: &mut Admission<()>| {
        gate.cancel(at(1), &key(id), &reply("x"), Addressee::Gateway)
    };
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
fn an_idle_gateway_keeps_nothing_beyond_the_window() {
    let mut gate = Admission::new(rules());
    let ticket = accepted(offer(&mut gate, 0, task("a")).0);
    gate.next(at(0)).unwrap();
    gate.finish(at(1), ticket, done("x")).unwrap();
    gate.cancel(at(2), &key("b"), &reply("x"), Addressee::Gateway);
    gate.tick(at(102));
    assert_eq!(gate.take_gone(), []);
    gate.tick(at(1001));
    assert_eq!(gate.take_gone(), [crate::recall::Gone::Cancel(key("b"))]);
    gate.tick(at(1002));
    assert_eq!(gate.take_gone(), [crate::recall::Gone::Final(ticket)]);
}

#[test]
fn a_pools_cancel_waits_a_minute_and_takes_no_others_place() {
    let mut gate = Admission::new(rules());
    let unknown = gate.cancel(at(0), &key("own"), &reply("x"), Addressee::Gateway);
    assert!(matches!(unknown, Cancelled::Unknown(_)));
    for i in 0..2 * limits::CANCELS_MAX {
        let key = key(&format!("p{i}"));
        let overheard = gate.cancel(at(0), &key, &reply("x"), Addressee::Pool);
        assert_eq!(overheard, Cancelled::Overheard);
    }
    assert_eq!(gate.take_gone(), [], "the journal never heard of them");
    let last = format!("p{}", 2 * limits::CANCELS_MAX - 1);
    let (decision, _) = offer(&mut gate, 59, task(&last));
    assert_eq!(decision, Decision::Ended("cancelled"));
    let (decision, _) = offer(&mut gate, 59, task("own"));
    assert_eq!(decision, Decision::Ended("cancelled"));
    let late = format!("p{}", 2 * limits::CANCELS_MAX - 2);
    let task = Task {
        deadline: Duration::from_secs(200),
        ..task(&late)
    };
    accepted(offer(&mut gate, 61, task).0);
}

#[test]
fn a_finish_that_crosses_the_cancel_is_done() {
    let mut gate = Admission::new(rules());
    offer(&mut gate, 0, task("a"));
    let (ticket, (), _) = gate.next(at(0)).unwrap();
    assert_eq!(
        gate.cancel(at(1), &key("a"), &reply("x"), Addressee::Gateway),
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
        .resume(at(0), kept(limits::BEGUN_MAX - 1), work())
        .unwrap();
    assert_eq!((post.event, post.ticket), ("accepted", Ticket(7)));
    let mut gate = Admission::new(rules());
    let post = gate
        .resume(at(0), kept(limits::BEGUN_MAX), work())
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
    gate.resume(at(0), kept, work()).unwrap();
    let refusal = |_: &Task, ()| Err(Refusal::context_overflow(9000, 100));
    let ended = gate.equip(at(0), 1, 1000, refusal);
    let [post] = ended.as_slice() else {
        panic!("{ended:?}");
    };
    assert!(matches!(body(post), Body::Failed(r) if r.code == Code::ContextOverflow));
}
