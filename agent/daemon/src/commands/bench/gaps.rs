//! How long running answers wait for their next token while a long prompt is computed beside them.

use super::runs::prepare;
use anyhow::{Result, anyhow, ensure};
use millwright_engine::{Engine, Slot};
use serde::Serialize;
use std::time::Instant;

/// Answers that run, and the long prompt.
pub(super) const SLOTS: usize = RUNNING + 1;
const RUNNING: usize = 2;
const PROMPT: usize = 1024;
/// Steps from which the usual gap is taken.
const USUAL: usize = 48;
/// A running answer's prompt; what it makes meanwhile is far less than it may.
const SHORT: usize = 16;
const DECODED_MAX: usize = 1024;
/// Whole blocks for all of them.
pub(super) const KV_TOKENS: usize = (SHORT + DECODED_MAX + 48) * RUNNING + PROMPT + 64;

/// Milliseconds.
#[derive(Debug, Serialize)]
pub(super) struct Gaps {
    threads: usize,
    prompt_tokens: usize,
    /// Between two tokens of an answer when only answers run: the median.
    usual_ms: f64,
    /// The longest while the prompt was computed.
    worst_ms: f64,
    /// A chunk of a prompt alone.
    chunk_ms: f64,
    /// What the worst may be: twice the usual and a chunk.
    bound_ms: f64,
}

pub(super) fn measure(engine: &mut Engine) -> Result<Gaps> {
    ensure!(
        engine.usage().slots_max >= SLOTS,
        "--gaps needs a model that runs several answers at once; this one is in the plain plan"
    );
    let chunk_ms = chunk(engine)?;
    let mut slots = Vec::new();
    for answer in 0..RUNNING {
        slots.push(start(engine, answer, SHORT, DECODED_MAX)?);
    }
    while engine.answers_begun() < RUNNING {
        engine.step()?;
    }
    let mut usual = (0..USUAL)
        .map(|_| step(engine))
        .collect::<Result<Vec<_>>>()?;
    usual.sort_by(f64::total_cmp);
    let usual_ms = usual[USUAL / 2];
    slots.push(start(engine, RUNNING, PROMPT, 2)?);
    let mut worst_ms = 0.0_f64;
    // Each step brings each running answer a token (the engine's tests hold that), so a gap is a step.
    while engine.answers_begun() < SLOTS {
        worst_ms = worst_ms.max(step(engine)?);
    }
    for slot in slots {
        engine.cancel(slot);
    }
    Ok(Gaps {
        threads: engine.card().threads.decode,
        prompt_tokens: PROMPT,
        usual_ms,
        worst_ms,
        chunk_ms,
        bound_ms: 2.0 * usual_ms + chunk_ms,
    })
}

/// The longest step of the long prompt computed alone: its last chunk has all of its context.
fn chunk(engine: &mut Engine) -> Result<f64> {
    let slot = start(engine, 0, PROMPT, 2)?;
    let mut worst = 0.0_f64;
    while engine.answers_begun() == 0 {
        worst = worst.max(step(engine)?);
    }
    engine.cancel(slot);
    Ok(worst)
}

fn start(engine: &mut Engine, answer: usize, prompt: usize, decode: usize) -> Result<Slot> {
    let prepared = prepare(engine, answer, prompt, decode)?;
    let started = engine.start(prepared);
    started.map_err(|_| anyhow!("no room for {prompt} + {decode} tokens"))
}

fn step(engine: &mut Engine) -> Result<f64> {
    let start = Instant::now();
    engine.step()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

pub(super) fn print(gaps: &[Gaps]) {
    for row in gaps {
        println!(
            "{} threads: {RUNNING} answers beside a prompt of {}: gap usually {:.1} ms, at worst {:.1}; twice the \
             usual and a chunk ({:.1}) are {:.1}",
            row.threads, row.prompt_tokens, row.usual_ms, row.worst_ms, row.chunk_ms, row.bound_ms,
        );
    }
}
