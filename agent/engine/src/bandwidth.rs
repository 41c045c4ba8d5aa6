//! How fast this machine reads memory: the ceiling of decoding. Measures, and knows nothing of models.

use crate::cores::{Calm, Cores, Stay, pool};
use crate::tuning::{counts, read, write};
use serde::{Deserialize, Serialize};
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

/// Larger than a gateway's caches, small enough for its memory.
const BUFFER_BYTES: usize = 128 << 20;
const PASSES: usize = 7;
/// No machine reads slower or faster than this: bytes a second.
const POSSIBLE: std::ops::RangeInclusive<f64> = 1e7..=1e13;
const FILE: &str = "bandwidth.json";

/// The file, as it is written.
#[derive(Serialize, Deserialize)]
struct Remembered {
    engine: String,
    cores: String,
    read_bytes_per_second: f64,
}

/// Bytes a second that `threads` threads read together, on the cores that a model of as many threads would use: the
/// best of a few passes over 128 MiB. What disturbs a pass can only make it slower.
pub fn read_bytes_per_second(threads: usize) -> f64 {
    on(&Cores::here(), threads)
}

/// What the best number of threads reads: as `folder` remembers it of this machine, else measured now. Takes a second
/// and the memory's whole bandwidth, so it belongs before the work.
pub fn remembered(folder: &Path) -> f64 {
    let (cores, path) = (Cores::here(), folder.join(FILE));
    match recall(&path, &cores.name()) {
        Ok(Some(rate)) => return rate,
        Ok(None) => {}
        Err(why) => tracing::warn!("{} is measured anew: {why}", path.display()),
    }
    let calm = Calm::begin();
    let rates = counts(cores.threads_fast()).into_iter();
    let rate = rates.map(|n| on(&cores, n)).fold(0.0, f64::max);
    tracing::info!("this machine reads {:.1} GB/s", rate / 1e9);
    if !calm.held() {
        tracing::warn!("other work took the cores meanwhile, so the next start measures again");
        return rate;
    }
    let remembered = Remembered {
        engine: env!("CARGO_PKG_VERSION").into(),
        cores: cores.name(),
        read_bytes_per_second: rate,
    };
    let bytes = serde_json::to_vec(&remembered).unwrap_or_default();
    if let Err(error) = write(&path, &bytes) {
        tracing::warn!(
            "{} can't be written, so the next start measures again: {error}",
            path.display()
        );
    }
    rate
}

fn recall(path: &Path, cores: &str) -> Result<Option<f64>, String> {
    let Some(bytes) = read(path).map_err(|e| e.to_string())? else {
        return Ok(None);
    };
    let file: Remembered =
        serde_json::from_slice(&bytes).map_err(|e| format!("it is no such file: {e}"))?;
    if file.cores != cores || file.engine != env!("CARGO_PKG_VERSION") {
        return Err("it was measured by another engine or on another CPU".into());
    }
    if !POSSIBLE.contains(&file.read_bytes_per_second) {
        return Err(format!("{} bytes a second", file.read_bytes_per_second));
    }
    Ok(Some(file.read_bytes_per_second))
}

fn on(cores: &Cores, threads: usize) -> f64 {
    let threads = threads.clamp(1, cores.threads_max());
    let kept_to = cores.kept_to(threads).map(<[usize]>::to_vec);
    let _stay = Stay::on(kept_to.as_deref());
    let pool = pool(threads, kept_to.clone());
    let buffers = vec![vec![1u64; BUFFER_BYTES / 8 / threads]; threads];
    let pass = |_| {
        let start = Instant::now();
        pool.run(&|worker, _| {
            black_box(sum(black_box(&buffers[worker])));
        });
        (buffers[0].len() * 8 * threads) as f64 / start.elapsed().as_secs_f64()
    };
    (0..PASSES).map(pass).fold(0.0, f64::max)
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
        let measured = remembered(folder.path());
        assert!(POSSIBLE.contains(&measured), "{measured}");
        // A figure that no measurement would give again.
        let path = folder.path().join(FILE);
        let cores = Cores::here().name();
        let save = |cores: &str, rate: f64| {
            let file = Remembered {
                engine: env!("CARGO_PKG_VERSION").into(),
                cores: cores.into(),
                read_bytes_per_second: rate,
            };
            fs::write(&path, serde_json::to_vec(&file).unwrap()).unwrap();
        };
        save(&cores, 12_345_678.0);
        assert!((remembered(folder.path()) - 12_345_678.0).abs() < 1.0);
        save("another", 12_345_678.0);
        assert!(recall(&path, &cores).is_err());
        for rate in [0.0, -1.0, f64::INFINITY, f64::NAN, 1e20] {
            save(&cores, rate);
            assert!(recall(&path, &cores).is_err(), "{rate}");
        }
        fs::write(&path, b"\xff").unwrap();
        assert!(POSSIBLE.contains(&remembered(folder.path())));
    }
}
