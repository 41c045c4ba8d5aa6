//! The accuracy guard on models that eight bits don't suit, and bundles made of exporters' folders.

mod support;

use millwright_engine::bundle::{Bundle, Check, Guard, Manifest};
use millwright_engine::bundling::{BundlingError, Naming, Stage, make};
use millwright_engine::{Card, Engine, OpenError, Options, PlanChoice, Progress};
use prost::Message;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use support::{kl, written};
use tempfile::TempDir;
use tract_onnx::pb::ModelProto;

const TEXT: &str = "Pump 7 runs hot. Check the oil, then the seal; replace what leaks.";

fn options(folder: &TempDir) -> Options {
    Options {
        threads: Some(1),
        state_dir: folder.path().join("state"),
        ..Options::default()
    }
}

fn logits(engine: &mut Engine) -> Vec<Vec<f32>> {
    let tokens = engine.text().encode(TEXT).unwrap();
    let mut rows = Vec::new();
    engine
        .score(&tokens, &mut |_, row| rows.push(row.to_vec()))
        .unwrap();
    rows
}

/// The mean KL divergence of these options from the reference plan.
fn divergence(model: &Path, options: &Options) -> f64 {
    let reference = Options {
        plan: PlanChoice::Reference,
        ..options.clone()
    };
    let expected = logits(&mut Engine::open(model, &reference).unwrap());
    let found = logits(&mut Engine::open(model, options).unwrap());
    let rows = expected.iter().zip(&found);
    rows.map(|(p, q)| kl(p, q)).sum::<f64>() / expected.len() as f64
}

fn check(card: &Card) -> &Check {
    match &card.guard {
        Some(Guard::Passed(check)) => check,
        other => panic!("not checked: {other:?}"),
    }
}

/// Changes a stored matrix of f32, `[rows, cols]`: the one that the first node whose name holds `of` reads.
fn change(folder: &TempDir, of: &str, change: impl Fn(usize, usize, &mut f32)) {
    let path = folder.path().join("out/onnx/model.onnx");
    let mut model = ModelProto::decode(&*fs::read(&path).unwrap()).unwrap();
    let graph = model.graph.as_mut().unwrap();
    let node = graph
        .node
        .iter()
        .find(|node| node.name.contains(of))
        .unwrap();
    let tensor = graph
        .initializer
        .iter_mut()
        .find(|t| node.input.contains(&t.name))
        .unwrap();
    let cols = *tensor.dims.last().unwrap() as usize;
    for (index, bytes) in tensor.raw_data.as_chunks_mut().0.iter_mut().enumerate() {
        let mut value = f32::from_le_bytes(*bytes);
        change(index / cols, index % cols, &mut value);
        *bytes = value.to_le_bytes();
    }
    fs::write(&path, model.encode_to_vec()).unwrap();
}

/// One input of a linear has weights so large that its block loses all others, and is never anything but zero.
fn with_an_outlier() -> TempDir {
    let folder = written("f32-sdpa", false);
    change(
        &folder,
        "layers.0/mlp/gate_proj/MatMul",
        |_, output, value| {
            if output == 0 {
                *value = 0.0;
            }
        },
    );
    change(
        &folder,
        "layers.0/mlp/down_proj/MatMul",
        |input, _, value| {
            if input == 0 {
                *value = 1e4;
            }
        },
    );
    folder
}

#[test]
fn a_linear_that_eight_bits_would_ruin_stays_in_f32() {
    let folder = with_an_outlier();
    let model = folder.path().join("out");
    let guarded = options(&folder);
    let engine = Engine::open(&model, &guarded).unwrap();
    let check = check(engine.card());
    let [kept] = &check.kept[..] else {
        panic!("{:?}", check.kept)
    };
    assert!(kept.linear.contains("layers.0/mlp/down_proj"), "{kept:?}");
    assert!(kept.error > 0.1, "{kept:?}");
    assert_eq!(check.oracle, "tract");
    assert_eq!((engine.card().plan, engine.card().exact), ("flat", false));
    let note = format!("the linear on {} stays in f32", kept.weight);
    assert!(
        engine.card().notes.contains(&note),
        "{:?}",
        engine.card().notes
    );

    let without = Options {
        guard: false,
        state_dir: folder.path().join("without"),
        ..guarded.clone()
    };
    let engine = Engine::open(&model, &without).unwrap();
    assert_eq!(engine.card().guard, Some(Guard::Skipped));
    assert!(engine.card().exact);
    let (with, without) = (divergence(&model, &guarded), divergence(&model, &without));
    assert!(with < 0.006 && without > 3.0 * with, "{with} and {without}");
}

