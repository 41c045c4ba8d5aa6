//! Packing is streaming: what it takes beside the packed file doesn't grow with the weights. Alone in its process,
//! whose resident memory it measures.
#![cfg(target_os = "linux")]

use indicatif::ProgressBar;
use millwright_engine::{Engine, Options};
use millwright_forge::llama::Shape;
use millwright_forge::{Precision, like};
use std::fs;

/// 58 million weights, of which a linear has 8 at most.
const SHAPE: Shape = Shape {
    layers: 2,
    width: 1024,
    heads: 16,
    kv_heads: 4,
    head_dim: 64,
    mlp: 8192,
    vocab: 2048,
    context: 256,
    rope_base: 10_000.0,
    epsilon: 1e-5,
};
/// What opening such a model may take beside its weights; a linear of the bundle is in memory at a time.
const BESIDE_MAX: usize = 24 << 20;

/// A field of `/proc/self/status` in bytes.
fn status(field: &str) -> usize {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let kilobytes = line.unwrap().trim_start_matches(':').trim();
    let digits = kilobytes.trim_end_matches(" kB");
    digits.parse::<usize>().unwrap() << 10
}

#[test]
fn what_packing_takes_does_not_grow_with_the_weights() {
    for precision in [Precision::Int8, Precision::Q4] {
        let folder = tempfile::tempdir().unwrap();
        like::write(
            folder.path(),
            "m",
            &SHAPE,
            precision,
            &ProgressBar::hidden(),
        )
        .unwrap();
        let options = Options {
            threads: 1,
            state_dir: folder.path().join("state"),
            ..Options::default()
        };
        // From here on the peak is counted anew.
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = status("VmRSS");
        let engine = Engine::open(folder.path(), &options).unwrap();
        let taken = status("VmHWM").saturating_sub(before);
        let packed = engine.usage().packed_bytes;
        println!("{precision}: {taken} bytes beside {packed}");
        // The packed file is mapped and not yet read.
        assert!(taken <= BESIDE_MAX, "{taken} bytes to pack {packed}");
        assert!(packed > BESIDE_MAX);
    }
}
