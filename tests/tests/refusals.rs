//! Bad input: each kind gets its own clear refusal, and the agent goes on serving.

use millwright_tests::{Agent, BASE, Broker, Client, Outgoing, Setup};
use rumqttc::v5::mqttbytes::v5::PublishProperties;
use serde_json::{Value, json};

struct Scene {
    _broker: Broker,
    agent: Agent,
    mes: Client,
}

impl Scene {
    fn new(setup: &Setup) -> Self {
        let broker = Broker::open();
        let agent = Agent::with(&broker, setup);
        let mut mes = Client::connect(&broker, "mes");
        mes.await_state("online");
        Self {
            _broker: broker,
            agent,
            mes,
        }
    }

    /// The refusal of a payload that has no usable id.
    fn nameless(&mut self, payload: impl Into<Vec<u8>>) -> Value {
        self.mes.raw(payload);
        self.mes.refusal()
    }

    fn refused(&mut self, task: &Value) -> Value {
        self.mes.task(task);
        let id = task["id"].as_str().unwrap();
        let event = self.mes.outcome(id);
        assert_eq!(event["event"], "rejected", "{event}");
        event
    }

    /// After all that was refused, a good task is answered.
    fn goes_on(mut self) {
        self.mes.generate("good", 4);
        assert_eq!(self.mes.outcome("good")["event"], "done");
        assert!(self.agent.is_running());
    }
}

fn has(event: &Value, code: &str, words: &[&str]) {
    assert_eq!(event["code"], code, "{event}");
    let reason = event["reason"].as_str().unwrap();
    for word in words {
        assert!(reason.contains(word), "{word:?} is not in {reason:?}");
    }
    assert!(reason.len() < 400, "{reason}");
}

#[test]
fn what_is_no_task_is_refused_by_name() {
    let mut scene = Scene::new(&Setup::default());
    for payload in [
        "",
        "{",
        "[]",
        "null",
        "{\"id\":\"x\",\"kind\":\"generate\",\"prompt\":\"tr",
    ] {
        has(&scene.nameless(payload), "invalid", &[]);
    }
    has(
        &scene.nameless(*b"{\"id\":\"x\",\"prompt\":\"\xFF\xFE\"}"),
        "invalid",
        &[],
    );
    has(&scene.nameless("[".repeat(50_000)), "invalid", &[]);
    for id in ["a b", "", "ü", "a/b", "+", "\u{1b}[2J"] {
        let task = json!({ "id": id, "kind": "generate", "prompt": "x", "max_tokens": 2 });
        let event = scene.nameless(task.to_string());
        has(&event, "invalid", &["id"]);
        assert!(!event["reason"].as_str().unwrap().contains('\u{1b}'));
    }
    has(
        &scene.nameless(json!({ "kind": "generate", "prompt": "x" }).to_string()),
        "invalid",
        &["id"],
    );
    scene.goes_on();
}

#[test]
fn fields_are_checked_one_by_one() {
    let mut scene = Scene::new(&Setup::default());
    let cases = [
        ("max_token", json!(3)),
        ("kind", json!("sing")),
        ("prompt", json!(7)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!("many")),
        ("temperature", json!(-1)),
        ("top_p", json!(1.5)),
        ("seed", json!(1_u64 << 53)),
        ("priority", json!(10)),
        ("stop", json!(vec!["x"; 99])),
        ("stream", json!("yes")),
        ("deadline_ms", json!(-5)),
        ("messages", json!([{ "role": "user", "content": "x" }])),
    ];
    for (n, (field, value)) in cases.into_iter().enumerate() {
        let mut task =
            json!({ "id": format!("f-{n}"), "kind": "generate", "prompt": "x", "max_tokens": 2 });
        task[field] = value;
        let event = scene.refused(&task);
        assert!(
            event["code"] == "invalid" || event["code"] == "unsupported",
            "{event}"
        );
        assert!(
            event["reason"].as_str().unwrap().contains(field),
            "{field}: {event}"
        );
    }
    scene.goes_on();
}

#[test]
fn a_retained_task_is_refused() {
    let mut scene = Scene::new(&Setup::default());
    let task = json!({ "id": "r", "kind": "generate", "prompt": "x", "max_tokens": 2 });
    scene.mes.publish(
        "task/mes",
        task.to_string(),
        Outgoing {
            retain: true,
            ..Outgoing::default()
        },
    );
    // MQTT 5 takes the flag off for a subscriber that is there already, unless it asks to see it.
    let event = scene.mes.outcome("r");
    assert_eq!(event["event"], "rejected", "{event}");
    has(&event, "invalid", &["RETAIN"]);
    scene.goes_on();
}

