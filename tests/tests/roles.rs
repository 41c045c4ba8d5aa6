//! What each role may and may not do at a broker with the files of deploy/mosquitto. Each refusal is shown by what did not
//! arrive, beside the same of somebody who may, which did.

use millwright_tests::authority::{Authority, CLIENT, DAY};
use millwright_tests::plant::{Person, Plant, shipped, trial_ca};
use millwright_tests::{Agent, BASE, Setup, await_some};
use serde_json::{Value, json};
use std::fs;
use std::process::{Command, Output};

const ROLES: &str = r#"
[plant]
agents = ["gw-1", "gw-2", "gw-3"]
operators = ["mes", "hmi"]
fleet_managers = ["fleet"]
consoles = ["console"]
[plant.pools]
line3 = ["gw-1", "gw-2"]
[berlin]
agents = ["gw-b"]
operators = ["mes-b"]
fleet_managers = ["fleet-b"]
"#;
const POOL: &str = "millwright/v1/plant/pool/line3";
const SHARE: &str = "$share/line3/millwright/v1/plant/pool/line3/task/+";

fn plant() -> Plant {
    Plant::start(ROLES)
}

fn below(base: &str, tails: &[&str]) -> Vec<String> {
    tails.iter().map(|tail| format!("{base}/{tail}")).collect()
}

/// A task's events up to its end.
fn outcome(person: &mut Person, id: &str) -> Value {
    loop {
        let message = person.next(&format!("the outcome of {id}"));
        if message.topic.ends_with(&format!("/{id}")) {
            let event = message.json();
            if ["done", "rejected", "failed"]
                .iter()
                .any(|name| event["event"] == *name)
            {
                return event;
            }
        }
    }
}

fn await_online(person: &mut Person) {
    while person.next("a state").json()["state"] != "online" {}
}

fn task(id: &str) -> String {
    json!({ "id": id, "kind": "generate", "prompt": "The pump", "max_tokens": 4 }).to_string()
}

#[test]
fn an_agent_serves_an_operator_and_is_watched() {
    let plant = plant();
    let _agent = Agent::with(&plant.broker, &plant.setup("gw-1"));
    let (mut mes, mut fleet) = (plant.person("mes"), plant.person("fleet"));
    assert!(mes.subscribe(&format!("{BASE}/state")));
    assert!(mes.subscribe(&format!("{BASE}/result/mes/#")));
    await_online(&mut mes);
    mes.publish(&format!("{BASE}/task/mes"), &task("t"), false);
    assert_eq!(outcome(&mut mes, "t")["event"], "done");
    // One subscription for all sites, as README.md has it.
    for topic in ["state", "card", "health"] {
        assert!(fleet.subscribe(&format!("millwright/v1/+/+/{topic}")));
        assert_eq!(fleet.next(topic).topic, format!("{BASE}/{topic}"));
        fleet.came();
    }
}

#[test]
fn a_pool_of_agents_serves_an_operator() {
    let plant = plant();
    let member = |name: &str| Setup {
        pool: Some("line3".into()),
        ..plant.setup(name)
    };
    let _agents = ["gw-1", "gw-2"].map(|name| Agent::with(&plant.broker, &member(name)));
    let mut mes = plant.person("mes");
    assert!(mes.subscribe(&format!("{POOL}/result/mes/#")));
    // The broker logs each subscription when it has made it.
    await_some("both are in the pool", || {
        let joined = |agent: &str| {
            plant
                .broker
                .log()
                .contains(&format!("-{agent}-pool 1 {SHARE}"))
        };
        (joined("gw-1") && joined("gw-2")).then_some(())
    });
    // In turn.
    let mut gateways = Vec::new();
    for n in 0..4 {
        let id = format!("t-{n}");
        mes.publish(&format!("{POOL}/task/mes"), &task(&id), false);
        let done = outcome(&mut mes, &id);
        assert_eq!(done["event"], "done");
        gateways.push(done["gateway"].as_str().unwrap().to_owned());
    }
    gateways.sort();
    gateways.dedup();
    assert_eq!(gateways, ["gw-1", "gw-2"]);
}

/// Who may not publish there; who may; to whom it goes.
struct Publishing {
    topics: Vec<String>,
    refused: &'static [&'static str],
    allowed: &'static str,
    reader: &'static str,
    filters: Vec<String>,
}

