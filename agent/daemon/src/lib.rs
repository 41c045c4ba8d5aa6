//! The agent's process: it wires the task protocol and the engine to the broker, the clock and the command
//! line. What is judged, is judged in `millwright-task`; what is computed, in `millwright-engine`.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)
)]
// As in `millwright-task`: refusals are rare.
#![allow(clippy::result_large_err)]

pub mod alarms;
pub mod app;
pub mod broker;
pub mod card;
pub mod clock;
pub mod commands;
pub mod config;
mod confine;
mod crash;
pub mod dispatcher;
pub mod intake;
pub mod journal;
pub mod loader;
mod log;
pub mod outbox;
pub mod pool;
pub mod probe;
pub mod service;
pub mod tally;
pub mod worker;
