//! Runs what is fuzzed within limits. Passing one ends the process with a line that says which: libFuzzer keeps the
//! input of a process that aborts.

use crate::heap;
use rustix::time::{ClockId, clock_gettime};
use std::backtrace::Backtrace;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::sync::Mutex;
use std::time::Duration;

/// Set where it is to be said what came of each input.
pub const SAY: &str = "MILLWRIGHT_FUZZ_SAY";

/// What one call may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of all threads together.
    pub cpu: Duration,
    /// More than was live before.
    pub heap_bytes: usize,
}

impl Limits {
    /// For what reads a message, a row or a text: none of them is large.
    pub const SMALL: Self = Self {
        cpu: Duration::from_secs(1),
        heap_bytes: 16 << 20,
    };
}

/// Where the last panic was, and what it said.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// Has panics noted instead of ending the process at once: one that the callee catches is its own affair.
pub fn note_panics() {
    set_hook(Box::new(|panic| {
        let text = format!("{panic}\n{}", Backtrace::capture());
        *PANIC.lock().unwrap_or_else(|e| e.into_inner()) = text;
    }));
}

/// Runs `work`, which must neither panic nor pass a limit.
pub fn guarded<T>(what: &str, limits: Limits, work: impl FnOnce() -> T) -> T {
    let began = cpu();
    heap::allow(Some(limits.heap_bytes));
    let done = catch_unwind(AssertUnwindSafe(work));
    heap::allow(None);
    let took = cpu().saturating_sub(began);
    let Ok(value) = done else {
        let panic = PANIC.lock().unwrap_or_else(|e| e.into_inner());
        fail(&format!("{what} panicked: {panic}"));
    };
    if std::env::var_os(SAY).is_some() {
        eprintln!("{what}: {took:.3?}");
    }
    if took > limits.cpu {
        fail(&format!("{what} took {took:.2?} of CPU time"));
    }
    value
}

fn fail(why: &str) -> ! {
    eprintln!("FAILURE: {why}");
    std::process::abort()
}

/// What all threads of this process have used.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
