//! How fast this machine reads memory: the ceiling of decoding. Measures, and knows nothing of models.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

/// Larger than a gateway's caches, small enough for its memory.
const BUFFER_BYTES: usize = 128 << 20;
const PASSES: usize = 5;

/// Bytes a second that `threads` threads read together; the median of a few passes over 128 MiB.
pub fn read_bytes_per_second(threads: usize) -> f64 {
    let threads = threads.max(1);
    let part = vec![1u64; BUFFER_BYTES / 8 / threads];
    let buffers: Vec<Vec<u64>> = (0..threads).map(|_| part.clone()).collect();
    let mut rates: Vec<f64> = (0..PASSES)
        .map(|_| {
            let start = Instant::now();
            thread::scope(|scope| {
                for buffer in &buffers {
                    scope.spawn(|| black_box(sum(black_box(buffer))));
                }
            });
            (part.len() * 8 * threads) as f64 / start.elapsed().as_secs_f64()
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    rates[PASSES / 2]
}

/// Thirty-two sums, so that no addition waits for another.
fn sum(values: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    for chunk in values.chunks_exact(32) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*value);
        }
    }
    lanes.iter().fold(0, |all, lane| all.wrapping_add(*lane))
}
