//! Two agents in one pool on a real mosquitto, with a slow model without weights: who runs what, who hears a cancel, who
//! takes no more.

#[allow(dead_code)] // each program of tests uses its part
mod common;

use common::{Agent, Broker, Listener, publish_at};
use serde_json::Value;
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

const POOL: &str = "millwright/v1/test/pool/line3";
/// A task of this many tokens outlives any test here.
const LONG: usize = 900;

fn task(id: &str, tokens: usize) -> String {
    format!(
        r#"{{"id": "{id}", "kind": "generate", "prompt": "check the pump ", "max_tokens": {tokens}}}"#
    )
}

/// A broker, and two members that take the pool's tasks.
struct Plant {
    broker: Broker,
    agents: Vec<Agent>,
    _states: Vec<TempDir>,
    results: Listener,
}

impl Plant {
    fn start(drain_grace_s: u64) -> Self {
        let broker = Broker::start();
        let port = broker.port;
        let results = Listener::to(port, &[&format!("{POOL}/result/#")]);
        let states: Vec<_> = (0..2).map(|_| tempfile::tempdir().unwrap()).collect();
        let more = format!("drain_grace_s={drain_grace_s}\n[pool]\nname='line3'");
        let start = |(n, state): (usize, &TempDir)| {
            let step = Duration::from_millis(50);
            Agent::start_as(&format!("gw-{n}"), &more, state.path(), port, step)
        };
        let agents = states.iter().enumerate().map(start).collect();
        let plant = Self {
            broker,
            agents,
            _states: states,
            results,
        };
        plant.await_taking("gw-0", true);
        plant.await_taking("gw-1", true);
        plant
    }

    fn await_taking(&self, name: &str, taking: bool) {
        let health = format!("millwright/v1/test/{name}/health");
        Listener::to(self.broker.port, &[&health])
            .expect_that("such health", |json| json["pools"][0]["taking"] == taking);
    }

    fn publish(&self, kind: &str, payload: &str) {
        publish_at(POOL, self.broker.port, kind, payload, &[]);
    }

