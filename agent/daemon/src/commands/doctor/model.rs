//! The model: that it is whole, byte by byte, and that it has room.

use super::machine::Agent;
use super::report::{Finding, Report};
use crate::commands::agent::fit_of;
use crate::config;
use millwright_engine::bundle::{Bundle, MANIFEST};
use millwright_engine::inspect;
use serde_json::Value;

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
        let note = if bundle.dir().join(MANIFEST).exists() {
            let says = format!("{place} is a bundle, but model.file passes its checksums over");
            Finding::note(CHECK, says).advising("leave model.file out")
        } else {
            let says = format!("{place} is an exporter's folder, which has no checksums");
            Finding::note(CHECK, says).advising("make a bundle of it: millwright model import")
        };
        report.add(note);
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

/// Whether the model has room; where the agent runs, and its model is part of what is taken, whether it has one by the state
/// that it says.
pub(super) fn memory(model: &config::Model, agent: Agent, state: Option<&Value>) -> Finding {
    const CHECK: &str = "memory";
    let fit = match fit_of(model) {
        Ok(fit) => fit,
        Err(e) => {
            let advice = "set it right in [model]; until then the agent does not start";
            return Finding::problem(CHECK, e.to_string(), advice);
        }
    };
    let says = format!("the model takes {}", fit.needs);
    if let Agent::Runs(_) = agent {
        return running(CHECK, &says, state);
    }
    match (fit.judge(), fit.room) {
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
    }
}

/// A running agent may have no model: then its state is degraded.
fn running(check: &'static str, says: &str, state: Option<&Value>) -> Finding {
    let text = |key: &str| state.and_then(|state| state[key].as_str());
    match text("state") {
        Some("degraded") => Finding::problem(
            check,
            format!(
                "the agent runs and says it is degraded: {}",
                text("reason").unwrap_or("no reason given")
            ),
            "see to that; it takes tasks again by itself",
        ),
        Some(state @ ("online" | "draining")) => {
            Finding::ok(check, format!("the agent runs and is {state}; {says}"))
        }
        _ => Finding::note(
            check,
            format!("the agent runs, but whether it has loaded the model can't be told; {says}"),
        )
        .advising("look at its state at the broker, or at its log"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Level;
    use super::*;
    use serde_json::json;

    #[test]
    fn a_running_agent_is_judged_by_its_state() {
        let of = |state: Value| running("memory", "", Some(&state));
        let degraded = of(json!({"state": "degraded", "reason": "no room"}));
        assert_eq!(degraded.level, Level::Problem);
        assert!(degraded.says.contains("no room"), "{degraded:?}");
        assert_eq!(of(json!({"state": "online"})).level, Level::Ok);
        for odd in [json!({"state": "offline"}), json!({"state": 1}), json!([])] {
            assert_eq!(of(odd).level, Level::Note);
        }
        assert_eq!(running("memory", "", None).level, Level::Note);
    }
}
