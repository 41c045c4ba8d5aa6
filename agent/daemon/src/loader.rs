//! Loads the model in a thread of its own, and tries again when what was in the way may be gone: so that a gateway whose model
//! is missing, damaged or too large is mended without a restart. Knows nothing of brokers and tasks.

use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How often it is looked whether to try again: some calls to the kernel.
const LOOK: Duration = Duration::from_secs(2);
/// What no look can tell (a full disk) is tried again after this long: each time costs as much as a first start.
const AGAIN: Duration = Duration::from_hours(1);
/// Entries of a bundle's folder that are looked at.
const ENTRIES_MAX: usize = 1000;

/// Why there is no model.
pub struct Unusable {
    pub reason: String,
    /// Whether what was in the way is gone, where that can be told at little cost.
    pub is_over: Box<dyn FnMut() -> bool + Send>,
}

impl Unusable {
    /// It is over when the model's folder changes, as far as can be told.
    pub fn new(reason: String) -> Self {
        Self {
            reason,
            is_over: Box::new(|| false),
        }
    }
}

/// What came of loading: the model, after which nothing follows, or why there is none.
pub type Outcome<M> = Result<M, String>;

/// Calls `load` now, and until it gives a model again whenever the folder has changed, what was in the way is over, or an hour
/// has passed. The thread ends with its receiver, or with the process: packing can take minutes, and a shutdown does not wait
/// for it.
pub fn spawn<M: Send + 'static>(
    folder: PathBuf,
    load: impl FnMut() -> Result<M, Unusable> + Send + 'static,
) -> Result<mpsc::Receiver<Outcome<M>>> {
    spawn_looking(folder, LOOK, load)
}

fn spawn_looking<M: Send + 'static>(
    folder: PathBuf,
    look: Duration,
    mut load: impl FnMut() -> Result<M, Unusable> + Send + 'static,
) -> Result<mpsc::Receiver<Outcome<M>>> {
    let (outcomes, receiver) = mpsc::channel(1);
    let run = move || {
        loop {
            let seen = Seen::of(&folder);
            // A defect in a library must not end in a loop of restarts.
            let loaded = catch_unwind(AssertUnwindSafe(&mut load));
            let loaded = loaded.unwrap_or_else(|_| {
                let reason = "loading it broke off: the log says of what";
                Err(Unusable::new(reason.into()))
            });
            let mut unusable = match loaded {
                Ok(model) => return drop(outcomes.blocking_send(Ok(model))),
                Err(unusable) => unusable,
            };
            let reason = std::mem::take(&mut unusable.reason);
            if outcomes.blocking_send(Err(reason)).is_err() {
                return;
            }
            while !is_due(&folder, look, &seen, &mut unusable) {
                if outcomes.is_closed() {
                    return;
                }
            }
        }
    };
    thread::Builder::new()
        .name("load".into())
        .spawn(run)
        .context("a thread to load the model can't be started")?;
    Ok(receiver)
}

/// Waits for two looks, and says whether it is worth another try. What has changed must stand still between the two: a copy
/// that is under way is no model yet, and memory that is free for a moment is none.
fn is_due(folder: &Path, look: Duration, seen: &Seen, unusable: &mut Unusable) -> bool {
    thread::sleep(look);
    let (first, was_over) = (Seen::of(folder), (unusable.is_over)());
    if first.entries == seen.entries && !was_over {
        return seen.at.elapsed() > AGAIN;
    }
    thread::sleep(look);
    let still = Seen::of(folder).entries == first.entries;
    let is_over = was_over && (unusable.is_over)();
    still && (first.entries != seen.entries || is_over)
}

/// A folder and those in it, as they were.
struct Seen {
    at: Instant,
    /// Path, inode, length and time of change.
    entries: Vec<(PathBuf, u64, u64, i64)>,
}

