//! What the gateway says of itself, retained: its state and its card. Plain data.

use crate::config::Config;
use millwright_task::{Now, calendar, limits, wire};
use serde::Serialize;
use serde_json::{Value, json};

/// What is known of the model that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Model {
    pub name: String,
    pub version: String,
    pub precision: String,
    pub digest: String,
    /// Whether the same task gives the same tokens wherever it runs.
    pub exact: bool,
    pub context_length: usize,
    /// Whether it has a chat template.
    pub chat: bool,
    pub kernel: String,
    /// Threads for a step that only decodes, and for one with prompt tokens in it.
    pub decode_threads: usize,
    pub prefill_threads: usize,
    /// What this machine reads from memory; null where it is unknown, as where other work disturbed the measurement.
    pub read_bytes_per_s: Option<u64>,
    pub plan: String,
    /// How its import was checked, what was left to tract and why.
    pub notes: Vec<String>,
}

impl Model {
    /// Name, precision and version, as answers state them. A name that ends with the precision says it already.
    pub fn title(&self) -> String {
        let (name, precision) = (&self.name, &self.precision);
        if name.ends_with(&format!("-{precision}")) {
            return format!("{name} {}", self.version);
        }
        format!("{name}-{precision} {}", self.version)
    }
}

/// How the gateway is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Online,
    Draining,
    Degraded,
    Offline,
}

/// The payload of `{base}/state`. The will has no time: nobody knows when it will be needed.
pub fn state(
    config: &Config,
    state: State,
    reason: &str,
    boot_id: &str,
    now: Option<Now>,
) -> Vec<u8> {
    let mut json = json!({
        "gateway": config.gateway.name, "state": state, "reason": reason, "boot_id": boot_id,
        "agent": env!("CARGO_PKG_VERSION"),
    });
    if let Some(now) = now {
        json["at"] = Value::String(calendar::format(now.wall_ms));
        json["clock"] = Value::String(if now.synced { "synced" } else { "unsynced" }.into());
    }
    bytes(&json)
}

/// The payload of `{base}/card`: of the model, if there is one, and how many tasks and tokens it takes.
pub fn card(config: &Config, model: Option<(&Model, usize, usize)>) -> Vec<u8> {
    let (gateway, tasks) = (&config.gateway, &config.tasks);
    let pools = config.pool.iter();
    let pools: Vec<_> = pools
        .map(|pool| json!({"name": pool.name, "base": pool.base.to_string()}))
        .collect();
    let kinds: &[&str] = match model {
        None => &[],
        Some((model, ..)) if model.chat => &["generate", "chat"],
        Some(_) => &["generate"],
    };
    let (slots, context) = (model.map(|m| m.1), model.map(|m| m.2));
    let model = model.map(|m| m.0);
    bytes(&json!({
        "gateway": gateway.name, "site": gateway.site, "area": gateway.area, "line": gateway.line,
        "base": config.base.to_string(), "pools": pools, "protocols": [1], "agent": env!("CARGO_PKG_VERSION"),
        "content_types": wire::Format::ALL.map(wire::Format::content_type),
        "model": model, "kinds": kinds, "fields": wire::FIELDS, "templates": [], "adapters": [],
        "limits": {
            "context_tokens": context, "max_tokens": tasks.tokens_max, "max_tokens_default": tasks.tokens_default,
            "payload_bytes": tasks.payload_bytes_max, "answer_bytes": limits::ANSWER_BYTES_MAX,
            "messages": limits::MESSAGES_MAX, "stop": limits::STOPS_MAX, "stop_bytes": limits::STOP_BYTES_MAX,
            "running": slots, "queue": tasks.queue_max,
            "deadline_ms": tasks.deadline_max.as_millis() as u64,
            "deadline_ms_default": tasks.deadline_default.as_millis() as u64,
            "dedup_window_ms": tasks.dedup_window.as_millis() as u64,
        },
    }))
}

fn bytes(json: &Value) -> Vec<u8> {
    json.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_title_names_the_precision_once() {
        let title = |name: &str, precision: &str| {
            let model = Model {
                name: name.into(),
                version: "1".into(),
                precision: precision.into(),
                digest: String::new(),
                exact: true,
                context_length: 1,
                chat: false,
                kernel: String::new(),
                decode_threads: 1,
                prefill_threads: 1,
                read_bytes_per_s: None,
                plan: String::new(),
                notes: vec![],
            };
            model.title()
        };
        assert_eq!(title("smollm2-135m", "int8"), "smollm2-135m-int8 1");
        assert_eq!(title("smollm2-135m-q4", "q4"), "smollm2-135m-q4 1");
        assert_eq!(title("tinyq4", "q4"), "tinyq4-q4 1");
    }
}
