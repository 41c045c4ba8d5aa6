//! A gateway's first setup: its configuration, its key, and what `doctor` says of it.

use millwright_tests::authority::{CLIENT, DAY};
use millwright_tests::plant::Plant;
use millwright_tests::{
    Agent, BASE, Broker, Client, Message, Security, Setup, await_some, bundle, program,
};
use serde_json::Value;
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// A gateway's folder before anything is set up: a password file, and nothing else.
struct Gateway {
    folder: TempDir,
}

impl Gateway {
    fn new() -> Self {
        let new = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let password = new.file("password");
        fs::write(&password, "gw-secret\n").unwrap();
        fs::set_permissions(&password, Permissions::from_mode(0o600)).unwrap();
        new
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.file(name).display().to_string()
    }

    /// What a script says of this gateway at a broker with passwords.
    fn flags(&self, broker: &Broker) -> Vec<String> {
        let mut flags = self.least();
        flags.extend(flags_of(&[
            ("--port", &broker.port.to_string()),
            ("--user", "gw"),
            ("--password-file", &self.text("password")),
        ]));
        flags
    }

    fn least(&self) -> Vec<String> {
        flags_of(&[
            ("--config", &self.text("agent.toml")),
            ("--site", "plant"),
            ("--name", "gw-1"),
            ("--host", "127.0.0.1"),
            ("--model", &bundle().display().to_string()),
            ("--state-dir", &self.text("state")),
        ])
    }

    fn written(&self) -> String {
        fs::read_to_string(self.file("agent.toml")).unwrap()
    }

    fn doctor(&self) -> Doctor {
        Doctor::with(&self.file("agent.toml"))
    }
}

fn flags_of(pairs: &[(&str, &str)]) -> Vec<String> {
    let pairs = pairs.iter().flat_map(|(flag, value)| [*flag, *value]);
    pairs.map(str::to_owned).collect()
}

fn init(flags: &[String]) -> Output {
    let all = [&["init".to_owned(), "--yes".to_owned()], flags].concat();
    millwright(&all)
}

fn millwright(arguments: &[String]) -> Output {
    let output = Command::new(program("millwright"))
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    output.unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What `doctor` found.
struct Doctor {
    report: Value,
    code: Option<i32>,
}

impl Doctor {
    fn with(config: &Path) -> Self {
        let arguments = ["doctor", "--json", "--config", config.to_str().unwrap()];
        let output = millwright(&arguments.map(str::to_owned));
        let report = serde_json::from_slice(&output.stdout);
        Self {
            report: report.unwrap_or_else(|e| panic!("{e}: {}", said(&output))),
            code: output.status.code(),
        }
    }

    #[track_caller]
    fn has(&self, level: &str, check: &str, words: &str) -> &Self {
        let is_it = |f: &Value| {
            f["level"] == level
                && f["check"] == check
                && f["finding"].as_str().unwrap().contains(words)
        };
        let findings = self.report["findings"].as_array().unwrap();
        assert!(
            findings.iter().any(is_it),
            "no {level} of {check}: {words} in {:#}",
            self.report
        );
        self
    }

    #[track_caller]
    fn fails_by(&self, check: &str, words: &str) {
        self.has("problem", check, words);
        assert_eq!(self.code, Some(1));
        assert_eq!(self.report["ok"], false);
    }

    /// No problem but what the machine under the tests has.
    #[track_caller]
    fn is_content(&self) -> &Self {
        let findings = self.report["findings"].as_array().unwrap();
        let problem = findings
            .iter()
            .find(|f| f["level"] == "problem" && f["check"] != "flash");
        assert!(problem.is_none(), "{problem:#?}");
        self
    }
}

#[test]
fn a_script_sets_a_gateway_up_and_its_agent_answers() {
    let broker = Broker::start(Security::Passwords);
    let own = Gateway::new();
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
    let own = Gateway::new();
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
    let own = Gateway::new();
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
fn doctor_is_content_with_a_gateway_that_works_and_disturbs_no_agent() {
    let broker = Broker::start(Security::Passwords);
    let own = Gateway::new();
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
    let own = Gateway::new();
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
    let own = Gateway::new();
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
    let own = Gateway::new();
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
    let own = Gateway::new();
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
    let own = Gateway::new();
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

#[test]
fn a_broker_that_says_nothing_ends_neither_command_late() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port().to_string();
    let own = Gateway::new();
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
    let own = Gateway::new();
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
