//! Our operators allocate nothing in a step once steps of its size were seen. Alone in its binary: every allocation of
//! the process is counted.

use millwright_engine::sampler::Sampling;
use millwright_engine::{Engine, Observer, Options, Part, Prompt, Request};
use millwright_forge::Precision;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use tempfile::TempDir;

/// Allocations of all threads: all, and those while an operator of ours ran.
static ALL: AtomicUsize = AtomicUsize::new(0);
static OURS: AtomicUsize = AtomicUsize::new(0);
static FORWARD: AtomicUsize = AtomicUsize::new(0);
static OPERATORS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: it passes everything to the system's allocator and only counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALL.fetch_add(1, SeqCst);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Adds what was allocated between a part's beginning and its end.
#[derive(Default)]
struct Watch {
    at: usize,
    forward_at: usize,
}

impl Observer for Watch {
    fn begin(&mut self, part: Part) {
        let now = ALL.load(SeqCst);
        match part {
            Part::Forward => self.forward_at = now,
            _ => self.at = now,
        }
    }

    fn end(&mut self, part: Part) {
        let now = ALL.load(SeqCst);
        if part == Part::Forward {
            FORWARD.fetch_add(now - self.forward_at, SeqCst);
        } else {
            OURS.fetch_add(now - self.at, SeqCst);
            OPERATORS.fetch_add(1, SeqCst);
        }
    }
}

fn start(engine: &mut Engine, prompt: &str) {
    let request = Request {
        prompt: Prompt::Text(prompt.into()),
        max_tokens: 200,
        sampling: Sampling::greedy(),
        stop: Vec::new(),
    };
    let prepared = engine.preparer().prepare(request).unwrap();
    engine.start(prepared.ignoring_eos()).unwrap();
}

/// What `steps` steps allocate: in our operators, in the whole forward pass, and how many operators ran.
fn counted(engine: &mut Engine, steps: usize) -> [usize; 3] {
    let counters = [&OURS, &FORWARD, &OPERATORS];
    for counter in counters {
        counter.store(0, SeqCst);
    }
    for _ in 0..steps {
        engine.step().unwrap();
    }
    counters.map(|counter| counter.load(SeqCst))
}

#[test]
fn a_decode_step_allocates_nothing_in_our_operators() {
    let folder = TempDir::new().unwrap();
    millwright_forge::tiny::write(folder.path(), Precision::Int8).unwrap();
    let options = Options {
        threads: Some(2),
        state_dir: folder.path().join("state"),
        kv_tokens: 1024,
        prefill_chunk: 16,
        ..Options::default()
    };
    let mut engine = Engine::open(folder.path(), &options).unwrap();
    engine.observe(Box::new(Watch::default()));
    start(&mut engine, "the bearing of pump 7 is hot and loud");
    let [ours, ..] = counted(&mut engine, 4);
    assert!(
        ours > 0,
        "the first steps make the buffers, or nothing is counted"
    );
    // Beyond a block of the cache, so that attention's loop over blocks is in it.
    for _ in 0..3 {
        let [ours, forward, operators] = counted(&mut engine, 40);
        assert!(operators > 0);
        assert_eq!(ours, 0, "in 40 steps of one answer");
        println!(
            "tract allocates {:.1} times an operator",
            forward as f64 / operators as f64
        );
    }
    start(&mut engine, "grease");
    counted(&mut engine, 4);
    let [ours, ..] = counted(&mut engine, 40);
    assert_eq!(ours, 0, "in 40 steps of two answers");
}
