//! The fault suite's command line; `tests/faults/run` builds and starts it.

use millwright_tests::faults::{Options, run};
use std::process::ExitCode;

const USAGE: &str = "tests/faults/run [--quick] [--only NAME] [--seconds N] [--seed N] [--jobs N] [--write] [--list]";

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)) {
        Ok(options) if run(&options) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(what) => {
            eprintln!("{what}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options::default();
    while let Some(argument) = arguments.next() {
        let mut number = || {
            let value = arguments.next().and_then(|value| value.parse().ok());
            value.ok_or_else(|| format!("{argument} takes a number"))
        };
        match argument.as_str() {
            "--quick" => options.quick = true,
            "--write" => options.write = true,
            "--list" => options.list = true,
            "--seconds" => options.seconds = Some(number()?),
            "--seed" => options.seed = number()?,
            "--jobs" => options.jobs = number()?.clamp(1, 64) as usize,
            "--only" => options.only.extend(arguments.next()),
            _ => return Err(format!("unknown argument {argument}")),
        }
    }
    Ok(options)
}
