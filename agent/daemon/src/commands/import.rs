//! `millwright model import`: a bundle of an exporter's folder, its import checked.

use super::model::MEGA;
use anyhow::Result;
use millwright_engine::bundle::Manifest;
use millwright_engine::bundling::{Naming, Stage, make};
use millwright_engine::{Options, Progress};
use std::io::{IsTerminal, Write, stderr};
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The exporter's folder
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// The bundle's folder, new or empty
    #[arg(short, long, value_name = "BUNDLE")]
    output: PathBuf,
    /// Which graph to take where the folder has several
    #[arg(long, value_name = "FILE")]
    file: Option<String>,
    /// What the model is called [default: the folder's name]
    #[arg(long)]
    name: Option<String>,
    /// Which version of it this is [default: 1]
    #[arg(long)]
    version: Option<String>,
    /// The licence of its weights, by its SPDX name [default: unknown]
    #[arg(long, value_name = "NAME")]
    licence: Option<String>,
    /// Don't check the import against f32 arithmetic; the manifest says so
    #[arg(long)]
    no_guard: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let naming = Naming {
        name: args.name.clone(),
        version: args.version.clone(),
        licence: args.licence.clone(),
    };
    let options = Options {
        file: args.file.clone(),
        guard: !args.no_guard,
        ..Options::default()
    };
    let show = stderr().is_terminal();
    let progress: Progress = Arc::new(move |stage| {
        let text = match stage {
            Stage::Reading => "reading the graph".to_owned(),
            Stage::Checking(linear, of) => format!("checking linear {linear} of {of}"),
            Stage::Trying => "trying what was written".to_owned(),
            Stage::Writing(name, bytes) => {
                format!("writing {name}, {:.1} MB", bytes as f64 / MEGA)
            }
        };
        if show {
            // In the place of what was said before.
            let _ = write!(stderr(), "\r\x1b[K{text}");
        }
    });
    let made = make(&args.folder, &naming, &options, &args.output, &progress);
    if show {
        let _ = write!(stderr(), "\r\x1b[K");
    }
    print(&made?);
    println!("{}", args.output.display());
    Ok(())
}

fn print(made: &Manifest) {
    let bytes: u64 = made.files.iter().map(|file| file.bytes).sum();
    println!(
        "{} {}, {}, {:.1} MB",
        made.name,
        made.version,
        made.precision,
        bytes as f64 / MEGA
    );
    let Some(import) = &made.import else {
        return;
    };
    for part in &import.form {
        println!("{part}");
    }
    println!("{}", import.guard);
}
