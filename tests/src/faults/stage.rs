//! A plant for one case: a broker, a network that can fail, an agent with the tiny model, a requester, and a look at the
//! agent's memory all the while. Knows no fault by name.

use super::judge::Verdict;
use super::oracle::{Load, Oracle, Timings};
use super::proxy::Proxy;
use crate::{Agent, Broker, Client, Keeps, Security, Setup};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What the agent may take beyond what it takes with nothing to do. The sum in agent/task/src/limits.rs is more: for tasks as large
/// as may be, which these are not.
const BUDGET_KIB: u64 = 64 * 1024;
/// How long outcomes may take once the faults are over.
const SETTLE: Duration = Duration::from_mins(1);

/// How a plant is set up, where it is not as usual.
#[derive(Clone)]
pub(super) struct Plant {
    pub(super) keeps: Keeps,
    pub(super) security: Security,
    pub(super) setup: Setup,
    pub(super) load: Load,
    pub(super) settle: Duration,
    /// The broker logs errors alone.
    pub(super) quiet: bool,
}

impl Plant {
    pub(super) fn new(seed: u64) -> Self {
        let setup = Setup {
            // One thread: nothing is measured at the first start.
            model: "threads = 1\nslots = 4".into(),
            ..Setup::default()
        };
        let load = Load {
            seed,
            ..Load::default()
        };
        Self {
            keeps: Keeps::AtTheEnd,
            security: Security::Open,
            setup,
            load,
            settle: SETTLE,
            quiet: false,
        }
    }
}

/// A running plant.
pub(super) struct Stage {
    pub(super) broker: Broker,
    pub(super) proxy: Proxy,
    pub(super) agent: Agent,
    pub(super) oracle: Oracle,
    pub(super) timings: Timings,
    /// How often the agent ended without having been told to.
    pub(super) left: usize,
    /// Whether it may: where its disk fails, it can do no better.
    pub(super) may_leave: bool,
    watch: Watch,
    settle: Duration,
}

impl Stage {
    pub(super) fn start(mut plant: Plant) -> Self {
        let broker = if plant.quiet {
            Broker::quiet(plant.keeps, "")
        } else {
            Broker::with(plant.security, plant.keeps)
        };
        let proxy = if plant.security == Security::Tls {
            let ca = broker.file("ca.pem").display().to_string();
            plant.setup.broker = format!("[broker.tls]\nca = '{ca}'\n");
            Proxy::opaque(broker.port)
        } else {
            Proxy::new(broker.port)
        };
        plant.setup.port = Some(proxy.port);
        let watch = Watch::start();
        let agent = Agent::with(&broker, &plant.setup);
        watch.see(&agent);
        // What is sent to a gateway that never subscribed is lost, and would cost a resend.
        Client::connect(&broker, "console").await_state("online");
        let timings = Timings::default();
        let oracle = Oracle::start(broker.client_port, plant.load, timings.clone());
        let stage = Self {
            broker,
            proxy,
            agent,
            oracle,
            timings,
            left: 0,
            may_leave: false,
            watch,
            settle: plant.settle,
        };
        stage.await_progress(1);
        stage
    }

    /// Who the agent is, now and after restarts.
    pub(super) fn pid(&self) -> impl Fn() -> u32 + Send + use<> {
        let shared = Arc::clone(&self.watch.shared);
        move || shared.pid.load(Ordering::Relaxed)
    }

    /// Judges all tasks until now, and begins with others.
    pub(super) fn lap(&mut self, load: Load) -> Verdict {
        let port = self.broker.client_port;
        // What comes to nobody would be a violation: the new one listens when the old one has all.
        let verdict = self.oracle.finish(self.settle);
        self.oracle = Oracle::start(port, load, self.timings.clone());
        verdict
    }

    /// Waits until this many more tasks have an outcome, or for as long as that should ever take.
    pub(super) fn await_progress(&self, tasks: usize) {
        self.await_settled(self.oracle.settled() + tasks, Duration::from_secs(30));
    }

