//! The fault matrix: each fault, how often it happened, what came out. As a table for people and as the README's.

use super::{Case, Finding, Ran};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const BEGIN: &str = "<!-- matrix: written by tests/faults/run --write -->";
const END: &str = "<!-- end of matrix -->";
const HEADINGS: [&str; 9] = [
    "fault",
    "times",
    "tasks",
    "outcomes",
    "repeated, the same",
    "resent",
    "refused for now",
    "peak MiB",
    "result",
];

pub(super) struct Row {
    cells: [String; 9],
    violated: bool,
    skipped: bool,
}

pub(super) fn rows(cases: &[Case], findings: impl Iterator<Item = Finding>) -> Vec<Row> {
    let rows = cases.iter().zip(findings);
    rows.map(|(case, finding)| row(case, finding)).collect()
}

fn row(case: &Case, finding: Finding) -> Row {
    let name = format!("{}: {}", case.family, case.name);
    match finding {
        Finding::Skipped(why) => {
            let mut cells = <[String; 9]>::default();
            cells[0] = name;
            cells[8] = format!("skipped: {}", why.replace('\n', " "));
            Row {
                cells,
                violated: false,
                skipped: true,
            }
        }
        Finding::Ran(ran) => Row {
            cells: cells(name, &ran),
            violated: ran.verdict.violations > 0,
            skipped: false,
        },
    }
}

fn cells(name: String, ran: &Ran) -> [String; 9] {
    let verdict = &ran.verdict;
    let refused = verdict.refused.iter();
    let refused: Vec<String> = refused.map(|(code, n)| format!("{n} {code}")).collect();
    let mut result = match verdict.violations {
        0 => "one outcome each".to_owned(),
        n => format!("**{n} violations**"),
    };
    if !ran.note.is_empty() {
        result = format!("{result}; {}", ran.note);
    }
    [
        name,
        ran.times.to_string(),
        verdict.tasks.to_string(),
        verdict.outcomes.to_string(),
        verdict.repeated.to_string(),
        verdict.resent.to_string(),
        refused.join(", "),
        format!("{:.1}", ran.peak as f64 / 1024.0),
        result,
    ]
}

/// In columns.
pub(super) fn table(rows: &[Row]) -> String {
    let head = HEADINGS.map(str::to_owned);
    let all: Vec<&[String; 9]> = [&head]
        .into_iter()
        .chain(rows.iter().map(|r| &r.cells))
        .collect();
    let width = |n: usize| {
        let lengths = all.iter().map(|cells| cells[n].chars().count());
        lengths.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..HEADINGS.len()).map(width).collect();
    let mut text = String::new();
    for cells in all {
        for (n, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            // Numbers to the right.
            let _ = if (1..=5).contains(&n) || n == 7 {
                write!(text, "{cell:>width$}  ")
            } else {
                write!(text, "{cell:<width$}  ")
            };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

fn markdown(rows: &[Row]) -> String {
    let line = |cells: &[String; 9]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&HEADINGS.map(str::to_owned));
    text.push_str("|---|--:|--:|--:|--:|--:|---|--:|---|\n");
    for row in rows {
        text.push_str(&line(&row.cells));
    }
    text
}

/// Puts the matrix between the README's markers.
pub(super) fn write(rows: &[Row], quick: bool) -> io::Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("faults/README.md");
    let text = fs::read_to_string(&path)?;
    let parts = text
        .split_once(BEGIN)
        .and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let Some((before, after)) = parts else {
        return Err(io::Error::other("the README has lost its markers"));
    };
    let which = if quick { "quick" } else { "full" };
    let matrix = markdown(rows);
    let new = format!("{before}{BEGIN}\n\nThe {which} suite:\n\n{matrix}\n{END}{after}");
    fs::write(&path, new)?;
    Ok(path)
}

/// One line, and whether nothing was violated.
pub(super) fn summary(rows: &[Row]) -> (String, bool) {
    let names = |of: fn(&Row) -> bool| {
        let names = rows.iter().filter(|row| of(row));
        names.map(|row| row.cells[0].as_str()).collect::<Vec<_>>()
    };
    let (violated, skipped) = (names(|row| row.violated), names(|row| row.skipped));
    let passed = rows.len() - violated.len() - skipped.len();
    let mut line = format!("faults: {passed} of {} held", rows.len());
    if !violated.is_empty() {
        let _ = write!(line, "; VIOLATED: {}", violated.join(", "));
    }
    if !skipped.is_empty() {
        let _ = write!(line, "; skipped: {}", skipped.join(", "));
    }
    (line, violated.is_empty() && !rows.is_empty())
}
