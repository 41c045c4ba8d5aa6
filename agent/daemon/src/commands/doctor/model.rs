//! The model: that it is whole, byte by byte, and that it has room.

use super::report::{Finding, Report};
use crate::commands::agent::fit_of;
use crate::config;
use millwright_engine::bundle::{Bundle, MANIFEST};
use millwright_engine::inspect;

const CHECK: &str = "model";

/// Reads all of it and compares it with its manifest, then imports it as the agent would. Whether it can be used.
pub(super) fn check(model: &config::Model, report: &mut Report) -> bool {
    let place = model.bundle.display();
    let bundle = match Bundle::open_file(&model.bundle, model.file.as_deref()) {
        Ok(bundle) => bundle,
        Err(e) => {
            report.add(Finding::problem(
                CHECK,
                e.to_string(),
                "check model.bundle, or bring the model to the box again",
            ));
            return false;
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
            return false;
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
        Ok(_) => true,
        Err(e) => {
            report.add(Finding::problem(
                CHECK,
                e.to_string(),
                "take another export of the model",
            ));
            false
        }
    }
}

/// Whether the model has room. `is_running`: the agent, and its model, are part of what is taken.
pub(super) fn memory(model: &config::Model, is_running: bool) -> Option<Finding> {
    const CHECK: &str = "memory";
    // What is wrong with the model was said.
    let fit = fit_of(model).ok()?;
    let says = format!("the model takes {}", fit.needs);
    if is_running {
        return Some(Finding::ok(CHECK, format!("the agent runs; {says}")));
    }
    Some(match (fit.judge(), fit.room) {
        (Err(misfit), _) => Finding::problem(
            CHECK,
            misfit.to_string(),
            "until then the agent stays up without a model and refuses tasks",
        ),
        (Ok(()), None) => Finding::note(
            CHECK,
            format!("{says}; this machine doesn't say what is free"),
        ),
        (Ok(()), Some(room)) => {
            let needed = fit.needs.bytes();
            let says = format!("{says}; {} MB are free", room.bytes / 1_000_000);
            if needed + needed / 4 > room.bytes {
                Finding::warning(
                    CHECK,
                    format!("{says}: little is left for anything else"),
                    "a smaller or 4-bit model, kv_cache = \"int8\", or fewer kv_tokens",
                )
            } else {
                Finding::ok(CHECK, says)
            }
        }
    })
}
