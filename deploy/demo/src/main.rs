//! The demo: a broker, an agent and an operator on this machine, and real work orders that go from one to
//! the other. Builds and starts the programs that a plant would run; nothing of them is linked in here, so
//! the agent carries no broker.

#![forbid(unsafe_code)]

mod broker;
mod operator;
mod programs;
mod screen;

use anyhow::{Context, Result, bail};
use clap::Parser;
use programs::{Agent, Programs};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Where the demo's gateway lives: `millwright/v1/{SITE}/{GATEWAY}`.
const SITE: &str = "demo";
const GATEWAY: &str = "gw-01";
/// The sender's level of the topics, which a broker with users would hold the operator to.
const OPERATOR: &str = "operator";
/// Packing the weights at a first start takes seconds; on a small board, longer.
const ONLINE_WITHIN: Duration = Duration::from_mins(3);

/// Runs the whole thread on this machine: builds the agent, brings a model, starts a broker on the loopback
/// interface, an agent and an operator, and sends a few real maintenance work orders as tasks.
#[derive(Parser)]
#[command(name = "cargo demo", version)]
struct Arguments {
    /// The model, by its name in `cargo forge list`
    #[arg(long, default_value = "smollm2-135m")]
    model: String,
    /// The broker's port; a free one by default
    #[arg(long)]
    port: Option<u16>,
    /// Leave broker and agent running afterwards, and say how to talk to them
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    match runtime.block_on(run(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("\ndemo: {error:#}");
    ExitCode::FAILURE
}

async fn run(arguments: &Arguments) -> Result<()> {
    // First of all, so that a port in use is told before minutes of building.
    let address = broker::reserve(arguments.port)?;
    screen::step("Building the agent and the forge");
    let programs = Programs::build()?;
    screen::step(&format!("Bringing the model {}", arguments.model));
    let bundle = programs.pull(&arguments.model)?;
    screen::fact("model", &bundle.display().to_string());

    screen::step("Starting a broker, an agent and an operator");
    broker::start(address)?;
    screen::fact("broker", &format!("{address} (MQTT 5, loopback only)"));
    let mut agent = Agent::start(&programs, &bundle, address)?;
    let outcome = tokio::select! {
        outcome = work(address) => outcome,
        died = agent.died() => Err(died),
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    if outcome.is_ok() && arguments.keep {
        screen::keep(address, &programs.millwright);
        tokio::select! {
            died = agent.died() => return Err(died),
            stopped = tokio::signal::ctrl_c() => stopped.context("waiting for Ctrl-C")?,
        }
    }
    agent.stop().await;
    outcome
}

/// The operator's part, from the agent coming online to the last answer.
async fn work(address: std::net::SocketAddr) -> Result<()> {
    let began = Instant::now();
    let mut operator = operator::Operator::connect(address).await?;
    let online = tokio::time::timeout(ONLINE_WITHIN, operator.wait_until_online()).await;
    online.with_context(|| {
        format!(
            "the agent did not come online within {} s",
            ONLINE_WITHIN.as_secs()
        )
    })??;
    screen::fact(
        "agent",
        &format!("online after {:.1} s", began.elapsed().as_secs_f32()),
    );

    let orders = operator::orders()?;
    screen::step(&format!("Sending {} work orders", orders.len()));
    let summary = operator.run(&orders).await?;
    screen::summary(&summary);
    if summary.answered < orders.len() {
        bail!(
            "{} of {} work orders were answered",
            summary.answered,
            orders.len()
        );
    }
    Ok(())
}
