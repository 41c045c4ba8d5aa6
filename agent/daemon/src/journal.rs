//! What must outlive the process. Changes are noted as they happen and written together; what must not be seen before
//! they are on disk (an acknowledgement, an event) waits for their mark. Never judges a task, and never waits: a
//! thread of its own writes.
//!
//! An error of the disk keeps the batch and tries again, until it is written or the process ends: nothing that hangs on
//! it is seen meanwhile. A file that is damaged, foreign or of a later version is set aside and a new one begun.

mod record;
mod store;

pub use record::Stamp;

use crate::crash;
use anyhow::{Context, Result, bail};
use millwright_task::admission::Kept;
use millwright_task::job::{Post, Ticket};
use millwright_task::limits::JOURNAL_UNKEPT_BYTES;
use millwright_task::recall::Recalled;
use millwright_task::wire::{Key, Reply, Task};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};
use store::{OpenError, Store};
use tokio::sync::mpsc;

const FILE: &str = "journal.redb";
/// Writes in any second, for flash has so many in it.
const WRITES_MAX: u32 = 200;
/// Writes that may follow each other at once after a pause, so that what a stall held up is caught up with.
const BURST: u32 = 10;
/// Changes that nothing waits for are written with others, or after this long.
const LEISURE: Duration = Duration::from_secs(5);
/// Batches that wait for the thread; what comes then is gathered in one.
const BATCHES_MAX: usize = 256;
/// What a change takes beside its payload.
const CHANGE_BYTES: usize = 1024;
/// The gateway's own time is written at least so often.
const STAMP: Duration = Duration::from_hours(1);
/// Between attempts after an error of the disk.
const RETRY: Duration = Duration::from_millis(500);
/// Damaged files that are kept.
const ASIDE_MAX: usize = 8;

/// One change of what is known of tasks.
#[derive(Debug, Clone)]
pub enum Change {
    /// It will be run, with this seed.
    Accepted {
        ticket: Ticket,
        task: Box<Task>,
        seed: u64,
    },
    /// Its sender wants the answer elsewhere now.
    Moved {
        ticket: Ticket,
        reply: Reply,
    },
    /// The model began with it for the so-manieth time.
    Begun {
        ticket: Ticket,
        times: u32,
    },
    /// It runs, and its sender cancelled it.
    Cancelled(Ticket),
    /// It reached its end; what it said last is noted beside.
    Ended(Ticket),
    /// Said once and to be delivered, or remembered, or both.
    Said {
        post: Post,
        at: Duration,
    },
    /// The broker has it, or nobody ever will.
    Delivered(Ticket),
    /// The dedup window's bounds took its text, or all of it.
    Stripped(Ticket),
    Forgotten(Ticket),
    /// A cancel that came before its task; it is used up, or too old.
    CancelKept {
        key: Key,
        at: Duration,
    },
    CancelGone(Key),
}

impl Change {
    /// Whether nothing waits for it. Lost, it costs an answer said twice, or room.
    fn is_leisurely(&self) -> bool {
        matches!(
            self,
            Self::Delivered(_) | Self::Stripped(_) | Self::Forgotten(_)
        )
    }

    /// What it takes in memory, about.
    fn bytes(&self) -> usize {
        let more = match self {
            Self::Accepted { task, .. } => task.bytes,
            Self::Said { post, .. } => post.bytes.len(),
            _ => 0,
        };
        CHANGE_BYTES + more
    }
}

/// What the journal held when it was opened.
#[derive(Debug, Default)]
pub struct Past {
    /// Accepted and not final, by ticket, with their seeds.
    pub open: Vec<(Kept, u64)>,
    /// Remembered final events, the oldest first.
    pub finals: Vec<(Key, Recalled)>,
    /// Not delivered, in the order in which it was said.
    pub unsent: Vec<Post>,
    /// Cancels without a task, the oldest first.
    pub cancels: Vec<(Duration, Key)>,
    /// The last ticket that was given.
    pub last: Ticket,
    /// When it was last written.
    pub stamp: Option<Stamp>,
}

/// A place in the journal: what is noted before it is on disk, once [`Journal::kept`] has passed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Mark(u64);

