//! Bundles and packed files that are missing, cut or altered: each has its own sentence, and what can be made anew is.

use millwright_engine::bundle::{FileEntry, MANIFEST, Manifest};
use millwright_engine::{
    Engine, OpenError, Options, Prompt, Request, RequestError, sampler::Sampling,
};
use millwright_forge::{Precision, tiny};
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

/// Something done to a file's bytes.
type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);

struct Tiny {
    folder: TempDir,
}

impl Tiny {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        tiny::write(folder.path(), Precision::Int8).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn open(&self) -> Result<Engine, OpenError> {
        let options = Options {
            threads: Some(1),
            state_dir: self.path("state"),
            ..Options::default()
        };
        Engine::open(self.folder.path(), &options)
    }

    fn refusal(&self) -> String {
        self.open().err().expect("it must not open").to_string()
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.path(name)).unwrap();
        change(&mut bytes);
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Makes the manifest agree with the files again, so that what is inside them is what is tested.
    fn restate(&self) {
        let text = fs::read_to_string(self.path(MANIFEST)).unwrap();
        let mut manifest = Manifest::parse(&text).unwrap();
        let names: Vec<String> = manifest.files.iter().map(|f| f.name.clone()).collect();
        manifest.files = names
            .iter()
            .map(|name| FileEntry::of(&self.path(name)).unwrap())
            .collect();
        fs::write(self.path(MANIFEST), manifest.to_text().unwrap()).unwrap();
    }

    fn packed(&self) -> PathBuf {
        let mut entries = fs::read_dir(self.path("state")).unwrap();
        let only = entries.next().unwrap().unwrap().path();
        assert!(entries.next().is_none(), "nothing half-written is left");
        only
    }
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text:?} should say {part:?}");
    }
}

#[test]
fn a_missing_bundle_says_how_to_get_one() {
    let options = Options::default();
    let error = Engine::open("/nonexistent/model".as_ref(), &options)
        .err()
        .unwrap()
        .to_string();
    says(
        &error,
        &["no model at /nonexistent/model", "cargo forge pull"],
    );
}

#[test]
fn a_missing_file_is_named() {
    let tiny = Tiny::new();
    fs::remove_file(tiny.path("tokenizer.json")).unwrap();
    says(
        &tiny.refusal(),
        &["tokenizer.json is missing", "pull the model again"],
    );
}

#[test]
fn a_truncated_file_is_named_with_both_sizes() {
    let tiny = Tiny::new();
    let whole = fs::metadata(tiny.path("model.onnx.data")).unwrap().len();
    tiny.change("model.onnx.data", |bytes| bytes.truncate(1000));
    says(
        &tiny.refusal(),
        &["model.onnx.data", "1000", &whole.to_string()],
    );
}

#[test]
fn an_altered_file_is_found_when_its_weights_are_packed() {
    let tiny = Tiny::new();
    tiny.change("model.onnx.data", |bytes| bytes[5] ^= 1);
    says(
        &tiny.refusal(),
        &["model.onnx.data does not match its digest"],
    );
    assert!(
        !tiny.path("state").exists() || fs::read_dir(tiny.path("state")).unwrap().next().is_none()
    );
}

#[test]
fn a_manifest_with_unknown_fields_or_paths_is_refused() {
    let tiny = Tiny::new();
    let text = fs::read_to_string(tiny.path(MANIFEST)).unwrap();
    fs::write(tiny.path(MANIFEST), format!("surprise = 1\n{text}")).unwrap();
    says(&tiny.refusal(), &["not a valid manifest", "surprise"]);
    fs::write(
        tiny.path(MANIFEST),
        text.replace("\"tokenizer.json\"", "\"../tokenizer.json\""),
    )
    .unwrap();
    says(&tiny.refusal(), &["not a plain file name"]);
    fs::write(tiny.path(MANIFEST), "x".repeat(100_000)).unwrap();
    says(&tiny.refusal(), &["larger than"]);
}

#[test]
fn a_graph_that_is_no_graph_is_refused() {
    let tiny = Tiny::new();
    tiny.change("model.onnx", |bytes| bytes.truncate(bytes.len() / 2));
    tiny.restate();
    says(&tiny.refusal(), &["model.onnx", "ONNX"]);
    fs::write(tiny.path("model.onnx"), b"").unwrap();
    tiny.restate();
    says(&tiny.refusal(), &["no graph"]);
}

#[test]
fn weights_beyond_the_end_of_their_file_are_refused() {
    let tiny = Tiny::new();
    tiny.change("model.onnx.data", |bytes| bytes.truncate(bytes.len() - 64));
    tiny.restate();
    says(&tiny.refusal(), &["lies beyond the end of its file"]);
}

#[test]
fn weights_that_the_manifest_does_not_name_are_refused() {
    let tiny = Tiny::new();
    let text = fs::read_to_string(tiny.path(MANIFEST)).unwrap();
    let mut manifest = Manifest::parse(&text).unwrap();
    manifest.files.retain(|file| file.name != "model.onnx.data");
    fs::write(tiny.path(MANIFEST), manifest.to_text().unwrap()).unwrap();
    says(&tiny.refusal(), &["model.onnx.data", "manifest"]);
}

