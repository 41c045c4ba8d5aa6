//! Which cores arithmetic runs on: the fast ones, where cores differ. Reads what Linux says of them and sets the
//! affinity of threads; knows nothing of models.

use millwright_kernels::Pool;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/devices/system/cpu";
/// A core at least this share as fast as the fastest is fast too: favoured cores of one kind differ by a few
/// percent, kinds by a quarter at least (RK3588: 1024 to about 530; Intel's hybrids: 5.2 GHz to 3.9).
const FAST_SHARE: f64 = 0.8;
/// The largest capacity that Linux gives a core, and a clock in kHz that no core reaches.
const CAPACITY_MAX: u64 = 1024;
const CLOCK_MAX: u64 = 10_000_000;
/// A sysfs file holds one number and a newline.
const FILE_BYTES_MAX: u64 = 32;

/// The cores this process may use, and those of them that are fast.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cores {
    allowed: Vec<usize>,
    fast: Vec<usize>,
}

impl Cores {
    /// Those of this machine that the process's affinity mask allows.
    pub(crate) fn here() -> Self {
        Self::read(Path::new(ROOT), allowed())
    }

    /// What a tree like [`ROOT`] says of `allowed`. Cores of which any says nothing that makes sense are equal.
    fn read(root: &Path, allowed: Vec<usize>) -> Self {
        let of_all = |file: &str, max: u64| -> Option<Vec<u64>> {
            let speed = |core: &usize| number(&root.join(format!("cpu{core}")).join(file), max);
            allowed.iter().map(speed).collect()
        };
        let speeds = of_all("cpu_capacity", CAPACITY_MAX)
            .or_else(|| of_all("cpufreq/cpuinfo_max_freq", CLOCK_MAX));
        let Some(speeds) = speeds else {
            return Self {
                fast: allowed.clone(),
                allowed,
            };
        };
        // The least of the fastest class below `limit`.
        let class = |limit: f64| {
            let below = speeds.iter().map(|&speed| speed as f64);
            below.filter(|&speed| speed < limit).fold(0.0, f64::max) * FAST_SHARE
        };
        let many = |least: f64| {
            speeds
                .iter()
                .filter(|&&speed| speed as f64 >= least)
                .count()
        };
        let mut least = class(f64::INFINITY);
        if many(least) < 2 && speeds.len() > 1 {
            // One core alone, as in phones' 1 + 3 + 4: it and the class below it.
            least = class(least);
        }
        let pairs = allowed.iter().zip(&speeds);
        let fast = pairs.filter(|(_, speed)| **speed as f64 >= least);
        Self {
            fast: fast.map(|(core, _)| *core).collect(),
            allowed,
        }
    }

    /// How many threads may run at once: one for each allowed core, fewer where a control group says so.
    pub(crate) fn threads_max(&self) -> usize {
        self.allowed.len().min(parallelism()).max(1)
    }

    /// How many threads are worth trying: one for each fast core.
    pub(crate) fn threads_fast(&self) -> usize {
        self.fast.len().min(self.threads_max()).max(1)
    }

    /// The cores that this many threads should keep to; `None` where it makes no difference, or where they are
    /// more than the fast cores.
    pub(crate) fn kept_to(&self, threads: usize) -> Option<&[usize]> {
        let differ = self.fast.len() < self.allowed.len();
        (differ && threads <= self.fast.len()).then_some(&self.fast)
    }

    /// In words: what a measurement on these cores holds for.
    pub(crate) fn name(&self) -> String {
        let list = |cores: &[usize]| {
            let words: Vec<String> = cores.iter().map(usize::to_string).collect();
            words.join(",")
        };
        format!(
            "{} of {}; {} threads",
            list(&self.fast),
            list(&self.allowed),
            self.threads_max()
        )
    }
}

/// Threads that keep to these cores, if any are named.
pub(crate) fn pool(threads: usize, kept_to: Option<Vec<usize>>) -> Pool {
    Pool::started(threads, move |_| {
        if let Some(cores) = &kept_to {
            keep_to(cores);
        }
    })
}

