//! The engine beside ONNX Runtime with graph optimisation disabled (`tests/goldens/make.py` makes the goldens).
//!
//! With f32 activations (the `reference` kernel) logits are held tightly: what is left is the order of sums and, in the
//! flat plan, the f16 cache. With int8 activations the distributions are compared: KL divergence, and the same
//! likeliest token wherever the golden's margin is wider than rounding can bridge.

mod support;

use millwright_engine::bundle::sha256_of;
use millwright_engine::{Engine, Options, PlanChoice};
use millwright_forge::{Precision, tiny};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use support::kl;
use tempfile::TempDir;

#[derive(Deserialize)]
struct Golden {
    weights_sha256: String,
    text: String,
    prompt_tokens: usize,
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

fn golden(name: &str) -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/goldens")
        .join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn open(folder: &Path, kernel: &str, plan: PlanChoice) -> Engine {
    let state_dir = folder.join("state");
    let kernel = Some(kernel.to_owned());
    let options = Options {
        threads: Some(2),
        kernel,
        state_dir,
        plan,
        ..Options::default()
    };
    Engine::open(folder, &options).unwrap()
}

/// The largest difference of a logit, the mean KL divergence, and the tokens on which the likeliest differs though
/// the golden's margin is above `margin`.
fn compare(
    engine: &mut Engine,
    tokens: &[u32],
    golden: &[Vec<f32>],
    margin: f32,
) -> (f32, f64, usize) {
    let (mut worst, mut divergence, mut differing) = (0f32, 0f64, 0);
    engine
        .score(tokens, &mut |position, logits| {
            let expected = &golden[position];
            assert_eq!(logits.len(), expected.len());
            worst = logits
                .iter()
                .zip(expected)
                .fold(worst, |worst, (a, b)| worst.max((a - b).abs()));
            divergence += kl(expected, logits);
            let mut order: Vec<usize> = (0..expected.len()).collect();
            order.sort_by(|&a, &b| expected[b].total_cmp(&expected[a]));
            let clear = expected[order[0]] - expected[order[1]] > margin;
            let top = (0..logits.len())
                .max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
                .unwrap();
            differing += usize::from(clear && top != order[0]);
        })
        .unwrap();
    (worst, divergence / tokens.len() as f64, differing)
}

fn check(precision: Precision, name: &str, kernel: &str, plan: PlanChoice, tolerance: f32) {
    let folder = TempDir::new().unwrap();
    tiny::write(folder.path(), precision).unwrap();
    let golden = golden(name);
    let weights = sha256_of(&folder.path().join("model.onnx.data")).unwrap();
    assert_eq!(
        weights, golden.weights_sha256,
        "the goldens are of another model: run tests/goldens/make.py"
    );
    let mut engine = open(folder.path(), kernel, plan);
    let wanted = if plan == PlanChoice::Auto {
        "flat"
    } else {
        "plain"
    };
    assert_eq!(engine.card().plan, wanted, "{:?}", engine.card().notes);
    let encoded = engine.text().encode(&golden.text).unwrap();
    assert_eq!(
        encoded[..golden.prompt_tokens],
        golden.tokens[..golden.prompt_tokens],
        "the tokenizer agrees"
    );
    let (worst, divergence, differing) =
        compare(&mut engine, &golden.tokens, &golden.logits, 2.0 * tolerance);
    println!(
        "{name}, {kernel}, {plan:?}: largest difference {worst}, KL divergence {divergence:.6}"
    );
    assert!(worst <= tolerance, "a logit differs by {worst}");
    assert_eq!(differing, 0);
}

#[test]
fn f32_in_the_reference_plan() {
    check(
        Precision::F32,
        "tiny-f32.json",
        "scalar",
        PlanChoice::Reference,
        1e-3,
    );
}

#[test]
fn int8_in_the_reference_plan() {
    check(
        Precision::Int8,
        "tiny-int8.json",
        "scalar",
        PlanChoice::Reference,
        1e-3,
    );
}

#[test]
fn f32_weights_are_quantised_as_the_forge_does() {
    let tokens: Vec<u32> = (3..23).collect();
    let logits = |precision| {
        let folder = TempDir::new().unwrap();
        tiny::write(folder.path(), precision).unwrap();
        let mut engine = open(folder.path(), "scalar", PlanChoice::Auto);
        let mut all: Vec<u32> = Vec::new();
        let mut keep = |_, row: &[f32]| all.extend(row.iter().map(|logit| logit.to_bits()));
        engine.score(&tokens, &mut keep).unwrap();
        all
    };
    assert_eq!(logits(Precision::F32), logits(Precision::Int8));
}

#[test]
fn int8_weights_and_f32_activations_in_the_plain_plan() {
    check(
        Precision::Int8,
        "tiny-int8.json",
        "reference",
        PlanChoice::Plain,
        1e-3,
    );
}

#[test]
fn int8_weights_and_f32_activations_in_the_flat_plan() {
    check(
        Precision::Int8,
        "tiny-int8.json",
        "reference",
        PlanChoice::Auto,
        5e-2,
    );
}

#[test]
fn int8_activations_stay_close() {
    let folder = TempDir::new().unwrap();
    tiny::write(folder.path(), Precision::Int8).unwrap();
    let golden = golden("tiny-int8.json");
    let mut engine = open(folder.path(), "scalar", PlanChoice::Auto);
    let (worst, divergence, differing) = compare(&mut engine, &golden.tokens, &golden.logits, 0.5);
    println!("int8 activations: largest difference {worst}, KL divergence {divergence:.6}");
    assert!(divergence < 0.005, "KL divergence {divergence}");
    assert_eq!(differing, 0);
}

#[derive(Deserialize)]
struct RealGolden {
    weights_sha256: String,
    prompts: Vec<RealPrompt>,
}

#[derive(Deserialize)]
struct RealPrompt {
    text: String,
    tokens: Vec<u32>,
    last: Vec<RealRow>,
}

#[derive(Deserialize)]
struct RealRow {
    position: usize,
    top: Vec<usize>,
    logits: Vec<f32>,
}

/// The real model, where it was pulled: `tests/run` pulls it, and says so with `MILLWRIGHT_TEST_MODEL`.
#[test]
fn smollm2_with_f32_activations() {
    let Some(model) = std::env::var_os("MILLWRIGHT_TEST_MODEL").map(PathBuf::from) else {
        println!("MILLWRIGHT_TEST_MODEL is not set: tests/run sets it");
        return;
    };
    let text = std::fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/smollm2-135m-int8.json"),
    );
    let golden: RealGolden = serde_json::from_str(&text.unwrap()).unwrap();
    assert_eq!(
        sha256_of(&model.join("model.onnx.data")).unwrap(),
        golden.weights_sha256
    );
    let state = TempDir::new().unwrap();
    let options = Options {
        threads: Some(2),
        kernel: Some("reference".into()),
        state_dir: state.path().into(),
        ..Options::default()
    };
    let mut engine = Engine::open(&model, &options).unwrap();
    for prompt in golden.prompts {
        assert_eq!(
            engine.text().encode(&prompt.text).unwrap(),
            prompt.tokens,
            "the tokenizer agrees"
        );
        engine
            .score(&prompt.tokens, &mut |position, logits| {
                for row in prompt.last.iter().filter(|row| row.position == position) {
                    for (&token, &expected) in row.top.iter().zip(&row.logits) {
                        let difference = (logits[token] - expected).abs();
                        assert!(
                            difference < 0.05,
                            "position {position}, token {token}: {difference}"
                        );
                    }
                }
            })
            .unwrap();
    }
}
