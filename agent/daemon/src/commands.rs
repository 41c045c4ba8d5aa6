//! The subcommands: one module each, with its arguments and a `run`.

mod agent;
mod ask;
mod bench;
mod credentials;
mod doctor;
mod enroll;
mod eval;
mod files;
mod generate;
mod import;
mod init;
mod inspect;
mod model;

use crate::{crash, log};
use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

/// Language models inside the plant, over MQTT.
#[derive(Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Serve tasks from the broker until SIGTERM
    Agent(agent::Args),
    /// Set a gateway up: ask for broker, site, name and model, and write the configuration
    ///
    /// Tries the connection, writes a configuration that explains every key, and ends with `millwright doctor`. Every answer
    /// has a flag, so that a script needs no terminal: --yes with --site, --host and --model, and what differs from the
    /// defaults.
    ///
    /// Secrets are named by their files. Those in /etc/millwright/credentials are passed to the service by systemd, so the
    /// configuration names them as /run/credentials/millwright.service/….
    Init(init::Args),
    /// Look whether everything is there that the agent needs, and say what to do about what isn't
    ///
    /// Looks at the configuration, file rights, certificates, the broker with its limits, the rights on each topic, the model with
    /// all its checksums, memory, sensors, clock and disk. Changes nothing and may run beside the agent. The exit code is 1
    /// where there is a problem; warnings and notes leave it at 0.
    Doctor(doctor::Args),
    /// Make a key and a request for its certificate; the key stays on this box
    ///
    /// With a key that is there already the request renews its certificate: an agent that runs takes the renewed file up
    /// without a restart.
    Enroll(enroll::Args),
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
            Self::Init(args) => {
                log::start("error");
                init::run(&args)
            }
            Self::Doctor(args) => {
                log::start("error");
                doctor::run(&args)
            }
            Self::Enroll(args) => {
                log::start("error");
                enroll::run(&args)
            }
            Self::Ask(args) => {
                log::start("error");
                block_on(ask::run(args))?
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

/// Runs it to its end, and waits for nobody who reads a file or resolves a name beside it. One thread for the broker's
/// connections and the dispatcher: they hand everything to each other, and with more threads an agent under load spent a
/// quarter more processor time on waking them. The model and the journal have their own.
fn block_on<T>(future: impl Future<Output = T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the runtime can't be started")?;
    let outcome = runtime.block_on(future);
    runtime.shutdown_background();
    Ok(outcome)
}
