//! What `millwright doctor` says of a gateway.

use millwright_tests::plant::Plant;
use millwright_tests::{Agent, BASE, Broker, Client, Message, Security, Setup, await_some, bundle};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use millwright_tests::gateway::{Doctor, Gateway, init};

#[test]
fn doctor_is_content_with_a_gateway_that_works_and_disturbs_no_agent() {
    let broker = Broker::start(Security::Passwords);
    let own = Gateway::default();
    init(&own.flags(&broker));
    let mut mes = Client::connect(&broker, "mes");
    let before = own.doctor();
    // Nothing is said in the name of an agent that was never there.
    let is_said = |m: &Message| m.topic.ends_with("/state") || m.topic.ends_with("/card");
    let said = mes.next_within(Duration::from_millis(300), is_said);
    assert!(said.is_none(), "{said:?}");
    before
        .is_content()
        .has("ok", "topics", "may subscribe")
        .has("ok", "model", "checksums");
    before.has("ok", "topics", "keep this user from foreign topics");
    let mut agent = Agent::configured(own.folder);
    mes.await_state("online");
    let ids: Vec<String> = (0..10).map(|n| format!("t-{n}")).collect();
    for id in &ids {
        mes.generate(id, 100);
    }
    let beside = Doctor::with(&agent.folder().join("agent.toml"));
    beside
        .is_content()
        .has("note", "agent", "it runs here")
        .has("ok", "memory", "the agent runs and is online");
    for id in &ids {
        assert_eq!(mes.outcome(id)["event"], "done");
    }
    // It stayed connected, and its state and card are its own.
    assert_eq!(agent.log().matches("connected to the broker").count(), 1);
    let mut late = Client::connect(&broker, "mes");
    late.await_state("online");
    assert!(agent.is_running());
}

#[test]
fn doctor_names_a_password_that_the_broker_refuses_and_files_that_others_may_read() {
    let broker = Broker::start(Security::Passwords);
    let own = Gateway::default();
    init(&own.flags(&broker));
    fs::write(own.file("password"), "nonsense").unwrap();
    own.doctor().fails_by("broker", "refuses user gw");
    fs::write(own.file("password"), "gw-secret").unwrap();
    fs::set_permissions(own.file("password"), Permissions::from_mode(0o644)).unwrap();
    own.doctor()
        .fails_by("rights", "everybody on this machine may read");
    fs::remove_file(own.file("password")).unwrap();
    own.doctor()
        .fails_by("configuration", "password can't be read");
}

#[test]
fn doctor_names_topics_that_the_broker_forbids() {
    let mut broker = Broker::start(Security::Passwords);
    let own = Gateway::default();
    init(&own.flags(&broker));
    let mut with = |acl: &str| {
        broker.stop();
        fs::write(broker.file("acl"), acl).unwrap();
        broker.resume();
        own.doctor()
    };
    let inbound = format!("user gw\ntopic read {BASE}/task/+\ntopic read {BASE}/cancel/+\n");
    let said = format!(
        "{inbound}topic write {BASE}/card\ntopic write {BASE}/health\ntopic write {BASE}/state\ntopic write {BASE}/result/#\n"
    );
    with(&said).fails_by(
        "topics",
        &format!("forbids publishing on {BASE}/alarm/doctor"),
    );
    let least = with(&format!("{said}topic write {BASE}/alarm/+\n"));
    least
        .is_content()
        .has("ok", "topics", &format!("{BASE}/health"))
        .has(
            "note",
            "topics",
            &format!("whether {BASE}/state may be published"),
        );
    // Nothing but a task would show it: what mosquitto grants it may still drop.
    least.has("note", "topics", "can't be told");
    with("user gw\ntopic write other/#\n").fails_by("topics", "result/doctor/check");
    // Everything is allowed.
    with("user gw\ntopic readwrite #\n")
        .is_content()
        .has("note", "topics", "on any topic");
}

