//! A few threads that do the same thing to different rows, woken hundreds of times a token.
//! Not a scheduler: one job at a time, split by its caller, no queue, no stealing.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread that has nothing to do spins before it sleeps. Longer than the gap between two
/// dispatches of one token, shorter than anything a power meter would notice.
const SPIN: Duration = Duration::from_micros(50);

type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// The threads. The one that calls [`Pool::run`] is worker 0. Not `Sync`, so that a job can't start a job.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    not_sync: PhantomData<Cell<()>>,
}

struct Shared {
    /// Counts jobs; a change is the signal to start.
    epoch: AtomicU32,
    /// Written before `epoch` changes and read after, so never at the same time.
    task: UnsafeCell<Option<*const Task<'static>>>,
    /// Workers that have not finished the current job.
    pending: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Sleepers wait here; the counters say whether anybody does, so that a busy pool makes no system call.
    lock: Mutex<()>,
    started: Condvar,
    sleepers: AtomicUsize,
    finished: Condvar,
    caller_sleeps: AtomicBool,
}

// SAFETY: `task` is the only field that is not Sync by itself. It is written by the one caller of `run` (Pool
// is not Sync) while no worker is in a job, and read by workers after they saw `epoch` change (SeqCst). What it
// points to is Sync, and `run` outlives every use of it.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is to something Sync.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` workers, at least one, of which the caller is one.
    ///
    /// # Panics
    /// If the system refuses a thread.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            epoch: AtomicU32::new(0),
            task: UnsafeCell::new(None),
            pending: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            lock: Mutex::new(()),
            started: Condvar::new(),
            sleepers: AtomicUsize::new(0),
            finished: Condvar::new(),
            caller_sleeps: AtomicBool::new(false),
        });
        let workers = threads.max(1);
        let spawn = |worker| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("kernels-{worker}"))
                .spawn(move || shared.work(worker, workers))
                .expect("the system refused a thread")
        };
        let threads = (1..workers).map(spawn).collect();
        Self {
            shared,
            threads,
            not_sync: PhantomData,
        }
    }

    /// Workers, the caller included.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `task(worker, workers)` once on every worker and returns when all are done. A panic of any of
    /// them is the caller's, after all are done.
    pub fn run(&self, task: &Task) {
        let workers = self.threads();
        if workers == 1 {
            return task(0, 1);
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. No worker uses the pointer after `pending` is zero, and this
        // function does not return, by panic either, before that.
        let pointer = unsafe { std::mem::transmute::<&Task<'_>, *const Task<'static>>(task) };
        // SAFETY: no job is running, so no worker reads the cell.
        unsafe { *shared.task.get() = Some(pointer) };
        shared.pending.store(workers - 1, SeqCst);
        shared.epoch.fetch_add(1, SeqCst);
        shared.wake();
        shared.attempt(|| task(0, workers));
        shared.await_workers();
        let panic = shared
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Calls `task(index, chunk)` for every chunk of `size` elements of `data` (the last may be shorter),
    /// split over the workers in contiguous runs.
    ///
    /// # Panics
    /// If `size` is zero.
    pub fn chunks<T: Send>(
        &self,
        data: &mut [T],
        size: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let len = data.len();
        let chunks = len.div_ceil(size);
        let data = Shareable(data.as_mut_ptr());
        self.run(&|worker, workers| {
            for index in Self::split(chunks, worker, workers) {
                let start = index * size;
                // SAFETY: the range lies in `data`, which is borrowed mutably for the whole run, and every
                // index belongs to one worker.
                let chunk = unsafe {
                    std::slice::from_raw_parts_mut(data.at(start), size.min(len - start))
                };
                task(index, chunk);
            }
        });
    }

    /// The part of `0..n` that is `worker`'s; contiguous, in order, sizes differ by one at most.
    pub fn split(n: usize, worker: usize, workers: usize) -> Range<usize> {
        let (size, rest) = (n / workers, n % workers);
        let start = worker * size + worker.min(rest);
        start..start + size + usize::from(worker < rest)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        self.shared.epoch.fetch_add(1, SeqCst);
        self.shared.wake();
        for thread in self.threads.drain(..) {
            // A worker catches what its jobs throw, so there is nothing to hear from it.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self, worker: usize, workers: usize) {
        let mut seen = 0;
        loop {
            seen = self.await_job(seen);
            if self.stop.load(SeqCst) {
                return;
            }
            // SAFETY: `epoch` changed, so the cell was written and stays as it is until `pending` is zero.
            let task = unsafe { *self.task.get() };
            if let Some(task) = task {
                // SAFETY: `run` waits for this worker before what it points to ends.
                let task = unsafe { &*task };
                self.attempt(|| task(worker, workers));
            }
            if self.pending.fetch_sub(1, SeqCst) == 1 && self.caller_sleeps.load(SeqCst) {
                let _guard = self.lock();
                self.finished.notify_one();
            }
        }
    }

    /// Waits until `epoch` is not `seen`; the new one. Jobs come one at a time, so none is missed.
    fn await_job(&self, seen: u32) -> u32 {
        if !spin_until(|| self.epoch.load(SeqCst) != seen) {
            self.sleepers.fetch_add(1, SeqCst);
            let mut guard = self.lock();
            while self.epoch.load(SeqCst) == seen {
                guard = self
                    .started
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            self.sleepers.fetch_sub(1, SeqCst);
        }
        self.epoch.load(SeqCst)
    }

    /// After `epoch` changed. A worker raises `sleepers` before it looks at `epoch` for the last time, so
    /// either it saw the change or it is counted here.
    fn wake(&self) {
        if self.sleepers.load(SeqCst) > 0 {
            let _guard = self.lock();
            self.started.notify_all();
        }
    }

    fn await_workers(&self) {
        if spin_until(|| self.pending.load(SeqCst) == 0) {
            return;
        }
        self.caller_sleeps.store(true, SeqCst);
        let mut guard = self.lock();
        while self.pending.load(SeqCst) != 0 {
            guard = self
                .finished
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_sleeps.store(false, SeqCst);
    }

    /// Keeps the first panic for the caller.
    fn attempt(&self, task: impl FnOnce()) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(task)) {
            self.panic
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(panic);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether `done` came true within [`SPIN`]. The clock is read rarely: reading it costs as much as a job's start.
fn spin_until(done: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..64 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return done();
        }
    }
}

/// A pointer into memory that workers write disjoint parts of.
pub(crate) struct Shareable<T>(pub(crate) *mut T);

// SAFETY: it only carries the address; whoever dereferences it vouches for disjointness.
unsafe impl<T: Send> Sync for Shareable<T> {}

impl<T> Shareable<T> {
    /// # Safety
    /// `index` lies in the allocation or at its end.
    pub(crate) unsafe fn at(&self, index: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(index) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_runs_every_job_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for round in 0..300 {
                if round % 100 == 99 {
                    // Long enough for the workers to fall asleep.
                    std::thread::sleep(Duration::from_millis(2));
                }
                pool.run(&|worker, workers| {
                    assert_eq!(workers, threads);
                    counts[worker].fetch_add(1, SeqCst);
                });
            }
            assert!(counts.iter().all(|count| count.load(SeqCst) == 300));
        }
    }

    #[test]
    fn split_covers_everything_in_order() {
        for n in 0..40 {
            for workers in 1..9 {
                let all: Vec<usize> = (0..workers)
                    .flat_map(|w| Pool::split(n, w, workers))
                    .collect();
                assert_eq!(all, (0..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn chunks_are_disjoint_and_complete() {
        let pool = Pool::new(3);
        let mut data = vec![0usize; 103];
        pool.chunks(&mut data, 10, |index, chunk| {
            assert_eq!(chunk.len(), if index == 10 { 3 } else { 10 });
            chunk.fill(index + 1);
        });
        assert!(
            data.iter()
                .enumerate()
                .all(|(at, value)| *value == at / 10 + 1)
        );
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        for guilty in 0..3 {
            let job = |worker, _| assert!(worker != guilty, "worker {worker} fails on purpose");
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(&job)));
            let message = *caught.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("worker {guilty} fails on purpose"));
            let count = AtomicUsize::new(0);
            pool.run(&|_, _| {
                count.fetch_add(1, SeqCst);
            });
            assert_eq!(count.load(SeqCst), 3);
        }
    }

    #[test]
    fn the_caller_sleeps_through_a_long_job() {
        let pool = Pool::new(2);
        let done = AtomicBool::new(false);
        pool.run(&|worker, _| {
            if worker == 1 {
                std::thread::sleep(Duration::from_millis(20));
                done.store(true, SeqCst);
            }
        });
        assert!(done.load(SeqCst));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_idle_pool_uses_no_cpu() {
        let pool = Pool::new(2);
        let ticks = AtomicUsize::new(0);
        // The worker's own CPU time, in nanoseconds: the first field of its schedstat.
        let read = || {
            pool.run(&|worker, _| {
                if worker == 1 {
                    let text =
                        std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
                    let spent = text.split(' ').next().and_then(|field| field.parse().ok());
                    ticks.store(spent.unwrap_or(0), SeqCst);
                }
            });
            ticks.load(SeqCst)
        };
        let before = read();
        std::thread::sleep(Duration::from_millis(200));
        let spent = read() - before;
        assert!(
            spent < 20_000_000,
            "an idle worker used {spent} ns in 200 ms"
        );
    }
}