#[test]
fn a_context_beyond_the_rotary_tables_is_cut_to_them() {
    let tiny = Tiny::new();
    let text = fs::read_to_string(tiny.path(MANIFEST)).unwrap();
    let mut manifest = Manifest::parse(&text).unwrap();
    let positions = manifest.context_length;
    manifest.context_length = 100 * positions;
    fs::write(tiny.path(MANIFEST), manifest.to_text().unwrap()).unwrap();
    assert_eq!(tiny.open().unwrap().card().context_length, positions);
}

#[test]
fn an_input_that_is_not_known_is_named() {
    let tiny = Tiny::new();
    // The same length, so that the protobuf stays whole.
    tiny.change("model.onnx", |bytes| {
        let (from, to) = (b"position_ids", b"elephant_ids");
        let at: Vec<usize> = (0..bytes.len() - from.len())
            .filter(|&i| &bytes[i..i + from.len()] == from)
            .collect();
        assert!(!at.is_empty());
        for i in at {
            bytes[i..i + from.len()].copy_from_slice(to);
        }
    });
    tiny.restate();
    says(&tiny.refusal(), &["elephant_ids"]);
}

#[test]
fn a_packed_file_that_was_cut_or_altered_is_packed_anew() {
    let tiny = Tiny::new();
    drop(tiny.open().unwrap());
    let packed = tiny.packed();
    let whole = fs::read(&packed).unwrap();
    let cases: [Damage; 4] = [
        &|bytes| bytes.truncate(20),
        &|bytes| bytes.truncate(whole.len() - 1),
        &|bytes| bytes[0] ^= 1,
        &|bytes| bytes[60] ^= 1,
    ];
    for case in cases {
        let mut bytes = whole.clone();
        case(&mut bytes);
        fs::write(&packed, bytes).unwrap();
        drop(tiny.open().unwrap());
        assert!(fs::read(tiny.packed()).unwrap() == whole);
    }
}

#[test]
fn options_out_of_range_are_named() {
    let tiny = Tiny::new();
    let options = Options {
        threads: Some(0),
        ..Options::default()
    };
    let error = Engine::open(tiny.folder.path(), &options)
        .err()
        .unwrap()
        .to_string();
    says(&error, &["threads", "1 to 256"]);
    let options = Options {
        kernel: Some("abacus".into()),
        ..Options::default()
    };
    let error = Engine::open(tiny.folder.path(), &options)
        .err()
        .unwrap()
        .to_string();
    says(&error, &["abacus", "scalar"]);
}

#[test]
fn requests_beyond_the_context_or_the_vocabulary_are_refused() {
    let tiny = Tiny::new();
    let engine = tiny.open().unwrap();
    let refuse = |prompt: Prompt, max_tokens: usize| {
        let request = Request {
            prompt,
            max_tokens,
            sampling: Sampling::greedy(),
            stop: Vec::new(),
        };
        engine
            .preparer()
            .prepare(request)
            .expect_err("it must be refused")
    };
    let context = engine.card().context_length;
    let long = refuse(Prompt::Text("a".repeat(10 * context)), 1);
    assert!(
        matches!(long, RequestError::ContextOverflow { available, .. } if available == context),
        "{long}"
    );
    let max = refuse(Prompt::Text("a".into()), usize::MAX);
    assert!(matches!(max, RequestError::ContextOverflow { .. }), "{max}");
    let empty = refuse(Prompt::Text(String::new()), 1);
    assert!(
        matches!(
            empty,
            RequestError::Invalid {
                field: "prompt",
                ..
            }
        ),
        "{empty}"
    );
    let unknown = refuse(Prompt::Tokens(vec![1, 99_999]), 1);
    says(&unknown.to_string(), &["99999"]);
}

/// Where there is but one core, or other work takes the cores, nothing is remembered.
#[test]
fn tuned_threads_are_remembered_and_measured_anew_when_the_file_is_not_ours() {
    let tiny = Tiny::new();
    let threads = || {
        let options = Options {
            threads: None,
            state_dir: tiny.path("state"),
            ..Options::default()
        };
        let engine = Engine::open(tiny.folder.path(), &options).unwrap();
        engine.card().threads
    };
    let measured = threads();
    let most = std::thread::available_parallelism().unwrap().get();
    assert!((1..=most).contains(&measured.decode) && (1..=most).contains(&measured.prefill));
    let files = || {
        fs::read_dir(tiny.path("state"))
            .unwrap()
            .map(Result::unwrap)
    };
    let is_ours = |path: &PathBuf| path.to_str().unwrap().ends_with(".threads.json");
    let Some(path) = files().map(|entry| entry.path()).find(is_ours) else {
        // Nothing to measure, or too busy to believe it.
        return;
    };
    // Both ways round: at least one of them is not what was measured.
    for (decode, prefill) in [(1, 2), (2, 1)] {
        let mut file: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        file["threads"] = serde_json::json!({"decode": decode, "prefill": prefill});
        fs::write(&path, file.to_string()).unwrap();
        let read = threads();
        assert_eq!((read.decode, read.prefill), (decode, prefill));
    }
    let ours = fs::read(&path).unwrap();
    for bad in [&b"{}"[..], b"\xff", &ours[..ours.len() / 2]] {
        fs::write(&path, bad).unwrap();
        let again = threads();
        assert!((1..=most).contains(&again.decode));
    }
}
