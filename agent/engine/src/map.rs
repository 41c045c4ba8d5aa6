//! Files mapped into memory, read-only. The one place in this crate with `unsafe`.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;

/// A whole file as bytes.
///
/// Whoever truncates a mapped file kills its readers with SIGBUS, so packed files lie in the agent's own
/// state directory and are replaced by rename, never written in place.
#[derive(Debug)]
pub(crate) struct Mapped(memmap2::Mmap);

impl Mapped {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the map is read-only and private to this value; that nobody else writes the file while it is
        // mapped is the contract stated above.
        unsafe { memmap2::Mmap::map(&file) }.map(Self)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Drops the pages that were read from this process's memory; whoever reads them again gets them from the
    /// file. Best effort: a system that can't leaves them.
    pub(crate) fn forget(&self) {
        #[cfg(unix)]
        // SAFETY: the map is never written to, so each page comes back with the bytes it had.
        let _ = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }

    /// `count` little-endian f32 values at a byte offset; `None` if they don't lie inside the file or are
    /// not aligned to four bytes.
    pub(crate) fn f32s(&self, offset: usize, count: usize) -> Option<&[f32]> {
        let end = offset.checked_add(count.checked_mul(4)?)?;
        // SAFETY: every bit pattern is an f32; `align_to` splits off what isn't aligned.
        let (before, values, after) = unsafe { self.0.get(offset..end)?.align_to::<f32>() };
        (before.is_empty() && after.is_empty()).then_some(values)
    }
}
