//! The commands as their users type them: what they print, and how they fail.

use millwright_tests::{Agent, BASE, Broker, bundle, program};
use serde_json::Value;
use std::fs;
use std::process::{Command, Output};
use tempfile::TempDir;

fn millwright(arguments: &[&str]) -> Output {
    let state = TempDir::new().unwrap();
    let output = Command::new(program("millwright"))
        .args(arguments)
        .env("MILLWRIGHT_CACHE", state.path())
        .output();
    output.unwrap()
}

/// What a command printed, which must be one JSON object with all these fields.
#[track_caller]
fn json(arguments: &[&str], fields: &[&str]) -> Value {
    let output = millwright(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    for field in fields {
        assert!(!value[field].is_null(), "{field}: {value}");
    }
    value
}

/// A command must fail with exit code 1 and one sentence that has these words.
#[track_caller]
fn fails(arguments: &[&str], words: &[&str]) {
    let output = millwright(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    for word in words {
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn generate_answers_and_says_how() {
    let model = bundle();
    let model = model.to_str().unwrap();
    let arguments = [
        "generate",
        "--model",
        model,
        "--prompt",
        "the pump",
        "--max-tokens",
        "9",
        "--json",
    ];
    let fields = ["text", "tokens", "prompt_tokens", "finish", "timing"];
    let first = json(&arguments, &fields);
    assert!((1..=9).contains(&first["tokens"].as_array().unwrap().len()));
    let again = json(&arguments, &fields);
    assert_eq!(first["tokens"], again["tokens"]);

    let folder = TempDir::new().unwrap();
    let messages = folder.path().join("m.json");
    fs::write(&messages, r#"[{"role": "user", "content": "hello"}]"#).unwrap();
    let messages = messages.to_str().unwrap();
    json(
        &[
            "generate",
            "--model",
            model,
            "--messages",
            messages,
            "--max-tokens",
            "3",
            "--json",
        ],
        &fields,
    );
    fs::write(messages, "[{}]").unwrap();
    fails(
        &["generate", "--model", model, "--messages", messages],
        &["m.json", "role"],
    );
    fails(
        &[
            "generate",
            "--model",
            model,
            "--prompt",
            "x",
            "--max-tokens",
            "99999",
        ],
        &["100000", "256"],
    );
    fails(
        &["generate", "--model", "/nonexistent", "--prompt", "x"],
        &["/nonexistent", "cargo forge pull"],
    );
}

#[test]
fn an_exporters_folder_is_looked_at_and_answers_as_it_is() {
    let folder = TempDir::new().unwrap();
    let export = folder.path().join("genai-int4");
    let made = Command::new(program("millwright-forge"))
        .args(["export", "--form", "genai-int4", "-o"])
        .arg(&export)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let export = export.to_str().unwrap();
    let fields = [
        "parts",
        "context_length",
        "packed_bytes",
        "kv_bytes_per_token",
    ];
    let found = json(&["model", "inspect", export, "--json"], &fields);
    assert_eq!(
        (&found["plan"], &found["exact"]),
        (&"flat".into(), &true.into()),
        "{found}"
    );
    let said = millwright(&["model", "inspect", export]);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(
        said.contains("4 bits in blocks of 32") && said.contains("flat plan"),
        "{said}"
    );
    let answer = [
        "generate",
        "--model",
        export,
        "--prompt",
        "the pump",
        "--max-tokens",
        "5",
        "--json",
    ];
    json(&answer, &["text", "tokens"]);
    fails(
        &["model", "inspect", export, "--file", "model_q4.onnx"],
        &["there is no graph model_q4.onnx", "model.onnx"],
    );
    fails(&["model", "inspect", "/nonexistent"], &["/nonexistent"]);

    let bundle = folder.path().join("bundle");
    let bundle = bundle.to_str().unwrap();
    let import = ["model", "import", export, "-o", bundle, "--name", "press"];
    let said = millwright(&import);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(
        said.contains("press 1, q4") && said.contains("nats a token") && said.contains(bundle),
        "{said}"
    );
    fails(&import, &["no empty folder"]);
    let found = json(&["model", "inspect", bundle, "--json"], &fields);
    assert_eq!(found["name"], "press");
}

#[test]
fn bench_and_eval_report_what_the_readme_says() {
    let model = bundle();
    let model = model.to_str().unwrap();
    let bench = [
        "bench",
        "--model",
        model,
        "--threads",
        "1",
        "--prompt-tokens",
        "20",
        "--decode-tokens",
        "8",
        "--batch",
        "1,2",
        "--json",
    ];
    let fields = [
        "load_ms",
        "resident_bytes",
        "tokenizer_bytes",
        "read_bandwidth_gb_s",
        "bytes_per_token",
        "runs",
    ];
    let report = json(&bench, &fields);
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2);
    for field in [
        "threads",
        "batch",
        "prompt_tokens",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "ttft_ms",
        "bandwidth_share",
    ] {
        assert!(
            runs.iter().all(|run| run[field].as_f64() > Some(0.0)),
            "{field}: {report}"
        );
    }

    let folder = TempDir::new().unwrap();
    let text = folder.path().join("t.txt");
    fs::write(&text, "the bearing of pump 7 is hot and vibration is high").unwrap();
    let text = text.to_str().unwrap();
    let eval = [
        "eval",
        "--model",
        model,
        "--text",
        text,
        "--reference",
        model,
        "--json",
    ];
    let fields = [
        "perplexity",
        "tokens",
        "reference_perplexity",
        "kl_divergence",
        "top1_agreement",
    ];
    let report = json(&eval, &fields);
    // The reference is the same weights through tract's own attention.
    assert!(report["kl_divergence"].as_f64() < Some(0.01), "{report}");
    fails(
        &["eval", "--model", model, "--text", "/nonexistent.txt"],
        &["/nonexistent.txt"],
    );
}

#[test]
fn an_agent_that_can_not_start_says_why() {
    let folder = TempDir::new().unwrap();
    let config = folder.path().join("agent.toml");
    let write = |text: &str| fs::write(&config, text).unwrap();
    let path = config.to_str().unwrap();
    fails(&["agent", "--config", path], &["agent.toml"]);
    let whole = "[gateway]\nsite = 's'\nname = 'g'\n[broker]\nhost = '127.0.0.1'\n[model]\nbundle = '/nonexistent'\nstate_dir = '/nonexistent'\n";
    // A model that isn't there is none of these: the agent waits for it (tests/tests/small.rs).
    write(&whole.replace(
        "state_dir = '/nonexistent'",
        "state_dir = '/dev/null/state'",
    ));
    fails(&["agent", "--config", path], &["/dev/null/state"]);
    write(&whole.replace("state_dir", "kernel = 'abacus'\nstate_dir"));
    fails(&["agent", "--config", path], &["agent.toml", "abacus"]);
    write(&whole.replace("state_dir", "kv_tokens = 0\nstate_dir"));
    fails(&["agent", "--config", path], &["agent.toml", "kv_tokens"]);
    write(&whole.replace("host =", "pasword = 'hunter2'\nhost ="));
    let output = millwright(&["agent", "--config", path]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("pasword") && said.contains("line 5"),
        "{said}"
    );
    assert!(!said.contains("hunter2"), "{said}");
}

#[test]
fn ask_prints_the_answer_or_the_reason() {
    let broker = Broker::open();
    let _agent = Agent::start(&broker);
    let place = format!("127.0.0.1:{}", broker.port);
    let ask = |more: &[&str]| {
        let arguments = [&["ask", "--broker", &place, "--to", BASE][..], more].concat();
        millwright(&arguments)
    };
    let answer = ask(&[
        "--raw",
        "--max-tokens",
        "5",
        "--json",
        "--id",
        "q-1",
        "the pump",
    ]);
    let event: Value = serde_json::from_slice(&answer.stdout).unwrap();
    assert_eq!(
        (&event["event"], &event["task"]),
        (&"done".into(), &"q-1".into())
    );
    // The same id again: the same answer, byte for byte, as a terminal may show it.
    let again = ask(&[
        "--raw",
        "--max-tokens",
        "5",
        "--json",
        "--id",
        "q-1",
        "the pump",
    ]);
    assert_eq!(answer.stdout, again.stdout);
    let refused = ask(&["--max-tokens", "999999", "x"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1));
    assert!(said.contains("max_tokens"), "{said}");
    fails(
        &["ask", "--broker", "127.0.0.1:1", "--to", BASE, "x"],
        &["127.0.0.1:1", "can't be reached"],
    );
}
