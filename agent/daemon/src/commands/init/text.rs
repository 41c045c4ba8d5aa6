//! What people type: bounded, of one line, and without characters that deceive. And the sample configuration with their
//! answers in it.

use anyhow::{Context, Result, bail, ensure};
use millwright_task::wire::printable;
use std::path::Path;

/// The one commented configuration, which documents every key.
pub(super) const SAMPLE: &str = include_str!("../../../../../deploy/agent.toml");
/// An answer longer than this is a mistake.
pub(super) const ANSWER_BYTES_MAX: usize = 1024;

/// Refuses what is empty, too long or holds control characters.
pub(in crate::commands) fn plain(text: &str) -> Result<()> {
    ensure!(!text.trim().is_empty(), "it is empty");
    ensure!(
        text.len() <= ANSWER_BYTES_MAX,
        "it is longer than {ANSWER_BYTES_MAX} bytes"
    );
    ensure!(
        printable(text) == text && !text.contains(['\n', '\t']),
        "it holds control characters, or characters that can't be seen"
    );
    Ok(())
}

/// A value that is written into the configuration.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) section: &'static str,
    pub(super) key: &'static str,
    pub(super) value: toml::Value,
}

pub(super) fn entry(
    section: &'static str,
    key: &'static str,
    value: impl Into<toml::Value>,
) -> Entry {
    Entry {
        section,
        key,
        value: value.into(),
    }
}

pub(super) fn path_entry(section: &'static str, key: &'static str, path: &Path) -> Result<Entry> {
    let text = path.to_str().with_context(|| {
        format!(
            "{} is not UTF-8, which the configuration is",
            path.display()
        )
    })?;
    Ok(entry(section, key, text))
}

/// The sample with these values in their places; what was commented out there no longer is.
pub(super) fn filled(entries: &[Entry]) -> Result<String> {
    let mut lines: Vec<String> = SAMPLE.lines().map(str::to_owned).collect();
    for entry in entries {
        set(&mut lines, entry)?;
    }
    let text = lines.join("\n") + "\n";
    let table: toml::Table = toml::from_str(&text).context("the sample can't be filled in")?;
    for entry in entries {
        let (section, key) = (entry.section, entry.key);
        let mut found = Some(&table);
        for name in section.split('.') {
            found = found.and_then(|table| table.get(name)?.as_table());
        }
        let value = found.and_then(|table| table.get(key));
        ensure!(
            value == Some(&entry.value),
            "the sample has no place for {section}.{key}"
        );
    }
    Ok(text)
}

fn set(lines: &mut [String], entry: &Entry) -> Result<()> {
    let bare = |line: &str| line.strip_prefix("# ").unwrap_or(line).to_owned();
    let header = format!("[{}]", entry.section);
    let Some(begin) = lines.iter().position(|line| bare(line) == header) else {
        bail!("the sample has no section {header}");
    };
    let is_header = |line: &String| {
        let line = bare(line);
        line.starts_with('[') && line.ends_with(']')
    };
    let end = lines[begin + 1..]
        .iter()
        .position(is_header)
        .map_or(lines.len(), |n| begin + 1 + n);
    let start = format!("{} = ", entry.key);
    let Some(at) = (begin + 1..end).find(|&n| bare(&lines[n]).starts_with(&start)) else {
        bail!("the sample has no {} in {header}", entry.key);
    };
    lines[at] = format!("{start}{}", entry.value);
    lines[begin] = header;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_has_bounds() {
        assert!(plain("gw-07").is_ok() && plain("Werk Köln").is_ok());
        for bad in [
            "",
            "  ",
            "a\nb",
            "a\tb",
            "a\u{1b}[2J",
            "a\u{202e}b",
            "a\u{0}",
            &"x".repeat(1025),
        ] {
            assert!(plain(bad).is_err(), "{bad:?}");
        }
        assert!(plain(&"x".repeat(1024)).is_ok());
    }

    #[test]
    fn the_sample_takes_answers_in_their_places_and_keeps_its_comments() {
        let quoted = "a \"quoted\" \\ 'name'";
        let text = filled(&[
            entry("gateway", "site", quoted),
            entry("pool", "name", "pumps"),
            entry("broker", "port", 8884),
            entry("broker.tls", "ca", "/etc/millwright/tls/ca.pem"),
            entry("agent", "temperature_limit_c", 80),
        ])
        .unwrap();
        let table: toml::Table = toml::from_str(&text).unwrap();
        assert_eq!(table["gateway"]["site"].as_str(), Some(quoted));
        assert_eq!(table["gateway"]["name"].as_str(), Some("gw-07"));
        assert_eq!(table["pool"]["name"].as_str(), Some("pumps"));
        assert_eq!(table["broker"]["tls"].as_table().unwrap().len(), 1);
        assert_eq!(text.lines().count(), SAMPLE.lines().count());
        assert!(text.contains("# Seconds between pings"));
        assert!(filled(&[entry("broker", "nonsense", 1)]).is_err());
        assert!(filled(&[entry("nonsense", "host", 1)]).is_err());
    }
}
