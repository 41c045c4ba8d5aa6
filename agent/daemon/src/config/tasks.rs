//! `[tasks]` and `[senders]`: bounds on tasks, and what one sender may.

use anyhow::{Result, ensure};
use millwright_task::admission::Share;
use millwright_task::limits;
use serde::Deserialize;
use std::collections::HashMap;
use std::time::Duration;

/// Bounds on tasks.
#[derive(Debug, Clone)]
pub struct Tasks {
    pub queue_max: usize,
    pub payload_bytes_max: usize,
    pub tokens_default: usize,
    pub tokens_max: usize,
    pub deadline_default: Duration,
    pub deadline_max: Duration,
    pub dedup_window: Duration,
    pub dedup_tasks_max: usize,
    pub dedup_bytes_max: usize,
    pub share: Share,
    pub shares: HashMap<String, Share>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawTasks {
    queue_max: usize,
    sender_queue_max: Option<usize>,
    payload_bytes_max: usize,
    tokens_default: usize,
    tokens_max: usize,
    deadline_default_s: u64,
    deadline_max_s: u64,
    dedup_window_s: u64,
    dedup_tasks_max: usize,
    dedup_bytes_max: usize,
    pub(super) reply_prefixes: Vec<String>,
}

impl Default for RawTasks {
    fn default() -> Self {
        Self {
            queue_max: 32,
            sender_queue_max: None,
            payload_bytes_max: limits::PAYLOAD_BYTES_MAX,
            tokens_default: 256,
            tokens_max: 2048,
            deadline_default_s: 120,
            deadline_max_s: 3600,
            dedup_window_s: 24 * 3600,
            dedup_tasks_max: limits::RECALL_TASKS_MAX,
            dedup_bytes_max: limits::RECALL_BYTES_MAX,
            reply_prefixes: Vec::new(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSender {
    priority_max: Option<u8>,
    queue_max: Option<usize>,
}

impl RawTasks {
    pub(super) fn check(self, senders: HashMap<String, RawSender>) -> Result<Tasks> {
        let within = |key: &str, value: usize, most: usize| {
            ensure!(
                (1..=most).contains(&value),
                "tasks.{key} is {value}; it must be 1 to {most}"
            );
            Ok(value)
        };
        ensure!(
            self.deadline_max_s >= 1,
            "tasks.deadline_max_s must be at least 1"
        );
        ensure!(
            u32::try_from(self.deadline_max_s).is_ok(),
            "tasks.deadline_max_s is too large for an MQTT session"
        );
        ensure!(
            (1..=self.deadline_max_s).contains(&self.deadline_default_s),
            "tasks.deadline_default_s must be 1 to deadline_max_s ({})",
            self.deadline_max_s
        );
        ensure!(
            self.tokens_default <= self.tokens_max,
            "tasks.tokens_default is more than tokens_max"
        );
        let queue_max = within("queue_max", self.queue_max, limits::QUEUE_TASKS_MAX)?;
        // So that there is room for others beside one who floods.
        let usual = (queue_max * 3).div_ceil(4);
        let share = Share {
            tasks_max: within(
                "sender_queue_max",
                self.sender_queue_max.unwrap_or(usual),
                queue_max,
            )?,
            priority_max: limits::PRIORITY_MAX,
        };
        let mut shares = HashMap::new();
        for (name, sender) in senders {
            let most = share.priority_max;
            let priority_max = sender.priority_max.unwrap_or(most);
            ensure!(
                priority_max <= most,
                "senders.{name}.priority_max must be 0 to {most}"
            );
            let tasks_max = sender.queue_max.unwrap_or(share.tasks_max);
            ensure!(
                (1..=queue_max).contains(&tasks_max),
                "senders.{name}.queue_max is {tasks_max}; it must be 1 to queue_max ({queue_max})"
            );
            let own = Share {
                tasks_max,
                priority_max,
            };
            shares.insert(name, own);
        }
        Ok(Tasks {
            queue_max,
            payload_bytes_max: within(
                "payload_bytes_max",
                self.payload_bytes_max,
                limits::PAYLOAD_BYTES_MAX,
            )?,
            tokens_default: within("tokens_default", self.tokens_default, limits::TOKENS_MAX)?,
            tokens_max: within("tokens_max", self.tokens_max, limits::TOKENS_MAX)?,
            dedup_tasks_max: within(
                "dedup_tasks_max",
                self.dedup_tasks_max,
                limits::RECALL_TASKS_MAX,
            )?,
            dedup_bytes_max: within(
                "dedup_bytes_max",
                self.dedup_bytes_max,
                limits::RECALL_BYTES_MAX,
            )?,
            deadline_default: Duration::from_secs(self.deadline_default_s),
            deadline_max: Duration::from_secs(self.deadline_max_s),
            dedup_window: Duration::from_secs(self.dedup_window_s),
            share,
            shares,
        })
    }
}
