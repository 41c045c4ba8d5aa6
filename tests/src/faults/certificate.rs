//! The broker's certificate expires while a session lasts: the session goes on, the next connection is refused until the
//! certificate is renewed, and no answer is lost over it. The agent's clock is moved past the end, not waited for.

use super::shim::{Field, Shim};
use super::stage::{Plant, Stage};
use super::{Case, Finding, Ran, Scale};
use crate::Security;
use crate::authority::{DAY, SERVER};
use std::time::Duration;

/// The certificate is good for two days.
const LATER: i64 = 10 * 86_400;

/// Outcomes that may reach the requester late; with a connection there would be ten times as many.
const STRAY_MAX: usize = 24;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("certificate", "expires mid-session", expires),
        Case::new("certificate", "clock before 2020", forgets),
    ]
}

/// A board without a battery: after each power cut its clock is years before the certificates were made, and only the journal
/// knows better.
fn forgets(scale: Scale) -> Finding {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let shim = match Shim::new(folder.path()) {
        Ok(shim) => shim,
        Err(why) => return Finding::Skipped(why),
    };
    let mut plant = Plant::new(scale.seed);
    plant.security = Security::Tls;
    plant.setup.env = shim.env(false);
    let mut stage = Stage::start(plant);
    stage.await_progress(20);
    let times = scale.pick(2, 20);
    for _ in 0..times {
        stage.kill_agent();
        shim.set(Field::ClockOffset, -10 * 366 * DAY);
        stage.restart_agent();
        stage.await_progress(20);
    }
    Finding::Ran(Ran::of(stage, times, ""))
}

fn expires(scale: Scale) -> Finding {
    let mut ran = Ran::default();
    for round in 0..scale.pick(1, 10) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let shim = match Shim::new(folder.path()) {
            Ok(shim) => shim,
            Err(why) => return Finding::Skipped(why),
        };
        let mut plant = Plant::new(scale.seed + round);
        plant.security = Security::Tls;
        plant.setup.env = shim.env(false);
        let mut stage = Stage::start(plant);
        shim.set(Field::ClockOffset, LATER);
        stage.await_progress(20);
        stage.proxy.cut(false);
        // What was answered before may still be on its way.
        std::thread::sleep(Duration::from_millis(300));
        let before = stage.oracle.settled();
        std::thread::sleep(Duration::from_millis(1500));
        let refused = stage
            .agent
            .log()
            .contains("the broker's certificate ended on");
        let went_on = stage.oracle.settled() > before + STRAY_MAX;
        stage.broker.stop();
        let authority = stage.broker.authority();
        authority.issue("server", SERVER, -DAY, 30 * DAY);
        stage.broker.resume();
        stage.await_progress(20);
        let mut one = Ran::of(stage, 1, "");
        if !refused || went_on {
            let what = "an expired certificate was taken, or the log does not say so";
            one.verdict.violate(what.into());
        }
        ran.add(one);
    }
    Finding::Ran(ran)
}
