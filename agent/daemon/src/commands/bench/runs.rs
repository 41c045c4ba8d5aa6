//! Prefill and decode rates, by prompt length and answers at once, and decode rates by context.

use super::Args;
use anyhow::{Context as _, Result, anyhow};
use millwright_engine::sampler::Sampling;
use millwright_engine::{Engine, Event, Prepared, Prompt, Reads, Request};
use serde::Serialize;
use std::time::Instant;

#[derive(Debug, Clone, Serialize)]
pub(super) struct Run {
    threads: usize,
    batch: usize,
    prompt_tokens: usize,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    ttft_ms: f64,
    #[serde(flatten)]
    memory: Memory,
}

/// Decoding with this many positions in the cache.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Context {
    threads: usize,
    positions: usize,
    decode_tokens_per_s: f64,
    #[serde(flatten)]
    memory: Memory,
}

/// What decoding read.
#[derive(Debug, Clone, Copy, Serialize)]
struct Memory {
    /// Packed weights and the cache's keys and values, for each token made.
    read_bytes_per_token: f64,
    /// Bytes a second, as a share of the bandwidth measured with as many threads.
    bandwidth_share: f64,
}

impl Memory {
    fn new(before: Reads, after: Reads, bandwidth: f64) -> Self {
        let bytes = (after.bytes - before.bytes) as f64;
        let tokens = (after.tokens - before.tokens) as f64;
        let seconds = after.time.saturating_sub(before.time).as_secs_f64();
        Self {
            read_bytes_per_token: bytes / tokens,
            bandwidth_share: bytes / seconds / bandwidth,
        }
    }
}

/// The median of what `part` says of each.
fn median<T>(all: &[T], part: impl Fn(&T) -> f64) -> f64 {
    let mut values: Vec<f64> = all.iter().map(part).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// All batches and prompt lengths that the arguments name.
pub(super) fn runs(engine: &mut Engine, args: &Args, bandwidth: f64) -> Result<Vec<Run>> {
    let slots = engine.usage().slots_max;
    let mut runs = Vec::new();
    for &batch in args.batch.iter().filter(|&&batch| batch <= slots) {
        for &prompt_tokens in &args.prompt_tokens {
            let run = |_| measure(engine, batch, prompt_tokens, args.decode_tokens, bandwidth);
            let all: Vec<Measured> = (0..args.repeat).map(run).collect::<Result<_>>()?;
            runs.push(Run {
                threads: engine.card().threads.decode,
                batch,
                prompt_tokens,
                prefill_tokens_per_s: median(&all, |m| m.prefill_tokens_per_s),
                decode_tokens_per_s: median(&all, |m| m.decode_tokens_per_s),
                ttft_ms: median(&all, |m| m.ttft_ms),
                memory: Memory {
                    read_bytes_per_token: median(&all, |m| m.memory.read_bytes_per_token),
                    bandwidth_share: median(&all, |m| m.memory.bandwidth_share),
                },
            });
        }
    }
    Ok(runs)
}

/// Gets to a position by a prefill, then decodes as often as the arguments say from there on.
pub(super) fn context(
    engine: &mut Engine,
    args: &Args,
    positions: usize,
    bandwidth: f64,
) -> Result<Context> {
    let prepared = prepare(engine, 0, positions, args.repeat * args.decode_tokens + 1)?;
    let slot = engine
        .start(prepared)
        .map_err(|_| anyhow!("no room for a context of {positions} positions"))?;
    while engine.answers_begun() == 0 {
        engine.step()?;
    }
    let mut all = Vec::new();
    for _ in 0..args.repeat {
        let (before, start) = (engine.reads(), Instant::now());
        // The last token of all is left undone, so that the answer stays in progress.
        for _ in 1..args.decode_tokens {
            engine.step()?;
        }
        let rate = (args.decode_tokens - 1) as f64 / start.elapsed().as_secs_f64();
        all.push((rate, Memory::new(before, engine.reads(), bandwidth)));
    }
    engine.cancel(slot);
    Ok(Context {
        threads: engine.card().threads.decode,
        positions,
        decode_tokens_per_s: median(&all, |(rate, _)| *rate),
        memory: Memory {
            read_bytes_per_token: median(&all, |(_, m)| m.read_bytes_per_token),
            bandwidth_share: median(&all, |(_, m)| m.bandwidth_share),
        },
    })
}

/// A request of any tokens, which all cost the same; different ones in each answer keep a cache from helping.
pub(super) fn prepare(
    engine: &Engine,
    answer: usize,
    prompt: usize,
    decode: usize,
) -> Result<Prepared> {
    let token = |i| ((i * 31 + answer * 7) % 250) as u32 + 1;
    let request = Request {
        prompt: Prompt::Tokens((0..prompt).map(token).collect()),
        max_tokens: decode,
        sampling: Sampling::greedy(),
        stop: Vec::new(),
    };
    Ok(engine.preparer().prepare(request)?.ignoring_eos())
}

struct Measured {
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    ttft_ms: f64,
    memory: Memory,
}

/// Prefills `batch` prompts, then decodes all of them together.
fn measure(
    engine: &mut Engine,
    batch: usize,
    prompt: usize,
    decode: usize,
    bandwidth: f64,
) -> Result<Measured> {
    let start = Instant::now();
    for answer in 0..batch {
        let prepared = prepare(engine, answer, prompt, decode)?;
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
            prefilled = Some((now, made + engine.tokens_made(), engine.reads()));
        }
    }
    let end = Instant::now();
    let first = first.context("no token was made")?;
    let (prefilled, before, reads) = prefilled.context("the answers ended within their prefill")?;
    let seconds = |from: Instant, to: Instant| (to - from).as_secs_f64();
    Ok(Measured {
        prefill_tokens_per_s: (batch * prompt) as f64 / seconds(start, prefilled),
        decode_tokens_per_s: (made - before) as f64 / seconds(prefilled, end),
        ttft_ms: seconds(start, first) * 1e3,
        memory: Memory::new(reads, engine.reads(), bandwidth),
    })
}

pub(super) fn print(runs: &[Run]) {
    println!(
        "threads batch prompt  prefill tok/s  decode tok/s  first token ms  MB a token  of bandwidth"
    );
    for run in runs {
        println!(
            "{:>7} {:>5} {:>6} {:>14.0} {:>13.1} {:>15.1} {:>11.1} {:>12.0}%",
            run.threads,
            run.batch,
            run.prompt_tokens,
            run.prefill_tokens_per_s,
            run.decode_tokens_per_s,
            run.ttft_ms,
            run.memory.read_bytes_per_token / 1e6,
            run.memory.bandwidth_share * 100.0,
        );
    }
}

pub(super) fn print_contexts(contexts: &[Context]) {
    if !contexts.is_empty() {
        println!("threads context  decode tok/s  MB a token  of bandwidth");
    }
    for row in contexts {
        println!(
            "{:>7} {:>7} {:>13.1} {:>11.1} {:>12.0}%",
            row.threads,
            row.positions,
            row.decode_tokens_per_s,
            row.memory.read_bytes_per_token / 1e6,
            row.memory.bandwidth_share * 100.0,
        );
    }
}
