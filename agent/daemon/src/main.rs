//! The agent's process and its command line.

mod commands;

use clap::{Parser, Subcommand};

/// Language models inside the plant
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Generate(commands::generate::GenerateArgs),
    Bench(commands::bench::BenchArgs),
    Eval(commands::eval::EvalArgs),
}

fn main() -> std::process::ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(args) => commands::generate::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Eval(args) => commands::eval::run(&args),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("millwright: {e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
