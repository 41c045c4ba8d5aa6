//! How many threads suit a model on this machine: measured with the model itself, then remembered beside its
//! packed weights. More is not always faster: two threads can exhaust a board's memory and four get in each other's way.

use crate::bundle::hex;
use crate::cores::{Calm, Cores};
use crate::forward::Forward;
use crate::small;
use crate::turn::{Batch, Row};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::time::{Duration, Instant};
use tract_onnx::prelude::TractResult;

/// Of two counts that are this close, the smaller is taken: it leaves cores to others.
const NEARLY: f64 = 1.03;
/// What measuring decode steps, and prefill chunks, may take once the weights are in memory.
const BUDGET: Duration = Duration::from_millis(1500);
const ROUNDS_MIN: usize = 3;
const ROUNDS_MAX: usize = 15;
/// The smallest piece of a prompt that is still like a large one.
const PIECE_MIN: usize = 8;
/// A piece is as long as lets the budget do for this many rounds: rather fewer than shorter ones.
const PIECE_ROUNDS: usize = 5;

/// Threads for a step that only decodes, and for one with prompt tokens in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Threads {
    pub decode: usize,
    pub prefill: usize,
}

/// What decides the counts. Any other is another measurement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Key {
    /// The engine's version: other kernels, other counts.
    pub(crate) engine: String,
    /// The bundle's digest, to which the packed file is bound.
    pub(crate) model: String,
    pub(crate) kernel: String,
    pub(crate) plan: String,
    pub(crate) cores: String,
    pub(crate) prefill_chunk: usize,
}

/// The file, as it is written.
#[derive(Serialize, Deserialize)]
struct Remembered {
    key: Key,
    threads: Threads,
}

impl Key {
    /// Names the file after all that decides, so that other options have one of their own.
    fn file(&self) -> String {
        let inside = serde_json::to_vec(self).unwrap_or_default();
        let digest = hex(&Sha256::digest(&inside)[..4]);
        let model = self.model.get(..16).unwrap_or("model");
        format!(
            "{model}-{}-{}-{digest}.threads.json",
            self.kernel, self.plan
        )
    }
}

/// The counts for this model, of which `positions` may be used: those remembered in `folder`, else measured now.
pub(crate) fn threads(
    key: Key,
    cores: &Cores,
    folder: &Path,
    positions: usize,
    forward: &mut dyn Forward,
) -> TractResult<Threads> {
    let most = cores.threads_fast();
    if most == 1 {
        return Ok(Threads {
            decode: 1,
            prefill: 1,
        });
    }
    let prefill_chunk = key.prefill_chunk;
    settled(key, most, folder, || {
        tracing::info!("measuring how many of {most} threads suit this model");
        let calm = Calm::begin();
        let threads = measure(most, prefill_chunk, positions, forward)?;
        Ok((threads, calm.held()))
    })
}

/// What `folder` remembers, else what `measure` gives; that is remembered if it also says that nothing disturbed it.
fn settled(
    key: Key,
    most: usize,
    folder: &Path,
    measure: impl FnOnce() -> TractResult<(Threads, bool)>,
) -> TractResult<Threads> {
    let path = folder.join(key.file());
    match recall(&path, &key, most) {
        Ok(Some(threads)) => return Ok(threads),
        Ok(None) => {}
        Err(why) => tracing::warn!("{} is measured anew: {why}", path.display()),
    }
    let (threads, calm) = measure()?;
    if !calm {
        tracing::warn!("other work took the cores meanwhile, so the next start measures again");
        return Ok(threads);
    }
    let remembered = Remembered { key, threads };
    if let Err(error) = small::remember(&path, &remembered) {
        tracing::warn!(
            "{} can't be written, so the next start measures again: {error}",
            path.display()
        );
    }
    Ok(threads)
}

/// What the file says for this key; `None` if there is none.
fn recall(path: &Path, key: &Key, most: usize) -> Result<Option<Threads>, String> {
    let Some(Remembered { key: of, threads }) = small::recall(path)? else {
        return Ok(None);
    };
    if of != *key {
        return Err("it was measured with another model, engine, option or CPU".into());
    }
    let possible = |count| (1..=most).contains(&count);
    if !possible(threads.decode) || !possible(threads.prefill) {
        return Err(format!("it names threads that are not 1 to {most}"));
    }
    Ok(Some(threads))
}

fn measure(
    most: usize,
    prefill_chunk: usize,
    positions: usize,
    forward: &mut dyn Forward,
) -> TractResult<Threads> {
    let positions = positions.min(2 * prefill_chunk.max(PIECE_MIN));
    if !forward.reserve(0, positions) {
        // Nothing runs yet, so this doesn't happen; all of them is what there was before tuning.
        return Ok(Threads {
            decode: most,
            prefill: most,
        });
    }
    let threads = measure_reserved(most, prefill_chunk.min(positions), positions, forward);
    forward.release(0);
    threads
}