/// Whether our threads together waited for a core for more than a tenth of the time since it was made: what was
/// measured meanwhile holds for now, not for this machine. Threads that ended meanwhile don't count.
pub(crate) struct Calm(Option<(Duration, Instant)>);

impl Calm {
    pub(crate) fn begin() -> Self {
        Self(waited().map(|waited| (waited, Instant::now())))
    }

    /// True where the system doesn't say.
    pub(crate) fn held(&self) -> bool {
        let Some(((before, start), now)) = self.0.zip(waited()) else {
            return true;
        };
        now.saturating_sub(before) * 10 <= start.elapsed()
    }
}

/// How long our threads could have run and had no core: the second number of each one's `schedstat`, in nanoseconds.
fn waited() -> Option<Duration> {
    let of = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ')
            .nth(1)?
            .parse()
            .ok()
            .map(Duration::from_nanos)
    };
    let tasks = fs::read_dir("/proc/self/task").ok()?;
    let each: Vec<Duration> = tasks.flatten().filter_map(of).collect();
    (!each.is_empty()).then(|| each.iter().sum())
}

/// The number in a small file, 1 to `max`.
fn number(path: &Path, max: u64) -> Option<u64> {
    let mut text = String::new();
    let file = fs::File::open(path).ok()?;
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).ok()?;
    text.trim().parse().ok().filter(|n| (1..=max).contains(n))
}

fn parallelism() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

pub(crate) use affinity::Stay;
use affinity::{allowed, keep_to};

mod affinity {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    /// The cores this thread may run on, rising.
    pub(crate) fn allowed() -> Vec<usize> {
        match sched_getaffinity(None) {
            Ok(set) => (0..CpuSet::MAX_CPU)
                .filter(|&core| set.is_set(core))
                .collect(),
            Err(_) => (0..super::parallelism()).collect(),
        }
    }

    /// Keeps the calling thread to these cores from now on. Where the system refuses, it runs where it did.
    pub(crate) fn keep_to(cores: &[usize]) {
        let mut set = CpuSet::new();
        for &core in cores {
            set.set(core);
        }
        if let Err(error) = sched_setaffinity(None, &set) {
            tracing::debug!("a thread can't be kept to the cores {cores:?}: {error}");
        }
    }

    /// Keeps the calling thread to some cores while it lives. Two system calls: for a step, not for a job.
    pub(crate) struct Stay(Option<CpuSet>);

    impl Stay {
        pub(crate) fn on(cores: Option<&[usize]>) -> Self {
            let before = cores.and_then(|_| sched_getaffinity(None).ok());
            if let (Some(cores), Some(_)) = (cores, &before) {
                keep_to(cores);
            }
            Self(before)
        }
    }

