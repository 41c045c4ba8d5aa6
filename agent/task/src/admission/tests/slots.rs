//! Who gives way to whom, and what a hard pressed gateway takes.

use super::*;

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
    match gate.cancel(at(2), &key("low"), &reply("x"), Addressee::Gateway) {
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
    let cancelled = gate.cancel(at(0), &key("low"), &reply("x"), Addressee::Gateway);
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
    cancelled.cancel(
        at(0),
        &of("mes", "m0", 3).key,
        &reply("x"),
        Addressee::Gateway,
    );
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
fn without_a_model_what_was_accepted_waits_and_a_model_takes_it_or_says_why_not() {
    let mut gate: Admission<()> = Admission::new(Rules {
        slots: 0,
        kv_tokens_max: 0,
        ..rules()
    });
    for (ticket, id) in [(1, "runs"), (2, "too-long"), (3, "cancelled"), (4, "late")] {
        let mut task = task(id);
        if id == "late" {
            task.deadline = Duration::from_secs(5);
        }
        let kept = Kept {
            ticket: Ticket(ticket),
            task,
            begun: 1,
            cancelled: false,
        };
        let post = gate.resume(at(0), kept, ((), Size::default()));
        assert_eq!(post.unwrap().event, "accepted");
    }
    assert_eq!(gate.next(at(1)), None);
    assert_eq!(gate.yielding(at(1)), []);
    // Sent again it is known, though new tasks would be refused.
    gate.close(Some(Refusal::new(Code::NoModel, "none".into())));
    assert!(matches!(
        offer(&mut gate, 1, task("runs")).0,
        Decision::Repeated { .. }
    ));
    assert_eq!(
        offer(&mut gate, 1, task("new")).0,
        Decision::Refused(Code::NoModel)
    );
    let cancelled = gate.cancel(at(2), &key("cancelled"), &reply("r"), Addressee::Gateway);
    assert!(matches!(cancelled, Cancelled::Waiting(_)));
    assert_eq!(gate.tick(at(6)).posts[0].event, "expired");

    let ended = gate.equip(at(7), 1, 1000, |task, ()| {
        if task.key.task == "too-long" {
            return Err(Refusal::context_overflow(9000, 100));
        }
        Ok(work())
    });
    assert_eq!(ended.len(), 1);
    assert!(matches!(body(&ended[0]), Body::Failed(r) if r.code == Code::ContextOverflow));
    assert_eq!(gate.next(at(8)), Some((Ticket(1), (), 2)));
    assert_eq!(
        (gate.waiting(), gate.running(), gate.queue.bytes()),
        (0, 1, 0)
    );
    assert_eq!(
        gate.finish(at(9), Ticket(1), done("x")).unwrap().event,
        "done"
    );
    assert!(gate.is_idle());
}
