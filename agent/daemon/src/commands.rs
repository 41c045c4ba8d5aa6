//! The subcommands: one module each, with its arguments and a `run`.

mod agent;
mod ask;
mod bench;
mod eval;
mod generate;
mod import;
mod inspect;
mod model;

use crate::{crash, log};
use anyhow::{Context, Result};
use clap::Subcommand;

#[derive(Subcommand)]
pub enum Command {
    /// Serve tasks from the broker until SIGTERM
    Agent(agent::Args),
    /// Send one task to a gateway and print its answer as it comes
    Ask(ask::Args),
    /// Answer one prompt on this machine, without a broker
    Generate(generate::Args),
    /// Measure prefill, decode, load time and memory of a model on this machine
    Bench(bench::Args),
    /// Measure perplexity on a text, and the KL divergence from a reference model
    ///
    /// The text is cut into windows, each scored from an empty context. The reference runs in f32 arithmetic; take the
    /// f32 form of the same model: `cargo forge pull NAME --precision f32`.
    Eval(eval::Args),
    /// Look at a model without running it
    #[command(subcommand)]
    Model(ModelCommand),
}

#[derive(Subcommand)]
pub enum ModelCommand {
    /// Say what a model's folder holds and how it would run on this machine
    ///
    /// Imports the graph as the agent would: which form its weights have, what is fused, what is left to tract and
    /// why, how much memory it takes and how fast it should decode. Nothing is written but the memory's bandwidth, which
    /// is measured once (a second).
    Inspect(inspect::Args),
    /// Make a bundle of an exporter's folder, for gateways
    ///
    /// Checks first that the model, imported and packed, computes what its file says: each linear, and the whole, against f32
    /// arithmetic. Linears that eight bits would change too much stay in f32; a model that diverges nevertheless is
    /// refused. What was found is in the bundle's manifest. The folder itself can be run, too: it is checked then at the
    /// first start.
    Import(import::Args),
}

impl Command {
    pub fn run(self) -> Result<()> {
        match self {
            Self::Agent(args) => {
                log::start("info");
                crash::say_no_more_than_where();
                agent::run(&args)
            }
            Self::Ask(args) => {
                log::start("error");
                runtime()?.block_on(ask::run(args))
            }
            Self::Generate(args) => {
                log::start(LOCAL);
                generate::run(&args)
            }
            Self::Bench(args) => {
                log::start(LOCAL);
                bench::run(&args)
            }
            Self::Model(ModelCommand::Inspect(args)) => {
                log::start("warn");
                inspect::run(&args)
            }
            Self::Model(ModelCommand::Import(args)) => {
                log::start("warn");
                import::run(&args)
            }
            Self::Eval(args) => {
                log::start(LOCAL);
                eval::run(&args)
            }
        }
    }
}

/// Where a model is run in front of somebody, they hear what takes long at its first start.
const LOCAL: &str = "warn,millwright_engine::guard=info,millwright_engine::pack=info";

/// Two threads: one polls the broker while the other prepares a long prompt.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the runtime can't be started")
}
