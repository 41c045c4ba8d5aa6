//! The fault suite: an agent, a broker and a network that fail in every way we know, and a requester that holds the
//! agent to its promise (agent/task/PROTOCOL.md). Only the outside of the processes is used. tests/faults/README.md
//! says how to run it and what came out.

mod agent;
mod broker;
mod certificate;
mod chance;
mod clock;
mod disk;
mod judge;
mod load;
mod matrix;
mod memory;
mod network;
mod oracle;
mod proxy;
mod request;
mod shim;
pub mod soak;
mod stage;
mod suite;

pub use shim::{ENOSPC, Field, Shim};
pub use suite::{Options, run};

use judge::Verdict;
use stage::Stage;

/// How much of each fault.
#[derive(Clone, Copy)]
struct Scale {
    quick: bool,
    seed: u64,
}

impl Scale {
    fn pick<T>(self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// One row of the matrix.
struct Case {
    family: &'static str,
    name: String,
    run: Box<dyn Fn(Scale) -> Finding + Send + Sync>,
}

impl Case {
    fn new(
        family: &'static str,
        name: impl Into<String>,
        run: impl Fn(Scale) -> Finding + Send + Sync + 'static,
    ) -> Self {
        Self {
            family,
            name: name.into(),
            run: Box::new(run),
        }
    }
}

enum Finding {
    Ran(Ran),
    /// Why it can't be done here.
    Skipped(String),
}

/// What a fault did.
#[derive(Default)]
struct Ran {
    /// How often it happened.
    times: usize,
    verdict: Verdict,
    /// The agent's highest resident memory in KiB.
    peak: u64,
    /// What else is worth saying.
    note: String,
}

impl Ran {
    /// Ends a stage and judges. A fault that never happened was not withstood.
    fn of(stage: Stage, times: usize, note: impl Into<String>) -> Self {
        let (mut verdict, peak) = stage.finish();
        if times == 0 {
            verdict.violate("the fault never happened".into());
        }
        Self {
            times,
            verdict,
            peak,
            note: note.into(),
        }
    }

    fn add(&mut self, other: Self) {
        self.times += other.times;
        self.verdict.add(other.verdict);
        self.peak = self.peak.max(other.peak);
        if self.note.is_empty() {
            self.note = other.note;
        }
    }
}

/// All cases, in the matrix's order.
fn cases() -> Vec<Case> {
    [
        load::cases(),
        agent::cases(),
        memory::cases(),
        broker::cases(),
        network::cases(),
        disk::cases(),
        clock::cases(),
        certificate::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
