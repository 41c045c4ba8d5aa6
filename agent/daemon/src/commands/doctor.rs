//! `millwright doctor`: looks at everything that a gateway needs, and says what to do about what it finds. Changes nothing,
//! and runs beside the agent: the journal is not opened, and at the broker it is another client.

mod certificates;
mod disk;
mod machine;
mod model;
mod report;
mod secrets;
mod service;
mod topics;

use super::credentials;
use crate::broker::Visit;
use crate::config::Config;
use anyhow::{Context, Result};
use machine::Agent;
use report::{Finding, Report};
use serde_json::Value;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Where the configuration is unless somebody says otherwise.
pub(super) const CONFIG: &str = "/etc/millwright/agent.toml";
/// A configuration larger than this is none.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The configuration
    #[arg(long, value_name = "FILE", default_value = CONFIG)]
    config: PathBuf,
    /// Leave the broker alone
    #[arg(long)]
    offline: bool,
    /// Print one JSON object: ok, problems, warnings, and findings with level, check, finding and advice
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let mut report = Report::new(args.json);
    examine(&args.config, args.offline, &mut report);
    report.end()
}

/// The same with the configuration that was just written.
pub(super) fn after(config: &Path, offline: bool) -> Result<()> {
    let mut report = Report::new(false);
    examine(config, offline, &mut report);
    report.end()
}

fn examine(path: &Path, offline: bool, report: &mut Report) {
    match read(path) {
        Ok((config, note)) => {
            report.add(Finding::ok(
                "configuration",
                format!("{} can be used", path.display()),
            ));
            report.extend(note);
            let agent = machine::agent(&config.model.state_dir);
            report.extend(running(agent, &config.model.state_dir));
            report.extend(stale());
            report.extend(secrets::check(path, &config));
            report.extend(service::check(path, &config));
            report.extend(certificates::own(&config.broker));
            let state = if offline {
                report.add(Finding::note("broker", "not asked (--offline)"));
                None
            } else {
                broker(&config, agent, report)
            };
            if model::check(&config.model, report) {
                report.add(model::memory(&config.model, agent, state.as_ref()));
            }
            report.extend(machine::sensors(
                &config.model.state_dir,
                config.temperature_limit,
            ));
            report.add(machine::clock(config.clock));
            report.busy("trying the disk");
            report.extend(disk::check(&config.model.state_dir));
        }
        Err(e) => {
            let kind = e
                .chain()
                .find_map(|cause| Some(cause.downcast_ref::<std::io::Error>()?.kind()));
            let advice = match (kind, path.try_exists()) {
                (Some(ErrorKind::PermissionDenied), _) => "run this as root",
                (_, Ok(false)) => "millwright init writes one",
                _ => "set that right; the rest is looked at then",
            };
            report.add(Finding::problem("configuration", format!("{e:#}"), advice));
        }
    }
}

/// The configuration, with the unit's secrets where root keeps them as long as the unit doesn't have them.
fn read(path: &Path) -> Result<(Config, Option<Finding>)> {
    let place = path.display();
    let unread = || format!("the configuration {place} can't be read");
    let data = path.metadata().with_context(unread)?;
    anyhow::ensure!(
        data.len() <= CONFIG_BYTES_MAX,
        "{place} is larger than {CONFIG_BYTES_MAX} bytes: that is no configuration"
    );
    let text = std::fs::read_to_string(path).with_context(unread)?;
    let (text, is_replaced) = credentials::readable(&text);
    let config =
        Config::parse(&text).with_context(|| format!("the configuration {place} can't be used"))?;
    let note = is_replaced.then(|| {
        let (passed, kept) = (credentials::PASSED, credentials::KEPT);
        let says =
            format!("{kept} is looked at for {passed}, as the unit is given it when it starts");
        Finding::note("credentials", says)
    });
    Ok((config, note))
}

fn running(agent: Agent, state_dir: &Path) -> Option<Finding> {
    match agent {
        Agent::Runs(pid) => Some(Finding::note(
            "agent",
            format!("it runs here, as process {pid}"),
        )),
        Agent::Absent => None,
        Agent::Unknown => Some(
            Finding::note(
                "agent",
                format!(
                    "whether it runs here can't be told from {}",
                    state_dir.display()
                ),
            )
            .advising("run this as root, if you don't"),
        ),
    }
}

/// What root changed since the unit was started.
fn stale() -> impl Iterator<Item = Finding> {
    let changed = credentials::changed().into_iter();
    changed.map(|name| {
        let (passed, kept) = (credentials::PASSED, credentials::KEPT);
        Finding::warning(
            "credentials",
            format!("{kept}/{name} is another than the running unit was given ({passed}/{name})"),
            "systemctl restart millwright",
        )
    })
}

/// The state that is retained there, if it can be read.
fn broker(config: &Config, agent: Agent, report: &mut Report) -> Option<Value> {
    let place = format!("{}:{}", config.broker.host, config.broker.port);
    report.busy(&format!("connecting to {place}"));
    report.extend(certificates::brokers(&config.broker));
    let state = super::block_on(async {
        let (mut visit, greeting) = match Visit::begin(&config.broker, "doctor").await {
            Ok(visit) => visit,
            Err(lost) => {
                let advice = "until then the agent tries again and again, and takes no tasks";
                report.add(Finding::problem("broker", lost.reason, advice));
                return None;
            }
        };
        let user = config
            .broker
            .access
            .user()
            .map_or_else(|| "without a user".to_owned(), |user| format!("as {user}"));
        let tls = if config.broker.access.has_tls() {
            "by TLS"
        } else {
            "in the clear"
        };
        report.add(Finding::ok(
            "broker",
            format!("{place} takes us {user}, {tls}"),
        ));
        report.extend(topics::limits(&greeting, config));
        report.busy("trying the rights on each topic");
        let is_absent = agent == Agent::Absent;
        let (findings, state) = topics::rights(&mut visit, config, is_absent).await;
        report.extend(findings);
        visit.end().await;
        state
    });
    state.unwrap_or_else(|e| {
        let finding = format!("{e:#}");
        report.add(Finding::problem("broker", finding, "free some memory"));
        None
    })
}
