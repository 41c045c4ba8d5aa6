//! What a task costs beside the model: time, disk, flash, memory. A real agent and a real mosquitto, the tiny model with
//! answers of one token. Measures and never judges: tests/cost/README.md says what each figure is.

mod disk;
mod rig;
mod round;
mod sender;
mod table;

use crate::process::{Io, Spread, processor_s, resident_kib};
use disk::Syncs;
use rig::Rig;
use round::{Round, median, spreads};
use sender::{Pace, Seen};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use table::{Table, Target};

/// What the command line says.
#[derive(Default)]
pub struct Options {
    pub quick: bool,
    /// Where the state directory lies. Default: beside the programs.
    pub folder: Option<PathBuf>,
    pub json: Option<PathBuf>,
    /// Lines for mosquitto's configuration.
    pub broker: String,
    /// The other part is left out.
    pub only: Option<Part>,
}

/// What is measured together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// Latency, throughput, memory.
    Time,
    Flash,
}

/// What a figure is worth nothing without.
#[derive(Default)]
struct Context {
    lines: Vec<String>,
}

impl Context {
    fn say(&mut self, line: String) {
        println!("{line}");
        self.lines.push(line);
    }
}

/// For how long, and how often.
struct Scale {
    syncs: usize,
    echoes: usize,
    few: usize,
    warm: Duration,
    /// At capacity and at 80 % of it, for `full` each.
    rounds: usize,
    full: Duration,
    slow: Duration,
    idle: Duration,
    counted: Duration,
    tasks: usize,
}

impl Scale {
    fn new(quick: bool) -> Self {
        let s = Duration::from_secs;
        if quick {
            return Self {
                syncs: 50,
                echoes: 50,
                few: 10,
                warm: Duration::from_millis(300),
                rounds: 1,
                full: Duration::from_millis(1500),
                slow: s(2),
                idle: s(1),
                counted: s(1),
                tasks: 0,
            };
        }
        Self {
            syncs: 300,
            echoes: 300,
            few: 300,
            warm: s(3),
            rounds: 13,
            full: s(5),
            slow: s(60),
            idle: s(60),
            counted: s(5),
            tasks: 10_000,
        }
    }
}

/// Requesters at work at the same time, and how many tasks they have under way together: less than the queue takes.
const SENDERS: usize = 4;
const UNDER_WAY: usize = 240;
/// Tasks a second that the agent is meant for.
const FIXED: f64 = 500.0;

