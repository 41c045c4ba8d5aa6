//! Every form in which exporters write models, imported and held against ONNX Runtime's logits for the same weights in
//! f32 arithmetic (`tests/goldens/forms.py` makes the goldens).

mod support;

use indicatif::ProgressBar;
use millwright_engine::{Card, Engine, Options, PlanChoice};
use millwright_forge::export::PRESETS;
use millwright_forge::llama::Shape;
use millwright_forge::{Precision, like};
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};
use support::{kl, written};
use tempfile::TempDir;

#[derive(Deserialize)]
struct Golden {
    form: String,
    bias: bool,
    prompt_tokens: usize,
    tokens: Vec<u32>,
    text: String,
    positions: Vec<usize>,
    logits: Vec<Vec<f32>>,
}

/// A form's own reference plan may be off by the order of sums.
const REFERENCE_TOLERANCE: f32 = 2e-3;
/// The flat plan rounds keys and values to f16.
const CACHE_TOLERANCE: f32 = 5e-2;
/// Forms without a matrix of floats, which would be quantised on the way.
const INTEGERS: [&str; 9] = [
    "dynamic-int8",
    "dynamic-uint8",
    "dynamic-uint8-channel",
    "dynamic-uint8-gqa",
    "genai-int4",
    "genai-int8",
    "merged",
    "qdq-block",
    "qdq-channel",
];
/// What int8 activations, and int8 weights where the form's are floats, may cost.
const DIVERGENCE_MAX: f64 = 0.006;

#[test]
fn a_long_context_in_a_small_file_is_no_reason_against_fusing() {
    let shape = Shape {
        layers: 2,
        width: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        mlp: 128,
        vocab: 320,
        context: 8192,
        rope_base: 1e6,
        epsilon: 1e-5,
    };
    for precision in [Precision::Int8, Precision::Q4] {
        let folder = TempDir::new().unwrap();
        let out = folder.path().join("out");
        like::write(&out, "m", &shape, precision, &ProgressBar::hidden()).unwrap();
        let engine = open(&folder, "scalar", PlanChoice::Auto);
        let card = engine.card();
        assert_eq!(
            (card.plan, card.context_length),
            ("flat", 8192),
            "{:?}",
            card.notes
        );
    }
}

fn goldens() -> Vec<Golden> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/forms");
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let read = |path: PathBuf| serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    paths.into_iter().map(read).collect()
}

fn open(folder: &TempDir, kernel: &str, plan: PlanChoice) -> Engine {
    let options = Options {
        threads: Some(1),
        kernel: Some(kernel.to_owned()),
        plan,
        state_dir: folder.path().join("state"),
        // So that prompts come in several steps, each after a past.
        prefill_chunk: 7,
        ..Options::default()
    };
    Engine::open(&folder.path().join("out"), &options).unwrap()
}

/// The largest difference of a logit and the mean KL divergence over the golden's positions.
fn compare(engine: &mut Engine, golden: &Golden) -> (f32, f64) {
    let (mut worst, mut divergence) = (0f32, 0.0);
    engine
        .score(&golden.tokens, &mut |position, logits| {
            let Some(at) = golden.positions.iter().position(|&p| p == position) else {
                return;
            };
            let expected = &golden.logits[at];
            assert_eq!(logits.len(), expected.len());
            worst = logits
                .iter()
                .zip(expected)
                .fold(worst, |w, (a, b)| w.max((a - b).abs()));
            divergence += kl(expected, logits);
        })
        .unwrap();
    (worst, divergence / golden.positions.len() as f64)
}

/// What is not to be expected of each form: that all of it is ours in the flat plan.
fn expect(golden: &Golden, card: &Card) {
    let (plan, exact, note) = match golden.form.as_str() {
        "mistral" => (
            "plain",
            false,
            "its attention is causal over all tokens only up to 8 of them",
        ),
        "gemma" | "phi" => ("flat", false, "operators were left to tract"),
        _ => ("flat", true, ""),
    };
    let form = &golden.form;
    assert_eq!(
        (card.plan, card.exact),
        (plan, exact),
        "{form}: {:?}",
        card.notes
    );
    assert!(
        card.notes.iter().any(|n| n.contains(note)) || note.is_empty(),
        "{form}: {:?}",
        card.notes
    );
}

#[test]
fn every_form_is_fused_and_faithful() {
    let goldens = goldens();
    assert!(
        PRESETS
            .iter()
            .all(|form| goldens.iter().any(|g| g.form == form.name))
    );
    println!(
        "{:24} {:>10} {:>10} {:>10} {:>10}",
        "form", "reference", "f32 acts", "int8 acts", "KL"
    );
    for golden in goldens {
        let Golden { form, bias, .. } = &golden;
        let folder = written(form, *bias);
        let mut engine = open(&folder, "reference", PlanChoice::Reference);
        let encoded = engine.text().encode(&golden.text).unwrap();
        assert_eq!(
            encoded[..golden.prompt_tokens],
            golden.tokens[..golden.prompt_tokens]
        );
        let (reference, _) = compare(&mut engine, &golden);
        assert!(
            reference <= REFERENCE_TOLERANCE,
            "{form}: a logit is off by {reference}"
        );

        let mut engine = open(&folder, "reference", PlanChoice::Auto);
        let (exact, _) = compare(&mut engine, &golden);
        if INTEGERS.contains(&form.as_str()) {
            assert!(
                exact <= CACHE_TOLERANCE,
                "{form}: a logit is off by {exact} with f32 activations"
            );
        }

        let mut engine = open(&folder, "scalar", PlanChoice::Auto);
        expect(&golden, engine.card());
        let (int8, divergence) = compare(&mut engine, &golden);
        println!("{form:24} {reference:10.6} {exact:10.6} {int8:10.6} {divergence:10.6}");
        assert!(
            divergence <= DIVERGENCE_MAX,
            "{form}: KL divergence {divergence}"
        );
    }
}
