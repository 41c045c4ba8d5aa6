//! What can happen to the broker: restarted, killed, with or without what it should have kept.

use super::stage::{Plant, Stage};
use super::{Case, Finding, Ran, Scale};
use crate::Keeps;
use std::time::Duration;

pub(super) fn cases() -> Vec<Case> {
    // The broker may lose what it had acknowledged to the requester, and what the agent had acknowledged of it: that is
    // mosquitto's. Resending repairs it, which is why the promise is made to those who resend.
    let loses = "the broker loses sessions and queues; resending repairs it";
    [
        ("restarted", Keeps::AtTheEnd, false, ""),
        ("SIGKILL, saved at each change", Keeps::EachChange, true, ""),
        (
            "SIGKILL, nothing saved since its start",
            Keeps::AtTheEnd,
            true,
            loses,
        ),
        ("SIGKILL, without persistence", Keeps::Nothing, true, loses),
    ]
    .into_iter()
    .map(|(name, keeps, killed, note)| {
        Case::new("broker", name, move |scale| {
            dies(scale, keeps, killed, note)
        })
    })
    .collect()
}

fn dies(scale: Scale, keeps: Keeps, killed: bool, note: &str) -> Finding {
    let mut ran = Ran::default();
    // The agent waits longer after each lost connection, so a stage sees a few.
    for round in 0..scale.pick(1, 10) {
        let mut plant = Plant::new(scale.seed + round);
        plant.keeps = keeps;
        let mut stage = Stage::start(plant);
        let times = scale.pick(2, 3);
        for _ in 0..times {
            stage.await_progress(20);
            if killed {
                stage.broker.kill();
            } else {
                stage.broker.stop();
            }
            std::thread::sleep(Duration::from_millis(200));
            stage.broker.resume();
        }
        stage.await_progress(20);
        ran.add(Ran::of(stage, times, note));
    }
    Finding::Ran(ran)
}
