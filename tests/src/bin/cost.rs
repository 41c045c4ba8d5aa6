//! The cost measurement's command line; `tests/cost/run` builds and starts it.

use millwright_tests::cost::{Options, Part, run};
use std::process::ExitCode;

const USAGE: &str =
    "tests/cost/run [--quick] [--json FILE] [--only time|flash] [--dir FOLDER] [--broker LINE]";

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
            eprintln!("not measured: {why}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options::default();
    while let Some(argument) = arguments.next() {
        let mut path = || {
            let path = arguments.next().ok_or(format!("{argument} takes a path"));
            path.map(|path| Some(path.into()))
        };
        match argument.as_str() {
            "--quick" => options.quick = true,
            "--json" => options.json = path()?,
            "--only" => options.only = Some(part(arguments.next().as_deref())?),
            "--broker" => options.broker.extend(arguments.next()),
            "--dir" => options.folder = path()?,
            _ => return Err(format!("unknown argument {argument}")),
        }
    }
    Ok(options)
}

fn part(name: Option<&str>) -> Result<Part, String> {
    match name {
        Some("time") => Ok(Part::Time),
        Some("flash") => Ok(Part::Flash),
        _ => Err("--only takes time or flash".into()),
    }
}
