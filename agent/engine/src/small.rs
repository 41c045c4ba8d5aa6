//! Small files of ours in the state directory: what was measured once and is remembered.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// Larger ones are not ours.
const BYTES_MAX: u64 = 64 << 10;

/// What the file says; `None` if it isn't there.
pub(crate) fn recall<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, String> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(|e| e.to_string())?,
    };
    let mut bytes = Vec::new();
    let read = file.take(BYTES_MAX).read_to_end(&mut bytes);
    read.map_err(|e| e.to_string())?;
    let parsed = serde_json::from_slice(&bytes);
    parsed
        .map(Some)
        .map_err(|e| format!("it is no such file: {e}"))
}

/// Writes the file whole or not at all.
pub(crate) fn remember(path: &Path, what: &impl Serialize) -> io::Result<()> {
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    let bytes = serde_json::to_vec(what)?;
    let written = fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written
}