impl Seen {
    fn of(folder: &Path) -> Self {
        let mut entries = Vec::new();
        list(folder, true, &mut entries);
        entries.sort_unstable();
        Self {
            at: Instant::now(),
            entries,
        }
    }
}

fn list(folder: &Path, deeper: bool, into: &mut Vec<(PathBuf, u64, u64, i64)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        // Of what a link leads to: models are often links into a cache.
        let Ok(of) = path.metadata() else { continue };
        if into.len() >= ENTRIES_MAX {
            return;
        }
        let changed = of.mtime().wrapping_mul(1_000_000_000) + of.mtime_nsec();
        if of.is_dir() && deeper {
            list(&path, false, into);
        }
        into.push((path, of.ino(), of.len(), changed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use tempfile::TempDir;

    const QUICK: Duration = Duration::from_millis(20);

    #[test]
    fn it_is_tried_again_when_the_folder_changes_and_not_before() {
        let folder = TempDir::new().unwrap();
        let bundle = folder.path().join("bundle");
        let tries = Arc::new(AtomicUsize::new(0));
        let (place, count) = (bundle.clone(), Arc::clone(&tries));
        let load = move || {
            count.fetch_add(1, Ordering::Relaxed);
            let text = fs::read_to_string(place.join("onnx/model"));
            text.map_err(|e| Unusable::new(e.to_string()))
        };
        let mut outcomes = spawn_looking(bundle.clone(), QUICK, load).unwrap();
        assert!(outcomes.blocking_recv().unwrap().is_err());
        thread::sleep(5 * QUICK);
        assert_eq!(tries.load(Ordering::Relaxed), 1);
        fs::create_dir_all(bundle.join("onnx")).unwrap();
        fs::write(bundle.join("onnx/model"), "weights").unwrap();
        // It may have been seen half made, and told so.
        let mut outcome = outcomes.blocking_recv().unwrap();
        while outcome.is_err() {
            outcome = outcomes.blocking_recv().unwrap();
        }
        assert_eq!(outcome.unwrap(), "weights");
        assert!(
            outcomes.blocking_recv().is_none(),
            "nothing follows a model"
        );
    }

    #[test]
    fn it_is_tried_again_when_what_was_in_the_way_is_over_and_survives_a_panic() {
        let folder = TempDir::new().unwrap();
        let free = Arc::new(AtomicBool::new(false));
        let (is_free, mut first) = (Arc::clone(&free), true);
        let load = move || {
            let is_free = Arc::clone(&is_free);
            if is_free.load(Ordering::Relaxed) {
                assert!(!std::mem::take(&mut first), "a defect");
                return Ok(());
            }
            Err(Unusable {
                reason: "no room".into(),
                is_over: Box::new(move || is_free.load(Ordering::Relaxed)),
            })
        };
        let mut outcomes = spawn_looking(folder.path().into(), QUICK, load).unwrap();
        let mut reason = || outcomes.blocking_recv().unwrap().unwrap_err();
        assert_eq!(reason(), "no room");
        free.store(true, Ordering::Relaxed);
        assert!(reason().contains("broke off"));
        fs::write(folder.path().join("model"), "another").unwrap();
        assert!(outcomes.blocking_recv().unwrap().is_ok());
    }

    #[test]
    fn its_thread_ends_with_who_listens() {
        struct Told(Arc<AtomicBool>);
        impl Drop for Told {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let ended = Arc::new(AtomicBool::new(false));
        let told = Told(Arc::clone(&ended));
        let load = move || {
            let _ = &told;
            Err::<(), _>(Unusable::new("none".into()))
        };
        let mut outcomes = spawn_looking("/nonexistent".into(), QUICK, load).unwrap();
        assert!(outcomes.blocking_recv().unwrap().is_err());
        drop(outcomes);
        let end = Instant::now() + Duration::from_secs(20);
        while !ended.load(Ordering::Relaxed) {
            assert!(Instant::now() < end, "the thread goes on");
            thread::sleep(QUICK);
        }
    }
}
