//! Where a decode step's time goes: our operators, tract around them, the engine around tract.

use super::runs::prepare;
use anyhow::{Result, anyhow};
use millwright_engine::{Engine, Observer, Part};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const PROMPT: usize = 32;

/// Microseconds of the mean decode step, reading the clock (some 50 ns an operator) included.
#[derive(Debug, Serialize)]
pub(super) struct Profile {
    threads: usize,
    steps: usize,
    step_us: f64,
    embedding_us: f64,
    linears_us: f64,
    attention_us: f64,
    head_us: f64,
    /// The plan between our operators: its own work for each node, and operators of its own if there are any.
    tract_us: f64,
    tract_share: f64,
    /// Gathering rows, sampling, text.
    engine_us: f64,
}

/// Adds up the time of each part.
#[derive(Default)]
struct Clock {
    begun: BTreeMap<Part, Instant>,
    spent: BTreeMap<Part, Duration>,
}

struct Shared(Arc<Mutex<Clock>>);

impl Observer for Shared {
    fn begin(&mut self, part: Part) {
        let mut clock = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        clock.begun.insert(part, Instant::now());
    }

    fn end(&mut self, part: Part) {
        let now = Instant::now();
        let mut clock = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(begun) = clock.begun.remove(&part) {
            *clock.spent.entry(part).or_default() += now - begun;
        }
    }
}

pub(super) fn measure(mut engine: Engine, steps: usize) -> Result<Profile> {
    let prepared = prepare(&engine, 0, PROMPT, steps + 2)?;
    engine
        .start(prepared)
        .map_err(|_| anyhow!("no room for {PROMPT} + {steps} tokens"))?;
    while engine.answers_begun() == 0 {
        engine.step()?;
    }
    let clock = Arc::new(Mutex::new(Clock::default()));
    engine.observe(Box::new(Shared(Arc::clone(&clock))));
    let start = Instant::now();
    for _ in 0..steps {
        engine.step()?;
    }
    let step_us = start.elapsed().as_secs_f64() * 1e6 / steps as f64;
    let clock = clock.lock().unwrap_or_else(PoisonError::into_inner);
    let spent = |part| {
        let spent = clock.spent.get(&part).copied().unwrap_or_default();
        spent.as_secs_f64() * 1e6 / steps as f64
    };
    let ours = [Part::Embedding, Part::Linears, Part::Attention, Part::Head].map(spent);
    let forward = spent(Part::Forward);
    let tract_us = forward - ours.iter().sum::<f64>();
    let [embedding_us, linears_us, attention_us, head_us] = ours;
    Ok(Profile {
        threads: engine.card().threads.decode,
        steps,
        step_us,
        embedding_us,
        linears_us,
        attention_us,
        head_us,
        tract_us,
        tract_share: tract_us / step_us,
        engine_us: step_us - forward,
    })
}

pub(super) fn print(profiles: &[Profile]) {
    for row in profiles {
        println!(
            "{} threads, µs a decode step: {:.0} = linears {:.0} + attention {:.0} + head {:.0} + embedding {:.0} + \
             tract {:.0} ({:.1} %) + engine {:.0}",
            row.threads,
            row.step_us,
            row.linears_us,
            row.attention_us,
            row.head_us,
            row.embedding_us,
            row.tract_us,
            row.tract_share * 100.0,
            row.engine_us,
        );
    }
}