#[test]
fn a_payload_over_the_limit_is_told_the_limit() {
    let setup = Setup {
        tasks: "payload_bytes_max = 1000".into(),
        ..Setup::default()
    };
    let mut scene = Scene::new(&setup);
    let task =
        json!({ "id": "big", "kind": "generate", "prompt": "x".repeat(2000), "max_tokens": 2 });
    scene.mes.task(&task);
    let big = |m: &millwright_tests::Message| m.topic.starts_with(&format!("{BASE}/result/mes/"));
    let event = scene.mes.next("a refusal", big).json();
    has(&event, "too_large", &[]);
    assert_eq!(event["limit"], 1000);
    scene.goes_on();
}

#[test]
fn answers_go_only_where_they_may() {
    let mut scene = Scene::new(&Setup::default());
    let topics = [
        "elsewhere/x".to_owned(),
        format!("{BASE}/task/mes"),
        format!("{BASE}/state"),
        format!("{BASE}/results/mes"),
        format!("{BASE}/result/mes/#"),
        "$SYS/broker".to_owned(),
    ];
    for (n, topic) in topics.iter().enumerate() {
        let id = format!("r-{n}");
        let event = scene.refused(&json!({ "id": id, "kind": "generate", "prompt": "x", "max_tokens": 2, "reply_to": topic }));
        has(&event, "forbidden_reply_topic", &[]);
    }
    let properties = PublishProperties {
        response_topic: Some("elsewhere/x".into()),
        ..PublishProperties::default()
    };
    let task = json!({ "id": "p", "kind": "generate", "prompt": "x", "max_tokens": 2 });
    scene.mes.publish(
        "task/mes",
        task.to_string(),
        Outgoing {
            properties,
            ..Outgoing::default()
        },
    );
    has(&scene.mes.outcome("p"), "forbidden_reply_topic", &[]);
    scene.goes_on();
}

#[test]
fn a_prompt_beyond_the_context_is_told_by_how_much() {
    let mut scene = Scene::new(&Setup::default());
    let prompt = "The pump is loud. ".repeat(400);
    let event = scene
        .refused(&json!({ "id": "long", "kind": "generate", "prompt": prompt, "max_tokens": 2 }));
    has(&event, "context_overflow", &[]);
    assert!(
        event["needed"].as_u64() > event["available"].as_u64(),
        "{event}"
    );
    scene.goes_on();
}

#[test]
fn a_chat_that_the_template_refuses_is_told_why() {
    // The tiny bundle with a template of a stricter model.
    let tiny = millwright_tests::bundle();
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&tiny).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let old = std::fs::metadata(tiny.join("chat_template.jinja"))
        .unwrap()
        .len() as usize;
    let strict = "{% if messages[0].role != 'user' %}{{ raise_exception('The first role must be user') }}{% endif %}{{ messages[0].content }}";
    assert!(strict.len() <= old, "the manifest states the size");
    replace_file(
        folder.path(),
        "chat_template.jinja",
        &format!("{strict:<old$}"),
    );
    let setup = Setup {
        bundle: Some(folder.path().to_owned()),
        ..Setup::default()
    };
    let mut scene = Scene::new(&setup);
    let event = scene.refused(&json!({ "id": "c", "kind": "chat", "max_tokens": 2, "messages": [{ "role": "system", "content": "x" }] }));
    has(&event, "invalid", &["The first role must be user"]);
    scene.goes_on();
}

/// Replaces a file of a bundle, its digest in the manifest too.
fn replace_file(folder: &std::path::Path, name: &str, text: &str) {
    let digest = |path: &std::path::Path| {
        let output = std::process::Command::new("sha256sum")
            .arg(path)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()[..64].to_owned()
    };
    let path = folder.join(name);
    let before = digest(&path);
    std::fs::write(&path, text).unwrap();
    let manifest = folder.join("manifest.toml");
    let changed = std::fs::read_to_string(&manifest)
        .unwrap()
        .replace(&before, &digest(&path));
    std::fs::write(&manifest, changed).unwrap();
}
