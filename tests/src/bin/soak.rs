//! The soak's command line; `tests/soak/run` builds and starts it.

use millwright_tests::faults::soak::{Options, run};
use std::process::ExitCode;
use std::str::FromStr;

const USAGE: &str = "tests/soak/run --hours N [--rate N] [--seed N] [--out FOLDER]";

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(what) => {
            eprintln!("{what}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("no soak: {why}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options::default();
    while let Some(argument) = arguments.next() {
        let value = arguments
            .next()
            .ok_or(format!("{argument} takes a value"))?;
        match argument.as_str() {
            "--hours" => options.hours = number(&argument, &value)?,
            "--rate" => options.rate = number(&argument, &value)?,
            "--seed" => options.seed = number(&argument, &value)?,
            "--out" => options.out = value.into(),
            _ => return Err(format!("unknown argument {argument}")),
        }
    }
    if options.hours.is_finite() && options.hours > 0.0 {
        return Ok(options);
    }
    Err("--hours takes a number above 0".into())
}

fn number<T: FromStr>(argument: &str, value: &str) -> Result<T, String> {
    value
        .parse()
        .map_err(|_| format!("{argument} takes a number"))
}
