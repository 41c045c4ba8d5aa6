//! The f32 form runs in tract as it comes, without our operators, and is causal with a past: a prompt in one
//! piece, in chunks and token by token gives the same logits.

mod support;

use millwright_forge::{Precision, tiny};
use support::{load, logits};

#[test]
fn chunks_and_single_steps_agree_with_the_whole_prompt() {
    let dir = tempfile::tempdir().unwrap();
    tiny::write(dir.path(), Precision::F32).unwrap();
    let plan = load(dir.path()).unwrap();
    let tokens: Vec<i64> = (0..40).map(|i| 3 + i * 37 % 390).collect();
    let whole = logits(&plan, &tokens, &[]).unwrap();
    assert_eq!(whole.len(), tokens.len() * tiny::shape().vocab);
    for cuts in [vec![16], vec![7, 8, 30], (1..40).collect()] {
        let pieces = logits(&plan, &tokens, &cuts).unwrap();
        let off = whole
            .iter()
            .zip(&pieces)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(off < 1e-3, "{off} with cuts at {cuts:?}");
    }
}
