//! What the disk itself takes to keep 4 KiB: the part of a task's latency that no agent can save.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;

/// Timings of `fdatasync` after 4 KiB each.
#[derive(Default)]
pub(super) struct Syncs {
    /// Appended, so that the file grows.
    pub(super) appended: Vec<Duration>,
    /// In place, as most of the journal's writes are.
    pub(super) in_place: Vec<Duration>,
}

impl Syncs {
    /// Adds so many of each, in turns, so that both meet the same disk.
    pub(super) fn measure(&mut self, folder: &Path, times: usize) -> io::Result<()> {
        let block = [7; BLOCK];
        let mut growing = tempfile::tempfile_in(folder)?;
        let mut fixed = tempfile::tempfile_in(folder)?;
        fixed.write_all(&vec![0; 16 * BLOCK])?;
        fixed.sync_all()?;
        for n in 0..times {
            let began = Instant::now();
            growing.write_all(&block)?;
            self.appended.push(synced(&growing, began)?);
            let began = Instant::now();
            fixed.write_all_at(&block, (n % 16 * BLOCK) as u64)?;
            self.in_place.push(synced(&fixed, began)?);
        }
        Ok(())
    }
}

fn synced(file: &File, began: Instant) -> io::Result<Duration> {
    file.sync_data()?;
    Ok(began.elapsed())
}
