//! The compact form over a real broker: the example client, and bytes written by hand from the protocol's page.

use millwright_tests::{
    Agent, BASE, Broker, Client, Message, Outgoing, Security, Setup, await_some, program,
};
use rumqttc::v5::mqttbytes::v5::PublishProperties;
use serde_json::json;
use std::process::{Child, Command, Stdio};

const COMPACT: &str = "application/vnd.millwright.v1+postcard";

fn started() -> (Broker, Agent, Client) {
    let broker = Broker::open();
    let agent = Agent::start(&broker);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    (broker, agent, mes)
}

/// A generate task of a few tokens with the prompt `The pump`.
fn task(id: &str, tokens: u8, stream: u8) -> Vec<u8> {
    let id = [&[1, 1, id.len() as u8], id.as_bytes()].concat();
    let text = [&[0, 0, 8], &b"The pump"[..], &[1, tokens]].concat();
    [&id[..], &text, &[0; 10], &[stream]].concat()
}

fn send(client: &Client, tail: &str, payload: Vec<u8>) {
    let properties = PublishProperties {
        content_type: Some(COMPACT.into()),
        correlation_data: Some(vec![0xAB, 0].into()),
        ..PublishProperties::default()
    };
    let with = Outgoing {
        properties,
        ..Outgoing::default()
    };
    client.publish(tail, payload, with);
}

/// The next event of this name for a task, by its user property.
fn event(client: &mut Client, task: &str, name: &str) -> Message {
    let topic = format!("{BASE}/result/mes/{task}");
    let named = ("event".to_owned(), name.to_owned());
    client.next(name, |m| {
        m.topic == topic && m.properties.user_properties.contains(&named)
    })
}

#[track_caller]
fn is_compact(message: &Message) {
    let properties = &message.properties;
    assert_eq!(properties.content_type.as_deref(), Some(COMPACT));
    assert_eq!(properties.payload_format_indicator, None);
    assert_eq!(message.payload[0], 1);
}

fn has(message: &Message, text: &[u8]) -> bool {
    message.payload.windows(text.len()).any(|w| w == text)
}

#[test]
fn a_compact_task_is_answered_in_kind_and_its_stored_answer_keeps_its_form() {
    let (_broker, mut agent, mut mes) = started();
    send(&mes, "task/mes", task("a", 8, 1));
    for name in ["accepted", "started", "delta"] {
        is_compact(&event(&mut mes, "a", name));
    }
    let done = event(&mut mes, "a", "done");
    is_compact(&done);
    let correlation = done.properties.correlation_data.as_deref();
    assert_eq!(correlation, Some(&[0xAB, 0][..]));

    // The same task in JSON, also after a power cut: what was said, as it was said.
    let same = json!({"id": "a", "kind": "generate", "prompt": "The pump", "max_tokens": 8, "stream": true});
    for _ in 0..2 {
        mes.task(&same);
        let again = event(&mut mes, "a", "done");
        is_compact(&again);
        assert_eq!(again.payload, done.payload);
        agent.kill();
        agent.restart();
        mes.await_state("online");
    }
    // And another task under its id is another one.
    send(&mes, "task/mes", task("a", 9, 1));
    is_compact(&event(&mut mes, "a", "rejected"));

    mes.task(&json!({"id": "b", "kind": "generate", "prompt": "The pump", "max_tokens": 8}));
    let first = event(&mut mes, "b", "done");
    assert_eq!(first.properties.payload_format_indicator, Some(1));
    send(&mes, "task/mes", task("b", 8, 0));
    let again = event(&mut mes, "b", "done");
    assert_eq!(again.payload, first.payload);
    assert_eq!(
        again.properties.content_type.as_deref(),
        Some("application/json")
    );
}

#[test]
fn what_is_wrong_is_said_in_the_compact_form() {
    let (_broker, _agent, mut mes) = started();
    let card = mes.next("the card", |m| m.topic.ends_with("/card")).json();
    assert_eq!(card["content_types"], json!(["application/json", COMPACT]));
    let whole = task("a", 8, 1);
    let version = [&[2], &whole[1..]].concat();
    for payload in [version, whole[..3].to_vec(), vec![]] {
        // Without Correlation Data there is no id at all.
        let with = Outgoing {
            properties: PublishProperties {
                content_type: Some(COMPACT.into()),
                ..PublishProperties::default()
            },
            ..Outgoing::default()
        };
        mes.publish("task/mes", payload, with);
        is_compact(&event(&mut mes, "_invalid", "rejected"));
    }
    send(&mes, "task/mes", whole[..10].to_vec());
    let refused = event(&mut mes, "a", "rejected");
    is_compact(&refused);
    assert!(has(&refused, b"`prompt` is cut off"));
    send(&mes, "task/mes", task("a", 0, 1));
    assert!(has(&event(&mut mes, "a", "rejected"), b"`max_tokens` is 0"));
    send(&mes, "cancel/mes", b"\x01\x04none".to_vec());
    is_compact(&event(&mut mes, "none", "unknown"));
    send(&mes, "cancel/mes", b"\x01\x04no".to_vec());
    is_compact(&event(&mut mes, "_invalid", "rejected"));
}

#[test]
fn the_example_client_gets_its_answer() {
    let folder = tempfile::tempdir().unwrap();
    let password = |user: &str| {
        let path = folder.path().join(user);
        std::fs::write(&path, format!("{user}-secret\n")).unwrap();
        path.display().to_string()
    };
    let broker = Broker::start(Security::Passwords);
    let setup = Setup {
        broker: format!("user = 'gw'\npassword_file = '{}'\n", password("gw")),
        ..Setup::default()
    };
    let (port, file) = (broker.client_port.to_string(), password("mes"));
    let ask = |tokens: &str| {
        let mut command = Command::new(program("millwright-client-example"));
        command
            .args(["wo-1", "The pump", "--base", BASE, "--port", &port])
            .args(["--user", "mes", "--password-file", &file])
            .args(["--max-tokens", tokens])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let said = |client: Child| {
        let output = client.wait_with_output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    // Sent while nobody listens, and again until there is an answer.
    let early = ask("8");
    await_some("the task at the broker", || {
        broker.log().contains("/task/mes'").then_some(())
    });
    let _agent = Agent::with(&broker, &setup);
    let (code, answer, more) = said(early);
    assert_eq!((code, answer.is_empty()), (Some(0), false), "{more}");
    // From the gateway's memory this time.
    let (code, again, more) = said(ask("8"));
    assert_eq!((code, again), (Some(0), answer), "{more}");
    assert!(!more.contains("accepted"), "{more}");
    let (code, nothing, more) = said(ask("9"));
    assert_eq!((code, nothing.as_str()), (Some(1), ""));
    assert!(
        more.contains("rejected: another task with this id"),
        "{more}"
    );
}