fn measure_reserved(
    most: usize,
    chunk: usize,
    positions: usize,
    forward: &mut dyn Forward,
) -> TractResult<Threads> {
    let (counts, mut logits, mut next) = (counts(most), Vec::new(), 0);
    let mut run = |tokens: usize, threads: usize| {
        let first = if next + tokens > positions { 0 } else { next };
        next = first + tokens;
        logits.clear();
        let batch = piece(first, tokens, forward.vocab());
        let start = Instant::now();
        forward.forward(&batch, threads, &mut logits)?;
        TractResult::Ok(start.elapsed())
    };
    // The first run brings the weights into memory.
    run(1, most)?;
    let decode = rounds(&counts, BUDGET, |threads| run(1, threads))?;
    let small = chunk.min(PIECE_MIN);
    let estimate = run(small, most)? * most as u32;
    let share = BUDGET.as_secs_f64() / (counts.len() * PIECE_ROUNDS) as f64;
    let tokens = (small as f64 * share / estimate.as_secs_f64().max(1e-9)) as usize;
    let tokens = tokens.clamp(small, chunk);
    let prefill = rounds(&counts, BUDGET, |threads| run(tokens, threads))?;
    let chosen = Threads {
        decode: choose(&decode),
        prefill: choose(&prefill),
    };
    tracing::info!(
        decode_ms = ?millis(&decode),
        prefill_ms = ?millis(&prefill),
        "{} threads to decode, {} for prompts ({tokens} tokens tried)",
        chosen.decode,
        chosen.prefill
    );
    Ok(chosen)
}

/// Tokens of slot 0 from `first` on; what they are doesn't matter to their cost.
fn piece(first: usize, tokens: usize, vocab: usize) -> Batch {
    let row = |position: usize| Row {
        token: (position * 31 % vocab.max(1)) as u32,
        slot: 0,
        position,
    };
    Batch {
        rows: (first..first + tokens).map(row).collect(),
        sample: vec![tokens - 1],
    }
}

/// What to try: each count up to four, then steps of a third to a half, and the most.
pub(crate) fn counts(most: usize) -> Vec<usize> {
    let steps = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192];
    let mut counts: Vec<usize> = steps.into_iter().filter(|&n| n < most).collect();
    counts.push(most);
    counts
}

/// The median time of each count. Rounds go up and down in turn, so that a drift of the clock favours none; they
/// end with the budget once each count had its least, and at three times the budget even before that.
fn rounds<E>(
    counts: &[usize],
    budget: Duration,
    mut run: impl FnMut(usize) -> Result<Duration, E>,
) -> Result<Vec<(usize, Duration)>, E> {
    let mut times = vec![Vec::new(); counts.len()];
    let mut spent = Duration::ZERO;
    'rounds: for round in 0..ROUNDS_MAX {
        if round >= ROUNDS_MIN && spent >= budget {
            break;
        }
        for turn in 0..counts.len() {
            // The most first: if time runs out in the first round, what is missing are the slow ones.
            let index = if round % 2 == 0 {
                counts.len() - 1 - turn
            } else {
                turn
            };
            let time = run(counts[index])?;
            times[index].push(time);
            spent += time;
            if spent >= 3 * budget {
                break 'rounds;
            }
        }
    }
    let measured = counts.iter().zip(times).filter(|(_, t)| !t.is_empty());
    let median = |mut times: Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2]
    };
    Ok(measured.map(|(&n, times)| (n, median(times))).collect())
}

/// The smallest count that is nearly as fast as the fastest.
fn choose(times: &[(usize, Duration)]) -> usize {
    let best = times
        .iter()
        .map(|(_, time)| *time)
        .min()
        .unwrap_or_default();
    let near = |time: &Duration| time.as_secs_f64() <= best.as_secs_f64() * NEARLY;
    let near = times.iter().filter(|(_, time)| near(time));
    near.map(|(count, _)| *count).min().unwrap_or(1)
}

