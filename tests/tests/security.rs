//! Who may connect, and whom the agent trusts.

use millwright_tests::{Agent, BASE, Broker, Client, Message, Security, Setup, await_some};
use serde_json::json;
use std::fs;
use std::time::Duration;

fn tls(ca: &std::path::Path) -> Setup {
    Setup {
        broker: format!("[broker.tls]\nca = '{}'\n", ca.display()),
        ..Setup::default()
    }
}

fn password(folder: &std::path::Path, password: &str) -> Setup {
    let file = folder.join("password");
    fs::write(&file, format!("{password}\n")).unwrap();
    Setup {
        broker: format!("user = 'gw'\npassword_file = '{}'\n", file.display()),
        ..Setup::default()
    }
}

#[test]
fn tasks_are_answered_over_tls_with_a_private_ca() {
    let broker = Broker::start(Security::Tls);
    let _agent = Agent::with(&broker, &tls(&broker.file("ca.pem")));
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    mes.generate("t", 4);
    assert_eq!(mes.outcome("t")["event"], "done");
}

#[test]
fn a_broker_with_another_ca_is_not_trusted() {
    let (broker, other) = (Broker::start(Security::Tls), Broker::start(Security::Tls));
    let mut agent = Agent::with(&broker, &tls(&other.file("ca.pem")));
    let mut mes = Client::connect(&broker, "mes");
    await_some("the log names the certificate", || {
        agent.log().contains("certificate").then_some(())
    });
    let state = mes.next_within(Duration::from_secs(2), |m| m.topic.ends_with("/state"));
    assert!(state.is_none(), "it connected all the same");
    assert!(agent.is_running());
}

#[test]
fn users_and_the_acl_hold_senders_to_their_topics() {
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start(Security::Passwords);
    let _agent = Agent::with(&broker, &password(folder.path(), "gw-secret"));
    let (mut mes, mut hmi) = (
        Client::connect(&broker, "mes"),
        Client::connect(&broker, "hmi"),
    );
    mes.await_state("online");
    // In the name of another: the broker drops it, and nobody hears of it.
    hmi.publish(
        "task/mes",
        r#"{"id":"forged","kind":"generate","prompt":"x"}"#,
        millwright_tests::Outgoing::default(),
    );
    hmi.generate("own", 4);
    assert_eq!(hmi.outcome("own")["event"], "done");
    mes.generate("t", 4);
    assert_eq!(mes.outcome("t")["event"], "done");
    assert!(
        mes.next_within(Duration::from_millis(500), |m| m.topic.ends_with("/forged"))
            .is_none()
    );
}

#[test]
fn an_answer_that_the_acl_refuses_is_said_where_it_may_be_and_raises_an_alarm() {
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start(Security::Passwords);
    let setup = Setup {
        tasks: "reply_prefixes = ['elsewhere']".into(),
        ..password(folder.path(), "gw-secret")
    };
    let mut agent = Agent::with(&broker, &setup);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    mes.subscribe(&format!("{BASE}/alarm/#"));
    mes.task(&json!({
        "id": "t", "kind": "generate", "prompt": "x", "max_tokens": 4, "reply_to": "elsewhere/x",
    }));
    let failed = mes.outcome("t");
    assert_eq!(failed["code"], "reply_undeliverable", "{failed}");
    let is_raised =
        |m: &Message| m.topic.ends_with("/alarm/undeliverable") && m.json()["raised"] == true;
    let alarm = mes.next("an alarm", is_raised).json();
    assert_eq!(alarm["times"], 1, "{alarm}");
    // It is set aside for good: not sent again after a restart, and the alarm is of the life before.
    agent.terminate();
    agent.ended();
    agent.restart();
    mes.await_state("online");
    mes.next("the alarm's end", |m| {
        m.topic.ends_with("/alarm/undeliverable") && m.json()["raised"] == false
    });
    assert!(
        mes.next_within(Duration::from_millis(500), is_raised)
            .is_none()
    );
}

#[test]
fn a_pools_answer_that_the_acl_refuses_is_said_on_the_pools_default_topic() {
    const POOL: &str = "millwright/v1/plant/pool/line3";
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start(Security::Passwords);
    let setup = Setup {
        pool: Some("line3".into()),
        ..password(folder.path(), "gw-secret")
    };
    let _agent = Agent::with(&broker, &setup);
    let mut mes = Client::at(&broker, "mes", POOL);
    let task = |id: &str| json!({ "id": id, "kind": "generate", "prompt": "x", "max_tokens": 4 });
    // As soon as it is a member, with no more rights than that takes.
    assert_eq!(mes.insist(&task("good"))["event"], "done");
    let mut deep = task("deep");
    deep["reply_to"] = format!("{POOL}/result/mes/a/b").into();
    mes.task(&deep);
    let topic = format!("{POOL}/result/mes/deep");
    let failed = mes.next("the last word", |m| m.topic == topic).json();
    assert_eq!(failed["code"], "reply_undeliverable", "{failed}");
}

#[test]
fn a_wrong_password_is_said_and_mended_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start(Security::Passwords);
    let setup = password(folder.path(), "wrong");
    let agent = Agent::with(&broker, &setup);
    let said = ["password", "not authorized", "NotAuthorized", "refuse"];
    await_some("the log says why", || {
        said.iter()
            .any(|word| agent.log().contains(word))
            .then_some(())
    });
    assert!(
        !agent.log().contains("wrong"),
        "the log must not show the password"
    );
    password(folder.path(), "gw-secret");
    Client::connect(&broker, "mes").await_state("online");
}
