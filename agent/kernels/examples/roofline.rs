//! Prints what each vectorised kernel reaches on this machine: GB/s of weights for one token, and operations per second for
//! 64 tokens, over weights of two kinds in the shapes of SmolLM2-135M.
//!
//! `cargo run --release -p millwright-kernels --example roofline [threads]`

use millwright_kernels::packed::{Kind, Packed, Shape};
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
    let weights = groups.iter().flat_map(|group| group.iter());
    let macs: usize = weights.clone().map(|(rows, cols)| rows * cols).sum();
    for (name, kind) in [("int8", Kind::I8), ("4-bit", Kind::Q4)] {
        let size = weights.clone().map(|pair| shape(pair).bytes(kind)).sum();
        // Any bytes do: the time does not depend on them, unless scales are denormal.
        let packed = vec![0x35u8; size];
        println!(
            "{name}, {threads} threads, {:.1} MB, {:.1} million weights",
            size as f64 / 1e6,
            macs as f64 / 1e6
        );
        for kernel in Kernel::available()
            .into_iter()
            .filter(Kernel::is_exact)
            .skip(1)
        {
            for m in [1, 4, 64] {
                let mut buffers = Buffers::default();
                buffers.a.keep_sums(kind.needs_sums());
                let best = fastest(groups.len(), &mut |clock| {
                    let mut rest = &packed[..];
                    for group in &groups {
                        let place = |pair| {
                            let (bytes, after) = rest.split_at(shape(pair).bytes(kind));
                            rest = after;
                            Packed::new(kind, shape(pair), kernel.layout(), bytes).expect("packed")
                        };
                        let packed: Vec<_> = group.iter().map(place).collect();
                        buffers.run(kernel, m, &packed, &pool);
                        clock();
                    }
                });
                println!(
                    "{:>10} m={m:<2} {:>9.3} ms {:>7.1} GB/s {:>8.1} GOPS {:>8.1} tokens/s",
                    kernel.name(),
                    best * 1e3,
                    size as f64 / best / 1e9,
                    2.0 * (macs * m) as f64 / best / 1e9,
                    m as f64 / best
                );
            }
        }
    }
}

/// What an engine would keep from step to step.
#[derive(Default)]
struct Buffers {
    a: Quantised,
    x: Vec<f32>,
    y: Vec<Vec<f32>>,
}

impl Buffers {
    fn run(&mut self, kernel: Kernel, m: usize, weights: &[Packed], pool: &Pool) {
        let width = weights[0].shape().cols();
        self.x.resize(m * width, 0.5);
        kernel.quantise_rows(Rows::Plain(&self.x), width, &mut self.a, pool);
        self.y.resize(weights.len(), Vec::new());
        let mut jobs = Vec::new();
        for (&weight, y) in weights.iter().zip(&mut self.y) {
            y.resize(m * weight.shape().rows(), 0.0);
            jobs.push(Job {
                weight,
                y,
                bias: None,
                residual: None,
                fine: false,
            });
        }
        kernel.matmuls(&mut jobs, &self.a, pool);
    }
}

/// The sum of each part's shortest time, over as many runs as fit two seconds, at least two: other work on the machine
/// rarely leaves a whole run alone. A run calls its argument after each part.
fn fastest(parts: usize, run: &mut dyn FnMut(&mut dyn FnMut())) -> f64 {
    let start = Instant::now();
    let mut best = vec![f64::MAX; parts];
    for round in 0.. {
        let (mut begin, mut best) = (Instant::now(), best.iter_mut());
        run(&mut || {
            let best = best.next().expect("as many parts as said");
            *best = best.min(begin.elapsed().as_secs_f64());
            begin = Instant::now();
        });
        if round > 0 && start.elapsed() > Duration::from_secs(2) {
            break;
        }
    }
    best.iter().sum()
}
