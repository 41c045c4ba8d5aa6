//! The agent's life beside its tasks: state and will, broker restarts, cancels that overtake, a full queue,
//! the drain. With the tiny model.

use millwright_tests::{Agent, BASE, Broker, Client, Message, Setup};
use serde_json::{Value, json};
use std::time::Duration;

/// Far more than fit a queue of two, sent faster than the tiny model answers.
const TASKS: usize = 40;

#[test]
fn a_gateway_shows_its_state_card_and_health() {
    let broker = Broker::open();
    let _agent = Agent::start(&broker);
    let mut console = Client::connect(&broker, "console");
    let state = console.await_state("online");
    assert!(state["boot_id"].is_string(), "{state}");
    let topic = format!("{BASE}/card");
    let card = console
        .next("the card", |m| m.topic == topic && !m.payload.is_empty())
        .json();
    for field in [
        "site", "gateway", "base", "model", "kinds", "fields", "limits",
    ] {
        assert!(!card[field].is_null(), "{field}: {card}");
    }
    console.subscribe(&format!("{BASE}/health"));
    let topic = format!("{BASE}/health");
    let health = console.next("a health sample", |m| m.topic == topic);
    assert!(!health.retain);
    assert!(health.json()["estimate_error"].is_null(), "{health:?}");
    // How far its estimates were, once there were any.
    for n in 0..12 {
        let id = format!("t-{n}");
        console.generate(&id, 8);
        assert_eq!(console.outcome(&id)["event"], "done");
    }
    let is_judged = |m: &Message| m.topic == topic && m.json()["estimate_error"].is_f64();
    let error = console.next("an estimate's error", is_judged).json()["estimate_error"].clone();
    assert!(error.as_f64().is_some_and(|e| e >= 0.0), "{error}");
}

#[test]
fn a_gateway_that_dies_is_shown_as_offline() {
    let broker = Broker::open();
    let mut agent = Agent::start(&broker);
    let mut console = Client::connect(&broker, "console");
    console.await_state("online");
    agent.kill();
    console.await_state("offline");
    // The state is retained: who comes later learns it too.
    Client::connect(&broker, "late").await_state("offline");
    agent.restart();
    console.await_state("online");
}

#[test]
fn the_agent_comes_back_after_a_broker_restart() {
    let mut broker = Broker::open();
    let _agent = Agent::start(&broker);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    mes.generate("before", 4);
    assert_eq!(mes.outcome("before")["event"], "done");
    drop(mes);
    broker.stop();
    broker.resume();
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    mes.generate("after", 4);
    assert_eq!(mes.outcome("after")["event"], "done");
}

#[test]
fn an_agent_started_before_its_broker_waits_for_it() {
    let mut broker = Broker::open();
    broker.stop();
    let mut agent = Agent::start(&broker);
    std::thread::sleep(Duration::from_millis(500));
    assert!(agent.is_running(), "{}", agent.log());
    broker.resume();
    Client::connect(&broker, "mes").await_state("online");
}

#[test]
fn a_cancel_may_overtake_its_task() {
    let broker = Broker::open();
    let _agent = Agent::start(&broker);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    mes.cancel("later");
    let reply = mes.event("later", "unknown");
    assert_eq!(reply["sender"], "mes");
    mes.generate("later", 8);
    assert_eq!(mes.outcome("later")["event"], "cancelled");
}

#[test]
fn only_its_sender_can_cancel_a_task() {
    let broker = Broker::open();
    let _agent = Agent::start(&broker);
    let (mut mes, mut hmi) = (
        Client::connect(&broker, "mes"),
        Client::connect(&broker, "hmi"),
    );
    mes.await_state("online");
    hmi.cancel("mine");
    hmi.event("mine", "unknown");
    mes.generate("mine", 4);
    assert_eq!(mes.outcome("mine")["event"], "done");
    mes.cancel("mine");
    mes.event("mine", "already_final");
}

