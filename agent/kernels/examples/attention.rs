//! Prints what attention reaches with each vectorised kernel of this machine, in the shapes of SmolLM2-135M (30 layers, 9 query heads, 3 KV heads of
//! 64): the time of a decoded token at several positions, and of a prompt's token.
//!
//! `cargo run --release -p millwright-kernels --example attention [threads]`

use millwright_kernels::{Heads, KV_BLOCK, Kernel, KvBlock, Pool, Token};
use std::time::{Duration, Instant};

const LAYERS: usize = 30;
const HEADS: Heads = Heads {
    query: 9,
    kv: 3,
    dim: 64,
    scale: 0.125,
};

fn main() {
    let threads = std::env::args()
        .nth(1)
        .map_or(1, |text| text.parse().expect("a number of threads"));
    let pool = Pool::new(threads);
    let head = 2 * KV_BLOCK * HEADS.dim;
    let blocks = 4096usize.div_ceil(KV_BLOCK);
    // f16 ones, a cache for each layer.
    let half = vec![0x3c00u16; LAYERS * blocks * HEADS.kv * head];
    let bytes = vec![1i8; half.len()];
    let ones = [1.0; KV_BLOCK];
    for kernel in Kernel::available()
        .into_iter()
        .filter(Kernel::is_exact)
        .skip(1)
    {
        for (name, is_half) in [("f16", true), ("int8", false)] {
            for (first, tokens) in [(100, 1), (1000, 1), (4000, 1), (1, 512)] {
                let batch: Vec<_> = (first..first + tokens)
                    .map(|keys| Token { sequence: 0, keys })
                    .collect();
                let q = vec![0.01; tokens * HEADS.query * HEADS.dim];
                let mut out = vec![0.0; q.len()];
                let best = fastest(&mut || {
                    for layer in 0..LAYERS {
                        let view = |_, block: usize, kv: usize| {
                            let at = ((layer * blocks + block) * HEADS.kv + kv) * head;
                            if is_half {
                                let (keys, values) = half[at..at + head].split_at(head / 2);
                                KvBlock::F16 { keys, values }
                            } else {
                                let (keys, values) = bytes[at..at + head].split_at(head / 2);
                                KvBlock::I8 {
                                    keys,
                                    values,
                                    key_scales: &ones,
                                    value_scales: &ones,
                                }
                            }
                        };
                        kernel.attend(HEADS, &batch, &q, &view, &mut out, &pool);
                    }
                });
                let pairs: usize = batch.iter().map(|token| token.keys).sum();
                let operations = 4 * pairs * HEADS.query * HEADS.dim * LAYERS;
                println!(
                    "{:>10} {name:>4} {tokens:>3} tokens from {first:>4}: {:>8.3} ms a token, {:>6.1} GFLOPS",
                    kernel.name(),
                    best * 1e3 / tokens as f64,
                    operations as f64 / best / 1e9,
                );
            }
        }
    }
}

/// The shortest of as many runs as fit half a second, at least two.
fn fastest(run: &mut dyn FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::MAX;
    for round in 0.. {
        let begin = Instant::now();
        run();
        best = best.min(begin.elapsed().as_secs_f64());
        if round > 0 && start.elapsed() > Duration::from_millis(500) {
            break;
        }
    }
    best
}
