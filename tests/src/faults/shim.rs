//! The suite's side of tests/faults/shim.c: compiles it, tells it what to do, and plays the power cut with what it
//! remembered.

use super::chance::Chance;
use crate::program;
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;

/// The control file's integers, in the shim's order.
#[derive(Clone, Copy)]
pub enum Field {
    ClockOffset = 0,
    FsyncFails = 1,
    WriteFails = 2,
    WriteErrno = 3,
    WriteShort = 4,
    WriteTorn = 5,
    Injected = 6,
    ClockReads = 7,
    DiskCalls = 8,
    Syncs = 9,
}

const FIELDS: usize = 16;
pub(super) const EIO: i64 = 5;
pub const ENOSPC: i64 = 28;
pub(super) const EROFS: i64 = 30;

/// A shim for one agent.
pub struct Shim {
    folder: TempDir,
    library: PathBuf,
    control: File,
    state: PathBuf,
}

impl Shim {
    /// Why there is none, if there can't be.
    pub fn new(state: &Path) -> Result<Self, String> {
        let library = library()?;
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let path = folder.path().join("control");
        fs::write(&path, [0; FIELDS * 8]).map_err(|e| e.to_string())?;
        let control = File::options().read(true).write(true).open(&path);
        Ok(Self {
            folder,
            library,
            control: control.map_err(|e| e.to_string())?,
            state: state.to_owned(),
        })
    }

    /// The agent's environment; with `undo` a power cut can be played.
    pub fn env(&self, undo: bool) -> Vec<(String, String)> {
        let at = |name: &str| self.folder.path().join(name).display().to_string();
        let mut env = vec![
            ("LD_PRELOAD", self.library.display().to_string()),
            ("FAULTS_CONTROL", at("control")),
            ("FAULTS_BELOW", self.state.display().to_string()),
        ];
        if undo {
            env.push(("FAULTS_UNDO", at("undo")));
        }
        let owned = env
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value));
        owned.collect()
    }

    pub fn set(&self, field: Field, value: i64) {
        let at = field as u64 * 8;
        let written = self.control.write_all_at(&value.to_ne_bytes(), at);
        written.expect("the control file");
    }

    pub fn get(&self, field: Field) -> i64 {
        let mut bytes = [0; 8];
        let read = self.control.read_exact_at(&mut bytes, field as u64 * 8);
        read.expect("the control file");
        i64::from_ne_bytes(bytes)
    }

    /// Takes back of a dead agent's files what was written since their last fsync: all of it, or pieces, as disks
    /// write in what order they like and sector by sector. How many writes were taken back.
    pub(super) fn power_cut(&self, chance: &mut Chance) -> usize {
        let path = self.folder.path().join("undo");
        let log = fs::read(&path).unwrap_or_default();
        let _ = fs::remove_file(&path);
        let files = files(&self.state);
        let mut taken = 0;
        for (inode, writes) in unsynced(&log) {
            if let Some(path) = files.get(&inode) {
                taken += take_back(path, &writes, chance);
            }
        }
        taken
    }
}

