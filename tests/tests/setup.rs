//! A gateway's first setup: its configuration and its key.

use millwright_tests::authority::{CLIENT, DAY};
use millwright_tests::{Agent, Broker, Client, Security, await_some, bundle, program};
use std::fs::{self};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use millwright_tests::gateway::{Gateway, flags_of, init, millwright, said};

#[test]
fn a_script_sets_a_gateway_up_and_its_agent_answers() {
    let broker = Broker::start(Security::Passwords);
    let own = Gateway::default();
    let flags = own.flags(&broker);
    let output = init(&flags);
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        shown.contains("is written") && shown.contains("may publish"),
        "{shown}{}",
        said(&output)
    );
    let text = own.written();
    assert!(text.contains("# Seconds between pings") && !text.contains("gw-secret"));
    assert_eq!(
        own.file("agent.toml").metadata().unwrap().mode() & 0o7777,
        0o640
    );
    // It is not replaced by mistake.
    let again = init(&flags);
    assert!(
        again.status.code() == Some(1) && said(&again).contains("--force"),
        "{}",
        said(&again)
    );
    assert_eq!(own.written(), text);
    fs::write(own.file("agent.toml"), "another").unwrap();
    let forced = [flags, vec!["--force".into(), "--offline".into()]].concat();
    init(&forced);
    assert_eq!(own.written(), text);
    let _agent = Agent::configured(own.folder);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    mes.generate("t", 4);
    assert_eq!(mes.outcome("t")["event"], "done");
}

#[test]
fn a_script_hears_which_flag_is_missing_or_wrong_and_nothing_is_written() {
    let own = Gateway::default();
    let least = own.least();
    let without = |flag: &str| {
        let at = least.iter().position(|word| word == flag).unwrap();
        [&least[..at], &least[at + 2..]].concat()
    };
    let with = |flag: &str, value: &str| [without(flag), flags_of(&[(flag, value)])].concat();
    let more = |flag: &str, value: &str| [least.clone(), flags_of(&[(flag, value)])].concat();
    let long = "x".repeat(2000);
    let cases = [
        (without("--site"), "--site is missing"),
        (without("--host"), "--host is missing"),
        (
            with("--site", "a/b"),
            "--site: it makes no level of a topic",
        ),
        (
            with("--site", "a\u{1b}[2Jb"),
            "--site: it holds control characters",
        ),
        (with("--name", "pool"), "--name: "),
        (with("--name", &long), "longer than 1024"),
        (with("--host", "mqtt://x"), "--host: it must be a name"),
        (with("--host", "10.1.2.3"), "--ca is missing"),
        (
            with("--model", "/nonexistent"),
            "there is no model at /nonexistent",
        ),
        (more("--port", "0"), "--port: it must be 1 to 65535"),
        (
            more("--ca", "/nonexistent"),
            "--ca: /nonexistent can't be read",
        ),
        (
            more("--password-file", "/x"),
            "--password-file needs --user",
        ),
        (
            [
                more("--user", "gw"),
                flags_of(&[("--password-file", "hunter2")]),
            ]
            .concat(),
            "--password-file: there is no such file",
        ),
        // Nobody listens there.
        (more("--port", "1"), "can't be reached"),
    ];
    for (flags, words) in cases {
        let output = init(&flags);
        let said = said(&output);
        assert!(
            output.status.code() == Some(1) && said.contains(words),
            "{words}: {said}"
        );
        assert!(
            !said.contains('\u{1b}') && !said.contains("hunter2"),
            "{said}"
        );
        assert!(!own.file("agent.toml").exists(), "{words}");
    }
}

