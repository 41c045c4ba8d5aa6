//! The subcommands: one module each, with its arguments and a `run`.

mod agent;
mod ask;
mod bench;
mod eval;
mod generate;
mod import;
mod inspect;
mod model;

use crate::crash;
use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

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
                log("info");
                crash::say_no_more_than_where();
                runtime()?.block_on(agent::run(args))
            }
            Self::Ask(args) => {
                log("error");
                runtime()?.block_on(ask::run(args))
            }
            Self::Generate(args) => {
                log(LOCAL);
                generate::run(&args)
            }
            Self::Bench(args) => {
                log(LOCAL);
                bench::run(&args)
            }
            Self::Model(ModelCommand::Inspect(args)) => {
                log("warn");
                inspect::run(&args)
            }
            Self::Model(ModelCommand::Import(args)) => {
                log("warn");
                import::run(&args)
            }
            Self::Eval(args) => {
                log(LOCAL);
                eval::run(&args)
            }
        }
    }
}

/// Where a model is run in front of somebody, they hear what takes long at its first start.
const LOCAL: &str = "warn,millwright_engine::guard=info,millwright_engine::pack=info";

/// Logs go to stderr; `MILLWRIGHT_LOG` says how much.
fn log(level: &str) {
    let asked = std::env::var("MILLWRIGHT_LOG").unwrap_or_else(|_| level.into());
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter(&asked)))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

/// A level is that of our own crates: libraries log what passes through them. Who wants more of one names it, as
/// `RUST_LOG` does elsewhere (`debug,rustls=debug`). The MQTT client's own warnings repeat what we say better, and tract
/// warns of each opset that it was not tested with.
fn filter(asked: &str) -> String {
    const LIBRARIES: &str = "warn,rumqttc=off,tract_onnx=error";
    let asked = asked.split(',').map(|part| {
        let is_level = part.trim().parse::<LevelFilter>().is_ok();
        // All of our crates begin so.
        let own = if is_level { "millwright=" } else { "" };
        format!(",{own}{}", part.trim())
    });
    asked.fold(LIBRARIES.to_owned(), |all, part| all + &part)
}

/// Two threads: one polls the broker while the other prepares a long prompt.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the runtime can't be started")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_that_of_our_own_crates() {
        let libraries = "warn,rumqttc=off,tract_onnx=error";
        assert_eq!(filter("info"), format!("{libraries},millwright=info"));
        assert_eq!(filter("TRACE"), format!("{libraries},millwright=TRACE"));
        assert_eq!(
            filter("debug, rustls=trace"),
            format!("{libraries},millwright=debug,rustls=trace")
        );
        assert_eq!(
            filter(LOCAL),
            format!(
                "{libraries},millwright=warn,millwright_engine::guard=info,millwright_engine::pack=info"
            )
        );
    }
}