#[test]
fn queries_may_stay_in_f32_where_attention_is_ours() {
    let folder = written("f32-sdpa", true);
    change(
        &folder,
        "layers.0/input_layernorm/Mul_1",
        |_, col, value| {
            if col == 0 {
                *value = 0.0;
            }
        },
    );
    change(
        &folder,
        "layers.0/self_attn/q_proj/MatMul",
        |input, _, value| {
            if input == 0 {
                *value = 1e4;
            }
        },
    );
    let model = folder.path().join("out");
    let engine = Engine::open(&model, &options(&folder)).unwrap();
    let [kept] = &check(engine.card()).kept[..] else {
        panic!("{:?}", engine.card())
    };
    assert!(
        kept.linear.contains("layers.0/self_attn/q_proj"),
        "{kept:?}"
    );
    assert_eq!(engine.card().plan, "flat");
    let found = divergence(&model, &options(&folder));
    assert!(found < 0.006, "{found}");
}

#[test]
fn who_was_asked_depends_on_what_tract_reads() {
    for (form, oracle) in [
        ("f16", "tract"),
        ("qdq-channel", "tract"),
        ("q4", "tract"),
        ("genai-int4", "tract"),
        ("qdq-block", "own"),
        ("q8", "own"),
        ("dynamic-int8", "own"),
    ] {
        let folder = written(form, false);
        let engine = Engine::open(&folder.path().join("out"), &options(&folder)).unwrap();
        let found = &check(engine.card()).oracle;
        assert!(found.starts_with(oracle), "{form}: {found}");
    }
}

#[test]
fn a_model_that_nothing_helps_is_refused() {
    let folder = written("f32-sdpa", false);
    // The layers add nothing, and every token's embedding has numbers that drown their blocks but not the logits: no
    // linear is to blame.
    for layer in 0..2 {
        for linear in ["self_attn/o_proj", "mlp/down_proj"] {
            let name = format!("layers.{layer}/{linear}/MatMul");
            change(&folder, &name, |_, _, value| *value = 0.0);
        }
    }
    change(&folder, "embed_tokens", |_, col, value| {
        if col % 32 == 0 {
            *value = 300.0;
        }
    });
    change(&folder, "/model/norm/Mul_1", |_, col, value| {
        *value = if col % 32 == 0 { 0.0 } else { 300.0 };
    });
    let model = folder.path().join("out");
    let error = Engine::open(&model, &options(&folder)).err().unwrap();
    assert!(matches!(error, OpenError::Unfaithful { .. }), "{error}");
    let said = error.to_string();
    let parts = ["nats a token", "--no-guard", "eight bits change"];
    assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    // It is not measured again to say so again.
    let again = Engine::open(&model, &options(&folder)).err().unwrap();
    assert_eq!(again.to_string(), said);
    let packed = fs::read_dir(folder.path().join("state")).unwrap();
    let packed: Vec<_> = packed.map(|entry| entry.unwrap().path()).collect();
    assert!(
        packed
            .iter()
            .any(|path| path.to_string_lossy().ends_with(".guard.json"))
    );
    let without = Options {
        guard: false,
        ..options(&folder)
    };
    assert!(Engine::open(&model, &without).is_ok());
}

#[test]
fn what_was_found_is_remembered_with_the_packed_weights() {
    let folder = written("q8", false);
    let model = folder.path().join("out");
    let first = Engine::open(&model, &options(&folder)).unwrap();
    let found = check(first.card()).clone();
    assert!(
        found.kept.is_empty() && found.divergence < 0.006,
        "{found:?}"
    );
    assert!(found.worst.is_some_and(|worst| worst.error < 0.1));
    let file = fs::read_dir(folder.path().join("state"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_string_lossy().ends_with(".guard.json"))
        .unwrap();
    // Not measured again: what the file says is believed.
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("\"tokens\":64", "\"tokens\":63")).unwrap();
    let second = Engine::open(&model, &options(&folder)).unwrap();
    assert_eq!(check(second.card()).tokens, 63);
    fs::write(&file, "{").unwrap();
    let third = Engine::open(&model, &options(&folder)).unwrap();
    assert_eq!(check(third.card()).tokens, 64);
}