/// Whether all could be measured.
pub fn run(options: &Options) -> Result<bool, String> {
    let scale = Scale::new(options.quick);
    let mut context = Context::default();
    let mut table = Table::default();
    describe(&mut context);
    if !options.broker.is_empty() {
        context.say(format!("mosquitto's configuration: {}", options.broker));
    }
    let folder = rig::folder(options.folder.as_deref(), &mut context)?;
    let (state, broker) = (folder.path(), options.broker.as_str());
    if options.only != Some(Part::Flash) {
        timed(&scale, state, broker, &mut table, &mut context)?;
    }
    if options.only != Some(Part::Time) {
        counted(&scale, state, broker, &mut table)?;
    }
    load_average(&mut context, "at the end");
    println!("\n{}", table.text());
    if let Some(path) = &options.json {
        let text = format!("{:#}\n", table.json(&context));
        fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let missing = table.missing();
    if !missing.is_empty() {
        println!("not measured: {}", missing.join(", "));
    }
    Ok(missing.is_empty())
}

fn describe(context: &mut Context) {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    context.say(format!("cores: {cores}"));
    load_average(context, "at the start");
}

fn load_average(context: &mut Context, when: &str) {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let words: Vec<&str> = load.split_whitespace().take(3).collect();
    context.say(format!("load average {when}: {}", words.join(" ")));
}

/// Latency, throughput, memory: an agent as it is.
fn timed(
    scale: &Scale,
    folder: &Path,
    broker: &str,
    table: &mut Table,
    context: &mut Context,
) -> Result<(), String> {
    let mut rig = Rig::start(folder, broker, false)?;
    std::thread::sleep(scale.warm);
    let idle = resident_kib(rig.pid());
    let mut syncs = Syncs::default();
    let disk = |e: std::io::Error| format!("the disk's own syncs: {e}");
    syncs.measure(folder, scale.syncs).map_err(disk)?;
    let mut echo = rig.senders[0].echo(scale.echoes, Duration::from_millis(5));

    let forever = Duration::from_mins(10);
    let mut alone = |gap| rig.senders[0].run(Pace::Gap(gap), forever, scale.few);
    let low = alone(Duration::from_millis(37));
    let next = alone(Duration::ZERO);
    rig.all(Pace::Open(UNDER_WAY / SENDERS), scale.warm);

    let mut rounds = Vec::new();
    for _ in 0..scale.rounds {
        rounds.push(Round::measure(&mut rig, scale.full)?);
    }
    let fixed = rig.all(evenly(FIXED)?, scale.full);
    syncs.measure(folder, scale.syncs).map_err(disk)?;
    echo.extend(rig.senders[0].echo(scale.echoes, Duration::from_millis(5)));

    let phases = || {
        let each = rounds.iter().flat_map(|round| [&round.full, &round.high]);
        [&low, &next, &fixed].into_iter().chain(each)
    };
    let refused: usize = phases().map(|s| s.refused).sum();
    let lost: usize = phases().map(|s| s.lost).sum();
    let answered: usize = phases().map(|s| s.done.len()).sum();
    latency(table, &syncs, &echo, &low, &next);
    let target = Some(Target::AtMost(25.0));
    let name = "accepted, 80 % of capacity";
    spreads(table, name, &rounds, |r| &r.high.accepted, target);
    let name = "answer, 80 % of capacity";
    spreads(table, name, &rounds, |r| &r.high.done, None);
    let name = "the agent's threads then waited for a core";
    table.say(name, "s per s run", median(&rounds, |r| r.waited));
    let name = format!("accepted, {FIXED} tasks/s");
    spread(table, &name, &fixed.accepted);

    table.group("throughput");
    let name = format!("tasks answered, {SENDERS} senders, {UNDER_WAY} under way");
    let capacity = median(&rounds, |r| Some(r.full_rate));
    table.hold(name, "tasks/s", capacity, Target::AtLeast(500.0));
    let name = "accepted, at that load";
    spreads(table, name, &rounds, |r| &r.full.accepted, None);
    let high = median(&rounds, |r| Some(r.high_rate));
    table.say("tasks answered at 80 % load", "tasks/s", high);
    let programs = ["agent", "mosquitto", "the four senders"];
    for (n, who) in programs.iter().enumerate() {
        let each = median(&rounds, |r| Some(r.processors_ms[n]));
        table.say(format!("processor time: {who}"), "ms/task", each);
    }
    table.say("refused as busy", "tasks", refused as f64);
    table.say("neither answered nor refused", "tasks", lost as f64);
    table.group("flash, full rate");
    written(table, |of| {
        median(&rounds, |r| {
            Some(of(r.io?) as f64 / r.full.done.len() as f64)
        })
    });

    memory(scale, table, &mut rig, idle, answered)?;
    context.say(format!("{answered} tasks answered while timed"));
    Ok(())
}

/// Even steps for each of the senders.
fn evenly(rate: f64) -> Result<Pace, String> {
    let step = Duration::try_from_secs_f64(SENDERS as f64 / rate);
    let step = step.map_err(|_| "no task was answered".to_owned())?;
    Ok(Pace::Every(step))
}

/// After many tasks, all of whose outcomes are remembered.
fn memory(
    scale: &Scale,
    table: &mut Table,
    rig: &mut Rig,
    idle: Option<(u64, u64)>,
    mut answered: usize,
) -> Result<(), String> {
    while answered < scale.tasks {
        let more = rig.all(Pace::Open(UNDER_WAY / SENDERS), Duration::from_secs(2));
        if more.done.is_empty() {
            break;
        }
        answered += more.done.len();
    }
    std::thread::sleep(scale.warm);
    let after = resident_kib(rig.pid());
    table.group("memory");
    for (when, resident) in [
        ("idle".to_owned(), idle),
        (format!("after {answered} tasks"), after),
    ] {
        let mib = |kib: u64| kib as f64 / 1024.0;
        let (all, own) = resident.map(|(all, own)| (mib(all), mib(own))).unzip();
        table.say(format!("resident, {when}"), "MiB", all);
        table.say("of that not a file's", "MiB", own);
    }
    let (length, taken) = rig.journal()?;
    table.say("journal's length then", "MiB", length as f64 / 1_048_576.0);
    table.say("on disk", "MiB", taken as f64 / 1_048_576.0);
    let log = rig.agent.log().len() as f64 / answered as f64;
    table.say("the agent's log", "bytes/task", log);
    Ok(())
}

fn latency(table: &mut Table, syncs: &Syncs, echo: &[Duration], low: &Seen, next: &Seen) {
    table.group("latency");
    spread(table, "disk: 4 KiB appended, fdatasync", &syncs.appended);
    spread(table, "disk: 4 KiB in place, fdatasync", &syncs.in_place);
    spread(table, "broker: to self and back", echo);
    spread(table, "accepted, one task at a time", &low.accepted);
    let middle = |of: &[Duration]| Spread::of(of).map(|s| s.median);
    let over = middle(&low.accepted).zip(middle(&syncs.appended));
    let over = over.map(|(accepted, disk)| accepted - disk);
    let target = Target::AtMost(3.0);
    table.hold("that less an appended fdatasync", "ms", over, target);
    let rest = over.and_then(|over| Some(over - 2.0 * middle(echo)?));
    table.say("and less two round trips of the broker", "ms", rest);
    spread(table, "answer, one task at a time", &low.done);
    spread(
        table,
        "accepted, each right after an answer",
        &next.accepted,
    );
}

fn spread(table: &mut Table, name: &str, timings: &[Duration]) {
    let spread = Spread::of(timings);
    table.say(format!("{name}: median"), "ms", spread.map(|s| s.median));
    table.say(format!("{name}: p99"), "ms", spread.map(|s| s.p99));
}

/// Flash, counted by the shim, which costs some time: an agent of its own.
fn counted(scale: &Scale, folder: &Path, broker: &str, table: &mut Table) -> Result<(), String> {
    let mut rig = Rig::start(folder, broker, true)?;
    let full = rig.all(Pace::Open(UNDER_WAY / SENDERS), scale.warm);
    if full.done.is_empty() {
        return Err("no task was answered under the shim".into());
    }
    let (began, before) = (Instant::now(), rig.syncs());
    let full = rig.all(Pace::Open(UNDER_WAY / SENDERS), scale.counted);
    let (seconds, syncs) = (began.elapsed().as_secs_f64(), rig.syncs() - before);
    let each = syncs as f64 / full.done.len() as f64;
    table.group("flash, full rate");
    table.hold("syncs", "a task", each, Target::AtMost(3.0));
    let rate = syncs as f64 / seconds;
    table.hold(
        "syncs, one a commit",
        "a second",
        rate,
        Target::AtMost(200.0),
    );

    // What nothing waited for is written five seconds later.
    std::thread::sleep(scale.idle.min(Duration::from_secs(7)));
    let (io, before) = (Io::of(rig.pid()), rig.syncs());
    let second = Duration::from_secs(1);
    let slow = rig.senders[0].run(Pace::Every(second), scale.slow, usize::MAX);
    std::thread::sleep(scale.idle.min(Duration::from_secs(7)));
    let syncs = rig.syncs() - before;
    table.group("flash, one task a second");
    let io = io_since(io, rig.pid());
    written(table, |of| Some(of(io?) as f64 / slow.done.len() as f64));
    let each = syncs as f64 / slow.done.len() as f64;
    table.hold("syncs", "a task", each, Target::AtMost(3.0));

    let (io, before) = (Io::of(rig.pid()), rig.syncs());
    std::thread::sleep(scale.idle);
    let io = io_since(io, rig.pid());
    let minutes = scale.idle.as_secs_f64() / 60.0;
    table.group("flash, idle");
    let bytes = |of: fn(Io) -> u64| io.map(|io| of(io) as f64 / minutes);
    table.say(
        "to the disk (write_bytes)",
        "bytes/min",
        bytes(|io| io.write_bytes),
    );
    table.say("to write calls (wchar)", "bytes/min", bytes(|io| io.wchar));
    let syncs = (rig.syncs() - before) as f64;
    table.say("syncs", "a minute", syncs / minutes);
    Ok(())
}

fn written(table: &mut Table, each: impl Fn(fn(Io) -> u64) -> Option<f64>) {
    let bytes = each(|io| io.write_bytes);
    table.say("to the disk (write_bytes)", "bytes/task", bytes);
    table.say("to write calls (wchar)", "bytes/task", each(|io| io.wchar));
}

fn io_since(before: Option<Io>, pid: u32) -> Option<Io> {
    Some(Io::of(pid)?.since(before?))
}

impl Rig {
    /// Processor seconds of the agent, the broker and this program.
    fn processors(&self) -> [f64; 3] {
        [self.pid(), self.broker.id(), std::process::id()]
            .map(|pid| processor_s(pid).unwrap_or(f64::NAN))
    }
}