#[test]
fn what_a_role_may_not_publish_reaches_nobody() {
    let plant = plant();
    let cases = [
        // In another's name, or without being an operator of that site; and an agent is none.
        Publishing {
            topics: below(BASE, &["task/mes", "cancel/mes"]),
            refused: &[
                "hmi", "mes-b", "fleet", "console", "gw-1", "gw-2", "stranger",
            ],
            allowed: "mes",
            reader: "gw-1",
            filters: below(BASE, &["task/+", "cancel/+"]),
        },
        Publishing {
            topics: below(POOL, &["task/mes", "cancel/mes"]),
            refused: &[
                "hmi", "mes-b", "fleet", "console", "gw-1", "gw-3", "stranger",
            ],
            allowed: "mes",
            reader: "gw-1",
            filters: vec![SHARE.into(), format!("{POOL}/cancel/+")],
        },
        // A gateway's word about itself, of another gateway too.
        Publishing {
            topics: below(BASE, &["state", "card", "health", "alarm/memory"]),
            refused: &["gw-2", "gw-b", "mes", "hmi", "fleet", "console", "stranger"],
            allowed: "gw-1",
            reader: "fleet",
            filters: below(BASE, &["state", "card", "health", "alarm/+"]),
        },
        // Its answers, of its sender too.
        Publishing {
            topics: below(BASE, &["result/mes/t"]),
            refused: &["gw-2", "gw-b", "mes", "hmi", "fleet", "console", "stranger"],
            allowed: "gw-1",
            reader: "mes",
            filters: below(BASE, &["result/mes/#"]),
        },
        Publishing {
            topics: below(POOL, &["result/mes/t"]),
            refused: &["gw-3", "gw-b", "mes", "hmi", "fleet", "console", "stranger"],
            allowed: "gw-2",
            reader: "mes",
            filters: below(POOL, &["result/mes/#"]),
        },
    ];
    for case in cases {
        let mut reader = plant.person(case.reader);
        for filter in &case.filters {
            assert!(reader.subscribe(filter), "{} reads {filter}", case.reader);
        }
        for topic in &case.topics {
            for user in case.refused {
                // What is retained would stay for those who come later.
                plant.person(user).publish(topic, user, true);
            }
            plant
                .person(case.allowed)
                .publish(topic, case.allowed, false);
            let came = reader.next(topic);
            let payload = String::from_utf8_lossy(&came.payload).into_owned();
            assert_eq!((&came.topic, payload.as_str()), (topic, case.allowed));
        }
        assert!(reader.came().is_empty());
        // Nothing was kept either.
        let mut late = plant.person(case.reader);
        for filter in &case.filters {
            late.subscribe(filter);
        }
        assert!(late.came().is_empty(), "{:?}", case.topics);
    }
}

/// A topic; who publishes it; who reads it by which filter; who must not, whatever the filter.
struct Reading {
    topic: String,
    publisher: &'static str,
    allowed: (&'static str, String),
    refused: &'static [&'static str],
}

#[test]
fn what_a_role_may_not_read_never_comes() {
    let plant = plant();
    let cases = [
        Reading {
            topic: format!("{BASE}/result/mes/t"),
            publisher: "gw-1",
            allowed: ("mes", format!("{BASE}/result/mes/#")),
            refused: &[
                "hmi", "mes-b", "fleet", "console", "gw-1", "gw-2", "stranger",
            ],
        },
        Reading {
            topic: format!("{POOL}/result/mes/t"),
            publisher: "gw-1",
            allowed: ("mes", format!("{POOL}/result/mes/#")),
            refused: &[
                "hmi", "mes-b", "fleet", "console", "gw-1", "gw-2", "stranger",
            ],
        },
        Reading {
            topic: format!("{BASE}/task/mes"),
            publisher: "mes",
            allowed: ("gw-1", format!("{BASE}/task/+")),
            refused: &["hmi", "mes", "fleet", "console", "gw-2", "gw-b", "stranger"],
        },
        Reading {
            topic: format!("{POOL}/cancel/mes"),
            publisher: "mes",
            allowed: ("gw-2", format!("{POOL}/cancel/+")),
            refused: &["hmi", "mes", "fleet", "console", "gw-3", "gw-b", "stranger"],
        },
        Reading {
            topic: format!("{BASE}/health"),
            publisher: "gw-1",
            allowed: ("console", format!("{BASE}/health")),
            refused: &["mes", "gw-2", "fleet-b", "stranger"],
        },
        Reading {
            topic: format!("{BASE}/state"),
            publisher: "gw-1",
            allowed: ("mes", "millwright/v1/+/+/state".into()),
            refused: &["gw-2", "mes-b", "fleet-b", "stranger"],
        },
    ];
    for case in cases {
        let mut refused: Vec<Person> = case.refused.iter().map(|u| plant.person(u)).collect();
        for person in &mut refused {
            let narrow = case.allowed.1.as_str();
            let shared = format!("$share/theirs/{}", case.topic);
            for filter in ["#", "+/#", "$share/g/#", &case.topic, narrow, &shared] {
                person.subscribe(filter);
            }
        }
        let mut allowed = plant.person(case.allowed.0);
        assert!(allowed.subscribe(&case.allowed.1), "{}", case.topic);
        plant
            .person(case.publisher)
            .publish(&case.topic, "it", false);
        assert_eq!(allowed.next(&case.topic).topic, case.topic);
        for (person, user) in refused.iter_mut().zip(case.refused) {
            let came = person.came();
            assert!(came.is_empty(), "{user}: {came:?}");
        }
    }
}

