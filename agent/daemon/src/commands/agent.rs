//! `millwright agent`: opens the model and serves.

use crate::app::{self, Mind};
use crate::card::Model;
use crate::config::{self, Config};
use crate::confine::confine;
use crate::service;
use crate::worker::{Brain, Load, Prepare, Work};
use anyhow::{Context, Result};
use millwright_engine::{
    Completion, Engine, Event, Options, Prepared, Preparer, Request, RequestError, Slot, bandwidth,
};
use millwright_task::pressure::Level;
use std::path::PathBuf;
use std::thread;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

#[derive(clap::Args)]
pub struct Args {
    /// The configuration (deploy/agent.toml shows every key)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let config = Config::read(&args.config)?;
    // Before there are other threads: it holds for those that come of this one.
    if config.landlock {
        confine(&config)?;
    }
    super::runtime()?.block_on(serve(config))
}

async fn serve(config: Config) -> Result<()> {
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
    tokio::pin!(shutdown);
    service::say_status(&format!(
        "loading the model in {}",
        settings.bundle.display()
    ));
    let Some(mind) = unless(shutdown.as_mut(), move || open(&settings)).await? else {
        tracing::info!("shut down while the model was loading");
        return Ok(());
    };
    tracing::info!(model = mind.model.name, digest = mind.model.digest, base = %config.base, "ready");
    app::run(config, mind, shutdown).await
}

/// What `load` returns, or `None` once `shutdown` resolves. Packing can take minutes; a thread of its own, unlike the
/// runtime's, keeps no one waiting: it ends with the process, and the next start packs anew.
async fn unless<T: Send + 'static>(
    shutdown: impl Future<Output = ()>,
    load: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<Option<T>> {
    let (send, loaded) = oneshot::channel();
    thread::Builder::new()
        .name("load".into())
        .spawn(move || drop(send.send(load())))
        .context("a thread to load the model can't be started")?;
    tokio::select! {
        biased;
        () = shutdown => Ok(None),
        loaded = loaded => loaded.context("the model's loading broke off")?.map(Some),
    }
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
        file: settings.file.clone(),
        guard: settings.guard.unwrap_or(defaults.guard),
    };
    // Before the model takes its memory and any task runs: it takes the memory's whole bandwidth for a second, at each
    // start until one that nothing disturbed.
    let bandwidth = bandwidth::remembered(&settings.state_dir);
    let engine = Engine::open(&settings.bundle, &options)
        .with_context(|| format!("the model in {} can't be used", settings.bundle.display()))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{pending, ready};
    use std::sync::mpsc;

    #[tokio::test]
    async fn a_signal_during_the_load_is_obeyed_at_once() {
        let (finish, wait) = mpsc::channel::<()>();
        let slow = move || Ok(wait.recv().is_ok());
        assert_eq!(unless(ready(()), slow).await.unwrap(), None);
        drop(finish);
        assert_eq!(unless(pending(), || Ok(3)).await.unwrap(), Some(3));
        let failed = unless(pending(), || Err::<(), _>(anyhow::anyhow!("no model"))).await;
        assert_eq!(failed.unwrap_err().to_string(), "no model");
        let broken = unless(pending(), || -> Result<()> { panic!("a defect") }).await;
        assert!(broken.unwrap_err().to_string().contains("broke off"));
    }
}
