//! What can happen to the wall clock: it jumps, or it was never set, as on boards without a battery. The shim moves it
//! for the agent alone.

use super::shim::{Field, Shim};
use super::stage::{Plant, Stage};
use super::{Case, Finding, Ran, Scale};
use std::time::Duration;

const DAY: i64 = 86_400;

pub(super) fn cases() -> Vec<Case> {
    [
        ("forwards a day and a year", &[DAY, 366 * DAY][..]),
        ("backwards an hour and a year", &[-3_600, -366 * DAY]),
        ("before 2020", &[-10 * 366 * DAY]),
        ("to and fro", &[30 * DAY, -30 * DAY, 0, -10 * 366 * DAY, 0]),
    ]
    .into_iter()
    .map(|(name, jumps)| Case::new("clock", name, move |scale| jump(scale, jumps)))
    .collect()
}

/// Each jump once at work, and once across a kill.
fn jump(scale: Scale, jumps: &[i64]) -> Finding {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let shim = match Shim::new(folder.path()) {
        Ok(shim) => shim,
        Err(why) => return Finding::Skipped(why),
    };
    let mut plant = Plant::new(scale.seed);
    plant.setup.env = shim.env(false);
    let mut stage = Stage::start(plant);
    if shim.get(Field::ClockReads) == 0 {
        return Finding::Skipped("the agent's clock can't be moved from outside".into());
    }
    let mut times = 0;
    for _ in 0..scale.pick(1, 10) {
        for &seconds in jumps {
            shim.set(Field::ClockOffset, seconds);
            stage.await_progress(15);
            shim.set(Field::ClockOffset, 0);
            stage.await_progress(15);
            stage.kill_agent();
            shim.set(Field::ClockOffset, seconds);
            stage.restart_agent();
            std::thread::sleep(Duration::from_millis(100));
            stage.await_progress(15);
            times += 3;
        }
    }
    Finding::Ran(Ran::of(stage, times, ""))
}
