//! What must not be told: secrets are planted wherever they pass through, and looked for wherever something is said.

use millwright_tests::authority::{CLIENT, DAY};
use millwright_tests::{
    Agent, BASE, Broker, Client, Message, Outgoing, Security, Setup, await_some, program,
};
use rumqttc::v5::mqttbytes::v5::PublishProperties;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PASSWORD: &str = "planted-broker-password";
const PROMPT: &str = "planted-in-a-prompt";
const SYSTEM: &str = "planted-in-a-system-message";
const CORRELATION: &str = "planted-as-correlation";
const VALUE: &str = "planted-as-a-value";
const USER: &str = "planted-as-a-user-property";

struct Plant {
    broker: Broker,
    agent: Agent,
    folder: tempfile::TempDir,
    /// All that the agent's private key file says.
    key: Vec<String>,
}

impl Plant {
    /// With TLS on both sides and a password.
    fn new(agent: &str) -> Self {
        let broker = Broker::start(Security::Mutual);
        broker.authority().issue("gw", CLIENT, -DAY, 300 * DAY);
        let folder = tempfile::tempdir().unwrap();
        let password = folder.path().join("password");
        fs::write(&password, format!("{PASSWORD}\n")).unwrap();
        let (cert, key) = broker.authority().files("gw");
        let setup = Setup {
            broker: format!(
                "user = 'gw'\npassword_file = '{}'\n[broker.tls]\nca = '{}'\ncert = '{}'\nkey = '{}'\n",
                password.display(),
                broker.file("ca.pem").display(),
                cert.display(),
                key.display()
            ),
            agent: agent.into(),
            env: vec![("MILLWRIGHT_LOG".into(), "trace".into())],
            ..Setup::default()
        };
        let key = fs::read_to_string(key).unwrap();
        let key = key.lines().filter(|line| !line.starts_with("---"));
        Self {
            agent: Agent::with(&broker, &setup),
            key: key.map(str::to_owned).collect(),
            broker,
            folder,
        }
    }

    /// What no sender says, so that nothing may repeat it.
    fn never(&self) -> impl Iterator<Item = &str> {
        [PASSWORD]
            .into_iter()
            .chain(self.key.iter().map(String::as_str))
    }

    fn secrets(&self) -> Vec<&str> {
        let planted = [PROMPT, SYSTEM, CORRELATION, VALUE, USER];
        planted.into_iter().chain(self.never()).collect()
    }
}

fn chat(id: &str) -> Value {
    json!({ "id": id, "kind": "chat", "max_tokens": 20, "stream": true, "messages": [
        { "role": "system", "content": SYSTEM }, { "role": "user", "content": PROMPT } ] })
}

fn properties() -> PublishProperties {
    PublishProperties {
        correlation_data: Some(CORRELATION.into()),
        user_properties: vec![(USER.into(), USER.into())],
        ..PublishProperties::default()
    }
}

#[track_caller]
fn has_none(what: &str, text: &str, secrets: &[&str]) {
    for secret in secrets {
        assert!(!text.contains(secret), "{what} tells {secret}:\n{text}");
    }
}

