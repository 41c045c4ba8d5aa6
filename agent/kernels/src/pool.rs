//! A few threads that do the same thing to different rows, woken hundreds of times a token.
//! Not a scheduler: one job at a time, split by its caller, no queue, no stealing. Which cores the threads run on is
//! for whoever starts them to say ([`Pool::started`]).

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread that has nothing to do spins before it sleeps. Longer than the gap between two
/// dispatches of one token, shorter than anything a power meter would notice.
const SPIN: Duration = Duration::from_micros(50);

type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// The threads. The one that calls [`Pool::run`] is worker 0. Not `Sync`, so that there is one caller.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// How many of them work; also what keeps the pool from being `Sync`.
    active: Cell<usize>,
    /// Whether a job is running, which must not start another.
    running: Cell<bool>,
}

struct Shared {
    /// The job to do; a change is the signal to start.
    job: AtomicU64,
    /// Written before `job` changes and read after, so never at the same time.
    task: UnsafeCell<Option<*const Task<'static>>>,
    /// Workers that have not finished the current job.
    pending: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Which workers sleep, so that a busy pool makes no system call and those not asked for sleep on.
    asleep: Vec<AtomicBool>,
    lock: Mutex<()>,
    finished: Condvar,
    caller_sleeps: AtomicBool,
}

/// One job's number and how many workers it has, in one word: read apart, the one could be another job's.
#[derive(Copy, Clone, PartialEq, Eq)]
struct Job(u64);

impl Job {
    const WORKERS_MAX: usize = u16::MAX as usize;

    fn next(self, workers: usize) -> Self {
        Self(((self.0 >> 16) + 1) << 16 | workers as u64)
    }

    fn workers(self) -> usize {
        self.0 as usize & Self::WORKERS_MAX
    }
}

