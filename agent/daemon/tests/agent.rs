//! The agent against a real mosquitto, with a model without weights: the route of a task, not its text.

mod common;

use common::{Agent, BASE, Broker, Listener, mind, publish};
use serde_json::Value;
use std::process::Command;
use std::time::Duration;

const FAST: Duration = Duration::from_millis(2);
const SLOW: Duration = Duration::from_millis(50);

fn task(id: &str, tokens: usize, more: &str) -> String {
    format!(
        r#"{{"id": "{id}", "kind": "generate", "prompt": "check the pump ", "max_tokens": {tokens}, "stream": true{more}}}"#
    )
}

#[test]
fn a_task_is_accepted_streamed_and_answered_and_resent_gets_the_same_answer() {
    let broker = Broker::start();
    let listener = Listener::start(broker.port);
    let agent = Agent::start(broker.port, FAST);
    listener.expect("online");
    publish(broker.port, "task", &task("a", 5, ""), &[]);
    assert_eq!(listener.expect("accepted")["queue_position"], 0);
    listener.expect("started");
    assert_eq!(listener.expect("delta")["offset"], 0);
    let done = listener.expect("done");
    assert_eq!(done["text"], "check the pump check the ");
    assert_eq!(
        (&done["finish"], &done["usage"]["generated_tokens"]),
        (&"length".into(), &5.into())
    );
    publish(broker.port, "task", &task("a", 5, ""), &[]);
    assert_eq!(listener.expect("done"), done);
    publish(broker.port, "task", &task("a", 6, ""), &[]);
    assert_eq!(listener.expect("rejected")["code"], "conflict");
    agent.stop().unwrap();
    listener.expect("draining");
    listener.expect("offline");
}

#[test]
fn what_comes_while_the_model_loads_waits_for_it_and_without_one_is_refused() {
    let broker = Broker::start();
    let listener = Listener::start(broker.port);
    let health = Listener::to(broker.port, &[&format!("{BASE}/health")]);
    let state = tempfile::tempdir().unwrap();
    let (minds, models) = tokio::sync::mpsc::channel(1);
    let agent = Agent::start_with(models, "gw", "drain_grace_s=1", state.path(), broker.port);
    // It is connected, and has asked for tasks before.
    let sample = health.event();
    assert!(sample["model_digest"].is_null() && sample["kv_tokens_max"].is_null());
    publish(broker.port, "task", &task("early", 2, ""), &[]);
    health.event();
    assert!(minds.try_send(Err("it is missing".into())).is_ok());
    // Nothing was said before it was known.
    let state = listener.event();
    assert_eq!(state["state"], "degraded");
    assert!(state["reason"].as_str().unwrap().contains("it is missing"));
    assert_eq!(listener.expect("rejected")["code"], "no_model");
    assert!(minds.try_send(Ok(mind(FAST))).is_ok());
    assert_eq!(listener.event()["state"], "online");
    publish(broker.port, "task", &task("early", 2, ""), &[]);
    listener.expect("done");
    agent.stop().unwrap();

    // The next start: it comes in time.
    let path = tempfile::tempdir().unwrap();
    let (minds, models) = tokio::sync::mpsc::channel(1);
    let agent = Agent::start_with(models, "gw", "drain_grace_s=1", path.path(), broker.port);
    health.event();
    publish(broker.port, "task", &task("again", 2, ""), &[]);
    health.event();
    assert!(minds.try_send(Ok(mind(FAST))).is_ok());
    listener.expect("offline");
    assert_eq!(listener.event()["state"], "online");
    assert_eq!(listener.event()["event"], "accepted");
    agent.stop().unwrap();
}

