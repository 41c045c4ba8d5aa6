//! `millwright bench`: how fast a model runs here, beside what the memory allows.

use super::model::{ModelArgs, resident_bytes};
use anyhow::{Context, Result, anyhow, bail};
use millwright_engine::sampler::Sampling;
use millwright_engine::{Engine, Event, Prompt, Request, bandwidth};
use serde::Serialize;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Thread counts to measure
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
    /// Runs of each, of which the median counts
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Print one JSON object instead of a table
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
    bytes_per_token: usize,
    runs: Vec<Run>,
}

#[derive(Debug, Clone, Serialize)]
struct Run {
    threads: usize,
    batch: usize,
    prompt_tokens: usize,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    ttft_ms: f64,
    /// Weight bytes read a second, as a share of the bandwidth measured with as many threads.
    bandwidth_share: f64,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if args.repeat == 0 || args.decode_tokens < 2 {
        bail!("--repeat must be at least 1 and --decode-tokens at least 2");
    }
    let most = |values: &[usize]| values.iter().copied().max().unwrap_or(1);
    let longest = most(&args.prompt_tokens) + args.decode_tokens;
    let kv_tokens = most(&args.batch) * longest.next_multiple_of(64);
    let open = |threads| {
        args.model
            .open(Some(threads), most(&args.batch), Some(kv_tokens))
    };
    // The first opening may have to pack; the second is the one that a start costs.
    drop(open(1)?);
    let start = Instant::now();
    let engine = open(1)?;
    let load_ms = start.elapsed().as_secs_f64() * 1e3;
    let usage = engine.usage();
    drop(engine);
    let mut runs = Vec::new();
    let mut resident = None;
    for &threads in &args.threads {
        let mut engine = open(threads)?;
        let bandwidth = bandwidth::read_bytes_per_second(threads);
        let slots = engine.usage().slots_max;
        for &batch in args.batch.iter().filter(|&&batch| batch <= slots) {
            for &prompt_tokens in &args.prompt_tokens {
                let measure = |_| measure(&mut engine, batch, prompt_tokens, args.decode_tokens);
                let all: Vec<Measured> = (0..args.repeat).map(measure).collect::<Result<_>>()?;
                let median = |part: fn(&Measured) -> f64| {
                    let mut values: Vec<f64> = all.iter().map(part).collect();
                    values.sort_by(f64::total_cmp);
                    values[values.len() / 2]
                };
                let decode = median(|m| m.decode_tokens_per_s);
                let steps = decode / batch as f64;
                let run = Run {
                    threads,
                    batch,
                    prompt_tokens,
                    prefill_tokens_per_s: median(|m| m.prefill_tokens_per_s),
                    decode_tokens_per_s: decode,
                    ttft_ms: median(|m| m.ttft_ms),
                    bandwidth_share: steps * usage.bytes_per_token as f64 / bandwidth,
                };
                if !args.json {
                    print_run(&run, runs.is_empty());
                }
                runs.push(run);
            }
        }
        resident = resident.max(resident_bytes());
    }
    let report = Report {
        load_ms,
        resident_bytes: resident,
        tokenizer_bytes: usage.tokenizer_bytes,
        read_bandwidth_gb_s: bandwidth::read_bytes_per_second(most(&args.threads)) / 1e9,
        bytes_per_token: usage.bytes_per_token,
        runs,
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!(
            "load {:.0} ms, resident {:.0} MB (tokenizer about {:.0} MB), {:.1} MB of weights a token, memory {:.1} GB/s",
            report.load_ms,
            report.resident_bytes.unwrap_or(0) as f64 / 1e6,
            report.tokenizer_bytes as f64 / 1e6,
            report.bytes_per_token as f64 / 1e6,
            report.read_bandwidth_gb_s,
        );
    }
    Ok(())
}

fn print_run(run: &Run, first: bool) {
    if first {
        println!("threads batch prompt  prefill tok/s  decode tok/s  first token ms  of bandwidth");
    }
    println!(
        "{:>7} {:>5} {:>6} {:>14.0} {:>13.1} {:>15.1} {:>12.0}%",
        run.threads,
        run.batch,
        run.prompt_tokens,
        run.prefill_tokens_per_s,
        run.decode_tokens_per_s,
        run.ttft_ms,
        run.bandwidth_share * 100.0,
    );
}

struct Measured {
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    ttft_ms: f64,
}

/// Prefills `batch` prompts, then decodes all of them together.
fn measure(engine: &mut Engine, batch: usize, prompt: usize, decode: usize) -> Result<Measured> {
    let preparer = engine.preparer();
    let start = Instant::now();
    for answer in 0..batch {
        // Any tokens cost the same; different ones in each answer keep a cache from helping.
        let tokens = (0..prompt)
            .map(|i| ((i * 31 + answer * 7) % 250) as u32 + 1)
            .collect();
        let request = Request {
            prompt: Prompt::Tokens(tokens),
            max_tokens: decode,
            sampling: Sampling::greedy(),
            stop: Vec::new(),
        };
        let prepared = preparer.prepare(request)?.ignoring_eos();
        engine
            .start(prepared)
            .map_err(|_| anyhow!("no room for {batch} answers of {prompt} + {decode} tokens"))?;
    }
    // A prompt's prefill ends with its first token.
    let (mut first, mut prefilled, mut made) = (None, None, 0);
    let mut completions = Vec::new();
    while completions.len() < batch {
        let events = engine.step()?;
        let now = Instant::now();
        for (_, event) in events {
            if let Event::Done(done) = event {
                made += done.tokens.len();
                completions.push(done);
            }
        }
        let begun = engine.answers_begun() + completions.len();
        if begun > 0 {
            first.get_or_insert(now);
        }
        if begun == batch && prefilled.is_none() {
            prefilled = Some((now, made + engine.tokens_made()));
        }
    }
    let end = Instant::now();
    let first = first.context("no token was made")?;
    let (prefilled, before) = prefilled.context("the answers ended within their prefill")?;
    let seconds = |from: Instant, to: Instant| (to - from).as_secs_f64();
    Ok(Measured {
        prefill_tokens_per_s: (batch * prompt) as f64 / seconds(start, prefilled),
        decode_tokens_per_s: (made - before) as f64 / seconds(prefilled, end),
        ttft_ms: seconds(start, first) * 1e3,
    })
}