/// Compiled once for all cases, beside the programs.
fn library() -> Result<PathBuf, String> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let build = || {
        let library = program("millwright").with_file_name("faults-shim.so");
        // Another run may be using the one that is there.
        let new = library.with_extension(std::process::id().to_string());
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("faults/shim.c");
        let mut command = Command::new("cc");
        command.args(["-O1", "-shared", "-fPIC", "-o"]);
        command.arg(&new).arg(source).arg("-ldl");
        let output = command.output().map_err(|e| format!("cc: {e}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        fs::rename(&new, &library).map_err(|e| e.to_string())?;
        Ok(library)
    };
    BUILT.get_or_init(build).clone()
}

/// What a write replaced.
struct Write {
    offset: u64,
    length: usize,
    old: Vec<u8>,
    old_size: u64,
}

fn unsynced(log: &[u8]) -> HashMap<u64, Vec<Write>> {
    const HEAD: usize = 6 * 8;
    let mut files: HashMap<u64, Vec<Write>> = HashMap::new();
    let mut rest = log;
    // The last record may be cut short: its write was never made.
    while let Some((head, more)) = rest.split_at_checked(HEAD) {
        let field = |n: usize| {
            let bytes = head[n * 8..][..8].try_into().expect("eight bytes");
            u64::from_ne_bytes(bytes)
        };
        let Some((old, more)) = more.split_at_checked(field(4) as usize) else {
            break;
        };
        rest = more;
        let writes = files.entry(field(1)).or_default();
        if field(0) == 2 {
            writes.clear();
        } else {
            writes.push(Write {
                offset: field(2),
                length: field(3) as usize,
                old: old.to_vec(),
                old_size: field(5),
            });
        }
    }
    files
}

fn take_back(path: &Path, writes: &[Write], chance: &mut Chance) -> usize {
    const SECTOR: usize = 512;
    let Some(first) = writes.first() else {
        return 0;
    };
    let file = File::options()
        .write(true)
        .open(path)
        .expect("a state file");
    let all = chance.percent(40);
    let mut taken = 0;
    for write in writes.iter().rev() {
        if !all && chance.percent(50) {
            continue;
        }
        taken += 1;
        let mut before = write.old.clone();
        before.resize(write.length, 0);
        let sectors = before.len().div_ceil(SECTOR);
        let torn = !all && chance.percent(30);
        let keep = if torn {
            chance.below(sectors.max(1) as u64) as usize
        } else {
            0
        };
        let from = (keep * SECTOR).min(before.len());
        let written = file.write_all_at(&before[from..], write.offset + from as u64);
        written.expect("taking back a write");
    }
    if all {
        file.set_len(first.old_size).expect("taking back a length");
    }
    taken
}

fn files(folder: &Path) -> HashMap<u64, PathBuf> {
    let mut all = HashMap::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            all.extend(files(&path));
        } else if let Ok(data) = entry.metadata() {
            all.insert(data.ino(), path);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: i64, offset: i64, length: i64, old: &[u8], old_size: i64) -> Vec<u8> {
        let head = [kind, 7, offset, length, old.len() as i64, old_size];
        let mut bytes: Vec<u8> = head.iter().flat_map(|n| n.to_ne_bytes()).collect();
        bytes.extend(old);
        bytes
    }

    #[test]
    fn what_was_synced_stays_and_the_rest_is_undone() {
        let mut log = record(1, 0, 2, b"", 0);
        log.extend(record(2, 0, 0, b"", 2));
        log.extend(record(1, 1, 3, b"b", 2));
        log.extend([1, 2, 3]);
        let writes = &unsynced(&log)[&7];
        assert_eq!(writes.len(), 1);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        // Some seed takes all back.
        let undone = (0..50).any(|seed| {
            fs::write(&path, b"aXYZ").unwrap();
            take_back(&path, writes, &mut Chance::new(seed));
            fs::read(&path).unwrap() == b"ab"
        });
        assert!(undone);
    }

    /// Whether a shell command succeeds on the shim, and what it prints.
    fn sh(shim: &Shim, undo: bool, command: &str) -> (bool, String) {
        let output = Command::new("sh")
            .args(["-c", command])
            .current_dir(&shim.state)
            .envs(shim.env(undo))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        (output.status.success(), said)
    }

    #[test]
    fn the_shim_does_to_a_process_what_it_is_told() {
        const COPY: &str = "dd if=/dev/zero of=file bs=8192 count=4 conv=fsync";
        let folder = tempfile::tempdir().unwrap();
        let shim = Shim::new(folder.path()).unwrap();
        assert!(sh(&shim, false, COPY).0 && shim.get(Field::DiskCalls) > 0);
        shim.set(Field::WriteErrno, ENOSPC);
        for field in [Field::FsyncFails, Field::WriteFails, Field::WriteTorn] {
            shim.set(field, 100);
            assert!(!sh(&shim, false, COPY).0);
            shim.set(field, 0);
        }
        assert!(shim.get(Field::Injected) >= 3);
        shim.set(Field::ClockOffset, -50 * 366 * 86_400);
        let year: u32 = sh(&shim, false, "date +%Y").1.parse().unwrap();
        assert!(year < 2000, "{year}");
    }

    #[test]
    fn a_power_cut_takes_what_was_not_synced() {
        let folder = tempfile::tempdir().unwrap();
        let shim = Shim::new(folder.path()).unwrap();
        let path = folder.path().join("file");
        fs::write(&path, vec![1; 4096]).unwrap();
        let dd = |more: &str| format!("dd if=/dev/zero of=file bs=1024 conv=notrunc{more}");
        assert!(sh(&shim, true, &dd(",fsync count=1")).0);
        assert!(sh(&shim, true, &dd(" count=1 seek=2")).0);
        // Each seed takes back another part: some time it is all.
        let mut chance = Chance::new(1);
        let taken = shim.power_cut(&mut chance);
        let left = fs::read(&path).unwrap();
        assert!(taken <= 1 && left.len() == 4096);
        assert_eq!(left[..1024], [0; 1024], "what was synced stays");
        assert_eq!(left[2048..][..1024] == [0; 1024], taken == 0);
    }
}