impl Mark {
    #[cfg(test)]
    pub(crate) fn of(number: u64) -> Self {
        Self(number)
    }
}

/// What the writing thread tells.
#[derive(Debug)]
pub enum Written {
    /// All up to the mark is on disk, so many bytes more than before.
    Kept { mark: Mark, bytes: usize },
    /// The disk refuses; it is tried again.
    Trouble(String),
}

/// What was handed over together. Those that wait are joined, and written in one commit.
struct Batch {
    mark: Mark,
    changes: Vec<Change>,
    bytes: usize,
    stamp: Stamp,
}

impl Batch {
    fn join(&mut self, mut next: Self) {
        self.changes.append(&mut next.changes);
        self.bytes += next.bytes;
        (self.mark, self.stamp) = (next.mark, next.stamp);
    }
}

/// The noting end.
pub struct Journal {
    changes: Vec<Change>,
    /// When the oldest of `changes` was noted.
    since: Option<Instant>,
    is_urgent: bool,
    /// What `changes` take in memory, about, and what all takes that is not on disk.
    bytes: usize,
    unkept_bytes: usize,
    /// The batch that `changes` become, and the last one that is on disk.
    next: Mark,
    kept: Mark,
    written: Instant,
    batches: Option<mpsc::Sender<Batch>>,
    thread: Option<JoinHandle<()>>,
}

impl Journal {
    /// Opens the journal of a state directory, or begins one, and starts its thread.
    pub fn open(state_dir: &Path) -> Result<(Self, Past, mpsc::Receiver<Written>)> {
        fs::create_dir_all(state_dir)
            .with_context(|| format!("the folder {} can't be made", state_dir.display()))?;
        let (store, past) = open(&state_dir.join(FILE))?;
        // A new file's name must last too.
        File::open(state_dir)
            .and_then(|folder| folder.sync_all())
            .with_context(|| format!("the folder {} can't be written", state_dir.display()))?;
        let (batches, batches_rx) = mpsc::channel(BATCHES_MAX);
        let (written, written_rx) = mpsc::channel(4);
        let thread = std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || keep(store, batches_rx, &written))
            .context("the journal's thread can't be started")?;
        let journal = Self {
            changes: Vec::new(),
            since: None,
            is_urgent: false,
            bytes: 0,
            unkept_bytes: 0,
            next: Mark(1),
            kept: Mark(0),
            written: Instant::now(),
            batches: Some(batches),
            thread: Some(thread),
        };
        Ok((journal, past, written_rx))
    }

    /// Notes a change.
    pub fn note(&mut self, change: Change) {
        self.is_urgent |= !change.is_leisurely();
        self.since.get_or_insert_with(Instant::now);
        self.bytes += change.bytes();
        self.unkept_bytes += change.bytes();
        self.changes.push(change);
    }

    /// The place after all that was noted.
    pub fn mark(&self) -> Mark {
        Mark(self.next.0 - u64::from(!self.is_urgent))
    }

    /// Whether more may be noted: no more than so much waits for a disk that is slow or refuses.
    pub fn has_room(&self) -> bool {
        self.unkept_bytes < JOURNAL_UNKEPT_BYTES
    }

    /// The place before which all is on disk.
    pub fn kept(&self) -> Mark {
        self.kept
    }

    /// Whether nothing waits to be written.
    pub fn is_settled(&self) -> bool {
        self.changes.is_empty() && self.kept.0 + 1 == self.next.0
    }

    /// Hands over what was noted, if somebody waits for it, or it has waited long enough, or is much.
    pub fn flush(&mut self, stamp: impl FnOnce() -> Stamp, hurry: bool) {
        let is_late = self.since.is_some_and(|since| since.elapsed() > LEISURE);
        let is_due = self.is_urgent
            || is_late
            || self.bytes >= JOURNAL_UNKEPT_BYTES
            || hurry && !self.changes.is_empty()
            || self.written.elapsed() > STAMP;
        let Some(batches) = &self.batches else { return };
        if !is_due || batches.capacity() == 0 {
            return;
        }
        let batch = Batch {
            mark: self.next,
            changes: std::mem::take(&mut self.changes),
            bytes: std::mem::take(&mut self.bytes),
            stamp: stamp(),
        };
        // Without the thread nothing is ever kept, and the agent ends.
        let _ = batches.try_send(batch);
        self.next.0 += 1;
        self.written = Instant::now();
        self.since = None;
        self.is_urgent = false;
    }

    /// All up to the mark is on disk, so many bytes more than before.
    pub fn keep(&mut self, mark: Mark, bytes: usize) {
        self.kept = self.kept.max(mark);
        self.unkept_bytes -= bytes;
    }
}