/// A terminal of util-linux's `script`.
fn on_a_terminal(command: &str, typed: &str) -> (Option<i32>, String) {
    let mut child = Command::new("script")
        .args(["-qec", command, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script, of util-linux");
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(typed.as_bytes()).unwrap();
    let mut shown = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut shown)
        .unwrap();
    // Until here: its end would be the terminal's.
    drop(stdin);
    (child.wait().unwrap().code(), shown)
}

#[test]
fn somebody_at_a_terminal_is_asked_and_asked_again() {
    let broker = Broker::start(Security::Passwords);
    let own = Gateway::default();
    fs::write(own.file("wrong"), "nonsense").unwrap();
    let wrong_then_right = format!(
        "a/b\nplant\ngw-1\nhttp://broker\n127.0.0.1\n-\nmany\n{port}\ngw\n{wrong}\n/nonexistent\n{model}\n\
         \n\n\n{port}\n\n{password}\n",
        port = broker.port,
        wrong = own.text("wrong"),
        password = own.text("password"),
        model = bundle().display(),
    );
    let command = format!(
        "{} init --config {} --state-dir {}",
        program("millwright").display(),
        own.text("agent.toml"),
        own.text("state")
    );
    let (_, shown) = on_a_terminal(&command, &wrong_then_right);
    let count = |words: &str| shown.matches(words).count();
    assert_eq!(count("Site: where the gateway is"), 2, "{shown}");
    assert_eq!(count("it must be a name or an address alone"), 1, "{shown}");
    assert_eq!(count("there is no model at /nonexistent"), 1, "{shown}");
    assert_eq!(count("refuses user gw"), 1, "{shown}");
    assert!(
        shown.contains("The broker takes us") && shown.contains("may publish"),
        "{shown}"
    );
    assert!(own.written().contains(&own.text("password")));
    own.doctor().is_content();
}

#[test]
fn a_broker_that_says_nothing_ends_neither_command_late() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port().to_string();
    let own = Gateway::default();
    let flags = [own.least(), flags_of(&[("--port", &port)])].concat();
    let output = init(&flags);
    assert!(
        output.status.code() == Some(1) && said(&output).contains("does not answer"),
        "{}",
        said(&output)
    );
    init(&[flags, vec!["--offline".into()]].concat());
    own.doctor().fails_by("broker", "does not answer");
}

/// Has the plant's CA sign a request.
fn sign(broker: &Broker, csr: &Path, certificate: &Path, ends: i64) {
    let folder = broker.file("ca.pem");
    fs::copy(csr, folder.with_file_name("enrolled.csr")).unwrap();
    broker.authority().sign("enrolled", CLIENT, -DAY, ends);
    // In one step, as the advice says nothing of stopping the agent.
    fs::copy(folder.with_file_name("enrolled.pem"), certificate).unwrap();
}

#[test]
fn a_key_made_on_the_box_is_certified_and_renewed_without_losing_tasks() {
    let broker = Broker::start(Security::Mutual);
    let own = Gateway::default();
    let (key, csr, certificate) = (
        own.file("credentials/client.key"),
        own.file("tls/client.csr"),
        own.file("tls/client.pem"),
    );
    let ca = broker.file("ca.pem").display().to_string();
    let mut flags = own.least();
    flags.extend(flags_of(&[
        ("--port", &broker.port.to_string()),
        ("--ca", &ca),
    ]));
    flags.push("--enroll-csr".into());
    let output = init(&flags);
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && shown.contains("openssl x509 -req"),
        "{shown}{}",
        said(&output)
    );
    let secret = fs::read_to_string(&key).unwrap();
    assert_eq!(key.metadata().unwrap().mode() & 0o7777, 0o600);
    assert!(!own.written().contains("PRIVATE") && !shown.contains("PRIVATE"));
    own.doctor()
        .fails_by("configuration", "client.pem can't be read");
    sign(&broker, &csr, &certificate, -60);
    let ended = own.doctor();
    ended
        .has("problem", "broker", "certificate expired")
        .fails_by("certificates", "ended on 20");
    // As it is printed, to be typed where the CA's files are.
    let command = shown.lines().find(|line| line.contains("openssl x509"));
    let folder = broker.file("ca.pem").parent().unwrap().to_owned();
    fs::copy(&csr, folder.join("client.csr")).unwrap();
    let signed = Command::new("sh")
        .args(["-ec", command.unwrap()])
        .current_dir(&folder)
        .output()
        .unwrap();
    assert!(signed.status.success(), "{}", said(&signed));
    fs::copy(folder.join("client.pem"), &certificate).unwrap();
    own.doctor().is_content().has("ok", "broker", "by TLS");
    sign(&broker, &csr, &certificate, 3600);
    own.doctor()
        .is_content()
        .has("ok", "broker", "by TLS")
        .has("warning", "certificates", "client.pem ends on 20")
        .has(
            "ok",
            "certificates",
            "the broker's certificate is good until",
        );
    let mut agent = Agent::configured(own.folder);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    let ids: Vec<String> = (0..20).map(|n| format!("t-{n}")).collect();
    for id in &ids {
        mes.generate(id, 100);
    }
    let config = agent.folder().join("agent.toml").display().to_string();
    // Key and certificate are the configuration's.
    let renewed = millwright(&["enroll".into(), "--config".into(), config]);
    assert!(renewed.status.success(), "{}", said(&renewed));
    assert!(String::from_utf8_lossy(&renewed.stdout).contains("renews its certificate"));
    assert_eq!(fs::read_to_string(&key).unwrap(), secret);
    sign(&broker, &csr, &certificate, 30 * DAY);
    let connections = || agent.log().matches("connected to the broker").count();
    await_some("another connection", || (connections() == 2).then_some(()));
    for id in &ids {
        assert_eq!(mes.outcome(id)["event"], "done");
    }
    assert!(agent.is_running());
}
