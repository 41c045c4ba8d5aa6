//! Hours of steady work with faults at random, the oracle judging all the while; what may creep (memory, descriptors,
//! the journal, latencies) is sampled, drawn, and its growth told. tests/soak/README.md says how to run it.

mod plot;
mod samples;

use super::chance::Chance;
use super::judge::Verdict;
use super::oracle::Load;
use super::shim::{EIO, ENOSPC, Field, Shim};
use super::stage::{Plant, Stage};
use crate::process::file_system;
use crate::program;
use samples::Diary;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the command line says.
pub struct Options {
    pub hours: f64,
    pub seed: u64,
    /// New tasks a second.
    pub rate: f64,
    /// Where `soak.csv`, `soak.svg` and `verdict.txt` go.
    pub out: PathBuf,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hours: 1.0,
            seed: 1,
            rate: 100.0,
            out: PathBuf::from("target/soak"),
        }
    }
}

/// After this long all tasks are judged and forgotten, so that the oracle's own memory has a bound.
const LAP: Duration = Duration::from_mins(5);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fault {
    Kill,
    Broker,
    Cut,
    Stop,
    Disk,
}

impl Fault {
    pub(super) const ALL: [Self; 5] = [Self::Kill, Self::Broker, Self::Cut, Self::Stop, Self::Disk];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kill => "SIGKILL",
            Self::Broker => "broker restarted",
            Self::Cut => "network cut",
            Self::Stop => "SIGSTOP",
            Self::Disk => "disk errors",
        }
    }
}

/// Whether nothing was violated.
pub fn run(options: &Options) -> Result<bool, String> {
    let io = |e: std::io::Error| e.to_string();
    let total = Duration::try_from_secs_f64(options.hours * 3600.0).map_err(|e| e.to_string())?;
    fs::create_dir_all(&options.out).map_err(io)?;
    let beside = program("millwright");
    let beside = beside.parent().expect("the programs' folder");
    let folder = tempfile::tempdir_in(beside).map_err(io)?;
    // The shim compares whole paths.
    let state = folder.path().canonicalize().map_err(io)?;
    let shim = Shim::new(&state)?;
    let mut stage = Stage::start(plant(options, &state, &shim));
    stage.may_leave = true;

    let diary = Arc::new(Diary::new(total));
    let journal = state.join("journal.redb");
    let csv = options.out.join("soak.csv");
    let sampling = diary.sample(stage.pid(), stage.timings.clone(), journal, &csv)?;
    let verdict = work(options, total, &mut stage, &shim, &diary);
    diary.end();
    sampling.join().expect("the sampling thread")?;
    let left = stage.left;
    let (last, peak) = stage.finish();
    let mut all = verdict;
    all.add(last);

    let report = report(options, total, &state, &diary, &all, (left, peak));
    let svg = plot::draw(&diary, &format!("{} of soaking", length(total)));
    fs::write(options.out.join("soak.svg"), svg).map_err(io)?;
    fs::write(options.out.join("verdict.txt"), &report).map_err(io)?;
    print!("\n{report}");
    Ok(all.violations == 0)
}

fn plant(options: &Options, state: &Path, shim: &Shim) -> Plant {
    let mut plant = Plant::new(options.seed);
    plant.quiet = true;
    plant.load = load(options, 0);
    plant.setup.state_dir = Some(state.to_owned());
    plant.setup.env = shim.env(false);
    // A line a task would be gigabytes. That the model is ready is what memory is counted from.
    let quiet = "warn,millwright::dispatcher::modelling=info";
    let log = ("MILLWRIGHT_LOG".to_owned(), quiet.to_owned());
    plant.setup.env.push(log);
    plant
}

/// Each lap has ids of its own.
fn load(options: &Options, lap: u64) -> Load {
    Load {
        seed: (options.seed << 32) + lap,
        pause: Duration::from_secs_f64(1.0 / options.rate.clamp(0.1, 10_000.0)),
        ..Load::default()
    }
}

