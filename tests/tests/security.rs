//! Who may connect, and whom the agent trusts.

use millwright_tests::{Agent, Broker, Client, Security, Setup, await_some};
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
fn a_wrong_password_is_said_and_mended_without_a_restart_of_the_broker() {
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start(Security::Passwords);
    let setup = password(folder.path(), "wrong");
    let mut agent = Agent::with(&broker, &setup);
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
    agent.restart();
    Client::connect(&broker, "mes").await_state("online");
}