// SAFETY: `task` is the only field that is not Sync by itself. It is written by the one caller of `run` (Pool
// is not Sync) while no worker is in a job, and read by workers that a job counts after they saw `job` change
// (SeqCst). What it points to is Sync, and `run` outlives every use of it.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is to something Sync.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` workers, at least one, of which the caller is one.
    ///
    /// # Panics
    /// If the system refuses a thread.
    pub fn new(threads: usize) -> Self {
        Self::started(threads, |_| {})
    }

    /// The same; `on_start(worker)` runs once on each thread that is started, before its first job. There the
    /// thread may choose its cores. The caller's thread, worker 0, is left alone.
    ///
    /// # Panics
    /// If the system refuses a thread.
    pub fn started(threads: usize, on_start: impl Fn(usize) + Send + Sync + 'static) -> Self {
        let workers = threads.clamp(1, Job::WORKERS_MAX);
        let shared = Arc::new(Shared {
            job: AtomicU64::new(0),
            task: UnsafeCell::new(None),
            pending: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            asleep: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            lock: Mutex::new(()),
            finished: Condvar::new(),
            caller_sleeps: AtomicBool::new(false),
        });
        let on_start = Arc::new(on_start);
        let spawn = |worker| {
            let (shared, on_start) = (Arc::clone(&shared), Arc::clone(&on_start));
            std::thread::Builder::new()
                .name(format!("kernels-{worker}"))
                .spawn(move || {
                    // Its panic is the first job's.
                    shared.attempt(|| on_start(worker));
                    shared.work(worker);
                })
                .expect("the system refused a thread")
        };
        let threads = (1..workers).map(spawn).collect();
        Self {
            shared,
            threads,
            active: Cell::new(workers),
            running: Cell::new(false),
        }
    }

    /// Workers, the caller included.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Has the jobs that follow done by this many workers: at least one, at most all. The others sleep.
    pub fn limit(&self, workers: usize) {
        self.active.set(workers.clamp(1, self.threads()));
    }

    /// Calls `task(worker, workers)` once on every worker that [`Pool::limit`] lets work, and returns when all are
    /// done. A panic of any of them is the caller's, after all are done.
    ///
    /// # Panics
    /// Also if a job calls this on the same pool.
    pub fn run(&self, task: &Task) {
        let workers = self.active.get();
        if workers == 1 {
            return task(0, 1);
        }
        assert!(!self.running.replace(true), "a job started a job");
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. No worker uses the pointer after `pending` is zero, and this
        // function does not return, by panic either, before that.
        let pointer = unsafe { std::mem::transmute::<&Task<'_>, *const Task<'static>>(task) };
        // SAFETY: no job is running, so no worker reads the cell.
        unsafe { *shared.task.get() = Some(pointer) };
        shared.pending.store(workers - 1, SeqCst);
        self.announce(workers);
        shared.attempt(|| task(0, workers));
        shared.await_workers();
        self.running.set(false);
        let panic = shared
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Starts the next job on the first `workers`. A worker marks itself asleep before it looks for a job for the
    /// last time, so either it sees this one or it is woken here. Both mark by a swap, not by a store: qemu 7.2 lets
    /// a load overtake a SeqCst store of aarch64, and neither would see the other.
    fn announce(&self, workers: usize) {
        let shared = &*self.shared;
        let job = Job(shared.job.load(SeqCst)).next(workers);
        shared.job.swap(job.0, SeqCst);
        for (asleep, thread) in shared.asleep[1..workers].iter().zip(&self.threads) {
            if asleep.load(SeqCst) {
                thread.thread().unpark();
            }
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
        self.announce(self.threads());
        for thread in self.threads.drain(..) {
            // A worker catches what its jobs throw, so there is nothing to hear from it.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self, worker: usize) {
        let mut seen = Job(0);
        loop {
            seen = self.await_job(worker, seen);
            if self.stop.load(SeqCst) {
                return;
            }
            // SAFETY: this job counts this worker, so the cell was written and stays as it is until `pending` is zero.
            let task = unsafe { *self.task.get() };
            if let Some(task) = task {
                // SAFETY: `run` waits for this worker before what it points to ends.
                let task = unsafe { &*task };
                self.attempt(|| task(worker, seen.workers()));
            }
            if self.pending.fetch_sub(1, SeqCst) == 1 && self.caller_sleeps.load(SeqCst) {
                let _guard = self.lock();
                self.finished.notify_one();
            }
        }
    }

    /// Waits for a job after `seen` that counts this worker. Such a job waits for the worker too, so none is missed.
    fn await_job(&self, worker: usize, seen: Job) -> Job {
        let due = || {
            let job = Job(self.job.load(SeqCst));
            (job != seen && worker < job.workers()).then_some(job)
        };
        if let Some(job) = spin_for(due) {
            return job;
        }
        self.asleep[worker].swap(true, SeqCst);
        let job = loop {
            match due() {
                Some(job) => break job,
                None => std::thread::park(),
            }
        };
        self.asleep[worker].store(false, SeqCst);
        job
    }

    fn await_workers(&self) {
        let done = || (self.pending.load(SeqCst) == 0).then_some(());
        if spin_for(done).is_some() {
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

/// What `ready` came to give within [`SPIN`]. The clock is read rarely: reading it costs as much as a job's start.
fn spin_for<T>(ready: impl Fn() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        for _ in 0..64 {
            if let Some(value) = ready() {
                return Some(value);
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return ready();
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
    fn a_job_cannot_start_a_job() {
        thread_local!(static POOL: Pool = Pool::new(2));
        let nested = catch_unwind(|| {
            POOL.with(|pool| pool.run(&|_, _| POOL.with(|pool| pool.run(&|_, _| {}))));
        });
        assert!(nested.is_err());
        POOL.with(|pool| pool.run(&|_, _| {}));
    }

    #[test]
    fn a_panic_at_the_start_of_a_thread_is_the_first_jobs() {
        let pool = Pool::started(2, |_| panic!("no core"));
        assert!(catch_unwind(AssertUnwindSafe(|| pool.run(&|_, _| {}))).is_err());
        pool.run(&|_, _| {});
    }

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

    #[test]
    fn a_limited_pool_works_with_fewer_and_then_with_all_again() {
        let pool = Pool::new(4);
        let mut expected = [0; 4];
        let counts: Vec<AtomicUsize> = (0..4).map(|_| AtomicUsize::new(0)).collect();
        for round in 0..400 {
            let limit = [1, 3, 2, 4, 9, 0][round % 6];
            let active = limit.clamp(1, 4);
            pool.limit(limit);
            if round % 50 == 49 {
                // Long enough for the workers to fall asleep.
                std::thread::sleep(Duration::from_millis(2));
            }
            pool.run(&|worker, workers| {
                assert_eq!(workers, active);
                counts[worker].fetch_add(1, SeqCst);
            });
            expected[..active].iter_mut().for_each(|count| *count += 1);
        }
        assert_eq!(pool.threads(), 4);
        let counts: Vec<usize> = counts.iter().map(|count| count.load(SeqCst)).collect();
        assert_eq!(counts, expected);
    }

    #[test]
    fn each_started_thread_is_told_its_number_once() {
        let started = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&started);
        let pool = Pool::started(3, move |worker| told.lock().unwrap().push(worker));
        pool.run(&|_, _| {});
        drop(pool);
        let mut started = started.lock().unwrap().clone();
        started.sort_unstable();
        assert_eq!(started, [1, 2]);
    }

    /// Asks the system from outside, so that asking wakes nobody: a worker that sleeps uses no time at all, however
    /// loaded the machine is; one that spins always does in the end.
    #[cfg(target_os = "linux")]
    #[test]
    fn an_idle_worker_uses_no_cpu() {
        let pool = Pool::new(2);
        let thread = Mutex::new(None);
        pool.run(&|worker, _| {
            if worker == 1 {
                *thread.lock().unwrap() = std::fs::read_link("/proc/thread-self").ok();
            }
        });
        let thread = thread.into_inner().unwrap().expect("/proc is mounted");
        let schedstat = std::path::Path::new("/proc").join(thread).join("schedstat");
        // Nanoseconds on a CPU, nanoseconds of waiting for one, turns.
        let used = || std::fs::read_to_string(&schedstat).unwrap();
        let mut last = used();
        let slept = (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(100));
            let now = used();
            std::mem::replace(&mut last, now.clone()) == now
        });
        assert!(slept, "an idle worker still runs after ten seconds: {last}");
    }
}
