//! The agent at its capacity, and at 80 % of it right after. Machines that are shared have bad seconds, which say nothing of the
//! agent: it is measured several times, and the median of these stands for all.

use super::rig::Rig;
use super::sender::{Pace, Seen};
use super::table::{Table, Target};
use super::{SENDERS, UNDER_WAY, evenly, io_since};
use crate::process::{Io, Spread, waited_and_ran_s};
use std::time::{Duration, Instant};

pub(super) struct Round {
    /// At capacity: each answer is followed by the next task.
    pub(super) full: Seen,
    pub(super) full_rate: f64,
    /// Tasks at even times.
    pub(super) high: Seen,
    pub(super) high_rate: f64,
    /// Of each second in which the agent's threads ran at 80 %, what they waited for a core. A share of 1: others had the cores
    /// for as long.
    pub(super) waited: Option<f64>,
    /// Processor time for each task at capacity: of the agent, the broker, and this program.
    pub(super) processors_ms: [f64; 3],
    /// Of the agent, at capacity.
    pub(super) io: Option<Io>,
}

impl Round {
    pub(super) fn measure(rig: &mut Rig, time: Duration) -> Result<Self, String> {
        let (io, processors) = (Io::of(rig.pid()), rig.processors());
        let (full, full_rate) = rated(rig, Pace::Open(UNDER_WAY / SENDERS), time);
        let io = io_since(io, rig.pid());
        let now = rig.processors();
        let each = |n: usize| (now[n] - processors[n]) / full.done.len() as f64 * 1e3;
        let processors_ms = [0, 1, 2].map(each);

        let before = waited_and_ran_s(rig.pid());
        let (high, high_rate) = rated(rig, evenly(0.8 * full_rate)?, time);
        let share = before.zip(waited_and_ran_s(rig.pid()));
        let waited = share.map(|(before, after)| (after.0 - before.0) / (after.1 - before.1));
        Ok(Self {
            full,
            full_rate,
            high,
            high_rate,
            waited,
            processors_ms,
            io,
        })
    }
}

/// What the senders saw, and how many tasks were answered in a second.
fn rated(rig: &mut Rig, pace: Pace, time: Duration) -> (Seen, f64) {
    let began = Instant::now();
    let seen = rig.all(pace, time);
    let took = seen.last_done.map_or(time, |last| last - began);
    let rate = seen.done.len() as f64 / took.as_secs_f64();
    (seen, rate)
}

/// The median of the rounds.
pub(super) fn median<T>(rounds: &[T], of: impl Fn(&T) -> Option<f64>) -> Option<f64> {
    let mut values: Vec<f64> = rounds.iter().map(of).collect::<Option<_>>()?;
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// The rounds' median and 99th percentile, with the target for the latter; if there are several, that of the worst and of
/// all together, too.
pub(super) fn spreads(
    table: &mut Table,
    name: &str,
    rounds: &[Round],
    of: fn(&Round) -> &Vec<Duration>,
    p99: Option<Target>,
) {
    let spreads: Option<Vec<Spread>> = rounds.iter().map(|round| Spread::of(of(round))).collect();
    let spreads = spreads.unwrap_or_default();
    let value = median(&spreads, |spread| Some(spread.median));
    table.say(format!("{name}: median"), "ms", value);
    let name = format!("{name}: p99");
    let value = median(&spreads, |spread| Some(spread.p99));
    match p99 {
        None => table.say(&name, "ms", value),
        Some(target) => table.hold(&name, "ms", value, target),
    }
    if rounds.len() > 1 {
        let worst = spreads.iter().map(|spread| spread.p99).reduce(f64::max);
        table.say(format!("{name}, of the worst round"), "ms", worst);
        let all: Vec<Duration> = rounds.iter().flat_map(of).copied().collect();
        let value = Spread::of(&all).map(|spread| spread.p99);
        table.say(format!("{name}, of all rounds together"), "ms", value);
    }
}
