//! What the kernel says of a process, and how a heap of timings is told in two numbers. Changes nothing.

use std::fs;
use std::path::Path;
use std::time::Duration;

/// Counters since the process began.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Io {
    /// Bytes that went, or will go, to a disk.
    pub(crate) write_bytes: u64,
    /// Bytes given to write calls, to sockets too.
    pub(crate) wchar: u64,
}

impl Io {
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
        Some(Self {
            write_bytes: field(&text, "write_bytes:")?,
            wchar: field(&text, "wchar:")?,
        })
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            write_bytes: self.write_bytes - before.write_bytes,
            wchar: self.wchar - before.wchar,
        }
    }
}

/// Resident memory in KiB: all of it, and what is no file's.
pub(crate) fn resident_kib(pid: u32) -> Option<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some((field(&text, "VmRSS:")?, field(&text, "RssAnon:")?))
}

/// Processor time in all, in seconds.
pub(crate) fn processor_s(pid: u32) -> Option<f64> {
    /// `USER_HZ`, which is 100 on every Linux that we know.
    const TICKS: f64 = 100.0;
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may have spaces in it.
    let rest = text.rsplit_once(')')?.1;
    let mut fields = rest.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / TICKS)
}

/// Seconds in which threads that could have run waited for a core, and in which they ran.
pub(crate) fn waited_and_ran_s(pid: u32) -> Option<(f64, f64)> {
    let (mut waited, mut ran) = (0.0, 0.0);
    for thread in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        let mut nanoseconds = text.split_whitespace();
        let mut next = || nanoseconds.next()?.parse::<f64>().ok();
        ran += next()? / 1e9;
        waited += next()? / 1e9;
    }
    Some((waited, ran))
}

pub(crate) fn descriptors(pid: u32) -> Option<usize> {
    Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count())
}

/// The type of the file system that a path is on.
pub(crate) fn file_system(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (at, kind) = (words.next()?, words.next()?);
        path.starts_with(at).then_some((at.len(), kind))
    });
    // The later of two mounts at the same place lies above.
    mounts
        .max_by_key(|(length, _)| *length)
        .map(|(_, kind)| kind.to_owned())
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Timings in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) count: usize,
    pub(crate) median: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// None of no timings.
    pub(crate) fn of(timings: &[Duration]) -> Option<Self> {
        let mut sorted: Vec<f64> = timings.iter().map(|t| t.as_secs_f64() * 1e3).collect();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
        (!sorted.is_empty()).then(|| Self {
            count: sorted.len(),
            median: at(0.5),
            p99: at(0.99),
            max: at(1.0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_read_off_the_sorted_timings() {
        let timings: Vec<Duration> = (0..=100).rev().map(Duration::from_millis).collect();
        let spread = Spread::of(&timings).unwrap();
        assert_eq!((spread.median, spread.p99, spread.max), (50.0, 99.0, 100.0));
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn this_process_can_be_read() {
        let pid = std::process::id();
        assert!(Io::of(pid).is_some() && processor_s(pid).is_some());
        assert!(resident_kib(pid).is_some_and(|(all, own)| all >= own && own > 0));
        assert!(waited_and_ran_s(pid).is_some_and(|(_, ran)| ran > 0.0));
        assert!(descriptors(pid).is_some_and(|n| n > 2));
        assert_eq!(file_system(Path::new("/proc")).as_deref(), Some("proc"));
    }
}
