//! The folder around a fuzzed graph.

use crate::seeds;
use millwright_engine::Options;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The file that holds all large tensors, of whatever type.
pub(crate) const WEIGHTS: &str = "weights";
pub(crate) const WEIGHTS_BYTES: usize = 1 << 17;
const GRAPH: &str = "model.onnx";

pub(crate) struct Folder {
    root: TempDir,
}

impl Folder {
    pub(crate) fn new() -> Self {
        let root = TempDir::new().expect("a temporary folder");
        seeds::beside(&root.path().join("model")).expect("the files beside the graph");
        Self { root }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.root.path().join("model")
    }

    fn state(&self) -> PathBuf {
        self.root.path().join("state")
    }

    /// Puts a graph there, and forgets what was made of the last one.
    pub(crate) fn put(&self, graph: &[u8]) {
        let _ = fs::remove_dir_all(self.state());
        fs::write(self.path().join(GRAPH), graph).expect("room for a graph");
    }

    pub(crate) fn options(&self) -> Options {
        Options {
            threads: Some(1),
            slots: 1,
            kv_tokens: 64,
            state_dir: self.state(),
            ..Options::default()
        }
    }
}

/// Writes bytes that are small numbers, whatever type they are read as: 0.06 to 0.9 as f16, below 0.002 as f32.
pub(crate) fn write_weights(dir: &Path) -> std::io::Result<()> {
    let byte = |i: usize| 0x2c + (i * i / 7 % 16) as u8;
    let bytes: Vec<u8> = (0..WEIGHTS_BYTES).map(byte).collect();
    fs::write(dir.join(WEIGHTS), bytes)
}
