//! The same logits, bit for bit, whatever the threads, the chunks of the prefill, the company in the batch and the
//! kernel.

use millwright_engine::sampler::Sampling;
use millwright_engine::{
    Completion, Engine, Event, KvPrecision, Options, PlanChoice, Prompt, Request, kernels,
};
use millwright_forge::Precision;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const TEXT: &str = "Replaced the seal on slew motor 3; pressure holds at 210 bar. Grease lines on the bucket were broken.";

struct Tiny(TempDir);

impl Tiny {
    fn new() -> Self {
        Self::of(Precision::Int8)
    }

    fn of(precision: Precision) -> Self {
        let folder = TempDir::new().unwrap();
        millwright_forge::tiny::write(folder.path(), precision).unwrap();
        Self(folder)
    }

    fn open(&self, change: impl FnOnce(&mut Options)) -> Engine {
        open(self.path(), &self.0.path().join("state"), change)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

fn open(bundle: &Path, state_dir: &Path, change: impl FnOnce(&mut Options)) -> Engine {
    let mut options = Options {
        threads: Some(1),
        state_dir: state_dir.to_owned(),
        slots: 4,
        kv_tokens: 1024,
        ..Options::default()
    };
    change(&mut options);
    Engine::open(bundle, &options).unwrap()
}

fn logits(engine: &mut Engine) -> Vec<Vec<u32>> {
    let tokens = engine.text().encode(TEXT).unwrap();
    let mut rows = Vec::new();
    engine
        .score(&tokens, &mut |_, row| {
            rows.push(row.iter().map(|v| v.to_bits()).collect());
        })
        .unwrap();
    assert_eq!(rows.len(), tokens.len());
    rows
}

#[test]
fn logits_do_not_depend_on_threads_or_chunks() {
    let tiny = Tiny::new();
    let expected = logits(&mut tiny.open(|_| {}));
    for threads in [1, 2, 3] {
        for prefill_chunk in [1, 2, 7, 64] {
            let mut engine =
                tiny.open(|o| (o.threads, o.prefill_chunk) = (Some(threads), prefill_chunk));
            assert!(
                engine.card().exact && engine.card().plan == "flat",
                "{:?}",
                engine.card()
            );
            assert!(
                logits(&mut engine) == expected,
                "{threads} threads, chunks of {prefill_chunk}"
            );
        }
    }
}

#[test]
fn logits_do_not_depend_on_the_kernel() {
    let tiny = Tiny::new();
    let mut all: HashMap<&str, _> = HashMap::new();
    for name in kernels().into_iter().filter(|name| *name != "reference") {
        all.insert(
            name,
            logits(&mut tiny.open(|o| o.kernel = Some(name.to_owned()))),
        );
    }
    let expected = &all["scalar"];
    assert!(all.values().all(|rows| rows == expected));
}

/// What the logits' bits come to, for comparison between machines.
fn digest(engine: &mut Engine) -> String {
    let mut sha = Sha256::new();
    for bits in logits(engine).into_iter().flatten() {
        sha.update(bits.to_le_bytes());
    }
    format!("{:x}", sha.finalize())
}

/// `cross/test` runs this under qemu as one ARM core after the other: these are x86-64's bits.
#[test]
fn logits_have_the_same_bits_on_every_cpu() {
    let found = [
        (Precision::Int8, KvPrecision::F16),
        (Precision::Int8, KvPrecision::I8),
        (Precision::Q4, KvPrecision::F16),
    ]
    .map(|(precision, kv)| digest(&mut Tiny::of(precision).open(|o| o.kv_precision = kv)));
    assert_eq!(
        found,
        [
            "e9d28d4a73354b55f2fc2fc19f209f5f2e700be3b13a8ffa87ecef78889e36d3",
            "b02fc503716b0c89a826d64e9a3b24d85245dc8c81ae3520a08dae19e866c5e0",
            "ee532d9c1fc9013e387328b10bb14b9c06e33e5aa3a67045a4430d6f8abdbcca"
        ]
    );
}

/// The real model where it was pulled, whose numbers range wider: `tests/run` says where with `MILLWRIGHT_TEST_MODEL`.
#[test]
fn smollm2s_logits_have_the_same_bits_on_every_cpu() {
    let Some(model) = std::env::var_os("MILLWRIGHT_TEST_MODEL").map(PathBuf::from) else {
        println!("MILLWRIGHT_TEST_MODEL is not set: tests/run sets it");
        return;
    };
    let state = TempDir::new().unwrap();
    let found = digest(&mut open(&model, state.path(), |_| {}));
    assert_eq!(
        found,
        "4d6896cc19dfc904f2aabf25e83f5a0f4c58bbb448eccbb093837c1544df9b36"
    );
}

/// The 8-bit cache is another arithmetic, but as much one as the other; and near it.
#[test]
fn an_8_bit_cache_is_exact_and_near() {
    let tiny = Tiny::new();
    let mut wide = tiny.open(|_| {});
    let wide_bytes = wide.usage().kv_bytes_per_position;
    let wide = logits(&mut wide);
    let narrow = |threads, prefill_chunk| {
        let mut engine = tiny.open(|o| {
            o.kv_precision = KvPrecision::I8;
            (o.threads, o.prefill_chunk) = (Some(threads), prefill_chunk);
        });
        assert_eq!(engine.card().notes, ["keys and values are kept in 8 bits"]);
        assert!(engine.usage().kv_bytes_per_position < wide_bytes);
        logits(&mut engine)
    };
    let expected = narrow(1, 64);
    assert!(expected == narrow(3, 7));
    // Root mean squares: of the difference, and of the logits themselves.
    let rms = |numbers: &mut dyn Iterator<Item = f32>| {
        let (count, sum) = numbers.fold((0, 0.0), |(n, sum), x| (n + 1, sum + x * x));
        (sum / count as f32).sqrt()
    };
    let (wide, expected) = (wide.concat(), expected.concat());
    let pairs = wide.iter().zip(&expected);
    let difference = rms(&mut pairs.map(|(a, b)| f32::from_bits(*a) - f32::from_bits(*b)));
    let size = rms(&mut wide.iter().map(|a| f32::from_bits(*a)));
    assert!(
        difference > 0.0 && difference < 0.05 * size,
        "{difference} of {size}"
    );
}

fn request(index: usize) -> Request {
    Request {
        prompt: Prompt::Text(TEXT[index * 7..].to_owned()),
        max_tokens: 12 + index,
        sampling: Sampling {
            temperature: 1.0,
            seed: index as u64,
            ..Sampling::greedy()
        },
        stop: Vec::new(),
    }
}

fn run(engine: &mut Engine, requests: &[Request]) -> Vec<Completion> {
    let mut slots = Vec::new();
    for request in requests {
        let prepared = engine
            .preparer()
            .prepare(request.clone())
            .unwrap()
            .ignoring_eos();
        slots.push(engine.start(prepared).unwrap());
    }
    let mut done = HashMap::new();
    let mut streamed: HashMap<_, String> = HashMap::new();
    while done.len() < slots.len() {
        for (slot, event) in engine.step().unwrap() {
            match event {
                Event::Started => {}
                Event::Text(text) => streamed.entry(slot).or_default().push_str(&text),
                Event::Done(completion) => {
                    let text = streamed.remove(&slot).unwrap_or_default();
                    assert_eq!(text, completion.text, "what was streamed is the answer");
                    done.insert(slot, completion);
                }
            }
        }
    }
    slots
        .iter()
        .map(|slot| done.remove(slot).unwrap())
        .collect()
}

#[test]
fn an_answer_does_not_depend_on_its_company() {
    let tiny = Tiny::new();
    let requests: Vec<Request> = (0..4).map(request).collect();
    let alone: Vec<Completion> = requests
        .iter()
        .flat_map(|r| run(&mut tiny.open(|_| {}), std::slice::from_ref(r)))
        .collect();
    for prefill_chunk in [5, 128] {
        let together = run(
            &mut tiny.open(|o| (o.prefill_chunk, o.threads) = (prefill_chunk, Some(2))),
            &requests,
        );
        for (one, other) in alone.iter().zip(&together) {
            assert_eq!((&one.tokens, &one.text), (&other.tokens, &other.text));
        }
    }
}

#[test]
fn a_cancelled_answer_frees_its_slot_and_its_blocks() {
    let tiny = Tiny::new();
    let mut engine = tiny.open(|o| (o.slots, o.kv_tokens) = (1, 192));
    let prepare = |engine: &Engine| engine.preparer().prepare(request(0)).unwrap();
    let slot = engine.start(prepare(&engine)).unwrap();
    assert!(engine.start(prepare(&engine)).is_err());
    engine.step().unwrap();
    let partial = engine.cancel(slot);
    assert_eq!(partial.finish, millwright_engine::Finish::Cancelled);
    assert_eq!(engine.usage().kv_tokens_used, 0);
    let next = run(&mut engine, &[request(0)]);
    assert_eq!(
        next[0].tokens,
        run(&mut tiny.open(|_| {}), &[request(0)])[0].tokens
    );
}

const CHUNK: usize = 16;

/// Runs one request, and puts it aside whenever it has made `every` steps that were new; what was streamed, and the answer.
fn run_aside(engine: &mut Engine, request: &Request, every: usize) -> (String, Completion) {
    let mut prepared = engine.preparer().prepare(request.clone()).unwrap();
    let (mut streamed, mut starts) = (String::new(), 0);
    loop {
        // Until it has caught up with itself nothing is new.
        let steps = every + prepared.prompt_tokens().div_ceil(CHUNK);
        let slot = engine.start(prepared.ignoring_eos()).unwrap();
        for _ in 0..steps {
            for (_, event) in engine.step().unwrap() {
                match event {
                    Event::Started => starts += 1,
                    Event::Text(text) => streamed.push_str(&text),
                    Event::Done(completion) => {
                        assert_eq!(starts, 1, "its prefill is announced once");
                        return (streamed, completion);
                    }
                }
            }
        }
        let partial;
        (prepared, partial) = engine.suspend(slot);
        assert!(partial.text.starts_with(&streamed));
        assert_eq!(engine.usage().kv_tokens_used, 0, "its blocks are free");
    }
}

#[test]
fn an_answer_that_is_put_aside_goes_on_as_if_it_had_not_been() {
    let tiny = Tiny::new();
    let text = run(&mut tiny.open(|_| {}), &[request(3)])[0].text.clone();
    let middle = text.chars().skip(text.chars().count() / 2).take(3);
    let stopping = Request {
        stop: vec![middle.collect()],
        ..request(3)
    };
    for request in [request(0), request(3), stopping] {
        let whole = &run(&mut tiny.open(|_| {}), std::slice::from_ref(&request))[0];
        for every in [1, 2, 5] {
            let mut engine = tiny.open(|o| o.prefill_chunk = CHUNK);
            let (streamed, aside) = run_aside(&mut engine, &request, every);
            assert_eq!((&aside.tokens, &aside.text), (&whole.tokens, &whole.text));
            assert_eq!(
                (aside.prompt_tokens, aside.finish),
                (whole.prompt_tokens, whole.finish)
            );
            assert_eq!(streamed, whole.text);
            assert!(engine.is_idle());
            // Not exact there, but whole.
            let mut plain = tiny.open(|o| o.plan = PlanChoice::Plain);
            let (streamed, aside) = run_aside(&mut plain, &request, every);
            assert_eq!(streamed, aside.text);
        }
    }
}

/// Here tract makes all rows of the logits and the engine picks those it samples.
#[test]
fn the_flat_plan_answers_as_the_plain_one_when_the_head_is_tracts() {
    let tiny = Tiny::of(Precision::F32);
    let requests: Vec<Request> = (0..3)
        .map(|index| Request {
            sampling: Sampling::greedy(),
            ..request(index)
        })
        .collect();
    let mut flat = tiny.open(|_| {});
    assert_eq!(flat.card().plan, "flat");
    let together = run(&mut flat, &requests);
    for (request, flat) in requests.iter().zip(&together) {
        let mut plain = tiny.open(|o| o.plan = PlanChoice::Plain);
        let plain = run(&mut plain, std::slice::from_ref(request));
        assert_eq!(plain[0].tokens[..4], flat.tokens[..4]);
    }
}