/// A fault, a while of peace, and so on.
fn work(
    options: &Options,
    total: Duration,
    stage: &mut Stage,
    shim: &Shim,
    diary: &Diary,
) -> Verdict {
    let mut chance = Chance::new(options.seed);
    let mut verdict = Verdict::default();
    let lap_time = LAP.min(total / 4);
    let (mut laps, mut lap_began) = (1, Instant::now());
    // A life must be long enough to see something creep.
    let life = (total / 6).max(Duration::from_mins(2));
    let mut killed = Instant::now();
    while diary.elapsed() < total {
        stage.nurse(chance.millis(4_000, 15_000).min(total / 20));
        let age = killed.elapsed().as_secs_f64() / life.as_secs_f64();
        let fault = if age > 0.5 && chance.percent((age * 20.0) as u32) {
            killed = Instant::now();
            Fault::Kill
        } else {
            Fault::ALL[1 + chance.below(4) as usize]
        };
        diary.note(fault);
        inflict(fault, stage, shim, &mut chance);
        if lap_began.elapsed() > lap_time && total.saturating_sub(diary.elapsed()) > lap_time / 2 {
            stage.nurse(Duration::from_secs(2));
            verdict.add(stage.lap(load(options, laps)));
            println!(
                "{}: {} faults, {} tasks, {} violations",
                length(diary.elapsed()),
                diary.faults().len(),
                verdict.tasks,
                verdict.violations
            );
            (laps, lap_began) = (laps + 1, Instant::now());
        }
    }
    stage.nurse(Duration::from_secs(2));
    verdict
}

fn inflict(fault: Fault, stage: &mut Stage, shim: &Shim, chance: &mut Chance) {
    match fault {
        Fault::Kill => {
            stage.kill_agent();
            stage.restart_agent();
        }
        Fault::Broker => {
            stage.broker.stop();
            std::thread::sleep(chance.millis(100, 2_000));
            stage.broker.resume();
        }
        Fault::Cut => {
            stage.proxy.cut(true);
            std::thread::sleep(chance.millis(1, 3_000));
            stage.proxy.cut(false);
        }
        Fault::Stop => {
            stage.agent.freeze(true);
            // The longer ones outlast the keep-alive of 5 s.
            std::thread::sleep(chance.millis(200, 8_000));
            stage.agent.freeze(false);
        }
        Fault::Disk => {
            let (field, errno) = [
                (Field::FsyncFails, EIO),
                (Field::WriteFails, EIO),
                (Field::WriteFails, ENOSPC),
                (Field::WriteShort, 0),
            ][chance.below(4) as usize];
            shim.set(Field::WriteErrno, errno);
            shim.set(field, [2, 30, 100][chance.below(3) as usize]);
            stage.nurse(chance.millis(300, 3_000));
            shim.set(field, 0);
        }
    }
}

fn report(
    options: &Options,
    total: Duration,
    state: &Path,
    diary: &Diary,
    verdict: &Verdict,
    (left, peak): (usize, u64),
) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let mut say = |line: String| writeln!(text, "{line}").expect("writing to a string");
    let kind = file_system(state).unwrap_or_else(|| "unknown".into());
    say(format!(
        "{} of soaking, {} tasks a second, seed {}, journal on {kind}",
        length(total),
        options.rate,
        options.seed
    ));
    let faults = diary.faults();
    let counts = Fault::ALL.map(|kind| {
        let times = faults.iter().filter(|(_, of)| *of == kind).count();
        format!("{times} {}", kind.name())
    });
    say(format!("faults: {}", counts.join(", ")));
    say(format!(
        "the agent left by itself and was started again: {left} times"
    ));
    say(format!(
        "tasks: {}, outcomes: {}, repeated the same: {}, resent: {}, violations: {}",
        verdict.tasks, verdict.outcomes, verdict.repeated, verdict.resent, verdict.violations
    ));
    for (code, times) in &verdict.refused {
        say(format!("refused for now as {code}: {times}"));
    }
    say(format!(
        "highest resident memory: {:.1} MiB",
        peak as f64 / 1024.0
    ));
    for line in diary.growth() {
        say(line);
    }
    let end = if verdict.violations == 0 {
        "verdict: one outcome each"
    } else {
        "verdict: VIOLATED"
    };
    say(end.to_owned());
    for told in &verdict.told {
        say(told.clone());
    }
    text
}

fn length(time: Duration) -> String {
    let minutes = time.as_secs_f64() / 60.0;
    if minutes < 100.0 {
        format!("{minutes:.1} minutes")
    } else {
        format!("{:.1} hours", minutes / 60.0)
    }
}
