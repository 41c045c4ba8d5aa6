//! Where bundles and downloads lie, and how a folder comes to be there whole or not at all: it is made beside
//! its place under a lock and renamed. Knows no model.

use crate::Precision;
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The cache directory.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$MILLWRIGHT_CACHE`, else `$XDG_CACHE_HOME/millwright`, else `~/.cache/millwright`.
    pub fn from_environment() -> Result<Self> {
        let set = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let root = set("MILLWRIGHT_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("millwright")))
            .or_else(|| set("HOME").map(|dir| dir.join(".cache/millwright")));
        root.map(Self::at)
            .context("there is no place for models: set MILLWRIGHT_CACHE or HOME")
    }

    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// Where the bundle of a model lies once pulled: `NAME-PRECISION`, unless the name ends so already.
    pub fn bundle(&self, name: &str, precision: Precision) -> PathBuf {
        let suffix = format!("-{precision}");
        let stem = name.strip_suffix(&suffix).unwrap_or(name);
        self.root.join("models").join(format!("{stem}{suffix}"))
    }

    /// Where what was downloaded lies.
    pub fn downloads(&self) -> PathBuf {
        self.root.join("downloads")
    }
}

/// The right to make one file or folder, held until dropped; the system takes it back from a process that
/// dies, so what is found half-made under it is nobody's.
#[derive(Debug)]
pub struct Claim {
    place: PathBuf,
    partial: PathBuf,
    _lock: File,
}

impl Claim {
    /// Claims `place`, waiting for another process that has it after calling `waiting`. Leftovers of a run
    /// that died are removed.
    pub fn take(place: &Path, waiting: impl FnOnce()) -> Result<Self> {
        let (Some(parent), Some(name)) = (place.parent(), place.file_name()) else {
            anyhow::bail!("{} is not a place for a file", place.display());
        };
        fs::create_dir_all(parent)
            .with_context(|| format!("{} can't be created", parent.display()))?;
        let beside = |kind: &str| parent.join(format!(".{}.{kind}", name.to_string_lossy()));
        let path = beside("lock");
        let open = File::options().create(true).append(true).open(&path);
        let lock = open.with_context(|| format!("{} can't be created", path.display()))?;
        let failed = || format!("{} can't be locked", path.display());
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                waiting();
                lock.lock().with_context(failed)?;
            }
            Err(fs::TryLockError::Error(e)) => return Err(e).with_context(failed),
        }
        let claim = Self {
            place: place.to_owned(),
            partial: beside("partial"),
            _lock: lock,
        };
        claim.clear()?;
        Ok(claim)
    }

    /// An empty folder to work in, on the same file system as the place.
    pub fn workshop(&self) -> Result<&Path> {
        fs::create_dir(&self.partial)
            .with_context(|| format!("{} can't be created", self.partial.display()))?;
        Ok(&self.partial)
    }

    /// Puts a finished file or folder, the workshop or something in it, into the claimed place. What was there
    /// is replaced.
    pub fn install(&self, finished: &Path) -> Result<()> {
        ensure!(
            finished.starts_with(&self.partial),
            "only what was made in the workshop is installed"
        );
        let failed = || format!("{} can't be put in place", self.place.display());
        remove(&self.place).with_context(failed)?;
        fs::rename(finished, &self.place).with_context(failed)?;
        let parent = self.place.parent().unwrap_or(Path::new("/"));
        File::open(parent)
            .and_then(|dir| dir.sync_all())
            .with_context(failed)
    }

    fn clear(&self) -> Result<()> {
        remove(&self.partial)
            .with_context(|| format!("{} can't be removed", self.partial.display()))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // After a failure only; if this fails too, the next claim removes it.
        let _ = self.clear();
    }
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Writes a file and brings it to disk.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.with_context(|| format!("{} can't be written", path.display()))
}

/// Whether an error is, at its root, a disk without room.
pub fn is_full(error: &anyhow::Error) -> bool {
    let kinds = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .map(io::Error::kind);
    kinds.into_iter().any(|kind| {
        matches!(
            kind,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_run_left_is_removed_and_a_finished_folder_replaces_the_old() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("models/m-int8");
        fs::create_dir_all(root.path().join("models/.m-int8.partial/deep")).unwrap();
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("old"), "").unwrap();
        let claim = Claim::take(&place, || panic!("nobody else is here")).unwrap();
        let workshop = claim.workshop().unwrap();
        fs::write(workshop.join("new"), "").unwrap();
        claim.install(workshop).unwrap();
        let names = |dir: &Path| {
            fs::read_dir(dir)
                .unwrap()
                .map(|e| e.unwrap().file_name())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&place), ["new"]);
        assert!(!root.path().join("models/.m-int8.partial").exists());
    }

    #[test]
    fn a_second_claim_waits_for_the_first() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("m");
        let first = Claim::take(&place, || ()).unwrap();
        let (told, waits) = std::sync::mpsc::channel();
        let second = std::thread::spawn({
            let place = place.clone();
            move || Claim::take(&place, || told.send(()).unwrap()).map(|_| ())
        });
        waits.recv().unwrap();
        assert!(!second.is_finished());
        drop(first);
        second.join().unwrap().unwrap();
    }
}
