//! The rules of the house (agent/ARCHITECTURE.md) that a compiler doesn't hold.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A crate's own dependencies, without those of its tests.
fn dependencies(folder: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
    let section = text.split("[dependencies]").nth(1).unwrap_or_default();
    let section = section.split("\n[").next().unwrap_or_default();
    let names = section
        .lines()
        .filter_map(|line| line.split(['.', '=', ' ']).next());
    names
        .filter(|name| !name.is_empty() && !name.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

/// Every Rust source below a folder, with its text.
fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            all.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            all.push((path, text));
        }
    }
    all
}

#[track_caller]
fn never(folder: &str, words: &[&str]) {
    let all = sources(&root().join(folder));
    assert!(!all.is_empty(), "{folder} has no source");
    for (path, text) in all {
        for word in words {
            assert!(!text.contains(word), "{} has {word}", path.display());
        }
    }
}

#[test]
fn crates_see_only_what_they_may() {
    assert_eq!(dependencies("agent/kernels"), Vec::<String>::new());
    let forbidden = [
        ("agent/task", &["tokio", "rumqttc", "millwright"][..]),
        ("agent/engine", &["tokio", "rumqttc", "millwright-task"]),
        (
            "agent/daemon",
            &["rumqttd", "tract", "millwright-kernels", "millwright-forge"],
        ),
        ("deploy/demo", &["millwright"]),
    ];
    for (folder, words) in forbidden {
        for name in dependencies(folder) {
            assert!(
                !words.iter().any(|word| name.starts_with(word)),
                "{folder} sees {name}"
            );
        }
    }
}

/// Users copy it: nothing in it may need the rest of this workspace.
#[test]
fn the_example_client_needs_little() {
    let needs = ["anyhow", "clap", "millwright-task", "rumqttc"];
    assert_eq!(dependencies("deploy/client"), needs);
}

#[test]
fn policy_has_no_clock_and_no_socket() {
    never(
        "agent/task/src",
        &[
            "Instant::now",
            "SystemTime",
            "std::net",
            "std::fs",
            "std::thread",
        ],
    );
}

#[test]
fn every_channel_has_a_bound() {
    never(
        "agent/daemon/src",
        &["unbounded_channel", "mpsc::channel()"],
    );
}

#[test]
fn unsafe_lives_in_the_kernels_and_the_map_alone() {
    for folder in [
        "agent/task/src",
        "agent/daemon/src",
        "models/forge/src",
        "deploy/client/src",
        "deploy/demo/src",
    ] {
        never(folder, &["unsafe {", "unsafe fn"]);
    }
    for (path, text) in sources(&root().join("agent/engine/src")) {
        let allowed = path.ends_with("map.rs");
        assert!(allowed || !text.contains("unsafe {"), "{}", path.display());
    }
}

/// The keys of a configuration, also those that are commented out.
fn keys(path: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(root().join(path)).unwrap();
    let key = |line: &str| {
        let (key, _) = line.trim_start_matches("# ").split_once(" = ")?;
        let is_key = key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        is_key.then(|| key.to_owned())
    };
    text.lines().filter_map(key).collect()
}

#[test]
fn the_fuzzer_begins_with_every_key_of_the_configuration() {
    let documented = keys("deploy/agent.toml");
    assert!(documented.len() > 30, "{documented:?}");
    assert_eq!(keys("tests/fuzz/corpora/config/full"), documented);
}
