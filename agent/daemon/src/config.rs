//! The configuration file, parsed into a type that can't be wrong. `deploy/agent.toml` is the reference:
//! every key with its meaning and its default.

mod pool;
mod tasks;

pub use tasks::Tasks;
use tasks::{RawSender, RawTasks};

use crate::broker::{Access, Files, Settings, tls};
use crate::clock::Trust;
use anyhow::{Context, Result, bail, ensure};
use millwright_engine::KvPrecision;
use millwright_task::limits;
use millwright_task::topic::{Base, ReplyRules};
pub use pool::Pool;
use serde::Deserialize;
use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Everything the agent is told.
#[derive(Debug, Clone)]
pub struct Config {
    pub gateway: Gateway,
    pub base: Base,
    pub reply_rules: ReplyRules,
    pub pool: Option<Pool>,
    pub broker: Settings,
    pub model: Model,
    pub tasks: Tasks,
    pub drain_grace: Duration,
    pub health_interval: Duration,
    pub clock: Trust,
    /// Whether the agent steps back when the machine is hard pressed.
    pub governor: bool,
    /// °C at which the board throttles, where it is to be another than the sensor's own.
    pub temperature_limit: Option<f32>,
    /// Prompts and answers are logged.
    pub log_prompts: bool,
    /// The kernel is asked to hold the agent to the files and ports that it needs.
    pub landlock: bool,
}

/// Where this gateway is.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gateway {
    pub site: String,
    pub name: String,
    pub area: Option<String>,
    pub line: Option<String>,
    base: Option<String>,
}

/// The model, and what it may take.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub bundle: PathBuf,
    /// The graph of this name, where an exporter's folder has several.
    pub file: Option<String>,
    /// Whether an exporter's folder is checked against f32 arithmetic when it is first opened.
    pub guard: Option<bool>,
    pub state_dir: PathBuf,
    pub threads: Option<usize>,
    pub kernel: Option<String>,
    pub slots: Option<usize>,
    pub kv_tokens: Option<usize>,
    pub kv_cache: Option<KvPrecision>,
    pub prefill_chunk: Option<usize>,
}

impl Config {
    /// Reads and checks a file. Errors name the file and the key.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("the configuration {} can't be read", path.display()))?;
        Self::parse(&text)
            .with_context(|| format!("the configuration {} can't be used", path.display()))
    }

    pub fn parse(text: &str) -> Result<Self> {
        // Without the source: a secret written here by mistake must not reach a log.
        let raw: Raw = toml::from_str(text).map_err(|e| {
            let line = e
                .span()
                .map_or(0, |span| text[..span.start].matches('\n').count())
                + 1;
            anyhow::anyhow!("line {line}: {}", without_values(e.message()))
        })?;
        let base = match &raw.gateway.base {
            Some(base) => Base::parse(base),
            None => Base::of_gateway(&raw.gateway.site, &raw.gateway.name),
        };
        let base = base.map_err(|e| {
            anyhow::anyhow!("gateway.base, or site and name, don't make a topic: {e}")
        })?;
        let prefixes = raw.tasks.reply_prefixes.clone();
        let mut reply_rules =
            ReplyRules::new(base.clone(), &prefixes).context("tasks.reply_prefixes")?;
        let tasks = raw.tasks.check(raw.senders)?;
        let broker = raw.broker.check(&raw.gateway, tasks.deadline_max)?;
        let pool = raw
            .pool
            .map(|pool| pool.check(&raw.gateway, &base, &prefixes, &broker))
            .transpose()?;
        if let Some(pool) = &pool {
            reply_rules = reply_rules.beside(pool.base.clone());
        }
        ensure!(
            raw.agent.health_interval_s >= 1,
            "agent.health_interval_s must be at least 1"
        );
        ensure!(
            raw.agent.drain_grace_s <= 3600,
            "agent.drain_grace_s must be at most 3600"
        );
        if let Some(limit) = raw.agent.temperature_limit_c {
            ensure!(
                (40.0..=150.0).contains(&limit),
                "agent.temperature_limit_c must be 40 to 150"
            );
        }
        if let Some(slots) = raw.model.slots {
            let most = limits::RUNNING_TASKS_MAX;
            ensure!(
                (1..=most).contains(&slots),
                "model.slots must be 1 to {most}"
            );
        }
        Ok(Self {
            base,
            reply_rules,
            pool,
            broker,
            tasks,
            gateway: raw.gateway,
            model: raw.model,
            drain_grace: Duration::from_secs(raw.agent.drain_grace_s),
            health_interval: Duration::from_secs(raw.agent.health_interval_s),
            clock: raw.agent.clock,
            governor: raw.agent.governor,
            temperature_limit: raw.agent.temperature_limit_c,
            log_prompts: raw.agent.log_prompts,
            landlock: raw.agent.landlock,
        })
    }
}

