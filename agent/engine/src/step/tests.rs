//! Who rides in a step, on a tiny model: counted in steps and tokens, not in time.

use super::*;
use crate::{Prompt, Request, sampler::Sampling};
use millwright_forge::Precision;
use std::collections::BTreeMap;
use tempfile::TempDir;

const CHUNK: usize = 16;

fn engine(folder: &TempDir) -> Engine {
    millwright_forge::tiny::write(folder.path(), Precision::Int8).unwrap();
    let options = Options {
        threads: Some(1),
        state_dir: folder.path().join("state"),
        slots: 6,
        kv_tokens: 2048,
        prefill_chunk: CHUNK,
        ..Options::default()
    };
    Engine::open(folder.path(), &options).unwrap()
}

fn start(engine: &mut Engine, prompt: usize, max_tokens: usize) -> Slot {
    let request = Request {
        prompt: Prompt::Tokens((0..prompt as u32).map(|i| i % 200 + 1).collect()),
        max_tokens,
        sampling: Sampling::greedy(),
        stop: Vec::new(),
    };
    let prepared = engine.preparer().prepare(request).unwrap();
    engine.start(prepared.ignoring_eos()).unwrap()
}

/// Does a step; the tokens of each slot that rode in it, by slot.
fn ride(engine: &mut Engine) -> BTreeMap<usize, usize> {
    engine.step().unwrap();
    let mut rode = BTreeMap::new();
    for row in &engine.batch.rows {
        *rode.entry(row.slot).or_default() += 1;
    }
    rode
}

/// Tokens that a slot's answer has.
fn made(engine: &Engine, slot: Slot) -> usize {
    let sequence = engine.slots[slot.0 as usize].as_ref().unwrap();
    sequence.tokens.len() - sequence.prompt_tokens
}

#[test]
fn running_answers_get_a_token_each_step_while_long_prompts_are_computed() {
    let folder = TempDir::new().unwrap();
    let mut engine = engine(&folder);
    let running = [start(&mut engine, 3, 200), start(&mut engine, 5, 200)];
    while running.iter().any(|slot| made(&engine, *slot) == 0) {
        ride(&mut engine);
    }
    let long = [start(&mut engine, 150, 60), start(&mut engine, 120, 60)];
    let mut steps = 0;
    while long.iter().any(|slot| made(&engine, *slot) == 0) {
        let before = running.map(|slot| made(&engine, slot));
        let rode = ride(&mut engine);
        steps += 1;
        assert_eq!(
            running.map(|slot| made(&engine, slot)),
            before.map(|n| n + 1),
            "step {steps}"
        );
        let done = long.iter().filter(|slot| made(&engine, **slot) > 0).count();
        let tokens: usize = rode.values().sum();
        assert!(
            tokens <= CHUNK + running.len() + done,
            "step {steps} carried {tokens} tokens"
        );
    }
    // The room was used: neither prompt waited for the other.
    assert_eq!(steps, (150_usize + 120).div_ceil(CHUNK));
}

#[test]
fn prompts_that_come_at_once_share_the_room() {
    let folder = TempDir::new().unwrap();
    let mut engine = engine(&folder);
    for _ in 0..3 {
        start(&mut engine, 150, 2);
    }
    let mut computed = [0; 3];
    for _ in 0..18 {
        for (slot, tokens) in ride(&mut engine) {
            computed[slot] += tokens;
        }
        let spread = computed.iter().max().unwrap() - computed.iter().min().unwrap();
        assert!(spread <= 1, "{computed:?}");
    }
    // A short one that comes later doesn't wait for them, and leaves them what it doesn't need.
    let short = start(&mut engine, 4, 2);
    let rode = ride(&mut engine);
    assert_eq!((rode[&3], rode.values().sum::<usize>()), (4, CHUNK));
    assert_eq!(made(&engine, short), 1);
}

#[test]
fn a_prompt_is_not_starved_by_those_that_keep_coming() {
    let folder = TempDir::new().unwrap();
    let mut engine = engine(&folder);
    engine.prefill_chunk = 1;
    // The lower slots are taken again and again by new prompts while the highest has a long one.
    let passing: Vec<Slot> = (0..2).map(|_| start(&mut engine, 6, 1)).collect();
    let long = start(&mut engine, 20, 1);
    assert!(passing.iter().all(|slot| slot.0 < long.0));
    let mut steps = 0;
    while engine.slots[long.0 as usize].is_some() {
        ride(&mut engine);
        steps += 1;
        while engine.slots[..2].iter().any(Option::is_none) {
            start(&mut engine, 6, 1);
        }
        assert!(steps <= 3 * 20, "a third of the steps is the long one's");
    }
}

#[test]
fn steps_with_a_prompt_in_them_are_told_apart() {
    let folder = TempDir::new().unwrap();
    let mut engine = engine(&folder);
    let mut events = Vec::new();
    start(&mut engine, 20, 3);
    assert_eq!(engine.gather(&mut events), CHUNK);
    engine.step().unwrap();
    assert_eq!(engine.gather(&mut events), 20 - CHUNK);
    engine.step().unwrap();
    assert_eq!(
        (engine.gather(&mut events), engine.batch.rows.len()),
        (0, 1)
    );
}

#[test]
fn an_eased_engine_takes_less_at_once_and_makes_the_same() {
    let folder = TempDir::new().unwrap();
    let mut engine = engine(&folder);
    let mut answer = |quarters: [usize; 2]| {
        start(&mut engine, 40, 8);
        let mut carried = Vec::new();
        for step in 0.. {
            engine.ease(quarters[step % 2]);
            let events = engine.step().unwrap();
            carried.push(engine.batch.rows.len());
            for (_, event) in events {
                if let Event::Done(completion) = event {
                    return (carried, completion.tokens);
                }
            }
        }
        unreachable!("an answer ends")
    };
    let (whole, tokens) = answer([4, 4]);
    assert_eq!(whole[..3], [16, 16, 8]);
    let (eased, same) = answer([3, 1]);
    assert_eq!(eased[..5], [12, 4, 12, 4, 8]);
    assert_eq!(tokens, same);
    // Of the threads, too.
    engine.threads = Threads {
        decode: 4,
        prefill: 8,
    };
    let threads = |engine: &Engine| (engine.threads_for(0), engine.threads_for(40));
    engine.ease(4);
    assert_eq!(threads(&engine), (4, 8));
    engine.ease(2);
    assert_eq!(threads(&engine), (2, 4));
    engine.threads.decode = 1;
    engine.ease(1);
    assert_eq!(threads(&engine), (1, 2));
}
