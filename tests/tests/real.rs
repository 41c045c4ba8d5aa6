//! What needs answers that take a while, or mean something: SmolLM2-135M, over a real broker.

use millwright_tests::{Agent, Broker, Client, Setup, real_bundle};
use serde_json::json;
use std::time::{Duration, Instant};

/// More than a few seconds of decoding on any machine that runs this.
const LONG: u32 = 1500;

fn started(setup: Setup) -> (Broker, Agent, Client) {
    let broker = Broker::open();
    let agent = Agent::with(
        &broker,
        &Setup {
            bundle: Some(real_bundle()),
            ..setup
        },
    );
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    (broker, agent, mes)
}

fn count_forever(mes: &Client, id: &str, more: &[(&str, serde_json::Value)]) {
    let mut task = json!({ "id": id, "kind": "generate", "prompt": "1, 2, 3, 4, 5, 6, 7, 8,", "max_tokens": LONG, "stream": true });
    for (field, value) in more {
        task[*field] = value.clone();
    }
    mes.task(&task);
}

#[test]
fn it_knows_what_gravity_is() {
    let (_broker, _agent, mut mes) = started(Setup::default());
    mes.task(&json!({ "id": "q", "kind": "chat", "max_tokens": 64, "messages": [{ "role": "user", "content": "What is gravity?" }] }));
    let done = mes.outcome("q");
    assert_eq!(done["event"], "done");
    assert!(done["text"].as_str().unwrap().contains("force"), "{done}");
}

#[test]
fn a_stop_string_ends_the_answer_before_it() {
    let (_broker, _agent, mut mes) = started(Setup::default());
    count_forever(&mes, "s", &[("stop", json!([" 12,"]))]);
    let events = mes.events("s");
    let done = events.last().unwrap();
    assert_eq!(
        (&done["event"], &done["finish"]),
        (&json!("done"), &json!("stop"))
    );
    assert_eq!(done["text"], " 9, 10, 11,");
    let streamed: String = events
        .iter()
        .filter(|event| event["event"] == "delta")
        .map(|event| event["text"].as_str().unwrap())
        .collect();
    assert_eq!(done["text"], streamed.as_str());
}

#[test]
fn running_and_waiting_tasks_can_be_cancelled() {
    let (_broker, _agent, mut mes) = started(Setup {
        model: "slots = 1".into(),
        ..Setup::default()
    });
    count_forever(&mes, "running", &[]);
    mes.event("running", "delta");
    count_forever(&mes, "waiting", &[]);
    mes.event("waiting", "accepted");
    mes.cancel("waiting");
    let cancelled = mes.event("waiting", "cancelled");
    assert_eq!(cancelled["text"], "");
    let asked = Instant::now();
    mes.cancel("running");
    let cancelled = mes.event("running", "cancelled");
    assert!(
        asked.elapsed() < Duration::from_secs(2),
        "{:?}",
        asked.elapsed()
    );
    assert!(
        !cancelled["text"].as_str().unwrap().is_empty(),
        "{cancelled}"
    );
    // The slot is free again.
    mes.generate("next", 4);
    assert_eq!(mes.outcome("next")["event"], "done");
}

#[test]
fn a_prompt_that_is_read_can_be_cancelled() {
    let (_broker, _agent, mut mes) = started(Setup {
        model: "slots = 1".into(),
        ..Setup::default()
    });
    // Read for ten seconds and more, for which no event comes.
    let prompt = "1, 2, 3, 4, 5, 6, 7, 8, ".repeat(250);
    let task = json!({ "id": "read", "kind": "generate", "prompt": prompt, "max_tokens": 1 });
    mes.task(&task);
    mes.event("read", "started");
    let asked = Instant::now();
    mes.cancel("read");
    let cancelled = mes.event("read", "cancelled");
    assert!(
        asked.elapsed() < Duration::from_secs(2),
        "{:?}",
        asked.elapsed()
    );
    assert_eq!(cancelled["text"], "", "{cancelled}");
    mes.generate("next", 4);
    assert_eq!(mes.outcome("next")["event"], "done");
}

#[test]
fn a_task_stops_at_its_deadline_with_what_it_has() {
    let (_broker, _agent, mut mes) = started(Setup::default());
    let began = Instant::now();
    count_forever(&mes, "d", &[("deadline_ms", json!(1500))]);
    let expired = mes.outcome("d");
    assert_eq!(expired["event"], "expired", "{expired}");
    let took = began.elapsed();
    assert!(
        took >= Duration::from_millis(1400) && took < Duration::from_secs(6),
        "{took:?}"
    );
    assert!(!expired["text"].as_str().unwrap().is_empty(), "{expired}");
}

#[test]
fn what_would_take_longer_than_the_drain_goes_on_at_the_next_start() {
    let (_broker, mut agent, mut mes) = started(Setup {
        agent: "drain_grace_s = 1".into(),
        ..Setup::default()
    });
    count_forever(&mes, "long", &[]);
    let first = mes.event("long", "delta");
    agent.terminate();
    mes.await_state("draining");
    let began = Instant::now();
    mes.await_state("offline");
    assert!(agent.ended().success(), "{}", agent.log());
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );
    agent.restart();
    let again = mes.next("it goes on", |m| {
        let event = m.json();
        event["event"] == "accepted" && event["run"] != first["run"]
    });
    assert_eq!(again.json()["task"], "long");
    mes.cancel("long");
    assert_eq!(mes.outcome("long")["event"], "cancelled");
}