/// What serde says, without the value that it found: it may be a secret in the wrong place.
fn without_values(message: &str) -> String {
    let kinds = ["invalid type: ", "invalid value: ", "unknown variant "];
    let found = kinds.into_iter().find(|kind| message.starts_with(kind));
    // Names that we know stand behind the last of these.
    match (found, message.rsplit_once(", expected ")) {
        (Some(kind), Some((_, expected))) => {
            format!("{}, expected {expected}", kind.trim_end_matches([':', ' ']))
        }
        (Some(kind), None) => kind.trim_end_matches([':', ' ']).into(),
        (None, _) => message.into(),
    }
}

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    gateway: Gateway,
    pool: Option<pool::RawPool>,
    broker: RawBroker,
    model: Model,
    #[serde(default)]
    tasks: RawTasks,
    #[serde(default)]
    senders: HashMap<String, RawSender>,
    #[serde(default)]
    agent: RawAgent,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBroker {
    host: String,
    port: Option<u16>,
    user: Option<String>,
    password_file: Option<PathBuf>,
    client_id: Option<String>,
    #[serde(default = "keep_alive_s")]
    keep_alive_s: u64,
    #[serde(default)]
    plaintext: bool,
    tls: Option<tls::Files>,
}

fn keep_alive_s() -> u64 {
    30
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawAgent {
    drain_grace_s: u64,
    health_interval_s: u64,
    clock: Trust,
    governor: bool,
    temperature_limit_c: Option<f32>,
    log_prompts: bool,
    landlock: bool,
}

impl Default for RawAgent {
    fn default() -> Self {
        Self {
            drain_grace_s: 10,
            health_interval_s: 10,
            clock: Trust::Auto,
            governor: true,
            temperature_limit_c: None,
            log_prompts: false,
            landlock: true,
        }
    }
}

impl RawBroker {
    fn check(self, gateway: &Gateway, session_expiry: Duration) -> Result<Settings> {
        // The MQTT client asserts the lower bound.
        ensure!(
            (5..=3600).contains(&self.keep_alive_s),
            "broker.keep_alive_s must be 5 to 3600"
        );
        let client_id = self
            .client_id
            .unwrap_or_else(|| format!("millwright-{}-{}", gateway.site, gateway.name));
        ensure!(!client_id.is_empty(), "broker.client_id is empty");
        ensure!(
            host_is_plain(&self.host),
            "broker.host must be a name or an address alone, without a scheme, a user or a path"
        );
        let has_tls = self.tls.is_some();
        let files = Files {
            tls: self.tls,
            user: self.user,
            password: self.password_file,
        };
        let access = Access::read(files).context("broker")?;
        if !has_tls && !self.plaintext && !is_loopback(&self.host) {
            bail!(
                "broker.host {} is not this machine and broker.tls is not set: passwords and prompts would cross the \
                 network in the clear (set broker.plaintext = true if that is meant)",
                self.host
            );
        }
        Ok(Settings {
            port: self.port.unwrap_or(if has_tls { 8883 } else { 1883 }),
            access,
            host: self.host,
            client_id,
            keep_alive: Duration::from_secs(self.keep_alive_s),
            session_expiry,
            will: None,
        })
    }
}

/// Whether `host` is a name or an address and nothing more.
pub fn host_is_plain(host: &str) -> bool {
    let is_plain =
        |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '[' | ']' | '%');
    !host.is_empty() && host.chars().all(is_plain)
}