impl Drop for Journal {
    /// Waits until what was handed over is written.
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Whether bytes are no row of the journal's, or one that is written as it was read: for fuzzing.
#[doc(hidden)]
pub fn is_sound_row(bytes: &[u8]) -> bool {
    record::is_sound(bytes)
}

/// Opens a file; one that can't be used is set aside.
fn open(path: &Path) -> Result<(Store, Past)> {
    for _ in 0..2 {
        match Store::open(path) {
            Ok(opened) => return Ok(opened),
            Err(OpenError::Taken) => bail!(
                "another process has the journal {}: two agents can't share a state_dir",
                path.display()
            ),
            Err(OpenError::Disk(e)) => {
                return Err(e).with_context(|| format!("the journal {}", path.display()));
            }
            Err(OpenError::Unusable(why)) => {
                let aside = set_aside(path)?;
                tracing::error!(
                    "the journal can't be used: {why}. It is now {}, and a new one is begun: tasks of before are not \
                     known any more",
                    aside.display()
                );
            }
        }
    }
    bail!("the journal {} can't be begun anew", path.display())
}

/// Gives a file another name; the first of a few that is free, else the last.
fn set_aside(path: &Path) -> Result<PathBuf> {
    let name = |n| path.with_extension(format!("unusable-{n}"));
    let free = (1..ASIDE_MAX).map(name).find(|name| !name.exists());
    let aside = free.unwrap_or_else(|| name(ASIDE_MAX));
    fs::rename(path, &aside).with_context(|| format!("{} can't be set aside", path.display()))?;
    Ok(aside)
}

/// Writes batches until nobody makes any: in one commit all that is there when it is due, so that nothing waits for more than
/// one pause.
fn keep(mut store: Store, mut batches: mpsc::Receiver<Batch>, written: &mpsc::Sender<Written>) {
    let mut pace = Pace::begin(Instant::now());
    while let Some(mut batch) = batches.blocking_recv() {
        while let Ok(next) = batches.try_recv() {
            batch.join(next);
        }
        let next = pace.take(Instant::now());
        crash::point("before-commit");
        while let Err(e) = store.write(&batch.changes, &batch.stamp) {
            let trouble = Written::Trouble(e.to_string());
            // The agent is gone: there is nobody to try for.
            if written.blocking_send(trouble).is_err() || batches.is_closed() {
                return;
            }
            sleep(RETRY);
        }
        crash::point("after-commit");
        let Batch { mark, bytes, .. } = batch;
        // Also when nobody listens any more: what was handed over is written.
        let _ = written.blocking_send(Written::Kept { mark, bytes });
        sleep(next.saturating_duration_since(Instant::now()));
    }
}

/// A bucket of tokens for writes, told by one time.
struct Pace {
    /// When the next write would be due if they came evenly.
    due: Instant,
}

impl Pace {
    /// Of a second's writes one comes first and a burst right after it; the rest share what is left of it.
    const STEP: Duration = Duration::from_secs(1)
        .checked_div(WRITES_MAX - BURST - 1)
        .unwrap();

    fn begin(now: Instant) -> Self {
        Self { due: now }
    }

    /// Counts a write, and says when the next may be.
    fn take(&mut self, now: Instant) -> Instant {
        let earliest = now.checked_sub(Self::STEP * BURST);
        self.due = earliest.map_or(self.due, |earliest| self.due.max(earliest)) + Self::STEP;
        self.due
    }
}

#[cfg(test)]
mod tests;
