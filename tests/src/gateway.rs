//! A gateway that is being set up: `init` for it, and what `doctor` finds.

use crate::{Broker, bundle, program};
use serde_json::Value;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// A gateway's folder before anything is set up: a password file, and nothing else.
pub struct Gateway {
    pub folder: TempDir,
}

impl Default for Gateway {
    fn default() -> Self {
        let new = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let password = new.file("password");
        fs::write(&password, "gw-secret\n").unwrap();
        fs::set_permissions(&password, Permissions::from_mode(0o600)).unwrap();
        new
    }
}

impl Gateway {
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.file(name).display().to_string()
    }

    /// What a script says of this gateway at a broker with passwords.
    pub fn flags(&self, broker: &Broker) -> Vec<String> {
        let mut flags = self.least();
        flags.extend(flags_of(&[
            ("--port", &broker.port.to_string()),
            ("--user", "gw"),
            ("--password-file", &self.text("password")),
        ]));
        flags
    }

    pub fn least(&self) -> Vec<String> {
        flags_of(&[
            ("--config", &self.text("agent.toml")),
            ("--site", "plant"),
            ("--name", "gw-1"),
            ("--host", "127.0.0.1"),
            ("--model", &bundle().display().to_string()),
            ("--state-dir", &self.text("state")),
        ])
    }

    pub fn written(&self) -> String {
        fs::read_to_string(self.file("agent.toml")).unwrap()
    }

    pub fn doctor(&self) -> Doctor {
        Doctor::with(&self.file("agent.toml"))
    }
}

pub fn flags_of(pairs: &[(&str, &str)]) -> Vec<String> {
    let pairs = pairs.iter().flat_map(|(flag, value)| [*flag, *value]);
    pairs.map(str::to_owned).collect()
}

pub fn init(flags: &[String]) -> Output {
    let all = [&["init".to_owned(), "--yes".to_owned()], flags].concat();
    millwright(&all)
}

pub fn millwright(arguments: &[String]) -> Output {
    let output = Command::new(program("millwright"))
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    output.unwrap()
}

pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What `doctor` found.
pub struct Doctor {
    pub report: Value,
    pub code: Option<i32>,
}

impl Doctor {
    pub fn with(config: &Path) -> Self {
        let arguments = ["doctor", "--json", "--config", config.to_str().unwrap()];
        let output = millwright(&arguments.map(str::to_owned));
        let report = serde_json::from_slice(&output.stdout);
        Self {
            report: report.unwrap_or_else(|e| panic!("{e}: {}", said(&output))),
            code: output.status.code(),
        }
    }

    #[track_caller]
    pub fn has(&self, level: &str, check: &str, words: &str) -> &Self {
        let is_it = |f: &Value| {
            f["level"] == level
                && f["check"] == check
                && f["finding"].as_str().unwrap().contains(words)
        };
        let findings = self.report["findings"].as_array().unwrap();
        assert!(
            findings.iter().any(is_it),
            "no {level} of {check}: {words} in {:#}",
            self.report
        );
        self
    }

    #[track_caller]
    pub fn fails_by(&self, check: &str, words: &str) {
        self.has("problem", check, words);
        assert_eq!(self.code, Some(1));
        assert_eq!(self.report["ok"], false);
    }

    /// No problem but what the machine under the tests has.
    #[track_caller]
    pub fn is_content(&self) -> &Self {
        let findings = self.report["findings"].as_array().unwrap();
        let problem = findings
            .iter()
            .find(|f| f["level"] == "problem" && f["check"] != "flash");
        assert!(problem.is_none(), "{problem:#?}");
        self
    }
}
