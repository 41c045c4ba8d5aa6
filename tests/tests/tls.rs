//! Certificates on both sides: which are taken, what is said of those that aren't, and how they are renewed.

use millwright_tests::authority::{Authority, CLIENT, DAY, SERVER};
use millwright_tests::{Agent, BASE, Broker, Client, Message, Security, Setup, await_some};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// The files that an agent is configured with, which tests replace.
struct Own {
    folder: TempDir,
}

impl Own {
    fn new(ca: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(ca, folder.path().join("ca.pem")).unwrap();
        Self { folder }
    }

    /// With a client certificate of its broker's own CA.
    fn of(broker: &Broker, ends: i64) -> Self {
        let own = Self::new(&broker.file("ca.pem"));
        own.put(&issued(&broker.authority(), -DAY, ends));
        own
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn put(&self, (cert, key): &(PathBuf, PathBuf)) {
        fs::copy(key, self.file("own.key")).unwrap();
        fs::copy(cert, self.file("own.pem")).unwrap();
    }

    fn setup(&self, with_certificate: bool) -> Setup {
        let at = |name| self.file(name).display().to_string();
        let own = format!("cert = '{}'\nkey = '{}'\n", at("own.pem"), at("own.key"));
        let own = if with_certificate { &own } else { "" };
        let broker = format!("[broker.tls]\nca = '{}'\n{own}", at("ca.pem"));
        Setup {
            broker,
            ..Setup::default()
        }
    }
}

fn issued(authority: &Authority, begins: i64, ends: i64) -> (PathBuf, PathBuf) {
    authority.issue("gw", CLIENT, begins, ends);
    authority.files("gw")
}

fn await_log(agent: &Agent, words: &str) {
    let what = format!("the log says {words:?}");
    await_some(&what, || agent.log().contains(words).then_some(()));
}

/// How often an agent was taken in.
fn connections(agent: &Agent) -> usize {
    agent.log().matches("connected to the broker").count()
}

fn await_connections(agent: &Agent, times: usize) {
    await_some("another connection", || {
        (connections(agent) == times).then_some(())
    });
}

fn forget_alarms(mes: &mut Client) {
    let is_alarm = |m: &Message| m.topic.starts_with(&format!("{BASE}/alarm/"));
    while mes.next_within(Duration::ZERO, is_alarm).is_some() {}
}

fn await_alarm(mes: &mut Client, raised: bool, words: &str) {
    let topic = format!("{BASE}/alarm/certificate");
    mes.next(&format!("alarm {raised} {words}"), |m| {
        m.topic == topic
            && m.json()["raised"] == raised
            && m.json()["reason"].as_str().unwrap_or("").contains(words)
    });
}

fn refused(broker: &Broker, setup: &Setup, words: &str) {
    let mut agent = Agent::with(broker, setup);
    await_log(&agent, words);
    assert_eq!(connections(&agent), 0);
    assert!(agent.is_running());
}

#[test]
fn what_is_wrong_with_the_brokers_certificate_is_said() {
    let mut broker = Broker::start(Security::Tls);
    let own = Own::new(&Broker::start(Security::Tls).file("ca.pem"));
    refused(
        &broker,
        &own.setup(false),
        "is of none of the CAs in broker.tls.ca",
    );
    let other = "subjectAltName=DNS:other.plant,IP:127.0.0.2\n";
    let cases = [
        (
            SERVER,
            -2 * DAY,
            -DAY,
            "the broker's certificate ended on 20",
        ),
        (
            SERVER,
            DAY,
            2 * DAY,
            "the broker's certificate begins on 20",
        ),
        (other, -DAY, DAY, "for another name than broker.host"),
        (CLIENT, -DAY, DAY, "the broker's certificate is not trusted"),
    ];
    for (purpose, begins, ends, words) in cases {
        broker.stop();
        broker.authority().issue("server", purpose, begins, ends);
        broker.resume();
        let own = Own::new(&broker.file("ca.pem"));
        refused(&broker, &own.setup(false), words);
    }
    let own = Own::new(&broker.file("ca.pem"));
    let where_none_is_spoken = Setup {
        port: Some(broker.client_port),
        ..own.setup(false)
    };
    refused(&broker, &where_none_is_spoken, "may speak no TLS there");
}

#[test]
fn what_is_wrong_with_the_own_certificate_is_said() {
    let broker = Broker::start(Security::Mutual);
    let ours = broker.authority();
    let ca = broker.file("ca.pem");
    let folder = tempfile::tempdir().unwrap();
    let others = Authority::make(folder.path());
    refused(&broker, &Own::new(&ca).setup(false), "client certificate");
    for (authority, ends, words) in [
        (&ours, -60, "certificate expired"),
        (&others, DAY, "the CA of our client certificate"),
    ] {
        let own = Own::new(&ca);
        own.put(&issued(authority, -DAY, ends));
        refused(&broker, &own.setup(true), words);
    }
}

#[test]
fn files_that_are_no_pair_are_refused_at_the_start() {
    let broker = Broker::start(Security::Mutual);
    let own = Own::of(&broker, DAY);
    let (_, key) = issued(&broker.authority(), -DAY, DAY);
    fs::copy(key, own.file("own.key")).unwrap();
    let mut agent = Agent::with(&broker, &own.setup(true));
    assert_eq!(agent.ended().code(), Some(1));
    assert!(
        agent.log().contains("don't belong together"),
        "{}",
        agent.log()
    );
}

#[test]
fn a_renewed_certificate_is_taken_up_without_a_restart_and_no_task_is_lost() {
    let broker = Broker::start(Security::Mutual);
    // It is nearly over.
    let own = Own::of(&broker, 3600);
    let mut agent = Agent::with(&broker, &own.setup(true));
    let mut mes = Client::connect(&broker, "mes");
    mes.subscribe(&format!("{BASE}/alarm/#"));
    mes.await_state("online");
    await_alarm(&mut mes, true, "ends on 20");
    let ids: Vec<String> = (0..20).map(|n| format!("t-{n}")).collect();
    for id in &ids {
        mes.generate(id, 100);
    }
    // Half of it is there: the key is still of another certificate.
    let (cert, key) = issued(&broker.authority(), -DAY, 30 * DAY);
    fs::copy(&cert, own.file("own.pem")).unwrap();
    await_alarm(&mut mes, true, "don't belong together");
    assert_eq!(connections(&agent), 1);
    fs::write(own.file("own.key"), "").unwrap();
    await_alarm(&mut mes, true, "no private key");
    forget_alarms(&mut mes);
    fs::copy(&key, own.file("own.key")).unwrap();
    await_alarm(&mut mes, false, "");
    await_connections(&agent, 2);
    for id in &ids {
        assert_eq!(mes.outcome(id)["event"], "done");
    }
    assert!(agent.is_running());
}

#[test]
fn a_renewed_certificate_that_the_broker_refuses_leaves_the_one_from_before() {
    let broker = Broker::start(Security::Mutual);
    let own = Own::of(&broker, 300 * DAY);
    let agent = Agent::with(&broker, &own.setup(true));
    let mut mes = Client::connect(&broker, "mes");
    mes.subscribe(&format!("{BASE}/alarm/#"));
    mes.await_state("online");
    let folder = tempfile::tempdir().unwrap();
    own.put(&issued(&Authority::make(folder.path()), -DAY, 300 * DAY));
    await_alarm(&mut mes, true, "refuses the renewed certificate");
    await_connections(&agent, 2);
    mes.generate("t", 4);
    assert_eq!(mes.outcome("t")["event"], "done");
    forget_alarms(&mut mes);
    own.put(&issued(&broker.authority(), -DAY, 300 * DAY));
    await_alarm(&mut mes, false, "");
    await_connections(&agent, 3);
}

/// One whose key leaked: who has it must not get in by it once more.
#[test]
fn a_ca_that_was_replaced_is_trusted_no_more() {
    let broker = Broker::start(Security::Mutual);
    let own = Own::of(&broker, 300 * DAY);
    let agent = Agent::with(&broker, &own.setup(true));
    Client::connect(&broker, "mes").await_state("online");
    let folder = tempfile::tempdir().unwrap();
    Authority::make(folder.path());
    fs::copy(folder.path().join("ca.pem"), own.file("ca.pem")).unwrap();
    let refusals = || agent.log().matches("of none of the CAs").count();
    // The first by the new files; the second would be the one by those from before.
    await_some("refusals", || (refusals() >= 2).then_some(()));
    assert_eq!(connections(&agent), 1);
    fs::copy(broker.file("ca.pem"), own.file("ca.pem")).unwrap();
    await_connections(&agent, 2);
}

/// A backup or a tool that writes the same again.
#[test]
fn files_that_are_written_anew_with_the_same_in_them_are_no_news() {
    let broker = Broker::start(Security::Mutual);
    let own = Own::of(&broker, 300 * DAY);
    let agent = Agent::with(&broker, &own.setup(true));
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    for _ in 0..4 {
        for file in ["ca.pem", "own.pem", "own.key"] {
            let bytes = fs::read(own.file(file)).unwrap();
            fs::write(own.file(file), bytes).unwrap();
        }
        std::thread::sleep(Duration::from_secs(3));
    }
    mes.generate("t", 4);
    assert_eq!(mes.outcome("t")["event"], "done");
    assert_eq!(connections(&agent), 1);
}

#[test]
fn a_certificate_that_ends_mid_session_is_replaced_by_the_renewed_one_and_no_task_is_lost() {
    let mut broker = Broker::start(Security::Mutual);
    let own = Own::of(&broker, 15);
    let agent = Agent::with(&broker, &own.setup(true));
    let mut mes = Client::connect(&broker, "mes");
    mes.subscribe(&format!("{BASE}/alarm/#"));
    mes.await_state("online");
    await_alarm(&mut mes, true, "ended on 20");
    // The session goes on without it.
    mes.generate("before", 4);
    assert_eq!(mes.outcome("before")["event"], "done");
    broker.stop();
    broker.resume();
    await_log(&agent, "finds our client certificate expired");
    let mut mes = Client::connect(&broker, "mes");
    mes.generate("between", 4);
    own.put(&issued(&broker.authority(), -DAY, 300 * DAY));
    assert_eq!(mes.outcome("between")["event"], "done");
}
