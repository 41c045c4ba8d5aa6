//! `millwright agent`: says how the model is loaded, and serves.

use super::model::PROCESS_BYTES;
use crate::app::{self, Mind};
use crate::card::Model;
use crate::config::{self, Config};
use crate::confine::confine;
use crate::loader::{self, Unusable};
use crate::worker::{Brain, Load, Prepare, Work};
use anyhow::{Context, Result};
use millwright_engine::{
    Completion, Engine, Event, Fit, OpenError, Options, Prepared, Preparer, Request, RequestError,
    Room, Slot, bandwidth, fit,
};
use millwright_task::pressure::Level;
use std::path::PathBuf;
use tokio::signal::unix::{SignalKind, signal};

#[derive(clap::Args)]
pub struct Args {
    /// The configuration (deploy/agent.toml shows every key)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let config = Config::read(&args.config)?;
    let options = options(&config.model);
    options
        .check()
        .with_context(|| format!("the configuration {} can't be used", args.config.display()))?;
    // Before there are other threads: it holds for those that come of this one.
    if config.landlock {
        confine(&config)?;
    }
    super::block_on(serve(config, options))?
}

async fn serve(config: Config, options: Options) -> Result<()> {
    // Before the model loads: a signal during the load must not be lost.
    let (mut term, mut int) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    let shutdown = async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    };
    let settings = config.model.clone();
    let models = loader::spawn(config.model.bundle.clone(), move || {
        open(&settings, &options)
    })?;
    app::run(config, models, shutdown).await
}

/// What the configuration asks of the engine.
fn options(settings: &config::Model) -> Options {
    let defaults = Options::default();
    Options {
        threads: settings.threads,
        kernel: settings.kernel.clone().or(defaults.kernel),
        state_dir: settings.state_dir.clone(),
        slots: settings.slots.unwrap_or(defaults.slots),
        kv_tokens: settings.kv_tokens.unwrap_or(defaults.kv_tokens),
        kv_precision: settings.kv_cache.unwrap_or(defaults.kv_precision),
        prefill_chunk: settings.prefill_chunk.unwrap_or(defaults.prefill_chunk),
        plan: defaults.plan,
        file: settings.file.clone(),
        guard: settings.guard.unwrap_or(defaults.guard),
    }
}

/// What the configured model takes, beside the memory that there is.
pub(super) fn fit_of(settings: &config::Model) -> Result<Fit, OpenError> {
    fit(&settings.bundle, &options(settings), PROCESS_BYTES)
}

/// The engine, opened and described, if there is memory for it.
fn open(settings: &config::Model, options: &Options) -> Result<Mind<Engine, Preparer>, Unusable> {
    let folder = &settings.bundle;
    let unusable = |why: &dyn std::fmt::Display| {
        format!("the model in {} can't be used: {why}", folder.display())
    };
    let fit = fit_of(settings).map_err(|e| Unusable::new(unusable(&e)))?;
    if let Err(misfit) = fit.judge() {
        let needed = misfit.needs.bytes();
        return Err(Unusable {
            reason: unusable(&misfit),
            is_over: Box::new(move || Room::here().is_some_and(|room| room.bytes >= needed)),
        });
    }
    tracing::info!("memory: {}", fit.needs);
    // Before the model takes its memory and any task runs: it takes the memory's whole bandwidth for a second, at each
    // start until one that nothing disturbed.
    let bandwidth = bandwidth::remembered(&settings.state_dir);
    let engine = Engine::open(folder, options).map_err(|e| Unusable::new(unusable(&e)))?;
    let card = engine.card();
    let model = Model {
        name: card.name.clone(),
        version: card.version.clone(),
        precision: card.precision.clone(),
        digest: card.digest.clone(),
        exact: card.exact,
        context_length: card.context_length,
        chat: card.chat,
        kernel: card.kernel.clone(),
        decode_threads: card.threads.decode,
        prefill_threads: card.threads.prefill,
        read_bytes_per_s: bandwidth.map(|rate| rate as u64),
        plan: card.plan.to_string(),
        notes: card
            .guard
            .iter()
            .map(ToString::to_string)
            .chain(card.notes.clone())
            .collect(),
    };
    Ok(Mind {
        model,
        preparer: engine.preparer(),
        slots: engine.usage().slots_max,
        brain: engine,
    })
}

impl Work for Prepared {
    fn prompt_tokens(&self) -> usize {
        Prepared::prompt_tokens(self)
    }
    fn tokens_max(&self) -> usize {
        Prepared::tokens_max(self)
    }
    fn kv_tokens(&self) -> usize {
        Prepared::kv_tokens(self)
    }
}

impl Prepare for Preparer {
    type Work = Prepared;
    fn prepare(&self, request: Request) -> Result<Prepared, RequestError> {
        Preparer::prepare(self, request)
    }
}

impl Brain for Engine {
    type Work = Prepared;
    type Slot = Slot;
    fn start(&mut self, work: Prepared) -> Result<Slot, Prepared> {
        Engine::start(self, work)
    }
    fn step(&mut self) -> Result<Vec<(Slot, Event)>, String> {
        Engine::step(self).map_err(|e| e.to_string())
    }
    fn cancel(&mut self, slot: Slot) -> Completion {
        Engine::cancel(self, slot)
    }
    fn suspend(&mut self, slot: Slot) -> (Prepared, Completion) {
        Engine::suspend(self, slot)
    }
    fn ease(&mut self, level: Level) {
        Engine::ease(self, level.quarters());
    }
    fn is_idle(&self) -> bool {
        Engine::is_idle(self)
    }
    fn load(&self) -> Load {
        let usage = self.usage();
        Load {
            kv_tokens_used: usage.kv_tokens_used,
            kv_tokens_max: usage.kv_tokens_max,
            reads: self.reads(),
        }
    }
}