fn bundled(model: &Path, options: &Options, out: &Path) -> Result<Manifest, BundlingError> {
    let progress: Progress = Arc::new(drop);
    make(model, &Naming::default(), options, out, &progress)
}

/// Makes a bundle of a form and holds it to the folder.
fn answers_alike(form: &str, bias: bool) -> TempDir {
    let folder = written(form, bias);
    let (model, out) = (folder.path().join("out"), folder.path().join("bundle"));
    let made = bundled(&model, &options(&folder), &out).unwrap();
    let import = made.import.as_ref().unwrap();
    let plain = matches!(&import.guard, Guard::Passed(check) if !check.plain);
    assert!(plain, "{form}: {import:?}");
    assert!(["int8", "q4"].contains(&made.precision.as_str()), "{form}");
    let bundle = Bundle::open(&out).unwrap();
    bundle.verify().unwrap();
    assert_eq!(bundle.manifest, made);
    let mut source = Engine::open(&model, &options(&folder)).unwrap();
    let mut engine = Engine::open(&out, &options(&folder)).unwrap();
    assert_eq!(engine.card().guard.as_ref(), Some(&import.guard));
    let alike = |card: &Card| (card.plan, card.exact, card.chat, card.context_length);
    assert_eq!(alike(engine.card()), alike(source.card()), "{form}");
    assert_eq!(logits(&mut engine), logits(&mut source), "{form}");
    // Nothing else is left beside it.
    let beside = fs::read_dir(folder.path()).unwrap();
    assert_eq!(beside.count(), 3, "out, bundle and state");
    folder
}

#[test]
fn a_bundle_runs_as_the_folder_it_was_made_of() {
    for form in [
        "dynamic-int8",
        "merged",
        "q4",
        "genai-int4",
        "qdq-block",
        "q8-zp",
    ] {
        answers_alike(form, false);
    }
}

#[test]
fn a_bundle_of_floats_is_small_and_runs_as_they_do() {
    for form in [
        "f32",
        "f32-sdpa",
        "f16",
        "genai-f16",
        "opset23-mask",
        "gemma",
        "mistral",
    ] {
        for bias in [false, true] {
            let folder = answers_alike(form, bias);
            let bytes = |of: &str| {
                fs::metadata(folder.path().join("bundle").join(of))
                    .unwrap()
                    .len()
            };
            let matrices = bytes("model.onnx.data");
            assert!(
                bytes("model.onnx") < matrices,
                "{form}: what is big lies outside"
            );
            let config = fs::read(folder.path().join("bundle/config.json")).unwrap();
            assert!(!config.is_empty());
        }
    }
}

#[test]
fn a_bundle_keeps_in_f32_what_the_guard_kept() {
    let folder = with_an_outlier();
    let (model, out) = (folder.path().join("out"), folder.path().join("bundle"));
    bundled(&model, &options(&folder), &out).unwrap();
    let engine = Engine::open(&out, &options(&folder)).unwrap();
    assert_eq!(check(engine.card()).kept.len(), 1);
    assert!(!engine.card().exact);
    let found = divergence(&out, &options(&folder));
    assert!(found < 0.006, "{found}");
}

#[test]
fn a_bundle_says_that_it_was_not_checked() {
    let folder = written("f16", false);
    let out = folder.path().join("bundle");
    let without = Options {
        guard: false,
        ..options(&folder)
    };
    let naming = Naming {
        name: Some("press-helper".into()),
        version: Some("7".into()),
        licence: Some("MIT".into()),
    };
    let stages = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&stages);
    let progress: Progress = Arc::new(move |stage| seen.lock().unwrap().push(stage));
    make(
        &folder.path().join("out"),
        &naming,
        &without,
        &out,
        &progress,
    )
    .unwrap();
    let text = fs::read_to_string(out.join("manifest.toml")).unwrap();
    assert!(text.contains("guard = \"skipped\""), "{text}");
    let Manifest {
        name,
        version,
        licence,
        ..
    } = Manifest::parse(&text).unwrap();
    assert_eq!([name, version, licence], ["press-helper", "7", "MIT"]);
    let engine = Engine::open(&out, &options(&folder)).unwrap();
    assert_eq!(engine.card().guard, Some(Guard::Skipped));
    let stages = stages.lock().unwrap();
    assert_eq!(stages[0], Stage::Reading);
    assert!(
        stages
            .iter()
            .all(|stage| !matches!(stage, Stage::Checking(..)))
    );
}

