//! The importer of ONNX exports: a graph in an otherwise sound folder is inspected, opened and run. The input is the
//! graph's file; its stored tensors may lie in the folder's [`folder::WEIGHTS`].
#![no_main]

mod edits;
mod folder;
mod seeds;

use folder::Folder;
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use millwright_engine::{Engine, inspect};
use millwright_fuzz::guard::{Limits, SAY, guarded, note_panics};
use millwright_fuzz::heap::Counted;
use millwright_fuzz::random::Random;
use std::cell::OnceCell;
use std::path::Path;
use std::time::Duration;

#[global_allocator]
static HEAP: Counted = Counted;

/// A second, for a build whose counters and checks slow it down (README.md says by how much).
const CPU_MAX: Duration = Duration::from_secs(2);
/// What any model may take, and what one may take for each byte of its files.
const HEAP_BYTES: usize = 64 << 20;
const HEAP_PER_BYTE: usize = 32;
/// Tokens that a model which opens is run on, fewer than the seeds' context.
const TOKENS: [u32; 5] = [1, 40, 2, 3, 259];
/// Where seeds are to be written, instead of fuzzing.
const SEEDS: &str = "MILLWRIGHT_FUZZ_SEEDS";

thread_local! {
    static FOLDER: OnceCell<Folder> = const { OnceCell::new() };
}

fuzz_target!(
    init: {
        if let Some(to) = std::env::var_os(SEEDS) {
            let written = seeds::write(Path::new(&to));
            written.expect("seeds must be written");
            std::process::exit(0);
        }
        note_panics();
    },
    |graph: &[u8]| {
        FOLDER.with(|folder| import(folder.get_or_init(Folder::new), graph));
    }
);

fn import(folder: &Folder, graph: &[u8]) {
    folder.put(graph);
    let limits = Limits {
        cpu: CPU_MAX,
        heap_bytes: HEAP_BYTES + HEAP_PER_BYTE * (graph.len() + folder::WEIGHTS_BYTES),
    };
    let inspected = guarded("inspect", limits, || inspect(&folder.path(), None));
    let opened = guarded("open", limits, || {
        Engine::open(&folder.path(), &folder.options())
    });
    if std::env::var_os(SAY).is_some() {
        let plan = inspected.map(|model| (model.plan, model.notes));
        let opened = opened.as_ref().map(|engine| engine.card().plan);
        eprintln!("inspected: {plan:?}\nopened: {opened:?}");
    }
    if let Ok(mut engine) = opened {
        let _ = guarded("score", limits, || engine.score(&TOKENS, &mut |_, _| {}));
        guarded("drop", limits, || drop(engine));
    }
}

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let random = &mut Random::new(seed);
    if random.one_in(12) {
        return fuzzer_mutate(data, size, max_size);
    }
    let edited = edits::edited(&data[..size], random).filter(|edited| edited.len() <= max_size);
    match edited {
        Some(edited) => {
            data[..edited.len()].copy_from_slice(&edited);
            edited.len()
        }
        None => fuzzer_mutate(data, size, max_size),
    }
});
