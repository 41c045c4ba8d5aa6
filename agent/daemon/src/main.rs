//! The command line. Errors are one sentence on stderr and exit code 1.

use clap::Parser;
use millwright::commands::Cli;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!(
                "millwright: {}",
                millwright_task::wire::printable(&format!("{error:#}"))
            );
            ExitCode::FAILURE
        }
    }
}
