//! Runs the cases, a few at a time (most of them wait most of the time), and says what came out.

use super::judge::Verdict;
use super::{Case, Finding, Ran, Scale, cases, matrix};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What the command line says.
pub struct Options {
    pub quick: bool,
    /// Cases whose name or family contains one of these; all if empty.
    pub only: Vec<String>,
    /// Goes through all again, with other seeds, until this many seconds are over.
    pub seconds: Option<u64>,
    pub seed: u64,
    pub jobs: usize,
    /// Puts the matrix into the README.
    pub write: bool,
    /// Says which cases there are.
    pub list: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            quick: false,
            only: Vec::new(),
            seconds: None,
            seed: 1,
            jobs: 4,
            write: false,
            list: false,
        }
    }
}

/// Whether all that ran held.
pub fn run(options: &Options) -> bool {
    let wanted = |case: &Case| {
        let title = format!("{}: {}", case.family, case.name);
        options.only.is_empty()
            || options
                .only
                .iter()
                .any(|word| title.contains(word.as_str()))
    };
    let cases: Vec<Case> = cases().into_iter().filter(wanted).collect();
    if options.list {
        for case in &cases {
            println!("{}: {}", case.family, case.name);
        }
        return true;
    }
    // Made once, before several cases would.
    crate::bundle();
    let began = Instant::now();
    let mut findings: Vec<Option<Finding>> = cases.iter().map(|_| None).collect();
    for round in 0.. {
        let scale = Scale {
            quick: options.quick,
            seed: options.seed + 1000 * round,
        };
        for (sum, found) in findings.iter_mut().zip(all(&cases, scale, options.jobs)) {
            match (sum, found) {
                (Some(Finding::Ran(sum)), Finding::Ran(found)) => sum.add(found),
                (sum, found) => *sum = Some(found),
            }
        }
        let until = Duration::from_secs(options.seconds.unwrap_or(0));
        if began.elapsed() >= until {
            break;
        }
    }
    let rows = matrix::rows(&cases, findings.into_iter().flatten());
    println!("\n{}", matrix::table(&rows));
    if options.write {
        match matrix::write(&rows, options.quick) {
            Ok(path) => println!("the matrix is in {}", path.display()),
            Err(e) => println!("the matrix could not be written: {e}"),
        }
    }
    let (line, held) = matrix::summary(&rows);
    println!("{line} ({} s)", began.elapsed().as_secs());
    held
}

/// What was found, in the cases' order.
fn all(cases: &[Case], scale: Scale, jobs: usize) -> Vec<Finding> {
    let waiting = Mutex::new((0..cases.len()).collect::<VecDeque<_>>());
    let found = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(cases.len()) {
            scope.spawn(|| {
                loop {
                    let next = lock(&waiting).pop_front();
                    let Some(n) = next else { return };
                    let finding = one(&cases[n], scale);
                    lock(&found).push((n, finding));
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_by_key(|(n, _)| *n);
    found.into_iter().map(|(_, finding)| finding).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn one(case: &Case, scale: Scale) -> Finding {
    let began = Instant::now();
    // A stage that can't be set up is this case's failure and no other's.
    let finding = catch_unwind(AssertUnwindSafe(|| (case.run)(scale))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        let mut verdict = Verdict::default();
        verdict.violate(format!("the case broke off: {}", text.unwrap_or("?")));
        Finding::Ran(Ran {
            verdict,
            ..Ran::default()
        })
    });
    let said = match &finding {
        Finding::Skipped(why) => format!("SKIPPED: {why}"),
        Finding::Ran(ran) if ran.verdict.violations == 0 => "ok".into(),
        Finding::Ran(ran) => format!(
            "VIOLATED ({})\n{}",
            ran.verdict.violations,
            ran.verdict.told.join("\n")
        ),
    };
    let seconds = began.elapsed().as_secs_f32();
    println!("{}: {} ({seconds:.1} s): {said}", case.family, case.name);
    finding
}
