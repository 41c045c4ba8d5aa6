//! What must outlive the process before a message is acknowledged. The seam is here; the implementation below
//! keeps nothing on disk: what it would hold is in the admission and the outbox, bounded there, and a crash
//! loses it. The durable journal takes its place behind the same trait.

use anyhow::Result;
use millwright_task::job::Ticket;
use millwright_task::wire::{Code, Key};

/// One fact about a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record<'a> {
    /// It will be run; `payload` is the message as it came.
    Accepted {
        ticket: Ticket,
        key: &'a Key,
        payload: &'a [u8],
        seed: u64,
    },
    Refused {
        key: &'a Key,
        code: Code,
    },
    /// Its outcome, and the final event byte for byte.
    Final {
        key: &'a Key,
        event: &'static str,
        bytes: &'a [u8],
    },
}

/// Keeps records. When `commit` returns, they are kept.
pub trait Journal: Send {
    /// Keeps all of `records` or none.
    fn commit(&mut self, records: &[Record<'_>]) -> Result<()>;
    /// Tasks accepted and not final.
    fn open(&self) -> usize;
}

/// Keeps records for as long as the process lives.
#[derive(Debug, Default)]
pub struct Volatile {
    open: usize,
}

impl Journal for Volatile {
    fn commit(&mut self, records: &[Record<'_>]) -> Result<()> {
        for record in records {
            match record {
                Record::Accepted { .. } => self.open += 1,
                Record::Final { .. } => self.open = self.open.saturating_sub(1),
                Record::Refused { .. } => {}
            }
        }
        Ok(())
    }

    fn open(&self) -> usize {
        self.open
    }
}
