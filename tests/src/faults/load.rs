//! No fault, and too much of everything: a flood, cancels. Nothing is killed here.

use super::stage::{Plant, Stage};
use super::{Case, Finding, Ran, Scale};
use std::time::Duration;

/// Tasks that the agent of a stage may hold: its queue and its slots.
const CAPACITY: usize = 36;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("load", "no fault", |scale| {
            let mut plant = Plant::new(scale.seed);
            plant.load.tasks_max = scale.pick(200, 5_000);
            all_of(plant, scale, 1)
        }),
        Case::new("load", "flood at 10 × capacity", |scale| {
            let mut plant = Plant::new(scale.seed);
            let tasks = scale.pick(1_000, 100_000);
            plant.load.tasks_max = tasks;
            plant.load.open_max = 10 * CAPACITY;
            plant.load.patience = Duration::from_secs(3);
            all_of(plant, scale, tasks)
        }),
        Case::new("load", "every task cancelled", |scale| {
            let mut plant = Plant::new(scale.seed);
            let tasks = scale.pick(200, 10_000);
            plant.load.tasks_max = tasks;
            plant.load.open_max = CAPACITY;
            plant.load.tokens_max = 150;
            plant.load.cancelled = 100;
            all_of(plant, scale, tasks)
        }),
    ]
}

fn all_of(plant: Plant, scale: Scale, times: usize) -> Finding {
    let tasks = plant.load.tasks_max;
    let stage = Stage::start(plant);
    stage.await_settled(tasks, Duration::from_secs(scale.pick(40, 3 * 3600)));
    Finding::Ran(Ran::of(stage, times, ""))
}
