//! How fast this machine reads memory: the ceiling of decoding. Measures, and knows nothing of models.

use crate::bundle::hex;
use crate::cores::{Calm, Cores, Stay, pool};
use crate::room::Room;
use crate::small;
use crate::tuning::counts;
use millwright_kernels::Pool;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

/// Larger than a gateway's caches, small enough for its memory.
const BUFFER_BYTES_MAX: usize = 128 << 20;
/// Less than this would measure caches.
const BUFFER_BYTES_MIN: usize = 32 << 20;
/// Of the memory that is free, one part in this many may be used.
const FREE_PARTS: usize = 4;
const PASSES: usize = 7;
/// No machine reads slower or faster than this: bytes a second.
const POSSIBLE: std::ops::RangeInclusive<f64> = 1e7..=1e13;

/// The file, as it is written.
#[derive(Serialize, Deserialize)]
struct Remembered {
    engine: String,
    cores: String,
    read_bytes_per_second: f64,
}

/// Bytes a second that `threads` threads read together, on the cores that a model of as many threads would use: the
/// best of a few passes over 128 MiB, or over a quarter of the free memory. What disturbs a pass can only make it
/// slower. `None` where less than 128 MiB are free: a quarter of it would measure caches.
pub fn read_bytes_per_second(threads: usize) -> Option<f64> {
    let cores = Cores::here();
    let threads = threads.clamp(1, cores.threads_max());
    Some(measure(&cores, &[threads], &buffer()?).0)
}

/// What the best number of threads reads: as `folder` remembers it of this machine, else measured now. Takes a second
/// and the memory's whole bandwidth, so it belongs before the work. `None` where it can't be known now: other work
/// took the cores, or too little memory is free.
pub fn remembered(folder: &Path) -> Option<f64> {
    let cores = Cores::here();
    settled(folder, &cores.name(), || {
        let counts = counts(cores.threads_fast());
        Some(measure(&cores, &counts, &buffer()?))
    })
}

/// What `folder` remembers of these cores, else what `measured` gives if it also says that nothing disturbed it.
fn settled(
    folder: &Path,
    cores: &str,
    measured: impl FnOnce() -> Option<(f64, bool)>,
) -> Option<f64> {
    let path = folder.join(file(cores));
    match recall(&path, cores) {
        Ok(Some(rate)) => return Some(rate),
        Ok(None) => {}
        Err(why) => tracing::warn!("{} is measured anew: {why}", path.display()),
    }
    let Some((rate, calm)) = measured() else {
        tracing::warn!("too little memory is free to measure how fast it is read");
        return None;
    };
    if !calm {
        tracing::warn!(
            "other work took the cores while memory was measured, so the next start measures again"
        );
        return None;
    }
    tracing::info!("this machine reads {:.1} GB/s", rate / 1e9);
    let remembered = Remembered {
        engine: env!("CARGO_PKG_VERSION").into(),
        cores: cores.into(),
        read_bytes_per_second: rate,
    };
    if let Err(error) = small::remember(&path, &remembered) {
        tracing::warn!(
            "{} can't be written, so the next start measures again: {error}",
            path.display()
        );
    }
    Some(rate)
}

/// Names the file after the cores: a process with fewer has its own.
fn file(cores: &str) -> String {
    format!("bandwidth-{}.json", hex(&Sha256::digest(cores)[..4]))
}

fn recall(path: &Path, cores: &str) -> Result<Option<f64>, String> {
    let Some(file) = small::recall::<Remembered>(path)? else {
        return Ok(None);
    };
    if file.cores != cores || file.engine != env!("CARGO_PKG_VERSION") {
        return Err("it was measured by another engine or on another CPU".into());
    }
    if !POSSIBLE.contains(&file.read_bytes_per_second) {
        return Err(format!("{} bytes a second", file.read_bytes_per_second));
    }
    Ok(Some(file.read_bytes_per_second))
}

/// What is read; its pages are there.
fn buffer() -> Option<Vec<u64>> {
    let bytes = buffer_bytes(Room::here().map(|room| room.bytes as usize))?;
    Some(vec![1; bytes / size_of::<u64>()])
}

fn buffer_bytes(available: Option<usize>) -> Option<usize> {
    let bytes = available.map_or(BUFFER_BYTES_MAX, |free| free / FREE_PARTS);
    (bytes >= BUFFER_BYTES_MIN).then_some(bytes.min(BUFFER_BYTES_MAX))
}

/// The best of a few passes with each of these numbers of threads, and whether nothing disturbed them.
fn measure(cores: &Cores, counts: &[usize], words: &[u64]) -> (f64, bool) {
    let most = counts.iter().copied().max().unwrap_or(1);
    let kept_to = cores.kept_to(most).map(<[usize]>::to_vec);
    let _stay = Stay::on(kept_to.as_deref());
    let pool = pool(most, kept_to.clone());
    let calm = Calm::begin();
    let pass = |threads: usize| {
        pool.limit(threads);
        let start = Instant::now();
        pool.run(&|worker, workers| {
            let part = Pool::split(words.len(), worker, workers);
            black_box(sum(black_box(&words[part])));
        });
        size_of_val(words) as f64 / start.elapsed().as_secs_f64()
    };
    let mut best = 0.0f64;
    for &threads in counts {
        best = (0..PASSES).map(|_| pass(threads)).fold(best, f64::max);
    }
    (best, calm.held())
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use tempfile::TempDir;

    #[test]
    fn what_was_measured_is_remembered_and_nonsense_is_not_believed() {
        let folder = TempDir::new().unwrap();
        let settle = |cores: &str, measured| settled(folder.path(), cores, || measured);
        assert_eq!(settle("a", None), None);
        assert_eq!(settle("a", Some((1e10, false))), None);
        assert_eq!(settle("a", Some((2e10, true))), Some(2e10));
        assert_eq!(settle("a", Some((3e10, true))), Some(2e10));
        assert_eq!(settle("b", Some((4e10, true))), Some(4e10));
        assert_eq!(settle("a", None), Some(2e10));
        let path = folder.path().join(file("a"));
        let save = |cores: &str, rate: f64| {
            let file = Remembered {
                engine: env!("CARGO_PKG_VERSION").into(),
                cores: cores.into(),
                read_bytes_per_second: rate,
            };
            fs::write(&path, serde_json::to_vec(&file).unwrap()).unwrap();
        };
        save("another", 2e10);
        assert!(recall(&path, "a").is_err());
        for rate in [0.0, -1.0, f64::INFINITY, f64::NAN, 1e20] {
            save("a", rate);
            assert!(recall(&path, "a").is_err(), "{rate}");
        }
        fs::write(&path, b"\xff").unwrap();
        assert_eq!(settle("a", Some((5e10, true))), Some(5e10));
    }

    #[test]
    fn this_machine_reads_memory() {
        let words = vec![1; BUFFER_BYTES_MIN / size_of::<u64>()];
        let cores = Cores::here();
        let (rate, _) = measure(&cores, &counts(cores.threads_fast()), &words);
        assert!(POSSIBLE.contains(&rate), "{rate}");
    }

    #[test]
    fn the_buffer_leaves_memory_to_others() {
        const MIB: usize = 1 << 20;
        assert_eq!(buffer_bytes(None), Some(128 * MIB));
        assert_eq!(buffer_bytes(Some(8192 * MIB)), Some(128 * MIB));
        assert_eq!(buffer_bytes(Some(200 * MIB)), Some(50 * MIB));
        assert_eq!(buffer_bytes(Some(128 * MIB - 1)), None);
        assert_eq!(buffer_bytes(Some(0)), None);
    }
}
