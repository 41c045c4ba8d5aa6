//! The task protocol and its policy: what a task is, what may be answered where, who runs, who waits and
//! who is refused. Pure: no clock (now is an argument), no socket, no thread, no engine.

#![forbid(unsafe_code)]
// Refusals are rare, and boxing them would cost the reader more than the copy costs the machine.
#![allow(clippy::result_large_err)]

pub mod admission;
pub mod calendar;
pub mod job;
pub mod limits;
pub mod pressure;
pub mod recall;
pub mod topic;
pub mod wire;

use std::time::Duration;

/// The moment an event is judged at. Deadlines run on `own`; `wall` is for people and for `expires_at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// The gateway's own time: it goes on while the machine is up or suspended, never jumps, and is carried over
    /// restarts and reboots.
    pub own: Duration,
    /// Milliseconds since 1970 by the wall clock, right or not.
    pub wall_ms: u64,
    /// Whether the wall clock is known to be synchronised.
    pub synced: bool,
}
