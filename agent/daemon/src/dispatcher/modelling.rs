//! Whether there is a model: until it is known tasks wait where they are, without one they are refused, and when there is one,
//! what was accepted before goes to it. Loads nothing.

use super::{Dispatcher, prepare};
use crate::alarms::Alarm;
use crate::card::Model;
use crate::worker::{Command, Load, Prepare};
use millwright_task::wire::{Code, Refusal, printable};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// How long tasks wait for a model that is being loaded, before they are refused. A first start may pack and measure for
/// minutes; a later one takes a second.
const PATIENCE: Duration = Duration::from_secs(10);

/// A model at work, and what it takes.
pub struct Equipment<P: Prepare> {
    pub model: Model,
    pub preparer: P,
    /// Tasks at the same time.
    pub slots: usize,
    /// Tokens that one task may take.
    pub context: usize,
    pub commands: mpsc::Sender<Command<P::Work>>,
    pub load: watch::Receiver<Load>,
}

/// What is known of the model.
pub(super) enum Standing<P: Prepare> {
    /// It is being loaded, since then.
    Loading(Duration),
    /// There is none, and why; for as long as loading takes, that.
    Lacking(String),
    Ready(Box<Equipment<P>>),
}

impl<P: Prepare> Standing<P> {
    pub(super) fn ready(&self) -> Option<&Equipment<P>> {
        match self {
            Self::Ready(equipment) => Some(equipment),
            Self::Loading(_) | Self::Lacking(_) => None,
        }
    }

    /// Tells the model something. There is room (see `worker::spawn`); when the thread is gone, the agent ends anyway.
    pub(super) fn tell(&self, command: Command<P::Work>) -> bool {
        self.ready()
            .is_some_and(|equipment| equipment.commands.try_send(command).is_ok())
    }
}

/// What a task is told that came where there is no model.
pub(super) fn no_model() -> Refusal {
    let reason = "this gateway has no usable model: its state says why";
    Refusal::new(Code::NoModel, reason.into())
}

impl<P: Prepare> Dispatcher<P> {
    /// The model is there.
    pub fn equip(&mut self, kv_tokens_max: usize, equipment: Equipment<P>) {
        let model = &equipment.model;
        tracing::info!(model = model.name, digest = model.digest, base = %self.decoder.base, "ready");
        let now = self.parts.clock.now();
        let (preparer, context) = (&equipment.preparer, equipment.context);
        let ended = self
            .admission
            .equip(now, equipment.slots, kv_tokens_max, |task, (_, seed)| {
                prepare(preparer, context, task, seed)
            });
        self.standing = Standing::Ready(Box::new(equipment));
        for post in ended {
            self.conclude(None, post);
        }
        self.tally.keep(|ticket| self.admission.holds(ticket));
        self.alarms.clear(Alarm::Model);
        self.settle_gate();
        self.say_state();
        self.say_card();
    }

    /// There is no model, and why. It may come yet.
    pub fn lack(&mut self, why: &str) {
        let why = printable(why);
        tracing::error!("there is no model to serve with: {why}");
        self.alarms
            .raise(self.parts.clock.now(), Alarm::Model, &why);
        self.take_for_lacking(why);
    }

    /// Refuses tasks rather than let them wait for a model any longer.
    pub(super) fn lose_patience(&mut self) {
        let now = self.parts.clock.now().own;
        if let Standing::Loading(since) = self.standing
            && now.saturating_sub(since) >= PATIENCE
        {
            tracing::info!("the model takes long to load: tasks are refused until it is there");
            self.take_for_lacking("it is being loaded".into());
        }
    }

    fn take_for_lacking(&mut self, why: String) {
        self.standing = Standing::Lacking(why);
        self.settle_gate();
        self.say_state();
        self.say_card();
    }

    /// Whether it will be known soon if there is a model: until then no task is taken in, and nothing is said of it.
    pub(super) fn is_settling(&self) -> bool {
        matches!(self.standing, Standing::Loading(_)) && !self.is_draining
    }
}
