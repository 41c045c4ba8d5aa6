//! Graphs in which fuzzing (tests/fuzz) found a fault: each is answered, and none harms.

use millwright_engine::{Engine, Options, inspect};
use millwright_forge::cache::Cache;
use millwright_forge::catalogue::Catalogue;
use millwright_forge::export::{Form, export, graph_path};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// The file that these graphs have their large tensors in, of small numbers in whatever type, as the fuzz target's.
fn weights() -> Vec<u8> {
    (0..1 << 17)
        .map(|i: usize| 0x2c + (i * i / 7 % 16) as u8)
        .collect()
}

#[test]
fn what_fuzzing_found_stays_mended() {
    let folder = TempDir::new().unwrap();
    let (model, state) = (folder.path().join("model"), folder.path().join("state"));
    let form = Form::find("f32").unwrap();
    let cache = Cache::at(folder.path().join("no-cache"));
    let catalogue = Catalogue::built_in().unwrap();
    export(&cache, &catalogue, "tiny", form, false, &model).unwrap();
    fs::write(model.join("weights"), weights()).unwrap();
    let options = Options {
        threads: Some(1),
        slots: 1,
        kv_tokens: 64,
        state_dir: state.clone(),
        ..Options::default()
    };
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/regressions/import");
    let mut count = 0;
    for entry in fs::read_dir(found).unwrap().map(Result::unwrap) {
        println!("{}", entry.path().display());
        let _ = fs::remove_dir_all(&state);
        fs::copy(entry.path(), graph_path(&model, form)).unwrap();
        let _ = inspect(&model, None);
        if let Ok(mut engine) = Engine::open(&model, &options) {
            let _ = engine.score(&[1, 40, 2, 3, 255], &mut |_, _| {});
        }
        count += 1;
    }
    assert!(count > 0, "no graph was found");
}