/// The hole that mosquitto has with `acl_file`: who may not read a task joins the pool all the same, and what it is given is
/// lost.
#[test]
fn nobody_joins_a_pool_uninvited_and_its_members_get_every_task() {
    let plant = plant();
    let mut members = ["gw-1", "gw-2"].map(|user| plant.person(user));
    for member in &mut members {
        assert!(member.subscribe(SHARE));
    }
    let mut uninvited = Vec::new();
    for user in ["hmi", "mes", "fleet", "console", "gw-3", "gw-b", "stranger"] {
        let mut person = plant.person(user);
        let narrow = format!("$share/line3/{POOL}/task/mes");
        for filter in [SHARE, "$share/line3/#", &narrow] {
            assert!(!person.subscribe(filter), "{user} joins by {filter}");
        }
        uninvited.push(person);
    }
    // A member only by the filter that is its own: not what it would have alone.
    for filter in [
        &format!("{POOL}/task/+"),
        &format!("$share/other/{POOL}/task/+"),
    ] {
        assert!(!members[0].subscribe(filter), "{filter}");
    }
    let mut mes = plant.person("mes");
    for n in 0..12 {
        mes.publish(&format!("{POOL}/task/mes"), &n.to_string(), false);
    }
    let counts = members.each_mut().map(|member| member.came().len());
    assert_eq!(counts, [6, 6]);
    for person in &mut uninvited {
        assert!(person.came().is_empty());
    }
}

/// The plugin takes commands over MQTT, from those who may publish there.
#[test]
fn nobody_changes_the_rights_or_watches_the_broker() {
    let plant = plant();
    let file = plant.broker.file("millwright-rights.json");
    let before = fs::read(&file).unwrap();
    let open = json!({ "acltype": "subscribe", "allow": true });
    let command = json!({ "command": "setDefaultACLAccess", "acls": [open] });
    let request = json!({ "commands": [command] }).to_string();
    for user in ["gw-1", "mes", "fleet", "console", "stranger"] {
        let mut person = plant.person(user);
        for filter in [
            "$SYS/#",
            "$CONTROL/#",
            "$CONTROL/dynamic-security/v1/response",
        ] {
            assert!(!person.subscribe(filter), "{user} subscribes to {filter}");
        }
        person.publish("$CONTROL/dynamic-security/v1", &request, false);
        assert!(person.came().is_empty(), "{user}");
        assert!(!person.subscribe("#"), "{user} changed the rights");
    }
    assert_eq!(fs::read(&file).unwrap(), before);
}

#[test]
fn only_a_certificate_of_the_plants_ca_for_a_client_gets_in() {
    let plant = plant();
    plant.person("mes");
    assert!(plant.connect(None).is_err(), "without a certificate");
    let pair = |name: &str| ["pem", "key"].map(|e| plant.broker.file(&format!("{name}.{e}")));
    assert!(
        plant.connect(Some(&pair("broker"))).is_err(),
        "with the broker's own"
    );
    let folder = tempfile::tempdir().unwrap();
    // One that calls itself the same.
    let other = Authority::make(folder.path());
    other.issue("mes", CLIENT, -DAY, DAY);
    let (cert, key) = other.files("mes");
    assert!(plant.connect(Some(&[cert, key])).is_err(), "of another CA");
}

