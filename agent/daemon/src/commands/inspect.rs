//! `millwright model inspect`: what a model's folder holds and how it would run on this machine.

use super::model::{MEGA, PROCESS_BYTES, packed_folder};
use anyhow::Result;
use millwright_engine::{Inspection, Options, bandwidth, inspect};
use std::path::PathBuf;

/// The share of the memory's bandwidth that decoding was found to reach.
const SHARE: f64 = 0.8;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model's folder: a bundle or an exporter's
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Which graph to look at where the folder has several
    #[arg(long, value_name = "NAME")]
    file: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let found = inspect(&args.folder, args.file.as_deref())?;
    if args.json {
        println!("{}", serde_json::to_string(&found)?);
    } else {
        print(&found);
    }
    Ok(())
}

fn print(found: &Inspection) {
    let mega = |bytes: usize| bytes as f64 / MEGA;
    let line = |what: &str, text: String| println!("{what:<20}{text}");
    line(
        "model",
        format!("{} ({}), {}", found.name, found.architecture, found.graph),
    );
    line(
        "parameters",
        format!("{:.1} million", found.parameters as f64 / 1e6),
    );
    for part in &found.parts {
        line(part.role, part.content());
    }
    line("context", format!("{} tokens", found.context_length));
    let (ours, all) = found.fused;
    line(
        "operators",
        format!(
            "{ours} of {all} fused, {} plan, {}",
            found.plan,
            if found.exact {
                "the same bits on every CPU"
            } else {
                "not the same bits everywhere"
            }
        ),
    );
    if !found.left.is_empty() {
        let left = found
            .left
            .iter()
            .map(|(name, count)| format!("{count} {name}"));
        line("left to tract", left.collect::<Vec<_>>().join(", "));
    }
    for note in &found.notes {
        line("note", note.clone());
    }
    if let Some(guard) = &found.guard {
        line("guard", guard.to_string());
    }
    line(
        "chat",
        if found.chat {
            "yes"
        } else {
            "no: it has no template"
        }
        .into(),
    );
    let fit = found.needs(&Options::default(), PROCESS_BYTES).here();
    line(
        "memory",
        format!(
            "{:.0} MB as an agent: {}",
            fit.needs.bytes() as f64 / MEGA,
            fit.needs
        ),
    );
    if let Err(misfit) = fit.judge() {
        line("", format!("it does not fit here: {misfit}"));
    }
    let bandwidth = packed_folder()
        .ok()
        .and_then(|folder| bandwidth::remembered(&folder));
    if let Some(rate) = bandwidth.filter(|_| found.bytes_per_token > 0 && found.plan == "flat") {
        line(
            "decode",
            format!(
                "about {:.0} tokens/s here: {:.1} MB a token, of memory that reads {:.1} GB/s",
                SHARE * rate / found.bytes_per_token as f64,
                mega(found.bytes_per_token),
                rate / 1e9,
            ),
        );
    }
}
