//! `millwright agent`: opens the model and serves.

use crate::app::{self, Mind};
use crate::card::Model;
use crate::config::{self, Config};
use crate::worker::{Brain, Load, Prepare, Work};
use anyhow::{Context, Result};
use millwright_engine::{
    Completion, Engine, Event, Options, Prepared, Preparer, Request, RequestError, Slot, bandwidth,
};
use std::path::PathBuf;
use tokio::signal::unix::{SignalKind, signal};

#[derive(clap::Args)]
pub struct Args {
    /// The configuration (deploy/agent.toml shows every key)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub(super) async fn run(args: Args) -> Result<()> {
    let config = Config::read(&args.config)?;
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
    let mind = tokio::task::spawn_blocking(move || open(&settings))
        .await
        .context("the model's loading broke off")??;
    tracing::info!(model = mind.model.name, digest = mind.model.digest, base = %config.base, "ready");
    app::run(config, mind, shutdown).await
}

/// The engine, opened and described.
fn open(settings: &config::Model) -> Result<Mind<Engine, Preparer>> {
    let defaults = Options::default();
    let options = Options {
        threads: settings.threads,
        kernel: settings.kernel.clone().or(defaults.kernel),
        state_dir: settings.state_dir.clone(),
        slots: settings.slots.unwrap_or(defaults.slots),
        kv_tokens: settings.kv_tokens.unwrap_or(defaults.kv_tokens),
        kv_precision: settings.kv_cache.unwrap_or(defaults.kv_precision),
        prefill_chunk: settings.prefill_chunk.unwrap_or(defaults.prefill_chunk),
        plan: defaults.plan,
    };
    let engine = Engine::open(&settings.bundle, &options)
        .with_context(|| format!("the model in {} can't be used", settings.bundle.display()))?;
    // Before any task runs: it takes the memory's whole bandwidth for a second, at the first start only.
    let bandwidth = bandwidth::remembered(&settings.state_dir);
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
        read_bytes_per_s: Some(bandwidth as u64),
        plan: card.plan.to_string(),
        notes: card.notes.clone(),
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