/// Whether `host` is this machine by name or address.
pub fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = include_str!("../../../deploy/agent.toml");
    const SMALL: &str = "[gateway]\nsite = 'hamburg'\nname = 'gw-07'\n[broker]\nhost = '127.0.0.1'\n[model]\nbundle = 'm'\nstate_dir = 's'\n";

    fn error(text: &str) -> String {
        format!("{:#}", Config::parse(text).unwrap_err())
    }

    #[test]
    fn the_sample_is_valid_and_shows_the_defaults() {
        let sample = Config::parse(SAMPLE).unwrap();
        let small = Config::parse(SMALL).unwrap();
        assert_eq!(format!("{:?}", sample.tasks), format!("{:?}", small.tasks));
        assert_eq!(
            (
                sample.drain_grace,
                sample.health_interval,
                sample.broker.keep_alive,
                sample.broker.port,
                sample.log_prompts
            ),
            (
                small.drain_grace,
                small.health_interval,
                small.broker.keep_alive,
                small.broker.port,
                false
            )
        );
        assert_eq!(small.base.to_string(), "millwright/v1/hamburg/gw-07");
    }

    #[test]
    fn the_sample_documents_every_key() {
        for key in [
            "site",
            "name",
            "area",
            "line",
            "base",
            "host",
            "port",
            "user",
            "password_file",
            "client_id",
            "keep_alive_s",
            "plaintext",
            "ca",
            "cert",
            "key",
            "bundle",
            "state_dir",
            "threads",
            "kernel",
            "slots",
            "kv_tokens",
            "kv_cache",
            "prefill_chunk",
            "queue_max",
            "sender_queue_max",
            "payload_bytes_max",
            "tokens_default",
            "tokens_max",
            "deadline_default_s",
            "deadline_max_s",
            "dedup_window_s",
            "dedup_tasks_max",
            "dedup_bytes_max",
            "reply_prefixes",
            "priority_max",
            "drain_grace_s",
            "health_interval_s",
            "clock",
            "governor",
            "temperature_limit_c",
            "log_prompts",
            "landlock",
        ] {
            assert!(
                SAMPLE
                    .lines()
                    .any(|l| l.trim_start_matches("# ").starts_with(&format!("{key} = "))),
                "{key}"
            );
        }
        // Uncommented, the optional keys must be ones the parser knows.
        let all: String = SAMPLE
            .lines()
            .map(|l| {
                l.strip_prefix("# ")
                    .filter(|l| l.contains(" = ") || l.starts_with('['))
                    .unwrap_or(l)
                    .to_owned()
                    + "\n"
            })
            .collect();
        let error = error(&all);
        assert!(
            error.contains("password") || error.contains("ca.pem"),
            "only the files may be missing: {error}"
        );
    }

    #[test]
    fn a_secret_in_the_wrong_place_is_not_repeated() {
        let (text, number) = ("hunter2", "424242");
        let broker = |line: &str| SMALL.replace("[model]", &format!("{line}\n[model]"));
        let configs = [
            SMALL.replace("127.0.0.1", &format!("mqtt://gw:{text}@broker")),
            broker(&format!("port = '{text}'")),
            broker(&format!("user = {number}")),
            broker(&format!("keep_alive_s = {number}.5")),
            broker(&format!("plaintext = ['{text}']")),
            broker(&format!("user = {text}")),
            broker(&format!("password = '{text}'")),
            broker(&format!("user = 'gw'\npassword_file = '{text}'")),
            broker(&format!("password_file = '{text}'")),
            broker(&format!("tls = '{text}'")),
            broker(&format!(
                "tls = {{ ca = '/dev/null', cert = '/dev/null', key = '{text}' }}"
            )),
            broker(&format!("tls = {{ ca = \"\"\"-----BEGIN\n{text}\"\"\" }}")),
            format!("{SMALL}kv_cache = '{text}, expected {text}'\n"),
            format!("{SMALL}[agent]\nclock = '{text}'\n"),
            format!("{SMALL}[tasks]\nreply_prefixes = '{text}'\n"),
            format!("{SMALL}[agent]\n'{text}\n"),
        ];
        for config in configs {
            let error = error(&config);
            assert!(
                !error.contains(text) && !error.contains(number),
                "{config}\n{error}"
            );
            assert!(error.len() > 20, "{error}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(error(&format!("{SMALL}[tasks]\nqueue = 3\n")).contains("queue"));
        assert!(error(&format!("{SMALL}[tasks]\nqueue_max = 0\n")).contains("tasks.queue_max"));
        let more = "[tasks]\nqueue_max = 3\nsender_queue_max = 4\n";
        assert!(error(&format!("{SMALL}{more}")).contains("tasks.sender_queue_max"));
        let more = "[senders.mes]\nqueue_max = 0\n";
        assert!(error(&format!("{SMALL}{more}")).contains("senders.mes.queue_max"));
        assert!(
            error(&format!("{SMALL}[tasks]\ndeadline_default_s = 9999\n"))
                .contains("deadline_default_s")
        );
        assert!(error(&SMALL.replace("127.0.0.1", "10.0.0.5")).contains("broker.tls"));
        assert!(error(&SMALL.replace("gw-07", "gw/07")).contains("gateway"));
        assert!(error(&SMALL.replace("bundle = 'm'\n", "")).contains("bundle"));
        assert!(
            error(&SMALL.replace(
                "[model]",
                "user = 'x'\npassword_file = '/nonexistent/p'\n[model]"
            ))
            .contains("/nonexistent/p")
        );
    }
}