/// A pool's tasks go to one of its members: nobody else may be in the group for a moment.
#[test]
fn doctor_takes_no_task_of_a_pool() {
    let broker = Broker::start(Security::Passwords);
    let own = Gateway::default();
    init(&own.flags(&broker));
    let text = own.written();
    let pooled = text.replace("# [pool]\n# name = \"pumps\"", "[pool]\nname = \"line3\"");
    assert_ne!(pooled, text);
    fs::write(own.file("agent.toml"), pooled).unwrap();
    let pool = "millwright/v1/plant/pool/line3";
    own.doctor()
        .is_content()
        .has("ok", "topics", &format!("{pool}/result/doctor/check"))
        .has("note", "topics", &format!("{pool}/task/+"));
    let agent = Agent::configured(own.folder);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    await_some("the agent is in the pool", || {
        let group = format!("$share/line3/{pool}/task/+");
        broker.log().contains(&group).then_some(())
    });
    let config = agent.folder().join("agent.toml");
    let checking = std::thread::spawn(move || Doctor::with(&config));
    let mut mes = Client::at(&broker, "mes", pool);
    let ids: Vec<String> = (0..20).map(|n| format!("t-{n}")).collect();
    for id in &ids {
        mes.generate(id, 4);
        std::thread::sleep(Duration::from_millis(50));
    }
    for id in &ids {
        assert_eq!(mes.outcome(id)["event"], "done");
    }
    checking.join().unwrap().is_content();
}

/// With the rights that deploy/mosquitto gives, and no more.
#[test]
fn doctor_is_content_with_a_pools_member_at_the_plants_broker() {
    let plant = Plant::start("[plant]\nagents = ['gw-1']\n[plant.pools]\nline3 = ['gw-1']\n");
    let setup = Setup {
        pool: Some("line3".into()),
        ..plant.setup("gw-1")
    };
    let mut agent = Agent::with(&plant.broker, &setup);
    await_some("the agent is connected", || {
        agent
            .log()
            .contains("connected to the broker")
            .then_some(())
    });
    let doctor = || Doctor::with(&agent.folder().join("agent.toml"));
    doctor()
        .is_content()
        .has("note", "topics", "$share/line3/")
        .has("note", "memory", "can't be told");
    agent.kill();
    Doctor::with(&agent.folder().join("agent.toml")).is_content();
}

#[test]
fn doctor_names_options_that_the_agent_refuses() {
    let broker = Broker::start(Security::Passwords);
    let own = Gateway::default();
    init(&own.flags(&broker));
    let text = own.written();
    for (line, words) in [
        ("kernel = 'nonsense'", "nonsense"),
        ("kv_tokens = 0", "kv_tokens"),
    ] {
        let with = text.replace("[model]\n", &format!("[model]\n{line}\n"));
        assert_ne!(with, text);
        fs::write(own.file("agent.toml"), with).unwrap();
        own.doctor().fails_by("memory", words);
    }
}

#[test]
fn doctor_names_a_model_that_was_altered_or_is_missing() {
    let broker = Broker::start(Security::Passwords);
    let own = Gateway::default();
    let model = own.file("model");
    fs::create_dir(&model).unwrap();
    for file in fs::read_dir(bundle()).unwrap().flatten() {
        fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    let mut flags = own.flags(&broker);
    let at = flags.iter().position(|word| word == "--model").unwrap();
    flags[at + 1] = own.text("model");
    init(&flags);
    own.doctor().is_content();
    let weights = model.join("model.onnx.data");
    let mut bytes = fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&weights, &bytes).unwrap();
    own.doctor().fails_by("model", "does not match its digest");
    fs::write(&weights, &bytes[..middle]).unwrap();
    own.doctor().fails_by("model", "truncated or altered");
    fs::remove_dir_all(&model).unwrap();
    own.doctor().fails_by("model", "there is no model");
}