    fn cancel(&self, id: &str) {
        self.publish("cancel", &format!(r#"{{"task": "{id}"}}"#));
    }

    fn expect(&self, id: &str, event: &str) -> Value {
        let wanted = |json: &Value| json["task"] == id && json["event"] == event;
        self.results
            .expect_that(&format!("{event} of {id}"), wanted)
    }

    /// The next event, whatever it is.
    fn next(&self) -> Value {
        self.results.expect_that("event", |_| true)
    }
}

#[test]
fn a_cancel_reaches_whoever_holds_the_task_and_nobody_else_speaks() {
    let plant = Plant::start(1);
    let mut holders = Vec::new();
    for id in ["a", "b"] {
        plant.publish("task", &task(id, LONG));
        holders.push(plant.expect(id, "accepted")["gateway"].clone());
        plant.expect(id, "started");
    }
    assert_ne!(holders[0], holders[1], "the broker gives in turn");
    for (id, holder) in ["a", "b"].iter().zip(&holders) {
        plant.cancel(id);
        // The very next: a member that doesn't know the task says nothing.
        let event = plant.next();
        assert_eq!(
            (&event["event"], &event["gateway"]),
            (&"cancelled".into(), holder),
            "{event}"
        );
        plant.cancel(id);
        let event = plant.next();
        assert_eq!(
            (&event["event"], &event["gateway"]),
            (&"already_final".into(), holder),
            "{event}"
        );
    }
    // Before its task, all remember it, so it does not matter who gets that, nor which connection is the quicker.
    plant.cancel("c");
    plant.cancel("d");
    for id in ["c", "d"] {
        plant.publish("task", &task(id, LONG));
        plant.expect(id, "cancelled");
    }
    for agent in plant.agents {
        agent.stop().unwrap();
    }
}

#[test]
fn a_member_that_drains_takes_no_more_of_the_pool_and_still_hears_its_cancels() {
    let mut plant = Plant::start(60);
    plant.publish("task", &task("runs", LONG));
    let holder = plant.expect("runs", "accepted")["gateway"].clone();
    let name = holder.as_str().unwrap();
    plant.expect("runs", "started");
    let at = usize::from(name == "gw-1");
    let drain = plant.agents.remove(at);
    let drain = std::thread::spawn(move || drain.stop());
    plant.await_taking(name, false);
    // One may wait and one may run at the other: all of the pool's go there.
    for id in ["x", "y"] {
        plant.publish("task", &task(id, 2));
        let event = plant.next();
        assert_eq!(event["event"], "accepted", "{event}");
        assert_ne!(event["gateway"], holder, "{event}");
        plant.expect(id, "done");
    }
    assert!(!drain.is_finished(), "it drains");
    plant.cancel("runs");
    assert_eq!(plant.expect("runs", "cancelled")["gateway"], holder);
    drain.join().unwrap().unwrap();
    for agent in plant.agents {
        agent.stop().unwrap();
    }
}

#[test]
fn a_full_pool_is_asked_again_until_there_is_room() {
    let plant = Plant::start(1);
    let port = plant.broker.port;
    let filters = [
        "millwright/v1/test/+/result/#",
        "millwright/v1/test/gw-0/state",
    ];
    let own = Listener::to(port, &filters);
    // It is retained: the listener listens.
    own.expect("online");
    // One runs and two wait at each: no room for another.
    for n in 0..6 {
        publish_at(
            &format!("millwright/v1/test/gw-{}", n % 2),
            port,
            "task",
            &task(&format!("fill-{n}"), LONG),
            &[],
        );
    }
    publish_at(
        "millwright/v1/test/gw-0",
        port,
        "task",
        &task("probe-0", 2),
        &[],
    );
    publish_at(
        "millwright/v1/test/gw-1",
        port,
        "task",
        &task("probe-1", 2),
        &[],
    );
    // The two answer in any order, once each.
    for _ in 0..2 {
        own.expect_that("busy", |json| json["code"] == "busy");
    }
    let place = format!("127.0.0.1:{port}");
    let ask = Command::new(env!("CARGO_BIN_EXE_millwright"))
        .args(["ask", "--pool", POOL, "--broker", &place, "--raw", "--json"])
        .args([
            "--sender",
            "mes",
            "--id",
            "asked",
            "--max-tokens",
            "2",
            "one ",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let busy = plant.expect("asked", "rejected");
    assert_eq!(busy["code"], "busy", "{busy}");
    for n in 0..6 {
        publish_at(
            &format!("millwright/v1/test/gw-{}", n % 2),
            port,
            "cancel",
            &format!(r#"{{"task": "fill-{n}"}}"#),
            &[],
        );
    }
    let output = ask.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let event: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(event["event"], "done", "{event}");
    assert!(said.contains("refused (busy); sent again in"), "{said}");
    for agent in plant.agents {
        agent.stop().unwrap();
    }
}

#[test]
fn ctrl_c_cancels_at_the_pool() {
    let plant = Plant::start(1);
    let place = format!("127.0.0.1:{}", plant.broker.port);
    let tokens = LONG.to_string();
    let ask = Command::new(env!("CARGO_BIN_EXE_millwright"))
        .args(["ask", "--pool", POOL, "--broker", &place, "--raw"])
        .args(["--id", "long", "--max-tokens", &tokens, "one "])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    plant.expect("long", "delta");
    let id = ask.id().to_string();
    let sent = Command::new("kill").args(["-INT", &id]).status().unwrap();
    assert!(sent.success());
    plant.expect("long", "cancelled");
    let output = ask.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("its sender cancelled it"), "{said}");
    for agent in plant.agents {
        agent.stop().unwrap();
    }
}

#[test]
fn a_pool_without_room_or_without_members_is_said_in_the_end() {
    let broker = Broker::start();
    let place = format!("127.0.0.1:{}", broker.port);
    let ask = |more: &[&str]| {
        let ask = Command::new(env!("CARGO_BIN_EXE_millwright"))
            .args(["ask", "--broker", &place, "--raw", "--accept-within", "0.2"])
            .args(more)
            .arg("one ")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ask.stderr).into_owned();
        (ask.status.code(), said)
    };
    // Nobody is there: it waits a while beyond the deadline, as for a gateway.
    let (code, said) = ask(&["--pool", POOL, "--deadline", "0.5"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("no member accepted it yet") && said.contains("no answer from the pool"),
        "{said}"
    );
    for (pool, words) in [("line3", "--config"), ("a/+", "--pool")] {
        let (code, said) = ask(&["--pool", pool]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(words), "{said}");
    }
}
