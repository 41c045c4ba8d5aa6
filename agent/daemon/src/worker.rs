//! The one thread that owns the model. Between two steps it looks at its commands, so that a cancel or a
//! deadline takes effect within one step. Never touches the broker, and decides nothing about tasks.

use crate::service::Pulse;
use anyhow::Context;
use millwright_engine::{Completion, Event, Reads, Request, RequestError};
use millwright_task::job::Ticket;
use millwright_task::limits::{RUNNING_TASKS_MAX, WORKER_EVENTS_MAX};
use millwright_task::pressure::Level;
use std::collections::{HashMap, VecDeque};
use std::fmt::Debug;
use std::hash::Hash;
use std::thread::JoinHandle;
use tokio::sync::mpsc::error::{TryRecvError, TrySendError};
use tokio::sync::{mpsc, watch};

/// Levels that wait for a step's end; the next is told when there is room.
const LEVELS_MAX: usize = 4;

/// A task in the model's own form.
pub trait Work: Send + 'static {
    fn prompt_tokens(&self) -> usize;
    /// Prompt and answer together, at most.
    fn tokens_max(&self) -> usize;
    /// What of the cache it holds while it runs, in tokens.
    fn kv_tokens(&self) -> usize;
}

/// Makes work of requests; may be called from any thread.
pub trait Prepare: Send + Sync + 'static {
    type Work: Work;
    fn prepare(&self, request: Request) -> Result<Self::Work, RequestError>;
}

/// The model as the worker drives it: the engine, or a test's stand-in without weights.
pub trait Brain: Send + 'static {
    type Work: Work;
    type Slot: Copy + Eq + Hash + Debug + Send;
    /// Begins a task, or gives it back when there is no room for it now.
    fn start(&mut self, work: Self::Work) -> Result<Self::Slot, Self::Work>;
    /// Does one step of all that run.
    fn step(&mut self) -> Result<Vec<(Self::Slot, Event)>, String>;
    /// Ends a task; what was produced until now.
    fn cancel(&mut self, slot: Self::Slot) -> Completion;
    /// Puts a task aside, to be started again later; and what was produced until now.
    fn suspend(&mut self, slot: Self::Slot) -> (Self::Work, Completion);
    /// Takes less of the machine from now on, or all that it may again.
    fn ease(&mut self, level: Level);
    fn is_idle(&self) -> bool;
    fn load(&self) -> Load;
}

/// The KV arena's use, in tokens, and what decoding has read since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    pub kv_tokens_used: usize,
    pub kv_tokens_max: usize,
    pub reads: Reads,
}

/// What the worker is told.
pub enum Command<W> {
    Start(Ticket, W),
    Stop(Ticket),
    Suspend(Ticket),
    Ease(Level),
}

/// What the worker tells.
pub enum Report<W> {
    Started(Ticket),
    Text(Ticket, String),
    Done(Ticket, Completion),
    /// Answers [`Command::Stop`]; `None` when the model never began.
    Stopped(Ticket, Option<Completion>),
    /// Answers [`Command::Suspend`].
    Suspended(Ticket, W, Option<Completion>),
    Failed(Ticket, String),
}

/// The agent's ends of the worker. The thread ends when `commands` is dropped.
pub struct Worker<W> {
    pub commands: mpsc::Sender<Command<W>>,
    pub reports: mpsc::Receiver<Report<W>>,
    pub load: watch::Receiver<Load>,
    pub thread: JoinHandle<()>,
}

/// Moves the model onto its thread, which says by `pulse` that it goes on.
pub fn spawn<B: Brain>(brain: B, pulse: Pulse) -> anyhow::Result<Worker<B::Work>> {
    // A start, a stop and a word to give way for each task that runs: a send never finds it full. Beside them, levels.
    let (commands, commands_rx) = mpsc::channel(3 * RUNNING_TASKS_MAX + LEVELS_MAX);
    let (reports_tx, reports) = mpsc::channel(WORKER_EVENTS_MAX);
    let (load_tx, load) = watch::channel(brain.load());
    let bench = Bench {
        brain,
        pulse,
        commands: commands_rx,
        reports: reports_tx,
        load: load_tx,
        waiting: VecDeque::new(),
        tickets: HashMap::new(),
        texts: HashMap::new(),
    };
    let thread = std::thread::Builder::new()
        .name("model".into())
        .spawn(move || bench.run())
        .context("the model's thread can't be started")?;
    Ok(Worker {
        commands,
        reports,
        load,
        thread,
    })
}

/// The agent is gone.
struct Gone;

struct Bench<B: Brain> {
    brain: B,
    pulse: Pulse,
    commands: mpsc::Receiver<Command<B::Work>>,
    reports: mpsc::Sender<Report<B::Work>>,
    load: watch::Sender<Load>,
    /// Given to us and not begun: the arena has no room yet. At most as many as run.
    waiting: VecDeque<(Ticket, B::Work)>,
    tickets: HashMap<B::Slot, Ticket>,
    /// Text that found the channel full; joined with what follows.
    texts: HashMap<Ticket, String>,
}