#[test]
fn no_log_and_no_message_tells_what_is_not_its_own() {
    let mut plant = Plant::new("");
    let (mut mes, mut all) = (
        Client::connect(&plant.broker, "mes"),
        Client::connect(&plant.broker, "console"),
    );
    all.subscribe("millwright/#");
    mes.await_state("online");
    let with = Outgoing {
        properties: properties(),
        ..Outgoing::default()
    };
    // Answered, cancelled, resent, in conflict, refused.
    mes.publish("task/mes", chat("good").to_string(), with.clone());
    let answer = mes.outcome("good");
    assert_eq!(answer["event"], "done", "{answer}");
    let answer = answer["text"].as_str().unwrap().to_owned();
    assert!(answer.len() > 8, "{answer}");
    mes.publish("task/mes", chat("good").to_string(), with.clone());
    let mut other = chat("good");
    other["messages"][1]["content"] = format!("{PROMPT} once more").into();
    mes.publish("task/mes", other.to_string(), with.clone());
    mes.event("good", "rejected");
    mes.publish(
        "cancel/mes",
        json!({ "task": VALUE }).to_string(),
        with.clone(),
    );
    for (n, (field, value)) in [
        ("kind", json!(VALUE)),
        ("seed", json!(VALUE)),
        (VALUE, json!(1)),
        ("reply_to", json!(format!("{BASE}/task/{VALUE}"))),
        ("prompt", json!("planted-in-a-prompt ".repeat(2000))),
    ]
    .into_iter()
    .enumerate()
    {
        let mut task = json!({ "id": format!("bad-{n}"), "kind": "generate", "prompt": PROMPT });
        task[field] = value;
        mes.publish("task/mes", task.to_string(), with.clone());
        assert_eq!(mes.outcome(&format!("bad-{n}"))["event"], "rejected");
    }
    mes.publish("task/mes", format!("{{{VALUE} {PROMPT}"), with.clone());
    // The connection fails in several ways; a task is taken up after a kill.
    plant.broker.stop();
    fs::write(plant.folder.path().join("password"), "").unwrap();
    await_some("a lost connection", || {
        plant.agent.log().contains("can't be reached").then_some(())
    });
    plant.broker.resume();
    fs::write(plant.folder.path().join("password"), PASSWORD).unwrap();
    mes.publish("task/mes", chat("long").to_string(), with.clone());
    mes.outcome("long");
    plant.agent.kill();
    plant.agent.restart();
    mes.generate("clean", 4);
    assert_eq!(mes.outcome("clean")["event"], "done");
    plant.agent.terminate();
    plant.agent.ended();

    let secrets = plant.secrets();
    let log = plant.agent.log();
    assert!(log.contains("INFO"), "{log}");
    has_none("the log", &log, &secrets);
    has_none("the log", &log, &[&answer]);
    // Only a task's own events may repeat what its sender said, in their reasons and where they say whose they are.
    let own = |m: &Message| {
        m.topic.starts_with(&format!("{BASE}/result/mes/"))
            && ["bad-", "_invalid", VALUE]
                .iter()
                .any(|id| m.topic.contains(id))
    };
    let never: Vec<&str> = plant.never().collect();
    let is_asked = |m: &Message| m.topic.contains("/task/") || m.topic.contains("/cancel/");
    let mut seen = 0;
    while let Some(message) = all.next_within(Duration::from_millis(300), |m| !is_asked(m)) {
        let secrets = if own(&message) { &never } else { &secrets };
        let payload = String::from_utf8_lossy(&message.payload);
        has_none(&message.topic, &payload, secrets);
        let pairs = &message.properties.user_properties;
        let said = format!("{} {pairs:?}", message.topic);
        has_none("a topic or a property", &said, secrets);
        seen += 1;
    }
    assert!(seen > 10, "only {seen} messages were seen");
}

#[test]
fn a_configuration_that_can_not_be_used_is_not_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.toml");
    for line in [
        format!("port = '{VALUE}'"),
        format!("password = '{VALUE}'"),
        format!("password_file = '{VALUE}'"),
        format!("user = 'gw'\npassword_file = '{VALUE}'"),
        format!("user = {VALUE}"),
        format!("tls = {{ ca = '{VALUE}' }}"),
    ] {
        fs::write(
            &path,
            format!("[gateway]\nsite = 'plant'\nname = 'gw-1'\n[model]\nbundle = '/m'\nstate_dir = '/s'\n[broker]\nhost = '127.0.0.1'\n{line}\n"),
        )
        .unwrap();
        let said = run_agent(&path);
        assert!(said.contains("agent.toml can't be used"), "{said}");
        has_none(&line, &said, &[VALUE]);
    }
}

fn run_agent(config: &Path) -> String {
    let output = Command::new(program("millwright"))
        .args(["agent", "--config"])
        .arg(config)
        .env("MILLWRIGHT_LOG", "trace")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
}

#[test]
fn prompts_are_logged_where_that_is_switched_on_escaped_and_cut() {
    let plant = Plant::new("log_prompts = true");
    let mut mes = Client::connect(&plant.broker, "mes");
    mes.await_state("online");
    let text = format!("{PROMPT}\n\u{1b}[2J\u{202e}2026-01-01 ERROR forged ");
    let long = format!("{text}{}", "x ".repeat(1500));
    let mut task = chat("t");
    task["messages"][1]["content"] = text.into();
    mes.task(&task);
    let answer = mes.outcome("t");
    assert_eq!(answer["event"], "done", "{answer}");
    mes.task(&json!({ "id": "long", "kind": "generate", "prompt": long }));
    mes.outcome("long");
    let log = plant.agent.log();
    for words in [
        format!(r"{PROMPT}\u{{a}}\u{{1b}}[2J\u{{202e}}2026-01-01 ERROR forged "),
        SYSTEM.to_owned(),
        "bytes more)".to_owned(),
        r#"role="system""#.to_owned(),
        r#"role="answer""#.to_owned(),
    ] {
        assert!(log.contains(&words), "{words:?} is not in\n{log}");
    }
    assert!(!log.contains(['\u{1b}', '\u{202e}']), "{log}");
    assert!(
        log.lines()
            .all(|line| line.starts_with("20") && line.len() < 2500),
        "{log}"
    );
    // Nothing else is told for it.
    let others: Vec<&str> = plant
        .secrets()
        .into_iter()
        .filter(|s| ![PROMPT, SYSTEM].contains(s))
        .collect();
    has_none("the log", &log, &others);
}