#[test]
fn cancels_deadlines_refusals_and_the_drain_each_say_what_they_are() {
    let broker = Broker::start();
    let listener = Listener::start(broker.port);
    let agent = Agent::start(broker.port, SLOW);
    listener.expect("online");
    publish(broker.port, "task", &task("slow", 900, ""), &[]);
    listener.expect("started");
    publish(
        broker.port,
        "task",
        &task("late", 9, r#", "deadline_ms": 100"#),
        &[],
    );
    assert_eq!(listener.expect("expired")["task"], "late");
    publish(broker.port, "task", &task("b", 9, ""), &[]);
    publish(broker.port, "task", &task("c", 9, ""), &[]);
    publish(broker.port, "task", &task("d", 9, ""), &[]);
    let busy = listener.expect("rejected");
    assert_eq!(
        (&busy["task"], &busy["code"], &busy["limit"]),
        (&"d".into(), &"busy".into(), &2.into())
    );
    publish(broker.port, "cancel", r#"{"task": "slow"}"#, &[]);
    let cancelled = listener.expect("cancelled");
    assert!(
        cancelled["text"]
            .as_str()
            .unwrap()
            .starts_with("check the pump ")
    );
    publish(broker.port, "cancel", r#"{"task": "slow"}"#, &[]);
    listener.expect("already_final");
    publish(broker.port, "task", "{\"id\": ", &[]);
    assert_eq!(listener.expect("rejected")["task"], "_invalid");
    publish(
        broker.port,
        "task",
        &task("r", 9, ""),
        &["-D", "publish", "response-topic", "elsewhere/x"],
    );
    assert_eq!(listener.expect("rejected")["code"], "forbidden_reply_topic");
    publish(broker.port, "task", &task("big", 1500, ""), &[]);
    assert_eq!(listener.expect("rejected")["code"], "context_overflow");
    agent.stop().unwrap();
    listener.expect("offline");
}

#[test]
fn an_urgent_task_takes_the_slot_and_the_other_goes_on_after_it() {
    let broker = Broker::start();
    let listener = Listener::start(broker.port);
    let agent = Agent::start(broker.port, SLOW);
    listener.expect("online");
    publish(broker.port, "task", &task("low", 40, ""), &[]);
    let mut events = Vec::new();
    let mut until = |task: &str, name: &str| {
        while !(events.iter()).any(|e: &Value| e["task"] == task && e["event"] == name) {
            events.push(listener.event());
        }
        events.clone()
    };
    until("low", "delta");
    let urgent = task("urgent", 3, r#", "priority": 9"#);
    publish(broker.port, "task", &urgent, &[]);
    let events = until("urgent", "done");
    assert!(
        !events
            .iter()
            .any(|e| e["task"] == "low" && e["event"] == "done")
    );
    // Then in the same run, and announced once.
    let events = until("low", "done");
    let low: Vec<_> = events.iter().filter(|e| e["task"] == "low").collect();
    let done = low.last().unwrap();
    assert!(low.iter().all(|e| e["run"] == done["run"]));
    assert_eq!(low.iter().filter(|e| e["event"] == "started").count(), 1);
    assert_eq!(done["usage"]["generated_tokens"], 40);
    let text = done["text"].as_str().unwrap();
    assert!("check the pump ".repeat(14).starts_with(text));
    for delta in low.iter().filter(|e| e["event"] == "delta") {
        let (offset, new) = (
            delta["offset"].as_u64().unwrap() as usize,
            delta["text"].as_str(),
        );
        assert_eq!(Some(&text[offset..offset + new.unwrap().len()]), new);
    }
    agent.stop().unwrap();
}

#[test]
fn what_the_drain_leaves_goes_on_at_the_next_start() {
    let state = tempfile::tempdir().unwrap();
    let broker = Broker::start();
    let listener = Listener::start(broker.port);
    let agent = Agent::start_in(state.path(), broker.port, SLOW);
    listener.expect("online");
    publish(broker.port, "task", &task("done", 2, ""), &[]);
    let done = listener.expect("done");
    publish(broker.port, "task", &task("runs", 900, ""), &[]);
    let accepted = listener.expect("accepted");
    publish(broker.port, "task", &task("waits", 3, ""), &[]);
    listener.expect("accepted");
    publish(broker.port, "task", &task("ends", 3, ""), &[]);
    listener.expect("accepted");
    publish(broker.port, "cancel", r#"{"task": "ends"}"#, &[]);
    let ended = listener.expect("cancelled");
    agent.stop().unwrap();
    let offline = listener.expect("offline");
    let reason = offline["reason"].as_str().unwrap();
    assert!(reason.contains("2 tasks go on"), "{reason}");

    let agent = Agent::start_in(state.path(), broker.port, FAST);
    let again = listener.expect("accepted");
    assert_eq!(again["task"], "runs");
    assert_ne!(again["run"], accepted["run"], "a new run");
    assert_eq!(listener.expect("done")["task"], "runs");
    assert_eq!(listener.expect("done")["task"], "waits");
    // What had ended is still known.
    publish(broker.port, "task", &task("done", 2, ""), &[]);
    assert_eq!(listener.expect("done"), done);
    publish(broker.port, "task", &task("ends", 3, ""), &[]);
    assert_eq!(listener.expect("cancelled"), ended);
    publish(broker.port, "task", &task("done", 3, ""), &[]);
    assert_eq!(listener.expect("rejected")["code"], "conflict");
    agent.stop().unwrap();
}

#[test]
fn an_answer_made_while_the_broker_was_away_arrives_when_it_is_back() {
    let mut broker = Broker::start();
    let agent = Agent::start(broker.port, SLOW);
    {
        let listener = Listener::start(broker.port);
        listener.expect("online");
        publish(broker.port, "task", &task("a", 20, ""), &[]);
        listener.expect("delta");
    }
    broker.restart();
    let listener = Listener::start(broker.port);
    assert_eq!(listener.expect("done")["usage"]["generated_tokens"], 20);
    // The subscription is new too: nothing of the old session was left at the broker.
    publish(broker.port, "task", &task("b", 3, ""), &[]);
    assert_eq!(listener.expect("done")["task"], "b");
    agent.stop().unwrap();
}

#[test]
fn ask_prints_the_answer_and_says_why_there_is_none() {
    let broker = Broker::start();
    let listener = Listener::start(broker.port);
    let agent = Agent::start(broker.port, FAST);
    listener.expect("online");
    let ask = |args: &[&str]| {
        let place = format!("127.0.0.1:{}", broker.port);
        let ask = Command::new(env!("CARGO_BIN_EXE_millwright"))
            .args(["ask", "--to", BASE, "--broker", &place, "--max-tokens", "4"])
            .args(args)
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (ask.status.code(), text(ask.stdout), text(ask.stderr))
    };
    let (code, out, err) = ask(&["--raw", "one \u{1b}[2Jtwo "]);
    assert_eq!(
        (code, out.as_str()),
        (Some(0), "one \\u{1b}[2Jtwo one \\u{1b}[2Jtwo \n"),
        "{err}"
    );
    assert!(
        err.contains("accepted by gw (position 0") && err.contains("4 tokens, cut at max_tokens"),
        "{err}"
    );
    let (code, out, err) = ask(&["--raw", "--json", "--id", "j", "one "]);
    assert_eq!(
        (
            code,
            serde_json::from_str::<Value>(&out).unwrap()["task"].clone()
        ),
        (Some(0), "j".into()),
        "{err}"
    );
    let (code, _, err) = ask(&["hello"]);
    assert!(
        code == Some(1) && err.contains("rejected, unsupported: the model has no chat template"),
        "{err}"
    );
    agent.stop().unwrap();
}