/// What `millwright enroll` hands over: a request for a key that stays on the gateway.
#[test]
fn the_trial_ca_signs_a_request_and_believes_nothing_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    trial_ca(folder.path(), &["init"]);
    let request = |key: &str, subject: &str| {
        let made = Command::new("openssl")
            .args([
                "req",
                "-new",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
            ])
            .args([
                "-keyout",
                &at(key),
                "-out",
                &at("box.csr"),
                "-subj",
                subject,
            ])
            .args(["-addext", "basicConstraints=critical,CA:TRUE"])
            .output();
        assert!(made.unwrap().status.success());
    };
    let sign = || {
        script(
            "trial-ca",
            &["--dir", &at(""), "sign", "gw-7", &at("box.csr")],
        )
    };
    request("box.key", "/O=Somebody/CN=gw-7");
    assert!(sign().status.success());
    let shown = Command::new("openssl")
        .args([
            "x509",
            "-noout",
            "-subject",
            "-ext",
            "basicConstraints,extendedKeyUsage",
            "-in",
            &at("gw-7.pem"),
        ])
        .output();
    let shown = String::from_utf8(shown.unwrap().stdout).unwrap();
    for words in [
        "subject=CN = gw-7\n",
        "CA:FALSE",
        "TLS Web Client Authentication",
    ] {
        assert!(shown.contains(words), "{words:?} in {shown}");
    }
    // The same key is a renewal; the one from before stays.
    assert!(sign().status.success());
    assert!(folder.path().join("gw-7.pem.1").exists());
    request("another.key", "/CN=gw-7");
    refused(&sign(), "has a certificate with another key");
    request("box.key", "/CN=gw-8");
    refused(&sign(), "is of gw-8, not of gw-7");
    refused(
        &script(
            "trial-ca",
            &["--dir", &at(""), "sign", "gw-7/+", &at("box.csr")],
        ),
        "can't be a user name",
    );
    fs::write(at("box.csr"), "x".repeat(17 << 10)).unwrap();
    refused(&sign(), "larger than 16 KiB");
    fs::write(at("box.csr"), "x").unwrap();
    refused(&sign(), "no certificate request");
    refused(
        &script("trial-ca", &["--dir", &at(""), "init"]),
        "is there already",
    );
}

#[test]
fn roles_that_would_give_more_than_they_say_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("roles.toml");
    let cases = [
        ("", "names nobody"),
        ("[plant", "no TOML"),
        ("agents = ['gw-1']", "must be a table"),
        ("[plant]\noperator = ['mes']", "unknown key 'operator'"),
        ("[plant]\noperators = 'mes'", "must be a list"),
        ("[plant]\noperators = ['+']", "can't be one level"),
        ("[plant]\noperators = ['a/b']", "can't be one level"),
        ("[plant]\noperators = ['%u']", "can't be one level"),
        ("['a/#']\noperators = ['mes']", "can't be one level"),
        ("[plant]\nagents = ['pool']", "another name"),
        (
            "[plant]\nagents = ['gw-1']\noperators = ['gw-1']",
            "different roles",
        ),
        (
            "[plant]\nagents = ['gw-1']\n[berlin]\nagents = ['gw-1']",
            "two agents",
        ),
        ("[plant]\nagents = ['gw-1', 'gw-1']", "twice"),
        (
            "[plant]\nagents = [{ name = 'a', base = 'x' }, { name = 'b', base = 'x/task' }]",
            "overlap",
        ),
        (
            "[plant]\nagents = [{ name = 'a', base = 'millwright/v1/berlin/b' }]",
            "among the default topics",
        ),
        ("[plant.pools]\np = ['gw-1']", "none of its agents"),
        ("[plant.pools]\np = [['gw-1']]", "none of its agents"),
        (
            "[plant]\nagents = ['a']\n[plant.pools]\nresult = ['a']",
            "another name",
        ),
    ];
    for (roles, words) in cases {
        fs::write(&path, roles).unwrap();
        let output = script("rights", &[&path.display().to_string()]);
        refused(&output, words);
    }
    let long = format!("[plant]\noperators = ['{}']", "x".repeat(129));
    fs::write(&path, long).unwrap();
    refused(
        &script("rights", &[&path.display().to_string()]),
        "longer than 128 bytes",
    );
    fs::write(&path, " ".repeat((1 << 20) + 1)).unwrap();
    refused(
        &script("rights", &[&path.display().to_string()]),
        "larger than",
    );
    let sample = shipped("roles.toml").display().to_string();
    assert!(script("rights", &[&sample]).status.success());
}

fn script(name: &str, arguments: &[&str]) -> Output {
    Command::new(shipped(name))
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// It ends with one sentence that says so.
fn refused(output: &Output, words: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(words), "{words:?} in {said:?}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
}