    impl Drop for Stay {
        fn drop(&mut self) {
            if let Some(before) = &self.0 {
                let _ = sched_setaffinity(None, before);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    /// A tree of cores, each with the files and texts given.
    fn tree(cores: &[&[(&str, &str)]]) -> TempDir {
        let root = TempDir::new().unwrap();
        for (core, files) in cores.iter().enumerate() {
            for (name, text) in *files {
                let path = root.path().join(format!("cpu{core}/{name}"));
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
        }
        root
    }

    #[track_caller]
    fn fast(tree: &TempDir, allowed: &[usize], expected: &[usize]) {
        let cores = Cores::read(tree.path(), allowed.to_vec());
        assert_eq!((&*cores.fast, &*cores.allowed), (expected, allowed));
        let differ = expected.len() < allowed.len();
        assert_eq!(cores.kept_to(expected.len()), differ.then_some(expected));
        assert_eq!(cores.kept_to(expected.len() + 1), None);
    }

    #[test]
    fn four_fast_of_eight_as_on_rk3588() {
        let (slow, quick) = ([("cpu_capacity", "530\n")], [("cpu_capacity", "1024\n")]);
        let mut cores = vec![&slow[..]; 4];
        cores.extend([&quick[..]; 4]);
        let tree = tree(&cores);
        fast(&tree, &[0, 1, 2, 3, 4, 5, 6, 7], &[4, 5, 6, 7]);
        fast(&tree, &[2, 3, 6, 7], &[6, 7]);
        fast(&tree, &[2, 3, 6], &[2, 3, 6]);
        fast(&tree, &[6], &[6]);
        fast(&tree, &[0, 1], &[0, 1]);
    }

    #[test]
    fn one_prime_core_does_not_work_alone_as_in_phones() {
        let capacities = ["325", "325", "325", "325", "780", "780", "780", "1024"];
        let files = capacities.map(|capacity| [("cpu_capacity", capacity)]);
        let cores: Vec<&[_]> = files.iter().map(|file| &file[..]).collect();
        let tree = tree(&cores);
        fast(&tree, &[0, 1, 2, 3, 4, 5, 6, 7], &[4, 5, 6, 7]);
        fast(&tree, &[4, 5, 6, 7], &[4, 5, 6, 7]);
        fast(&tree, &[0, 1, 7], &[0, 1, 7]);
    }

    #[test]
    fn four_equal_ones_as_on_a_pi() {
        let clock = [("cpufreq/cpuinfo_max_freq", "1500000\n")];
        fast(&tree(&[&clock[..]; 4]), &[0, 1, 2, 3], &[0, 1, 2, 3]);
    }

    #[test]
    fn clocks_tell_a_hybrids_cores_apart_but_not_its_favoured_ones() {
        let clocks = ["5000000", "5200000", "3900000", "3900000"];
        let files = clocks.map(|clock| [("cpufreq/cpuinfo_max_freq", clock)]);
        let cores: Vec<&[_]> = files.iter().map(|file| &file[..]).collect();
        fast(&tree(&cores), &[0, 1, 2, 3], &[0, 1]);
    }

    #[test]
    fn what_makes_no_sense_says_nothing() {
        let good = [("cpu_capacity", "1024")];
        for bad in [
            "",
            "fast",
            "-4",
            "0",
            "1025",
            "99999999999999999999999",
            "\u{fffd}",
        ] {
            let file = [("cpu_capacity", bad)];
            fast(&tree(&[&good, &file]), &[0, 1], &[0, 1]);
        }
        // Beside absurd capacities the clocks still count.
        let both = |clock| {
            [
                ("cpu_capacity", "70000"),
                ("cpufreq/cpuinfo_max_freq", clock),
            ]
        };
        let (slow, quick) = (both("1000000"), both("2000000"));
        fast(&tree(&[&slow, &quick, &quick]), &[0, 1, 2], &[1, 2]);
        let absurd = both("99000000");
        fast(&tree(&[&slow, &absurd]), &[0, 1], &[0, 1]);
        fast(&tree(&[&slow, &[]]), &[0, 1], &[0, 1]);
        fast(&tree(&[]), &[0, 1, 2], &[0, 1, 2]);
        let long = format!("{}1024", " ".repeat(100));
        fast(
            &tree(&[&[("cpu_capacity", &long)], &good]),
            &[0, 1],
            &[0, 1],
        );
        assert_eq!(
            Cores::read(Path::new("/nonexistent"), vec![]).threads_fast(),
            1
        );
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn another_thread_that_waits_for_a_core_counts() {
        let Some(before) = waited() else {
            return;
        };
        let core = allowed()[0];
        let busy = move || {
            keep_to(&[core]);
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(200) {}
            // It still lives when the other looks.
            waited()
        };
        let threads = [std::thread::spawn(busy), std::thread::spawn(busy)];
        let after = threads
            .map(|thread| thread.join().unwrap())
            .into_iter()
            .flatten()
            .max()
            .unwrap();
        assert!(
            after.saturating_sub(before) > Duration::from_millis(20),
            "{before:?} {after:?}"
        );
    }

    #[test]
    fn this_machine_has_cores_and_a_thread_comes_back_from_where_it_was_kept() {
        let cores = Cores::here();
        assert!((1..=cores.threads_max()).contains(&cores.threads_fast()));
        let before = allowed();
        let last = [*before.last().unwrap()];
        let stay = Stay::on(Some(&last));
        if cfg!(target_os = "linux") {
            assert_eq!(allowed(), last);
        }
        drop(stay);
        assert_eq!(allowed(), before);
        drop(Stay::on(None));
        assert_eq!(allowed(), before);
    }
}
