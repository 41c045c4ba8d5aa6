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
use report::{Finding, Report};
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
            if let Some(pid) = agent {
                report.add(Finding::note(
                    "agent",
                    format!("it runs here, as process {pid}"),
                ));
            }
            report.extend(secrets::check(path, &config));
            report.extend(service::check(path, &config));
            report.extend(certificates::own(&config.broker));
            if offline {
                report.add(Finding::note("broker", "not asked (--offline)"));
            } else {
                broker(&config, agent.is_some(), report);
            }
            if model::check(&config.model, report) {
                report.extend(model::memory(&config.model, agent.is_some()));
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
            let advice = if path.exists() {
                "set that right; the rest is looked at then"
            } else {
                "millwright init writes one"
            };
            report.add(Finding::problem("configuration", format!("{e:#}"), advice));
        }
    }
}

/// The configuration, with the unit's secrets where root keeps them as long as the unit doesn't run.
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
        Finding::note(
            "credentials",
            format!(
                "the unit doesn't run, so {passed} isn't there; its files are taken from {kept}"
            ),
        )
    });
    Ok((config, note))
}

fn broker(config: &Config, is_running: bool, report: &mut Report) {
    let place = format!("{}:{}", config.broker.host, config.broker.port);
    report.busy(&format!("connecting to {place}"));
    report.extend(certificates::brokers(&config.broker));
    let runtime = match super::runtime() {
        Ok(runtime) => runtime,
        Err(e) => {
            return report.add(Finding::problem(
                "broker",
                format!("{e:#}"),
                "free some memory",
            ));
        }
    };
    runtime.block_on(async {
        let (mut visit, greeting) = match Visit::begin(&config.broker, "doctor").await {
            Ok(visit) => visit,
            Err(lost) => {
                let advice = "until then the agent tries again and again, and takes no tasks";
                return report.add(Finding::problem("broker", lost.reason, advice));
            }
        };
        let user = config.broker.access.user().map_or_else(|| "without a user".to_owned(), |user| format!("as {user}"));
        let tls = if config.broker.access.has_tls() { "by TLS" } else { "in the clear" };
        report.add(Finding::ok("broker", format!("{place} takes us {user}, {tls}")));
        report.extend(topics::limits(&greeting, config));
        report.busy("trying the rights on each topic");
        match topics::rights(&mut visit, config, is_running).await {
            Ok(findings) => report.extend(findings),
            Err(lost) => report.add(Finding::problem(
                "topics",
                format!("{} (while the rights on topics were tried)", lost.reason),
                "look into the broker's log; where it says that a client took over another, it makes client ids of user names: switch that off",
            )),
        }
        visit.end().await;
    });
    // A name that is being resolved must not hold the end up.
    runtime.shutdown_background();
}
