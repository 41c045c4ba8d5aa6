//! A gateway without a usable model: too little memory, as the kernel's files tell it, a bundle that is missing or damaged. It
//! stays up and says so, and serves without a restart when that is mended.

use millwright_tests::faults::Shim;
use millwright_tests::{Agent, BASE, Broker, Client, Message, Setup, bundle};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

const CGROUP: &str = "/sys/fs/cgroup/system.slice/millwright.service";

/// The next message of the gateway's own on this topic that `wanted` picks.
fn next(client: &mut Client, tail: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let topic = format!("{BASE}/{tail}");
    let picked = |m: &Message| m.topic == topic && !m.payload.is_empty() && wanted(&m.json());
    client.next(tail, picked).json()
}

fn degraded(client: &mut Client, words: &[&str]) {
    let all_in = |json: &Value| {
        let reason = json["reason"].as_str().unwrap_or_default();
        json["state"] == "degraded" && words.iter().all(|word| reason.contains(word))
    };
    next(client, "state", all_in);
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_numbers_and_served_when_there_is_room() {
    let folder = TempDir::new().unwrap();
    let shim = Shim::new(&folder.path().canonicalize().unwrap()).unwrap();
    shim.sense("/proc/self/cgroup", "0::/system.slice/millwright.service\n");
    shim.sense(&format!("{CGROUP}/memory.max"), "30000000\n");
    shim.sense(&format!("{CGROUP}/memory.high"), "max\n");
    shim.sense(&format!("{CGROUP}/memory.current"), "29000000\n");
    shim.sense(
        &format!("{CGROUP}/memory.stat"),
        "anon 20000000\ninactive_file 4000000\n",
    );
    let broker = Broker::open();
    let setup = Setup {
        env: shim.env(false),
        pool: Some("pumps".into()),
        ..Setup::default()
    };
    let mut agent = Agent::with(&broker, &setup);
    let process = agent.id();
    let mut mes = Client::connect(&broker, "mes");
    mes.subscribe(&format!("{BASE}/alarm/model"));
    mes.subscribe(&format!("{BASE}/health"));
    let words = [
        "it needs",
        "for weights",
        "tokens in f16",
        "memory.max of 30 MB",
        CGROUP_NAME,
    ];
    degraded(&mut mes, &words);
    let card = next(&mut mes, "card", |_| true);
    assert_eq!((&card["model"], &card["kinds"]), (&Value::Null, &json!([])));
    let alarm = next(&mut mes, "alarm/model", |alarm| alarm["raised"] == true);
    assert!(
        alarm["reason"].as_str().unwrap().contains("it needs"),
        "{alarm}"
    );
    mes.generate("early", 4);
    let refused = mes.outcome("early");
    assert_eq!(
        (&refused["event"], &refused["code"]),
        (&json!("rejected"), &json!("no_model"))
    );
    let health = next(&mut mes, "health", |_| true);
    assert_eq!(health["model_digest"], Value::Null);
    assert_eq!(health["pools"][0]["taking"], false, "{health}");

    shim.sense(&format!("{CGROUP}/memory.max"), "900000000\n");
    mes.await_state("online");
    next(&mut mes, "card", |card| card["model"]["digest"].is_string());
    next(&mut mes, "alarm/model", |alarm| alarm["raised"] == false);
    // Refusals are not remembered: the same task is a new one.
    mes.generate("early", 4);
    assert_eq!(mes.outcome("early")["event"], "done");
    next(&mut mes, "health", |health| {
        health["pools"][0]["taking"] == true && health["model_digest"].is_string()
    });
    assert!(agent.is_running() && agent.id() == process);
}

const CGROUP_NAME: &str = "the cgroup /system.slice/millwright.service";

#[test]
fn a_bundle_that_is_missing_or_damaged_is_served_once_it_is_there() {
    let folder = TempDir::new().unwrap();
    let place = folder.path().join("bundle");
    let broker = Broker::open();
    let setup = Setup {
        bundle: Some(place.clone()),
        ..Setup::default()
    };
    let _agent = Agent::with(&broker, &setup);
    let mut mes = Client::connect(&broker, "mes");
    degraded(&mut mes, &["there is no model at", place.to_str().unwrap()]);
    mes.generate("early", 4);
    assert_eq!(mes.outcome("early")["code"], "no_model");

    copy(&bundle(), &place);
    let weights = place.join("model.onnx.data");
    let mut bytes = fs::read(&weights).unwrap();
    bytes[0] ^= 1;
    fs::write(&weights, &bytes).unwrap();
    degraded(&mut mes, &["model.onnx.data does not match its digest"]);
    bytes[0] ^= 1;
    fs::write(&weights, &bytes).unwrap();
    mes.await_state("online");
    mes.generate("early", 4);
    assert_eq!(mes.outcome("early")["event"], "done");
}

#[test]
fn what_was_accepted_waits_for_the_model_to_come_back() {
    let folder = TempDir::new().unwrap();
    let (place, away) = (folder.path().join("bundle"), folder.path().join("away"));
    copy(&bundle(), &place);
    let broker = Broker::open();
    let setup = Setup {
        bundle: Some(place.clone()),
        // It dies when a first task is on disk and acknowledged, and no end of it is.
        env: vec![("MILLWRIGHT_CRASH_AT".into(), "after-ack:1".into())],
        ..Setup::default()
    };
    let mut agent = Agent::with(&broker, &setup);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    mes.generate("known", 200);
    agent.ended();
    agent.set_env(vec![]);
    fs::rename(&place, &away).unwrap();
    agent.restart();
    degraded(&mut mes, &["there is no model at"]);
    // Sent again it is known, and not refused as new ones are.
    mes.generate("known", 200);
    mes.event("known", "accepted");
    mes.generate("new", 4);
    assert_eq!(mes.outcome("new")["code"], "no_model");
    fs::rename(&away, &place).unwrap();
    mes.await_state("online");
    assert_eq!(mes.outcome("known")["event"], "done");
}
