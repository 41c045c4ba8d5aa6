//! What was found, and how it is told: line by line as it is found, or as one JSON object at the end.

use anyhow::{Result, bail};
use millwright_task::wire::printable;
use serde::Serialize;
use serde_json::json;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _, stderr, stdout};

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    Ok,
    /// Good to know, or what can't be told from here.
    Note,
    /// It works, but not well or not for long.
    Warning,
    /// The agent does not work so.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    pub(crate) level: Level,
    pub(crate) check: &'static str,
    #[serde(rename = "finding")]
    pub(crate) says: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) advice: Option<String>,
}

impl Finding {
    pub(crate) fn ok(check: &'static str, says: impl Into<String>) -> Self {
        Self {
            level: Level::Ok,
            check,
            says: says.into(),
            advice: None,
        }
    }

    pub(crate) fn note(check: &'static str, says: impl Into<String>) -> Self {
        Self {
            level: Level::Note,
            ..Self::ok(check, says)
        }
    }

    pub(crate) fn warning(
        check: &'static str,
        says: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Warning,
            ..Self::note(check, says).advising(advice)
        }
    }

    pub(crate) fn problem(
        check: &'static str,
        says: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Problem,
            ..Self::note(check, says).advising(advice)
        }
    }

    pub(crate) fn advising(self, advice: impl Into<String>) -> Self {
        Self {
            advice: Some(advice.into()),
            ..self
        }
    }
}

/// Takes findings as they come.
#[derive(Debug, Default)]
pub(crate) struct Report {
    findings: Vec<Finding>,
    json: bool,
    /// Whether a line of progress is on the screen.
    is_busy: bool,
}

impl Report {
    pub(crate) fn new(json: bool) -> Self {
        Self {
            json,
            ..Self::default()
        }
    }

    pub(crate) fn add(&mut self, finding: Finding) {
        self.clear();
        if !self.json {
            let colour = stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            print(&line(&finding, colour));
        }
        self.findings.push(finding);
    }

    pub(crate) fn extend(&mut self, findings: impl IntoIterator<Item = Finding>) {
        findings.into_iter().for_each(|finding| self.add(finding));
    }

    /// Says what takes long: on a terminal in a line that the next one replaces.
    pub(crate) fn busy(&mut self, with: &str) {
        if stderr().is_terminal() {
            eprint!("\r\x1b[K… {}", printable(with));
            let _ = stderr().flush();
            self.is_busy = true;
        }
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.is_busy) {
            eprint!("\r\x1b[K");
        }
    }

    fn count(&self, level: Level) -> usize {
        self.findings.iter().filter(|f| f.level == level).count()
    }

    /// The last word; an error where there is a problem.
    pub(crate) fn end(mut self) -> Result<()> {
        self.clear();
        let (problems, warnings) = (self.count(Level::Problem), self.count(Level::Warning));
        if self.json {
            let all = json!({
                "ok": problems == 0, "problems": problems, "warnings": warnings, "findings": self.findings,
            });
            print(&all.to_string());
        } else if problems == 0 {
            let warnings = match warnings {
                0 => "nothing to warn of".to_owned(),
                n => counted(n, "warning"),
            };
            print(&format!("no problem, {warnings}"));
        }
        if problems > 0 {
            let (is, them) = if problems == 1 {
                ("is", "it")
            } else {
                ("are", "them")
            };
            bail!(
                "there {is} {}: the agent does not work well before somebody sees to {them}",
                counted(problems, "problem")
            );
        }
        Ok(())
    }
}

/// Who reads it may have seen enough and left; the exit code still counts.
fn print(text: &str) {
    let _ = writeln!(stdout(), "{text}");
}

fn counted(n: usize, what: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{n} {what}{plural}")
}

/// Where what was found begins, and how wide it is.
const INDENT: usize = 23;
const WIDTH: usize = 96;

/// Broken at spaces, with the lines below indented as the first is.
fn wrapped(text: &str, more: &str) -> String {
    let mut all = String::new();
    let mut width = 0;
    for word in text.split(' ') {
        let letters = word.chars().count();
        if width > 0 && width + 1 + letters > WIDTH - more.len() {
            let _ = write!(all, "\n{:INDENT$}{more}", "");
            width = 0;
        } else if width > 0 {
            all.push(' ');
            width += 1;
        }
        all += word;
        width += letters;
    }
    all
}

/// `warning  disk  what is wrong`, and below it what to do.
fn line(finding: &Finding, colour: bool) -> String {
    let (word, code) = match finding.level {
        Level::Ok => ("ok", "32"),
        Level::Note => ("note", "36"),
        Level::Warning => ("warning", "33"),
        Level::Problem => ("PROBLEM", "1;31"),
    };
    let word = if colour {
        format!("\x1b[{code}m{word:<8}\x1b[0m")
    } else {
        format!("{word:<8}")
    };
    let mut text = format!("{word} {:<13} ", finding.check);
    text += &wrapped(&printable(&finding.says), "");
    if let Some(advice) = &finding.advice {
        let _ = write!(
            text,
            "\n{:INDENT$}→ {}",
            "",
            wrapped(&printable(advice), "  ")
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_a_line_and_its_advice_another() {
        let finding = Finding::warning("disk", "a\u{1b}[2Jslow one", "use another");
        assert_eq!(
            line(&finding, false),
            "warning  disk          a\\u{1b}[2Jslow one\n                       → use another"
        );
        let long = line(&Finding::ok("disk", "word ".repeat(30).trim()), false);
        let lines: Vec<&str> = long.lines().collect();
        assert!(
            lines.len() == 2 && lines[1].starts_with(&" ".repeat(INDENT)),
            "{long}"
        );
        assert!(
            lines.iter().all(|line| line.len() <= INDENT + WIDTH),
            "{long}"
        );
        let coloured = line(&Finding::ok("disk", "fast"), true);
        assert_eq!(coloured, "\u{1b}[32mok      \u{1b}[0m disk          fast");
    }

    #[test]
    fn only_a_problem_is_a_failure() {
        let mut report = Report::new(true);
        report.add(Finding::warning("a", "b", "c"));
        report.add(Finding::note("a", "b"));
        assert!(report.end().is_ok());
        let mut report = Report::new(true);
        report.add(Finding::problem("a", "b", "c"));
        let error = report.end().unwrap_err().to_string();
        assert!(error.starts_with("there is 1 problem:"), "{error}");
    }
}
