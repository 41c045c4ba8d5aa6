//! The model: that it is whole, byte by byte, and that it has room.

use super::report::{Finding, Report};
use crate::config;
use millwright_engine::bundle::{Bundle, MANIFEST};
use millwright_engine::{Inspection, KvPrecision, Options, inspect};
use std::fs;

const CHECK: &str = "model";

/// Reads all of it and compares it with its manifest, then imports it as the agent would. What it needs goes to the memory's
/// check.
pub(super) fn check(model: &config::Model, report: &mut Report) -> Option<Inspection> {
    let place = model.bundle.display();
    let bundle = match Bundle::open_file(&model.bundle, model.file.as_deref()) {
        Ok(bundle) => bundle,
        Err(e) => {
            report.add(Finding::problem(
                CHECK,
                e.to_string(),
                "check model.bundle, or bring the model to the box again",
            ));
            return None;
        }
    };
    let all: u64 = bundle.manifest.files.iter().map(|file| file.bytes).sum();
    if bundle.dir().join(MANIFEST).exists() && model.file.is_none() {
        let mut last = u64::MAX;
        let verified = bundle.verify_with(|bytes| {
            let percent = bytes * 100 / all.max(1);
            if percent != last {
                report.busy(&format!("checksums of the model: {percent} %"));
                last = percent;
            }
        });
        if let Err(e) = verified {
            report.add(Finding::problem(
                CHECK,
                e.to_string(),
                "bring the model to the box again; don't run what was altered",
            ));
            return None;
        }
        let files = bundle.manifest.files.len();
        report.add(Finding::ok(
            CHECK,
            format!(
                "{} {}: {files} files, {:.0} MB, all as their checksums say",
                bundle.manifest.name,
                bundle.manifest.version,
                all as f64 / 1e6
            ),
        ));
    } else {
        report.add(
            Finding::note(
                CHECK,
                format!("{place} is an exporter's folder, which has no checksums"),
            )
            .advising("make a bundle of it: millwright model import"),
        );
    }
    report.busy("importing the model");
    match inspect(&model.bundle, model.file.as_deref()) {
        Ok(found) => Some(found),
        Err(e) => {
            report.add(Finding::problem(
                CHECK,
                e.to_string(),
                "take another export of the model",
            ));
            None
        }
    }
}

/// Bytes that a model takes beside what the machine has anyway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Need {
    packed: u64,
    cache: u64,
    rest: u64,
}

/// Whether the model has room. `is_running`: the agent, and its model, are part of what is taken.
pub(super) fn memory(found: &Inspection, model: &config::Model, is_running: bool) -> Finding {
    let need = need(found, model);
    if is_running {
        let mega = (need.packed + need.cache + need.rest) / 1_000_000;
        return Finding::ok(
            "memory",
            format!("the agent runs; its model is reckoned at {mega} MB"),
        );
    }
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    fits(
        need,
        room(&read("/proc/meminfo"), &read("/sys/fs/cgroup/memory.max")),
    )
}

fn need(found: &Inspection, model: &config::Model) -> Need {
    /// The program, its threads and what tasks take: 28 MiB were measured idle.
    const AGENT: u64 = 32 << 20;
    let tokens = model.kv_tokens.unwrap_or(Options::default().kv_tokens);
    let f16 = (found.kv_bytes_per_token.unwrap_or(0) * tokens) as u64;
    let cache = match model.kv_cache.unwrap_or_default() {
        KvPrecision::F16 => f16,
        // A byte a number, and a scale for 32.
        KvPrecision::I8 => f16 / 2 + f16 / 32,
    };
    Need {
        packed: found.packed_bytes as u64,
        cache,
        rest: found.tokenizer_bytes as u64 + AGENT,
    }
}

/// What may still be taken: the machine's, or the control group's where that is less.
fn room(meminfo: &str, limit: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    let free = kib * 1024;
    Some(
        limit
            .trim()
            .parse()
            .map_or(free, |limit: u64| limit.min(free)),
    )
}

fn fits(need: Need, room: Option<u64>) -> Finding {
    const CHECK: &str = "memory";
    let mega = |bytes: u64| bytes / 1_000_000;
    let all = need.packed + need.cache + need.rest;
    let says = format!(
        "the model takes about {} MB ({} packed, {} for its cache, {} for the rest)",
        mega(all),
        mega(need.packed),
        mega(need.cache),
        mega(need.rest)
    );
    let Some(room) = room else {
        return Finding::note(
            CHECK,
            format!("{says}; this machine doesn't say what is free"),
        );
    };
    let says = format!("{says} of {} that are free", mega(room));
    let advice =
        "a smaller or 4-bit model, kv_cache = \"int8\", fewer kv_tokens, or a box with more memory";
    if all > room {
        return Finding::problem(CHECK, says, advice);
    }
    if all + all / 4 > room {
        return Finding::warning(
            CHECK,
            format!("{says}: little is left for anything else"),
            advice,
        );
    }
    Finding::ok(CHECK, says)
}

#[cfg(test)]
mod tests {
    use super::super::report::Level;
    use super::*;

    #[test]
    fn what_fits_is_reckoned_with_the_least_that_is_free() {
        let meminfo = "MemTotal: 4000 kB\nMemAvailable:    1000000 kB\n";
        assert_eq!(room(meminfo, "max\n"), Some(1_024_000_000));
        assert_eq!(room(meminfo, "500000000\n"), Some(500_000_000));
        assert_eq!(room(meminfo, ""), Some(1_024_000_000));
        assert_eq!(
            (room("", "1"), room("MemAvailable: x kB", "")),
            (None, None)
        );
        let need = Need {
            packed: 100_000_000,
            cache: 50_000_000,
            rest: 50_000_000,
        };
        let level = |room| fits(need, room).level;
        assert_eq!(level(Some(300_000_000)), Level::Ok);
        assert_eq!(level(Some(220_000_000)), Level::Warning);
        assert_eq!(level(Some(199_000_000)), Level::Problem);
        assert_eq!(level(None), Level::Note);
    }
}