impl<B: Brain> Bench<B> {
    fn run(mut self) {
        while self.turn().is_ok() {}
    }

    fn turn(&mut self) -> Result<(), Gone> {
        if self.brain.is_idle() && self.waiting.is_empty() {
            self.pulse.rest();
            let command = self.commands.blocking_recv().ok_or(Gone)?;
            self.pulse.beat();
            self.obey(command)?;
        }
        self.pulse.beat();
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command)?,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Err(Gone),
            }
        }
        self.begin()?;
        if !self.brain.is_idle() {
            self.step()?;
        }
        let load = self.brain.load();
        self.load
            .send_if_modified(|last| std::mem::replace(last, load) != load);
        Ok(())
    }

    fn obey(&mut self, command: Command<B::Work>) -> Result<(), Gone> {
        match command {
            Command::Start(ticket, work) => self.waiting.push_back((ticket, work)),
            Command::Ease(level) => self.brain.ease(level),
            // Where neither is so it finished while the command was on its way, and its report was sent before.
            Command::Stop(ticket) => {
                if let Some(slot) = self.slot(ticket) {
                    let completion = self.brain.cancel(slot);
                    self.forget(slot);
                    return self.tell(Report::Stopped(ticket, Some(completion)));
                }
                if self.take_waiting(ticket).is_some() {
                    return self.tell(Report::Stopped(ticket, None));
                }
            }
            Command::Suspend(ticket) => {
                if let Some(slot) = self.slot(ticket) {
                    let (work, completion) = self.brain.suspend(slot);
                    // What comes later counts its place from here, so none of it may be missed.
                    if let Some(text) = self.texts.remove(&ticket) {
                        self.tell(Report::Text(ticket, text))?;
                    }
                    self.forget(slot);
                    return self.tell(Report::Suspended(ticket, work, Some(completion)));
                }
                if let Some(work) = self.take_waiting(ticket) {
                    return self.tell(Report::Suspended(ticket, work, None));
                }
            }
        }
        Ok(())
    }

    fn slot(&self, ticket: Ticket) -> Option<B::Slot> {
        let mut slots = self.tickets.iter();
        slots.find(|(_, t)| **t == ticket).map(|(slot, _)| *slot)
    }

    /// One that was given to us and not begun.
    fn take_waiting(&mut self, ticket: Ticket) -> Option<B::Work> {
        let place = self.waiting.iter().position(|(t, _)| *t == ticket)?;
        Some(self.waiting.remove(place)?.1)
    }

    /// Begins what has been waiting, in order.
    fn begin(&mut self) -> Result<(), Gone> {
        while let Some((ticket, work)) = self.waiting.pop_front() {
            match self.brain.start(work) {
                Ok(slot) => {
                    self.tickets.insert(slot, ticket);
                }
                Err(work) if self.brain.is_idle() => {
                    let reason = format!(
                        "the model has no room for {} tokens even when idle",
                        work.tokens_max()
                    );
                    self.tell(Report::Failed(ticket, reason))?;
                }
                Err(work) => {
                    self.waiting.push_front((ticket, work));
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), Gone> {
        match self.brain.step() {
            Ok(events) => events
                .into_iter()
                .try_for_each(|(slot, event)| self.pass(slot, event)),
            Err(reason) => {
                // The step belonged to all that run, and so does its failure. The next ones get a clean slate.
                let running: Vec<_> = self.tickets.keys().copied().collect();
                running.into_iter().try_for_each(|slot| {
                    self.brain.cancel(slot);
                    match self.forget(slot) {
                        Some(ticket) => self.tell(Report::Failed(ticket, reason.clone())),
                        None => Ok(()),
                    }
                })
            }
        }
    }

    fn pass(&mut self, slot: B::Slot, event: Event) -> Result<(), Gone> {
        let Some(&ticket) = self.tickets.get(&slot) else {
            return Ok(());
        };
        match event {
            Event::Started => self.tell(Report::Started(ticket)),
            Event::Text(text) => self.text(ticket, text),
            Event::Done(completion) => {
                // It holds the whole text, so that text which found no room is not missed.
                self.forget(slot);
                self.tell(Report::Done(ticket, completion))
            }
        }
    }

    /// Text may wait and be joined; decoding never waits for the network.
    fn text(&mut self, ticket: Ticket, new: String) -> Result<(), Gone> {
        let text = match self.texts.remove(&ticket) {
            None => new,
            Some(text) => text + &new,
        };
        match self.reports.try_send(Report::Text(ticket, text)) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(Report::Text(ticket, text))) => {
                self.texts.insert(ticket, text);
                Ok(())
            }
            Err(_) => Err(Gone),
        }
    }

    fn forget(&mut self, slot: B::Slot) -> Option<Ticket> {
        let ticket = self.tickets.remove(&slot)?;
        self.texts.remove(&ticket);
        Some(ticket)
    }

    fn tell(&self, report: Report<B::Work>) -> Result<(), Gone> {
        self.reports.blocking_send(report).map_err(|_| Gone)
    }
}

#[cfg(test)]
mod tests;
