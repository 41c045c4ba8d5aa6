//! Bundles and packed files that are missing, cut or altered: each has its own sentence, and what can be made anew is.

use millwright_engine::bundle::{FileEntry, GRAPH, MANIFEST, Manifest};
use millwright_engine::{
    Engine, OpenError, Options, Prompt, Request, RequestError, sampler::Sampling,
};
use millwright_forge::{Precision, tiny};
use prost::Message;
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{AttributeProto, GraphProto, ModelProto, NodeProto};

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

    /// Changes the graph and makes the manifest agree again.
    fn edit(&self, change: impl FnOnce(&mut GraphProto)) {
        self.change(GRAPH, |bytes| {
            let mut model = ModelProto::decode(&**bytes).unwrap();
            change(model.graph.as_mut().unwrap());
            *bytes = model.encode_to_vec();
        });
        self.restate();
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
fn who_packs_is_alone_and_clears_away_what_killed_ones_left() {
    let tiny = Tiny::new();
    let state = tiny.path("state");
    fs::create_dir_all(&state).unwrap();
    fs::write(state.join(".something.partial"), "cut off").unwrap();
    let another = fs::File::open(&state).unwrap();
    another.lock().unwrap();
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            drop(tiny.open().unwrap());
            done.send(()).unwrap();
        });
        let waits = is_done.recv_timeout(std::time::Duration::from_millis(500));
        assert!(waits.is_err(), "it packs beside another");
        assert!(state.join(".something.partial").exists());
        drop(another);
    });
    tiny.packed();
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

#[test]
fn tuning_keeps_to_the_rotary_tables_and_the_cores() {
    let tiny = Tiny::new();
    // Two chunks are more positions than the tables have.
    let options = Options {
        threads: None,
        prefill_chunk: 256,
        state_dir: tiny.path("state"),
        ..Options::default()
    };
    let engine = Engine::open(tiny.folder.path(), &options).unwrap();
    assert!(engine.card().context_length < 2 * options.prefill_chunk);
    let threads = engine.card().threads;
    let most = std::thread::available_parallelism().unwrap().get();
    assert!((1..=most).contains(&threads.decode) && (1..=most).contains(&threads.prefill));
}

fn node<'a>(graph: &'a mut GraphProto, output: &str) -> &'a mut NodeProto {
    let mut nodes = graph.node.iter_mut();
    nodes.find(|node| node.output[0] == output).unwrap()
}

#[test]
fn an_input_without_a_name_is_refused() {
    let tiny = Tiny::new();
    tiny.edit(|graph| node(graph, "layers.0.gate_proj.out").input[0].clear());
    says(&tiny.refusal(), &["gate_proj", "without all its inputs"]);
}

#[test]
fn activations_that_are_no_floats_are_refused() {
    let tiny = Tiny::new();
    tiny.edit(|graph| {
        let out = "layers.0.down_proj.out";
        let at = graph.node.iter().position(|n| n.output[0] == out).unwrap();
        let x = std::mem::replace(&mut graph.node[at].input[0], "whole".into());
        let to = AttributeProto {
            name: "to".into(),
            r#type: AttributeType::Int as i32,
            i: DataType::Int32 as i64,
            ..AttributeProto::default()
        };
        let cast = NodeProto {
            op_type: "Cast".into(),
            input: vec![x],
            output: vec!["whole".into()],
            attribute: vec![to],
            ..NodeProto::default()
        };
        graph.node.insert(at, cast);
    });
    says(&tiny.refusal(), &["tract can't run the graph", "I32"]);
}

#[test]
fn activations_of_another_width_than_the_weights_fail_in_a_sentence() {
    let tiny = Tiny::new();
    tiny.edit(|graph| {
        let x = node(graph, "layers.0.gate_proj.out").input[0].clone();
        node(graph, "layers.0.down_proj.out").input[0] = x;
    });
    let said = match tiny.open() {
        Err(refusal) => refusal.to_string(),
        Ok(mut engine) => {
            let error = engine.score(&[1, 2, 3], &mut |_, _| {}).unwrap_err();
            error.to_string()
        }
    };
    says(&said, &["activations of 64 for a weight of 128 columns"]);
}

#[test]
fn an_embedding_beside_the_head_is_not_what_a_token_reads() {
    let tiny = Tiny::new();
    let tied = tiny.open().unwrap().usage();
    tiny.edit(|graph| {
        let mut copies = Vec::new();
        for node in graph.node.iter_mut().filter(|n| n.op_type == "Gather") {
            let mut tables = graph.initializer.iter();
            let mut copy = tables.find(|t| t.name == node.input[0]).unwrap().clone();
            copy.name += ".copy";
            node.input[0].clone_from(&copy.name);
            copies.push(copy);
        }
        graph.initializer.extend(copies);
    });
    let untied = tiny.open().unwrap().usage();
    assert!(untied.packed_bytes > tied.packed_bytes);
    assert_eq!(untied.bytes_per_token, tied.bytes_per_token);
}