    pub(super) fn await_settled(&self, tasks: usize, within: Duration) {
        let deadline = Instant::now() + within;
        while self.oracle.settled() < tasks && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(super) fn kill_agent(&mut self) {
        if self.agent.is_running() {
            self.agent.kill();
        } else {
            self.left += 1;
        }
    }

    pub(super) fn restart_agent(&mut self) {
        self.agent.restart();
        self.watch.see(&self.agent);
    }

    /// For a while, does what a service manager does: starts the agent again when it has left.
    pub(super) fn nurse(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            if !self.agent.is_running() {
                self.left += 1;
                std::thread::sleep(Duration::from_millis(300));
                self.restart_agent();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for a while for the agent to be gone, and sees to it that it is.
    pub(super) fn await_death(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while self.agent.is_running() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        if self.agent.is_running() {
            self.agent.kill();
        }
    }

    /// Whether the agent dies of a signal within a time. That it left for another reason is another matter.
    pub(super) fn dies_within(&mut self, time: Duration, signal: i32) -> bool {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            if let Some(status) = self.agent.status() {
                return status.signal() == Some(signal);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }

    /// The faults are over: all outcomes, and the judgement. The agent's highest memory in KiB.
    pub(super) fn finish(mut self) -> (Verdict, u64) {
        let alive = self.agent.is_running();
        let mut verdict = self.oracle.finish(self.settle);
        let peak = self.watch.shared.peak.load(Ordering::Relaxed);
        let idle = self.watch.shared.idle.load(Ordering::Relaxed);
        if self.left > 0 && !self.may_leave {
            let times = self.left;
            verdict.violate(format!("the agent left {times} times without a cause"));
        }
        if !alive {
            verdict.violate("the agent was not running when the faults were over".into());
        }
        if peak == 0 {
            verdict.violate("the agent's memory was never seen".into());
        }
        if peak > idle + BUDGET_KIB {
            verdict.violate(format!(
                "the agent took {peak} KiB of memory, {idle} KiB when it was first ready"
            ));
        }
        if verdict.violations > 0 {
            let log = self.agent.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(30)..];
            verdict
                .told
                .push(format!("agent's log:\n  {}", tail.join("\n  ")));
        }
        (verdict, peak)
    }
}

/// Reads an agent's highest resident memory, over all of its lives, each from when its model was ready on: before that
/// it measures how fast memory is, for which it takes 128 MiB.
struct Watch {
    shared: Arc<Watched>,
}

#[derive(Default)]
struct Watched {
    pid: AtomicU32,
    /// The agent's log, and how long it was when this life began.
    log: Mutex<(PathBuf, u64)>,
    idle: AtomicU64,
    peak: AtomicU64,
    over: AtomicBool,
}

impl Watch {
    fn start() -> Self {
        let shared = Arc::new(Watched::default());
        let own = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut counted = 0;
            while !own.over.load(Ordering::Relaxed) {
                let pid = own.pid.load(Ordering::Relaxed);
                if pid != counted && own.is_ready() {
                    // Resets the highest to what it is now.
                    let _ = std::fs::write(format!("/proc/{pid}/clear_refs"), "5");
                    counted = pid;
                }
                if pid == counted {
                    let now = peak_kib(pid).unwrap_or(0);
                    own.peak.fetch_max(now, Ordering::Relaxed);
                    let _ = own
                        .idle
                        .compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Self { shared }
    }

    /// An agent begins to live.
    fn see(&self, agent: &Agent) {
        let log = agent.log_path();
        let length = log.metadata().map_or(0, |data| data.len());
        *self.shared.log.lock().expect("no thread panics with it") = (log, length);
        self.shared.pid.store(agent.id(), Ordering::Relaxed);
    }
}

impl Watched {
    /// By its own word: the proxy also sees the last connection of an agent that is gone.
    fn is_ready(&self) -> bool {
        let (log, length) = self.log.lock().expect("no thread panics with it").clone();
        let mut said = String::new();
        let read = File::open(log).and_then(|mut file| {
            file.seek(SeekFrom::Start(length))?;
            file.read_to_string(&mut said)
        });
        read.is_ok() && said.contains(" ready model=")
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
    }
}

fn peak_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
