//! How much memory this process may have: what the machine could give without swapping, and what the limits of its cgroup and
//! of all above it leave. Reads the kernel's files; judges nothing.

use std::fmt;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// v1 says so where there is no limit: the largest number of pages.
const UNLIMITED: u64 = 1 << 60;

/// Memory that this process may have, with what it holds already. Swap does not count: each token reads all weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    pub bytes: u64,
    /// What leaves no more.
    pub bound: Bound,
}

/// What bounds a process's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bound {
    Machine,
    /// `memory.max` or `memory.high` (in v1 `memory.limit_in_bytes`) of this cgroup.
    Limit {
        cgroup: PathBuf,
        file: &'static str,
        bytes: u64,
    },
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Machine => f.write_str("that is what the machine has free"),
            Self::Limit {
                cgroup,
                file,
                bytes,
            } => write!(
                f,
                "that is what {file} of {} MB leaves in the cgroup {}",
                bytes / 1_000_000,
                cgroup.display()
            ),
        }
    }
}

impl Room {
    /// `None` where the system doesn't say.
    pub fn here() -> Option<Self> {
        Self::at(Path::new("/"))
    }

    /// With another root of `/proc` and `/sys`.
    fn at(root: &Path) -> Option<Self> {
        let free = kib(&root.join("proc/meminfo"), "MemAvailable:").map(|bytes| Self {
            bytes,
            bound: Bound::Machine,
        });
        // What it holds is not free, and it is its own.
        let own = kib(&root.join("proc/self/status"), "RssAnon:").unwrap_or(0);
        let free = free.map(|room| Self {
            bytes: room.bytes + own,
            ..room
        });
        let rooms = free.into_iter().chain(limits(root, own));
        rooms.min_by_key(|room| room.bytes)
    }
}

/// A version of cgroups: where they are, and what their files are called.
struct Version {
    place: &'static str,
    limits: &'static [&'static str],
    usage: &'static str,
    /// In `memory.stat`: pages of files, which the kernel takes back as it needs them.
    files: [&'static str; 2],
}

const V2: Version = Version {
    place: "sys/fs/cgroup",
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    files: ["inactive_file ", "active_file "],
};
const V1: Version = Version {
    place: "sys/fs/cgroup/memory",
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    files: ["total_inactive_file ", "total_active_file "],
};

/// What each limit leaves of this process's cgroups and of all above them.
fn limits(root: &Path, own: u64) -> Vec<Room> {
    let mut rooms = Vec::new();
    let text = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let version = match controllers {
            "" => &V2,
            some if some.split(',').any(|name| name == "memory") => &V1,
            _ => continue,
        };
        // One that lies outside of what this process sees of the tree begins with `..`: what it sees is then the top alone.
        let path = Path::new(path.trim_start_matches('/'));
        let is_inside = path.components().all(|c| matches!(c, Component::Normal(_)));
        let path = if is_inside { path } else { Path::new("") };
        for cgroup in path.ancestors() {
            rooms.extend(version.rooms(root, cgroup, own));
        }
    }
    rooms
}

impl Version {
    fn rooms(&self, root: &Path, cgroup: &Path, own: u64) -> Vec<Room> {
        let folder = root.join(self.place).join(cgroup);
        let number = |name: &str| -> Option<u64> {
            let text = fs::read_to_string(folder.join(name)).ok()?;
            text.trim().parse().ok()
        };
        let limits = self.limits.iter().filter_map(|&file| {
            // "max" is no number, and no limit.
            let bytes = number(file).filter(|bytes| *bytes < UNLIMITED)?;
            Some((file, bytes))
        });
        let limits: Vec<_> = limits.collect();
        if limits.is_empty() {
            return Vec::new();
        }
        let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let part = |name: &str| -> u64 {
            let line = stat.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
        };
        let files: u64 = self.files.iter().map(|name| part(name)).sum();
        let used = number(self.usage).unwrap_or(0).saturating_sub(files);
        let room = |(file, bytes): (&'static str, u64)| Room {
            bytes: (bytes + own).saturating_sub(used),
            bound: Bound::Limit {
                cgroup: Path::new("/").join(cgroup),
                file,
                bytes,
            },
        };
        limits.into_iter().map(room).collect()
    }
}