#[test]
fn a_manifest_that_says_nonsense_is_refused() {
    let folder = with_an_outlier();
    let out = folder.path().join("bundle");
    bundled(&folder.path().join("out"), &options(&folder), &out).unwrap();
    let path = out.join("manifest.toml");
    let text = fs::read_to_string(&path).unwrap();
    let figure = text
        .lines()
        .find(|line| line.starts_with("divergence"))
        .unwrap();
    let kept = text
        .lines()
        .rfind(|line| line.starts_with("weight"))
        .unwrap();
    for (old, new, expected) in [
        (figure, "divergence = nan", "not all numbers"),
        (figure, "", "divergence"),
        (figure, "divergence = \"small\"", "divergence"),
        (kept, "weight = \"another\"", "no linear on another"),
    ] {
        fs::write(&path, text.replace(old, new)).unwrap();
        let said = Engine::open(&out, &options(&folder))
            .err()
            .unwrap()
            .to_string();
        assert!(said.contains(expected), "{said:?} should say {expected:?}");
    }
}

#[test]
fn folders_that_cannot_become_bundles_are_left_as_they_are() {
    let folder = written("q8", false);
    let (model, out) = (folder.path().join("out"), folder.path().join("bundle"));
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mine"), "").unwrap();
    let error = bundled(&model, &options(&folder), &out).unwrap_err();
    assert!(matches!(error, BundlingError::Occupied(_)), "{error}");
    fs::remove_file(out.join("mine")).unwrap();
    let (file, link) = (folder.path().join("file"), folder.path().join("link"));
    fs::write(&file, "").unwrap();
    std::os::unix::fs::symlink(&out, &link).unwrap();
    for place in [file.as_path(), &link, Path::new("."), Path::new("/")] {
        let error = bundled(&model, &options(&folder), place).unwrap_err();
        assert!(matches!(error, BundlingError::Occupied(_)), "{error}");
    }
    fs::remove_file(file).unwrap();
    fs::remove_file(link).unwrap();
    // What a run that was killed left behind is not taken for a part of this one.
    let partial = folder.path().join(".bundle.partial/bundle");
    fs::create_dir_all(&partial).unwrap();
    fs::write(partial.join("LICENSE.old"), "").unwrap();
    // Licences are files; folders and links of that name are left alone.
    fs::create_dir(model.join("LICENSES")).unwrap();
    fs::write(model.join("LICENSE.txt"), "MIT").unwrap();
    std::os::unix::fs::symlink("/etc/hostname", model.join("LICENSE.link")).unwrap();
    let made = bundled(&model, &options(&folder), &out).unwrap();
    let licences: Vec<_> = made
        .files
        .iter()
        .filter(|f| f.name.starts_with("LICENSE"))
        .collect();
    assert!(
        matches!(licences[..], [file] if file.name == "LICENSE.txt"),
        "{licences:?}"
    );
    assert!(!out.join("LICENSE.old").exists());
    let error = bundled(&out, &options(&folder), &folder.path().join("again")).unwrap_err();
    assert!(matches!(error, BundlingError::Already(_)), "{error}");
    // The guard can't run it, and nothing else can.
    let graph = model.join("onnx/model_q8.onnx");
    let mut unknown = ModelProto::decode(&*fs::read(&graph).unwrap()).unwrap();
    let nodes = &mut unknown.graph.as_mut().unwrap().node;
    let softmax = nodes.iter_mut().find(|node| node.op_type == "Softmax");
    softmax.unwrap().op_type = "Sparsemax".into();
    fs::write(&graph, unknown.encode_to_vec()).unwrap();
    let error = bundled(&model, &options(&folder), &folder.path().join("again")).unwrap_err();
    let said = error.to_string();
    assert!(said.contains("can't tell"), "{said}");
    fs::write(&graph, "nothing").unwrap();
    let error = bundled(&model, &options(&folder), &folder.path().join("again")).unwrap_err();
    assert!(matches!(error, BundlingError::Open(_)), "{error}");
    assert!(!folder.path().join("again").exists());
    let beside = fs::read_dir(folder.path()).unwrap();
    assert_eq!(beside.count(), 2, "out and bundle");
}
