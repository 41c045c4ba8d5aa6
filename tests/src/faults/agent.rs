//! What can happen to the agent's process: killed at any time, killed at the journal's transitions, frozen.

use super::chance::Chance;
use super::stage::{Plant, Stage};
use super::{Case, Finding, Ran, Scale};
use std::time::Duration;

/// Where the agent aborts by itself when `MILLWRIGHT_CRASH_AT=NAME:N` says so: at the N-th pass.
const POINTS: [&str; 8] = [
    "before-commit",
    "after-commit",
    "before-ack",
    "after-ack",
    "before-send",
    "after-send",
    "before-delivered",
    "during-replay",
];
const CRASH_AT: &str = "MILLWRIGHT_CRASH_AT";
const SIGABRT: i32 = 6;

pub(super) fn cases() -> Vec<Case> {
    let mut all = vec![
        Case::new("agent", "SIGKILL at random times", |s| kills(s, true)),
        Case::new("agent", "SIGKILL, nobody resends", |s| kills(s, false)),
    ];
    for point in POINTS {
        let run = move |scale| crash_at(scale, point);
        all.push(Case::new("agent", format!("killed {point}"), run));
    }
    all.push(Case::new("agent", "SIGTERM, started again", terms));
    all.push(Case::new("agent", "SIGSTOP, SIGCONT", freezes));
    all
}

fn kills(scale: Scale, resends: bool) -> Finding {
    let times = scale.pick(15, 500);
    let mut chance = Chance::new(scale.seed);
    let mut plant = Plant::new(scale.seed);
    plant.load.resends = resends;
    let mut stage = Stage::start(plant);
    for _ in 0..times {
        // Some kills hit the start, most the work.
        std::thread::sleep(chance.millis(20, 700));
        stage.kill_agent();
        stage.restart_agent();
    }
    Finding::Ran(Ran::of(stage, times, ""))
}

/// Its tasks are short, so that what runs ends within the grace and nothing is cancelled for it.
fn terms(scale: Scale) -> Finding {
    let times = scale.pick(3, 50);
    let mut stage = Stage::start(Plant::new(scale.seed));
    for _ in 0..times {
        stage.await_progress(20);
        stage.agent.terminate();
        stage.agent.ended();
        stage.restart_agent();
    }
    Finding::Ran(Ran::of(stage, times, ""))
}

fn crash_at(scale: Scale, point: &str) -> Finding {
    let mut chance = Chance::new(scale.seed);
    let mut plant = Plant::new(scale.seed);
    if point == "during-replay" {
        // So that a kill leaves something: else the tiny model is done with all within a commit.
        plant.load.tokens_max = 150;
        plant.load.open_max = 40;
        plant.setup.model = "slots = 1\nthreads = 1".into();
    }
    let mut stage = Stage::start(plant);
    let (mut reached, wanted) = (0, scale.pick(2, 25));
    // A kill may leave nothing to be replayed all the same.
    for round in 0..4 * wanted {
        // A replay passes once for sure; the other points without end.
        let pass = if point == "during-replay" {
            1 + round % 2
        } else {
            1 + chance.below(30)
        };
        stage.kill_agent();
        let env = (CRASH_AT.to_owned(), format!("{point}:{pass}"));
        stage.agent.set_env(vec![env]);
        stage.restart_agent();
        reached += u64::from(stage.dies_within(Duration::from_secs(5), SIGABRT));
        stage.agent.set_env(Vec::new());
        stage.restart_agent();
        std::thread::sleep(chance.millis(100, 400));
        if reached == wanted {
            break;
        }
    }
    Finding::Ran(Ran::of(stage, reached as usize, ""))
}

fn freezes(scale: Scale) -> Finding {
    // The longer ones outlast the keep-alive of 5 s, so that the broker gives the connection up.
    let seconds: &[u64] = scale.pick(&[1, 8], &[1, 3, 8, 15, 120, 120]);
    let stage = Stage::start(Plant::new(scale.seed));
    for &time in seconds {
        stage.agent.freeze(true);
        std::thread::sleep(Duration::from_secs(time));
        stage.agent.freeze(false);
        stage.await_progress(20);
    }
    let longest = seconds.iter().max().copied().unwrap_or_default();
    let note = format!("up to {longest} s");
    Finding::Ran(Ran::of(stage, seconds.len(), note))
}
