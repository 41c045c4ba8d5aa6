//! `millwright bench`: how fast a model runs here, beside what the memory allows.

mod gaps;
mod profile;
mod runs;

use super::model::{ModelArgs, resident_bytes};
use anyhow::{Result, anyhow, bail};
use gaps::Gaps;
use millwright_engine::{Threads, bandwidth};
use profile::Profile;
use runs::{Context, Run};
use serde::Serialize;
use std::time::Instant;

/// Positions that a block of the KV cache holds: room is given out in whole ones.
const BLOCK: usize = 64;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Thread counts to measure; more than the machine has cores are that many
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    threads: Vec<usize>,
    /// Prompt lengths to measure
    #[arg(long, value_delimiter = ',', default_value = "80,512")]
    prompt_tokens: Vec<usize>,
    /// Tokens to decode after each prompt
    #[arg(long, default_value_t = 64)]
    decode_tokens: usize,
    /// Answers in progress at once to measure; a model in the plain plan takes one
    #[arg(long, value_delimiter = ',', default_value = "1,4")]
    batch: Vec<usize>,
    /// Measure decoding with this many positions of context too, as in 100,1000,4000
    #[arg(long, value_delimiter = ',', value_name = "POSITIONS")]
    contexts: Vec<usize>,
    /// Runs of each, of which the median counts
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Measure how long running answers wait for a token while a long prompt is computed
    #[arg(long)]
    gaps: bool,
    /// Say where a decode step's time goes
    #[arg(long)]
    profile: bool,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    /// Opening the model with its weights packed already.
    load_ms: f64,
    resident_bytes: Option<u64>,
    tokenizer_bytes: usize,
    /// With the most threads asked for.
    read_bandwidth_gb_s: f64,
    /// Of packed weights, without the cache.
    bytes_per_token: usize,
    /// What the agent would use here, measured unless it is remembered.
    tuned: Threads,
    runs: Vec<Run>,
    contexts: Vec<Context>,
    gaps: Vec<Gaps>,
    profiles: Vec<Profile>,
}

impl Args {
    fn check(&self) -> Result<()> {
        if self.repeat == 0 || self.decode_tokens < 2 {
            bail!("--repeat must be at least 1 and --decode-tokens at least 2");
        }
        let counts = [
            &self.threads,
            &self.prompt_tokens,
            &self.batch,
            &self.contexts,
        ];
        if counts.iter().any(|counts| counts.contains(&0)) {
            bail!("threads, prompts, batches and contexts must be at least 1");
        }
        Ok(())
    }

    /// Positions that the largest of the measurements needs in all.
    fn kv_tokens(&self) -> usize {
        let room = |tokens: usize| (tokens + self.decode_tokens).next_multiple_of(BLOCK);
        let runs = most(&self.batch) * room(most(&self.prompt_tokens));
        let contexts = self
            .contexts
            .iter()
            .map(|&n| room(n + self.repeat * self.decode_tokens));
        let gaps = if self.gaps { gaps::KV_TOKENS } else { 0 };
        runs.max(contexts.max().unwrap_or(0)).max(gaps)
    }
}

fn most(values: &[usize]) -> usize {
    values.iter().copied().max().unwrap_or(1)
}

fn bandwidth(threads: usize) -> Result<f64> {
    let rate = bandwidth::read_bytes_per_second(threads);
    rate.ok_or_else(|| anyhow!("measuring memory needs 128 MiB of it free; stop other programs"))
}

pub(super) fn run(args: &Args) -> Result<()> {
    args.check()?;
    let slots = most(&args.batch).max(if args.gaps { gaps::SLOTS } else { 1 });
    let open = |threads| args.model.open(threads, slots, Some(args.kv_tokens()));
    // The first opening may have to pack and to tune; the second is the one that a start costs.
    let tuned = open(None)?.card().threads;
    let start = Instant::now();
    let engine = open(Some(1))?;
    let load_ms = start.elapsed().as_secs_f64() * 1e3;
    let usage = engine.usage();
    drop(engine);
    let mut report = Report {
        load_ms,
        resident_bytes: None,
        tokenizer_bytes: usage.tokenizer_bytes,
        read_bandwidth_gb_s: bandwidth(most(&args.threads))? / 1e9,
        bytes_per_token: usage.bytes_per_token,
        tuned,
        runs: Vec::new(),
        contexts: Vec::new(),
        gaps: Vec::new(),
        profiles: Vec::new(),
    };
    for &threads in &args.threads {
        let bandwidth = bandwidth(threads)?;
        let mut engine = open(Some(threads))?;
        report
            .runs
            .extend(runs::runs(&mut engine, args, bandwidth)?);
        for &context in &args.contexts {
            let row = runs::context(&mut engine, args, context, bandwidth)?;
            report.contexts.push(row);
        }
        if args.gaps {
            report.gaps.push(gaps::measure(&mut engine)?);
        }
        report.resident_bytes = report.resident_bytes.max(resident_bytes());
        if args.profile {
            report
                .profiles
                .push(profile::measure(engine, args.decode_tokens)?);
        }
    }
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    Ok(())
}

impl Report {
    fn print(&self) {
        runs::print(&self.runs);
        runs::print_contexts(&self.contexts);
        gaps::print(&self.gaps);
        profile::print(&self.profiles);
        println!(
            "load {:.0} ms, resident {:.0} MB (tokenizer about {:.0} MB), {:.1} MB of weights a token, memory {:.1} GB/s",
            self.load_ms,
            self.resident_bytes.unwrap_or(0) as f64 / 1e6,
            self.tokenizer_bytes as f64 / 1e6,
            self.bytes_per_token as f64 / 1e6,
            self.read_bandwidth_gb_s,
        );
        println!(
            "the agent would decode with {} and compute prompts with {} threads here",
            self.tuned.decode, self.tuned.prefill
        );
    }
}
