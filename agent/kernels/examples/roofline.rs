//! Prints what each kernel reaches on this machine: GB/s of weights for one token, and operations per second for
//! 64 tokens, over about 140 MB of weights in the shapes of SmolLM2-135M.
//!
//! `cargo run --release -p millwright-kernels --example roofline [threads]`

use millwright_kernels::packed::{Packed, Shape};
use millwright_kernels::{Job, Kernel, Pool, Quantised, Rows};
use std::time::{Duration, Instant};

/// Rows and columns of one layer's linears, in groups that share their activations; there are 30 layers and a head.
const LAYER: [&[(usize, usize)]; 4] = [
    &[(576, 576), (192, 576), (192, 576)],
    &[(576, 576)],
    &[(1536, 576), (1536, 576)],
    &[(576, 1536)],
];
const HEAD: [&[(usize, usize)]; 1] = [&[(49152, 576)]];

fn main() {
    let threads = std::env::args()
        .nth(1)
        .map_or(1, |text| text.parse().expect("a number of threads"));
    let pool = Pool::new(threads);
    let groups: Vec<&[(usize, usize)]> = std::iter::repeat_n(LAYER, 30)
        .flatten()
        .chain(HEAD)
        .collect();
    let shape = |&(rows, cols): &(usize, usize)| Shape::new(rows, cols).expect("a shape");
    let bytes: usize = groups
        .iter()
        .flat_map(|group| group.iter())
        .map(|pair| shape(pair).bytes())
        .sum();
    let macs: usize = groups
        .iter()
        .flat_map(|group| group.iter())
        .map(|(rows, cols)| rows * cols)
        .sum();
    // Any bytes do: the time does not depend on them, unless scales are denormal, so they are made 1.
    let mut weights = vec![0x5au8; bytes];
    for block in weights.chunks_exact_mut(544) {
        block[..32].as_chunks_mut().0.fill([0x00, 0x3c]);
    }
    println!(
        "{threads} threads, {:.1} MB of weights, {:.1} million weights",
        bytes as f64 / 1e6,
        macs as f64 / 1e6
    );
    for kernel in Kernel::available() {
        for m in [1, 4, 64] {
            let mut run = || {
                let mut rest = &weights[..];
                for group in &groups {
                    let width = group[0].1;
                    let x = vec![0.5; m * width];
                    let mut a = Quantised::new();
                    kernel.quantise_rows(Rows::Plain(&x), width, &mut a, &pool);
                    let mut outputs: Vec<_> =
                        group.iter().map(|(rows, _)| vec![0.0; m * rows]).collect();
                    let mut jobs = Vec::new();
                    for (pair, y) in group.iter().zip(&mut outputs) {
                        let (bytes, after) = rest.split_at(shape(pair).bytes());
                        rest = after;
                        jobs.push(Job {
                            weight: Packed::new(shape(pair), kernel.layout(), bytes)
                                .expect("packed"),
                            y,
                        });
                    }
                    kernel.matmuls(&mut jobs, &a, &pool);
                }
            };
            let best = fastest(&mut run);
            println!(
                "{:>10} m={m:<2} {:>9.3} ms {:>7.1} GB/s {:>8.1} GOPS {:>8.1} tokens/s",
                kernel.name(),
                best * 1e3,
                bytes as f64 / best / 1e9,
                2.0 * (macs * m) as f64 / best / 1e9,
                m as f64 / best
            );
        }
    }
}

/// The shortest of as many runs as fit two seconds, at least two.
fn fastest(run: &mut dyn FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::MAX;
    for round in 0.. {
        let begin = Instant::now();
        run();
        best = best.min(begin.elapsed().as_secs_f64());
        if round > 0 && start.elapsed() > Duration::from_secs(2) {
            break;
        }
    }
    best
}