/// A line of `/proc` in kB, in bytes.
fn kib(path: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    const MIB: u64 = 1 << 20;

    /// A root with these files; a number in the place of a text is a limit or a usage in MiB.
    fn room(files: &[(&str, &str)]) -> Option<Room> {
        let root = TempDir::new().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let text = match text.parse::<u64>() {
                Ok(mib) => (mib * MIB).to_string(),
                Err(_) => (*text).to_owned(),
            };
            fs::write(path, text).unwrap();
        }
        Room::at(root.path())
    }

    fn limit(cgroup: &str, file: &'static str, mib: u64) -> Bound {
        Bound::Limit {
            cgroup: cgroup.into(),
            file,
            bytes: mib * MIB,
        }
    }

    const FREE: (&str, &str) = (
        "proc/meminfo",
        "MemTotal: 999999 kB\nMemAvailable:  512000 kB\nSwapFree: 999999 kB\n",
    );

    #[test]
    fn without_limits_it_is_what_the_machine_has_and_swap_is_no_memory() {
        assert_eq!(room(&[]), None);
        let own = ("proc/self/status", "VmRSS: 90000 kB\nRssAnon:   3000 kB\n");
        let unlimited = [
            FREE,
            own,
            ("proc/self/cgroup", "0::/a\n"),
            ("sys/fs/cgroup/a/memory.max", "max\n"),
            ("sys/fs/cgroup/a/memory.current", "400"),
        ];
        let found = room(&unlimited).unwrap();
        assert_eq!(found.bytes, 515_000 * 1024);
        assert_eq!(found.bound, Bound::Machine);
    }

    #[test]
    fn the_tightest_limit_of_a_cgroup_and_all_above_it_counts() {
        let files = |high: &'static str, above: &'static str| {
            room(&[
                FREE,
                ("proc/self/cgroup", "0::/system.slice/millwright.service\n"),
                (
                    "sys/fs/cgroup/system.slice/millwright.service/memory.max",
                    "300",
                ),
                (
                    "sys/fs/cgroup/system.slice/millwright.service/memory.high",
                    high,
                ),
                (
                    "sys/fs/cgroup/system.slice/millwright.service/memory.current",
                    "100",
                ),
                (
                    "sys/fs/cgroup/system.slice/millwright.service/memory.stat",
                    "anon 1048576\ninactive_file 52428800\nactive_file 10485760\n",
                ),
                ("sys/fs/cgroup/system.slice/memory.max", above),
                ("sys/fs/cgroup/system.slice/memory.current", "200"),
                ("sys/fs/cgroup/system.slice/memory.stat", ""),
            ])
            .unwrap()
        };
        // Of 100 MiB in use 60 are pages of files.
        let own = files("max", "max");
        assert_eq!(own.bytes, 260 * MIB);
        let cgroup = "/system.slice/millwright.service";
        assert_eq!(own.bound, limit(cgroup, "memory.max", 300));
        let high = files("200", "max");
        assert_eq!(high.bytes, 160 * MIB);
        assert_eq!(high.bound, limit(cgroup, "memory.high", 200));
        let above = files("200", "250");
        assert_eq!(above.bytes, 50 * MIB);
        assert_eq!(above.bound, limit("/system.slice", "memory.max", 250));
        assert!(above.bound.to_string().contains("memory.max of 262 MB"));
        // More is in use than may be.
        assert_eq!(files("30", "max").bytes, 0);
    }

    #[test]
    fn version_1_and_a_cgroup_seen_from_within_count_too() {
        let v1 = room(&[
            FREE,
            (
                "proc/self/cgroup",
                "9:name=systemd:/\n4:cpu,memory:/box\n0::/\n",
            ),
            ("sys/fs/cgroup/memory/box/memory.limit_in_bytes", "128"),
            ("sys/fs/cgroup/memory/box/memory.usage_in_bytes", "64"),
            (
                "sys/fs/cgroup/memory/box/memory.stat",
                "inactive_file 1\ntotal_inactive_file 33554432\n",
            ),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
        ])
        .unwrap();
        assert_eq!(v1.bytes, 96 * MIB);
        assert_eq!(v1.bound, limit("/box", "memory.limit_in_bytes", 128));
        let container = room(&[
            FREE,
            ("proc/self/cgroup", "0::/../../elsewhere\n"),
            ("sys/fs/cgroup/memory.max", "64"),
            ("sys/fs/cgroup/memory.current", "32"),
        ])
        .unwrap();
        assert_eq!(container.bytes, 32 * MIB);
        assert_eq!(container.bound, limit("/", "memory.max", 64));
    }

    #[test]
    fn this_machine_says_how_much() {
        if cfg!(target_os = "linux") {
            assert!(Room::here().is_some_and(|room| room.bytes > MIB));
        }
    }
}