fn millis(times: &[(usize, Duration)]) -> Vec<f64> {
    let round = |time: &Duration| (time.as_secs_f64() * 1e5).round() / 1e2;
    times.iter().map(|(_, time)| round(time)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::fs;
    use tempfile::TempDir;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    /// What a machine on which a step takes `cost(threads)` settles for, and how long it was measured.
    fn settle(most: usize, cost: impl Fn(usize) -> Duration) -> (usize, Duration) {
        let mut spent = Duration::ZERO;
        let times = rounds(&counts(most), BUDGET, |threads| {
            spent += cost(threads);
            Ok::<_, Infallible>(cost(threads))
        });
        (choose(&times.unwrap()), spent)
    }

    #[test]
    fn the_smallest_count_that_is_nearly_the_best_wins() {
        // A Pi 5's memory: 9.3, 13.2 and 11.6 GB/s at one, two and four threads.
        assert_eq!(settle(4, |n| MS([0, 93, 66, 70, 76][n])).0, 2);
        assert_eq!(settle(4, |n| MS(1200 / n as u64)).0, 4);
        assert_eq!(settle(4, |n| MS([0, 100, 98, 98, 98][n])).0, 1);
        assert_eq!(settle(4, |n| MS([0, 200, 102, 100, 100][n])).0, 2);
        assert_eq!(settle(1, |_| MS(5)).0, 1);
    }

    #[test]
    fn one_slow_run_decides_nothing() {
        let mut runs = 0;
        let times = rounds(&[1, 2], BUDGET, |threads| {
            runs += 1;
            Ok::<_, Infallible>(if runs == 1 {
                MS(400)
            } else {
                MS(30 / threads as u64)
            })
        });
        assert_eq!(choose(&times.unwrap()), 2);
    }

    #[test]
    fn measuring_is_bounded_however_slow_the_model() {
        for cost in [0, 1, 50, 400, 2000, 60_000] {
            let (count, spent) = settle(4, |n| MS(cost) / n as u32);
            assert!(spent <= 3 * BUDGET + MS(cost), "{cost} ms: {spent:?}");
            // Where time allowed but one run, it was the one with all threads.
            assert_eq!(count, if cost == 0 { 1 } else { 4 });
        }
    }

    #[test]
    fn counts_end_with_the_most() {
        assert_eq!(counts(1), [1]);
        assert_eq!(counts(4), [1, 2, 3, 4]);
        assert_eq!(counts(10), [1, 2, 3, 4, 6, 8, 10]);
    }

    fn key() -> Key {
        Key {
            engine: "1".into(),
            model: "ab".repeat(32),
            kernel: "scalar".into(),
            plan: "flat".into(),
            cores: "0,1".into(),
            prefill_chunk: 128,
        }
    }

    #[test]
    fn what_was_measured_in_peace_is_remembered_for_its_options() {
        let folder = TempDir::new().unwrap();
        let of = |n| Threads {
            decode: n,
            prefill: n,
        };
        let settle = |key, measured, calm| {
            let mut asked = false;
            let threads = settled(key, 4, folder.path(), || {
                asked = true;
                Ok((of(measured), calm))
            });
            (threads.unwrap(), asked)
        };
        assert_eq!(settle(key(), 1, false), (of(1), true));
        assert_eq!(settle(key(), 2, true), (of(2), true));
        assert_eq!(settle(key(), 3, true), (of(2), false));
        // An agent and a command line with other options don't take each other's files.
        let other = || Key {
            prefill_chunk: 64,
            ..key()
        };
        assert_eq!(settle(other(), 4, true), (of(4), true));
        assert_eq!(settle(key(), 3, true), (of(2), false));
        assert_eq!(settle(other(), 3, true), (of(4), false));
        // A file that is not ours is replaced.
        fs::write(folder.path().join(key().file()), b"{}").unwrap();
        assert_eq!(settle(key(), 3, true), (of(3), true));
        assert_eq!(settle(key(), 1, true), (of(3), false));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn only_a_file_of_ours_for_this_very_key_is_believed() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("deep/x.threads.json");
        assert_eq!(recall(&path, &key(), 4), Ok(None));
        let threads = Threads {
            decode: 2,
            prefill: 4,
        };
        let save = |key, threads| {
            small::remember(&path, &Remembered { key, threads }).unwrap();
        };
        save(key(), threads);
        assert_eq!(recall(&path, &key(), 4), Ok(Some(threads)));
        assert!(recall(&path, &key(), 3).unwrap_err().contains("1 to 3"));
        let other = Key {
            cores: "0".into(),
            ..key()
        };
        save(other, threads);
        assert!(recall(&path, &key(), 4).unwrap_err().contains("another"));
        let whole = serde_json::to_vec(&Remembered {
            key: key(),
            threads,
        })
        .unwrap();
        let padded = [&whole[..whole.len() - 1], &b" ".repeat(70_000)[..], b"}"].concat();
        for bad in [
            &b""[..],
            b"{}",
            b"\xff\x00",
            &whole[..whole.len() / 2],
            &padded,
        ] {
            fs::write(&path, bad).unwrap();
            assert!(
                recall(&path, &key(), 4)
                    .unwrap_err()
                    .contains("no such file")
            );
        }
        save(
            key(),
            Threads {
                decode: 0,
                ..threads
            },
        );
        assert!(recall(&path, &key(), 4).is_err());
        // A folder where the file belongs: an error that is told, not a crash.
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(recall(&path, &key(), 4).is_err());
        assert!(small::remember(&path, &0).is_err());
        let left = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(left, 1, "nothing half-written stays");
    }
}