#[test]
fn what_does_not_fit_the_queue_is_refused_at_once_and_the_rest_is_answered() {
    let broker = Broker::open();
    let setup = Setup {
        tasks: "queue_max = 2".into(),
        model: "slots = 1".into(),
        ..Setup::default()
    };
    let _agent = Agent::with(&broker, &setup);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    for n in 0..TASKS {
        mes.generate(&format!("b-{n}"), 120);
    }
    let outcomes: Vec<Value> = (0..TASKS).map(|n| mes.outcome(&format!("b-{n}"))).collect();
    let of = |name: &str| {
        outcomes
            .iter()
            .filter(|o| o["event"] == name)
            .collect::<Vec<_>>()
    };
    let (done, refused) = (of("done"), of("rejected"));
    assert_eq!(done.len() + refused.len(), TASKS);
    assert!(
        !done.is_empty() && !refused.is_empty(),
        "{} done, {} refused",
        done.len(),
        refused.len()
    );
    for refusal in refused {
        assert_eq!(refusal["code"], "busy", "{refusal}");
        assert!(refusal["retry_after_ms"].as_u64() > Some(0), "{refusal}");
    }
}

/// mosquitto 2.0 may send a resumed session more than the receive maximum allows.
#[test]
fn all_that_waited_at_the_broker_is_answered_however_much_it_is() {
    let broker = Broker::open();
    let mut agent = Agent::start(&broker);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    agent.kill();
    let mut witness = Client::connect(&broker, "witness");
    witness.subscribe(&format!("{BASE}/task/mes"));
    for n in 0..200 {
        mes.generate(&format!("small-{n}"), 1);
    }
    // 20 MB, more than the agent takes in at once.
    let prompt = "x ".repeat(125_000);
    for n in 0..80 {
        let id = format!("large-{n}");
        mes.task(&json!({ "id": id, "kind": "generate", "prompt": prompt, "max_tokens": 1 }));
    }
    mes.generate("last", 1);
    witness.next("the last task", |m| m.json()["id"] == "last");
    agent.restart();
    let small = (0..200).map(|n| (format!("small-{n}"), "done"));
    let large = (0..80).map(|n| (format!("large-{n}"), "context_overflow"));
    for (id, expected) in small.chain(large) {
        let outcome = mes.outcome(&id);
        let said = [&outcome["event"], &outcome["code"]];
        assert!(
            said.iter().any(|s| *s == "busy" || *s == expected),
            "{outcome}"
        );
    }
}

#[test]
fn a_terminated_agent_says_goodbye_and_ends_well() {
    let broker = Broker::open();
    let mut agent = Agent::start(&broker);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    for n in 0..4 {
        mes.generate(&format!("d-{n}"), 100);
    }
    mes.event("d-3", "accepted");
    agent.terminate();
    // Each accepted task reaches its one outcome before the agent goes.
    for n in 0..4 {
        let outcome = mes.outcome(&format!("d-{n}"));
        assert!(
            outcome["event"] == "done" || outcome["event"] == "cancelled",
            "{outcome}"
        );
    }
    mes.await_state("offline");
    assert!(agent.ended().success(), "{}", agent.log());
}

#[test]
fn a_task_whose_deadline_can_not_be_met_is_not_left_waiting() {
    let broker = Broker::open();
    let setup = Setup {
        model: "slots = 1".into(),
        ..Setup::default()
    };
    let _agent = Agent::with(&broker, &setup);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    for n in 0..8 {
        mes.generate(&format!("w-{n}"), 200);
    }
    mes.task(&json!({ "id": "urgent", "kind": "generate", "prompt": "x", "max_tokens": 200, "deadline_ms": 1 }));
    let outcome = mes.outcome("urgent");
    let honest = outcome["event"] == "expired" || outcome["code"] == "deadline_unreachable";
    assert!(honest, "{outcome}");
}
