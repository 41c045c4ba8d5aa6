//! What the agent takes, every few seconds: as CSV while it is measured, and its growth at the end. Knows the agent from
//! `/proc` and the requester's clock alone.

use super::Fault;
use crate::faults::oracle::Timings;
use crate::process::{Spread, descriptors, resident_kib};
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const HEADINGS: &str = "seconds,pid,resident_kib,anonymous_kib,descriptors,journal_bytes,journal_on_disk,\
    tasks,first_event_median_ms,first_event_p99_ms,first_event_max_ms,faults";
/// A process that was started with a full journal takes this long to take what it takes.
const YOUNG_S: f64 = 100.0;
const MIB: f64 = 1024.0 * 1024.0;

/// One look. None: the agent was away.
#[derive(Clone, Default)]
pub(super) struct Sample {
    pub(super) seconds: f64,
    pub(super) pid: u32,
    /// KiB: all, and what is no file's.
    pub(super) resident: Option<(u64, u64)>,
    pub(super) descriptors: Option<usize>,
    /// Bytes: its length, and what it takes of the disk.
    pub(super) journal: Option<(u64, u64)>,
    /// From a task's first sending to its first event.
    pub(super) latency: Option<Spread>,
}

pub(super) struct Diary {
    began: Instant,
    total: Duration,
    samples: Mutex<Vec<Sample>>,
    faults: Mutex<Vec<(f64, Fault)>>,
    over: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Diary {
    pub(super) fn new(total: Duration) -> Self {
        Self {
            began: Instant::now(),
            total,
            samples: Mutex::default(),
            faults: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    pub(super) fn total(&self) -> Duration {
        self.total
    }

    pub(super) fn note(&self, fault: Fault) {
        let at = self.elapsed().as_secs_f64();
        lock(&self.faults).push((at, fault));
    }

    pub(super) fn faults(&self) -> Vec<(f64, Fault)> {
        lock(&self.faults).clone()
    }

    pub(super) fn samples(&self) -> Vec<Sample> {
        lock(&self.samples).clone()
    }

    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// Samples until [`Self::end`].
    pub(super) fn sample(
        self: &Arc<Self>,
        pid: impl Fn() -> u32 + Send + 'static,
        timings: Timings,
        journal: PathBuf,
        csv: &Path,
    ) -> Result<JoinHandle<Result<(), String>>, String> {
        let failed = |e: std::io::Error| format!("the CSV: {e}");
        let mut csv = File::create(csv).map_err(failed)?;
        writeln!(csv, "{HEADINGS}").map_err(failed)?;
        let diary = Arc::clone(self);
        let step = (self.total / 200).clamp(Duration::from_secs(1), Duration::from_secs(5));
        let work = move || {
            let mut told = 0;
            while !diary.over.load(Ordering::Relaxed) {
                std::thread::sleep(step);
                let sample = look(diary.elapsed(), pid(), &timings, &journal);
                let faults = diary.faults();
                let names: Vec<&str> = faults[told..].iter().map(|(_, f)| f.name()).collect();
                told = faults.len();
                writeln!(csv, "{},{}", row(&sample), names.join("; ")).map_err(failed)?;
                lock(&diary.samples).push(sample);
            }
            Ok(())
        };
        Ok(std::thread::spawn(work))
    }

    /// Growth per hour, in words. The first quarter, at most five minutes, is left out: the dedup window fills.
    pub(super) fn growth(&self) -> Vec<String> {
        let from = (self.total.as_secs_f64() / 4.0).min(300.0);
        let mut samples = self.samples();
        samples.retain(|sample| sample.seconds >= from);
        let mut began = (0, 0.0);
        let lives = |sample: &Sample| {
            if sample.pid != began.0 {
                began = (sample.pid, sample.seconds);
            }
            (sample.seconds - began.1 >= YOUNG_S).then_some(sample.pid)
        };
        // A restart is no growth: each process by itself.
        let groups: Vec<Option<u32>> = samples.iter().map(lives).collect();
        let of = |value: &dyn Fn(&Sample) -> Option<f64>, in_lives: bool| {
            let points = samples.iter().zip(&groups).filter_map(|(sample, group)| {
                let group = if in_lives { (*group)? } else { 0 };
                Some((group, sample.seconds / 3600.0, value(sample)?))
            });
            points.collect::<Vec<_>>()
        };
        let resident = of(&|s| Some(s.resident?.0 as f64 / 1024.0), true);
        let own = of(&|s| Some(s.resident?.1 as f64 / 1024.0), true);
        let descriptors = of(&|s| Some(s.descriptors? as f64), true);
        let length = of(&|s| Some(s.journal?.0 as f64 / MIB), false);
        let taken = of(&|s| Some(s.journal?.1 as f64 / MIB), false);
        let median = of(&|s| Some(s.latency?.median), false);
        vec![
            told("resident memory", "MiB", &resident),
            told("of that not a file's", "MiB", &own),
            told("descriptors", "", &descriptors),
            told("journal's length", "MiB", &length),
            told("journal on disk", "MiB", &taken),
            format!("first event, median: {}", quarters("ms", &median)),
        ]
    }
}

fn told(name: &str, unit: &str, points: &[(u32, f64, f64)]) -> String {
    match slope(points) {
        Some((slope, error)) => format!(
            "{name}: {slope:+.2} {unit}/h (± {:.2}); {}",
            2.0 * error,
            quarters(unit, points)
        ),
        None => format!("{name}: too few samples"),
    }
}

/// Medians, which what came during a fault moves little.
fn quarters(unit: &str, points: &[(u32, f64, f64)]) -> String {
    let median = |part: &[(u32, f64, f64)]| {
        let mut values: Vec<f64> = part.iter().map(|(_, _, value)| *value).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let quarter = points.len().div_ceil(4);
    let first = median(&points[..quarter]);
    let last = median(&points[points.len() - quarter..]);
    format!("median of the first quarter {first:.2} {unit}, of the last {last:.2}")
}

/// The common slope of groups that each have a level of their own (least squares), and its standard error.
fn slope(points: &[(u32, f64, f64)]) -> Option<(f64, f64)> {
    let (mut xx, mut xy, mut yy, mut freedom) = (0.0, 0.0, 0.0, -1.0);
    for group in points.chunk_by(|a, b| a.0 == b.0) {
        let count = group.len() as f64;
        let x_mean = group.iter().map(|p| p.1).sum::<f64>() / count;
        let y_mean = group.iter().map(|p| p.2).sum::<f64>() / count;
        for (_, x, y) in group {
            xx += (x - x_mean).powi(2);
            xy += (x - x_mean) * (y - y_mean);
            yy += (y - y_mean).powi(2);
        }
        freedom += count - 1.0;
    }
    let slope = xy / xx;
    let rest = (yy - slope * xy).max(0.0);
    (freedom > 0.0 && xx > 0.0).then(|| (slope, (rest / freedom / xx).sqrt()))
}

fn look(elapsed: Duration, pid: u32, timings: &Timings, journal: &Path) -> Sample {
    let data = journal.metadata().ok();
    Sample {
        seconds: elapsed.as_secs_f64(),
        pid,
        resident: resident_kib(pid),
        descriptors: descriptors(pid),
        journal: data.map(|data| (data.len(), data.blocks() * 512)),
        latency: Spread::of(&timings.take()),
    }
}

fn row(sample: &Sample) -> String {
    let text = |value: Option<String>| value.unwrap_or_default();
    let whole = |value: Option<u64>| text(value.map(|v| v.to_string()));
    let time = |of: fn(Spread) -> f64| text(sample.latency.map(|s| format!("{:.2}", of(s))));
    [
        format!("{:.1}", sample.seconds),
        sample.pid.to_string(),
        whole(sample.resident.map(|r| r.0)),
        whole(sample.resident.map(|r| r.1)),
        whole(sample.descriptors.map(|n| n as u64)),
        whole(sample.journal.map(|j| j.0)),
        whole(sample.journal.map(|j| j.1)),
        whole(sample.latency.map(|s| s.count as u64)),
        time(|s| s.median),
        time(|s| s.p99),
        time(|s| s.max),
    ]
    .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_is_no_growth() {
        let rising = |group: u32, level: f64| {
            (0..10).map(move |n| (group, f64::from(n), level + 2.0 * f64::from(n)))
        };
        let points: Vec<_> = rising(1, 0.0).chain(rising(2, -500.0)).collect();
        let (slope, error) = slope(&points).unwrap();
        assert!((slope - 2.0).abs() < 1e-9 && error < 1e-6);
        assert_eq!(super::slope(&[(1, 0.0, 1.0)]), None);
    }
}
