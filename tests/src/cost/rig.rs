//! What is measured: an agent on a real disk, its broker, and the senders. Counts syncs where it is told to.

use super::Context;
use super::SENDERS;
use super::sender::{Pace, Seen, Sender};
use crate::faults::{Field, Shim};
use crate::process::file_system;
use crate::{Agent, Broker, Client, Keeps, Setup, agent_program, program};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// A folder on a disk for the agents' states.
pub(super) fn folder(wanted: Option<&Path>, context: &mut Context) -> Result<TempDir, String> {
    let beside = program("millwright");
    let parent = wanted.or(beside.parent()).expect("the programs' folder");
    let folder = tempfile::tempdir_in(parent).map_err(|e| format!("{}: {e}", parent.display()))?;
    let kind = file_system(folder.path()).unwrap_or_else(|| "unknown".into());
    if ["tmpfs", "ramfs"].contains(&kind.as_str()) {
        return Err(format!(
            "{} is {kind}, in memory: say --dir with a folder on a disk",
            parent.display()
        ));
    }
    context.say(format!("file system of the journal: {kind}"));
    context.say(format!("agent: {}", agent_program().display()));
    Ok(folder)
}

pub(super) struct Rig {
    pub(super) senders: Vec<Sender>,
    pub(super) agent: Agent,
    pub(super) broker: Broker,
    shim: Option<Shim>,
    state: PathBuf,
}

impl Rig {
    pub(super) fn start(folder: &Path, broker: &str, counts: bool) -> Result<Self, String> {
        let name = if counts { "counted" } else { "timed" };
        let state = folder.join(name);
        std::fs::create_dir(&state).map_err(|e| e.to_string())?;
        // The shim compares whole paths.
        let state = state.canonicalize().map_err(|e| e.to_string())?;
        let shim = counts.then(|| Shim::new(&state)).transpose()?;
        let broker = Broker::quiet(Keeps::AtTheEnd, broker);
        let setup = Setup {
            model: "threads = 1\nslots = 16".into(),
            tasks: "queue_max = 256".into(),
            state_dir: Some(state.clone()),
            env: shim.as_ref().map(|s| s.env(false)).unwrap_or_default(),
            ..Setup::default()
        };
        let agent = Agent::with(&broker, &setup);
        Client::connect(&broker, "console").await_state("online");
        let names = (0..SENDERS).map(|n| format!("sender{n}"));
        let senders = names.map(|name| Sender::connect(broker.client_port, &name));
        let rig = Self {
            senders: senders.collect(),
            agent,
            broker,
            shim,
            state,
        };
        Ok(rig)
    }

    pub(super) fn pid(&self) -> u32 {
        self.agent.id()
    }

    /// All senders at once.
    pub(super) fn all(&mut self, pace: Pace, time: Duration) -> Seen {
        std::thread::scope(|scope| {
            let running: Vec<_> = self
                .senders
                .iter_mut()
                .map(|sender| scope.spawn(move || sender.run(pace, time, usize::MAX)))
                .collect();
            let mut all = Seen::default();
            for thread in running {
                all.add(thread.join().expect("a sender's thread"));
            }
            all
        })
    }

    /// Good syncs below the state folder so far.
    pub(super) fn syncs(&self) -> i64 {
        self.shim.as_ref().map_or(0, |shim| shim.get(Field::Syncs))
    }

    /// The journal's length and the room it takes, in bytes.
    pub(super) fn journal(&self) -> Result<(u64, u64), String> {
        let path = self.state.join("journal.redb");
        let data = path.metadata().map_err(|e| format!("the journal: {e}"))?;
        Ok((data.len(), data.blocks() * 512))
    }
}
