//! What can happen between the agent and its broker: cut at each type of packet, packets twice, in another order, late.

use super::chance::Chance;
use super::proxy::Act::{self, CutAfter, CutBefore, CutWithin, Late, Twice};
use super::proxy::Direction::{self, ToAgent, ToBroker};
use super::proxy::{Kind, Plan};
use super::stage::{Plant, Stage};
use super::{Case, Finding, Ran, Scale};
use std::time::{Duration, Instant};

/// Each packet that the two exchange: whose it is, whether only a new connection brings it, and how the quick suite cuts
/// there.
const PACKETS: [(&str, Direction, Kind, bool, Act); 10] = [
    ("CONNECT", ToBroker, Kind::Connect, true, CutAfter),
    ("CONNACK", ToAgent, Kind::Connack, true, CutAfter),
    ("SUBSCRIBE", ToBroker, Kind::Subscribe, true, CutAfter),
    ("SUBACK", ToAgent, Kind::Suback, true, CutBefore),
    ("a task's PUBLISH", ToAgent, Kind::Publish, false, CutWithin),
    ("a task's PUBACK", ToBroker, Kind::Puback, false, CutBefore),
    (
        "an event's PUBLISH",
        ToBroker,
        Kind::Publish,
        false,
        CutAfter,
    ),
    ("an event's PUBACK", ToAgent, Kind::Puback, false, CutBefore),
    ("PINGREQ", ToBroker, Kind::Pingreq, false, CutAfter),
    ("PINGRESP", ToAgent, Kind::Pingresp, false, CutBefore),
];

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for packet in PACKETS {
        let run = move |scale| cuts(scale, packet);
        all.push(Case::new("network", format!("cut at {}", packet.0), run));
    }
    let others = [
        ("tasks delivered twice", ToAgent, Twice),
        ("events delivered twice", ToBroker, Twice),
        ("tasks in another order", ToAgent, Late),
    ];
    for (name, direction, act) in others {
        let run = move |scale| disorder(scale, direction, act);
        all.push(Case::new("network", name, run));
    }
    all.push(Case::new(
        "network",
        "cut at any time, nobody resends",
        any_cuts,
    ));
    all.push(Case::new("network", "each packet 100 ms late", delays));
    all.push(Case::new("network", "silent, then goes on", stalls));
    all
}

fn cuts(scale: Scale, packet: (&str, Direction, Kind, bool, Act)) -> Finding {
    let (_, direction, kind, at_connection, act) = packet;
    let acts: &[Act] = if scale.quick {
        &[act]
    } else {
        &[CutBefore, CutWithin, CutAfter]
    };
    let mut ran = Ran::default();
    for round in 0..scale.pick(1, 5) {
        for &act in acts {
            // A stage for each: the agent waits longer after each lost connection.
            let stage = Stage::start(Plant::new(scale.seed + round));
            let often = [Kind::Publish, Kind::Puback].contains(&kind);
            let skip = if often { 7 * round as usize + 3 } else { 0 };
            stage.proxy.plan(Plan {
                direction,
                kind,
                skip,
                act,
                times: 1,
            });
            if at_connection {
                stage.proxy.cut(false);
            }
            await_done(&stage);
            stage.await_progress(20);
            let times = stage.proxy.acted();
            ran.add(Ran::of(stage, times, ""));
        }
    }
    Finding::Ran(ran)
}

fn await_done(stage: &Stage) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !stage.proxy.is_done() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn disorder(scale: Scale, direction: Direction, act: Act) -> Finding {
    let stage = Stage::start(Plant::new(scale.seed));
    stage.proxy.plan(Plan {
        direction,
        kind: Kind::Publish,
        skip: 0,
        act,
        times: scale.pick(200, 5_000),
    });
    await_done(&stage);
    let times = stage.proxy.acted();
    Finding::Ran(Ran::of(stage, times, ""))
}

fn any_cuts(scale: Scale) -> Finding {
    let mut chance = Chance::new(scale.seed);
    let mut ran = Ran::default();
    for round in 0..scale.pick(1, 20) {
        let mut plant = Plant::new(scale.seed + round);
        plant.load.resends = false;
        let stage = Stage::start(plant);
        for _ in 0..3 {
            stage.await_progress(20);
            std::thread::sleep(chance.millis(1, 50));
            stage.proxy.cut(false);
        }
        stage.await_progress(20);
        ran.add(Ran::of(stage, 3, ""));
    }
    Finding::Ran(ran)
}

fn delays(scale: Scale) -> Finding {
    let stage = Stage::start(Plant::new(scale.seed));
    stage.proxy.delay(Duration::from_millis(100));
    std::thread::sleep(Duration::from_secs(scale.pick(2, 30)));
    stage.proxy.delay(Duration::ZERO);
    Finding::Ran(Ran::of(stage, 1, ""))
}

fn stalls(scale: Scale) -> Finding {
    // The longer ones outlast the keep-alive of 5 s.
    let seconds: &[u64] = scale.pick(&[2, 9], &[2, 4, 9, 20]);
    let stage = Stage::start(Plant::new(scale.seed));
    for &time in seconds {
        stage.proxy.stall(true);
        std::thread::sleep(Duration::from_secs(time));
        stage.proxy.stall(false);
        stage.await_progress(20);
    }
    let longest = seconds.iter().max().copied().unwrap_or_default();
    let note = format!("up to {longest} s");
    Finding::Ran(Ran::of(stage, seconds.len(), note))
}
