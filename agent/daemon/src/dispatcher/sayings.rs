//! What the agent says of itself, unasked: state, card, health, and that an answer can't be delivered.

use super::modelling::Standing;
use super::{Dispatcher, outgoing};
use crate::alarms::Alarm;
use crate::broker::Outgoing;
use crate::card::{self, State};
use crate::journal::Mark;
use crate::outbox::{Purpose, Undeliverable};
use crate::probe::Machine;
use crate::worker::Prepare;
use millwright_task::pressure::Level;
use millwright_task::wire::{self, Code, Refusal, Reply};
use serde_json::json;

impl<P: Prepare> Dispatcher<P> {
    /// Says on the default topic that an answer can't be delivered.
    pub(super) fn last_word(&mut self, lost: Undeliverable) {
        let Undeliverable {
            key,
            ticket,
            is_last_word,
            topic,
            format,
            reason,
            forbidden,
        } = lost;
        tracing::error!(
            sender = key.sender,
            task = key.task,
            topic,
            reason,
            "an answer can't be delivered"
        );
        let now = self.parts.clock.now();
        self.alarms.raise(now, Alarm::Undeliverable, &reason);
        let bases = self.bases_of(&topic).into_iter();
        let mut defaults = bases.map(|base| base.result(&key.sender, &key.task));
        let default = defaults.next().unwrap_or_default();
        if is_last_word || forbidden && topic == default {
            // Set aside: nobody will ever have it.
            self.delivered(&key, ticket);
            return;
        }
        let body = wire::Body::Failed(Refusal::new(Code::ReplyUndeliverable, reason));
        let reply = Reply {
            topic: default,
            correlation: None,
            format,
        };
        let post = self
            .admission
            .say_alone(self.parts.clock.now(), &key, &reply, body);
        for topic in defaults {
            let mut also = outgoing(post.clone());
            also.topic = topic;
            self.outbox.push(Purpose::Progress, also, Mark::default());
        }
        self.outbox.push(
            Purpose::LastWord { key, ticket },
            outgoing(post),
            Mark::default(),
        );
    }

    /// How the gateway is, and why.
    pub(super) fn state(&self) -> (State, String) {
        if let Some(goodbye) = &self.goodbye {
            return goodbye.clone();
        }
        if self.is_draining {
            return (State::Draining, "shutting down".into());
        }
        if let Some(why) = &self.trouble {
            return (
                State::Degraded,
                format!("the journal can't be written: {why}"),
            );
        }
        match &self.standing {
            Standing::Ready(_) => {}
            Standing::Loading(_) => return (State::Degraded, "the model is being loaded".into()),
            Standing::Lacking(why) => {
                return (State::Degraded, format!("without a model: {why}"));
            }
        }
        if self.is_unheard {
            let reason = "the broker refuses the subscription to tasks";
            return (State::Degraded, reason.into());
        }
        let level = self.easing.level();
        let reason = format!("{}: {}", level.name(), self.easing.reason);
        match level {
            Level::Normal => (State::Online, String::new()),
            Level::Eased => (State::Online, reason),
            Level::Strained | Level::Critical => (State::Degraded, reason),
        }
    }

    /// How the gateway is, in words for somebody who stands at the box.
    pub fn status(&self) -> String {
        let (state, reason) = self.state();
        let what = match state {
            State::Online => {
                let title = self.standing.ready().map(|e| e.model.title());
                format!("serving, model {}", title.unwrap_or_default())
            }
            State::Draining => "draining".into(),
            State::Degraded => "degraded".into(),
            State::Offline => "leaving".into(),
        };
        let because = if reason.is_empty() { "" } else { ": " };
        let alone = if self.subscribed {
            ""
        } else {
            "; not connected to the broker"
        };
        format!("{what}{because}{reason}{alone}")
    }

    pub(super) fn say_state(&mut self) {
        if !self.subscribed || self.is_settling() {
            return;
        }
        let (state, reason) = self.state();
        let (config, clock) = (&self.parts.config, &self.parts.clock);
        let now = Some(clock.now());
        let payload = card::state(config, state, &reason, clock.boot_id(), now);
        self.retain(self.decoder.base.state(), payload);
    }

    pub(super) fn say_card(&mut self) {
        if !self.subscribed || self.is_settling() {
            return;
        }
        let equipment = self.standing.ready();
        let model = equipment.map(|e| (&e.model, e.slots, e.context));
        let payload = card::card(&self.parts.config, model);
        self.retain(self.decoder.base.card(), payload);
    }

    pub(super) fn say_alarms(&mut self) {
        if !self.subscribed {
            return;
        }
        let gateway = &self.parts.config.gateway.name;
        for (alarm, payload) in self.alarms.take_unsaid(gateway, self.parts.clock.now()) {
            let topic = self.decoder.base.alarm(alarm.name());
            self.retain(topic, payload.to_string().into_bytes());
        }
    }

    fn retain(&mut self, topic: String, payload: Vec<u8>) {
        let message = Outgoing {
            retain: true,
            ..Outgoing::json(topic, payload)
        };
        self.outbox
            .push(Purpose::Retained, message, Mark::default());
    }

    /// Publishes a health sample; a missed one is not worth keeping.
    pub fn say_health(&mut self, machine: &Machine) {
        let now = self.parts.clock.now();
        let (events, bytes) = self.outbox.depth();
        let (recalled, recalled_bytes) = self.admission.recalled();
        let equipment = self.standing.ready();
        let model = equipment.map(|e| &e.model);
        let load = equipment.map(|e| *e.load.borrow());
        let share = load
            .zip(model)
            .and_then(|(load, model)| self.tally.share(load.reads, model.read_bytes_per_s));
        let sample = json!({
            "gateway": self.parts.config.gateway.name,
            "at": millwright_task::calendar::format(now.wall_ms),
            "clock": if now.synced { "synced" } else { "unsynced" },
            "machine": machine, "level": self.easing.level().name(),
            "queue": self.admission.waiting(), "running": self.admission.running(),
            "estimate_error": self.admission.estimate_error(),
            "counts": self.tally.counts(),
            "kv_tokens_used": load.map(|l| l.kv_tokens_used), "kv_tokens_max": load.map(|l| l.kv_tokens_max),
            "memory_bandwidth_share": share,
            "threads": model.map(|m| json!({"decode": m.decode_threads, "prefill": m.prefill_threads})),
            "model_digest": model.map(|m| &m.digest),
            "journal": {"open": self.admission.waiting() + self.admission.running(), "recalled": recalled, "bytes": recalled_bytes},
            "outbox": {"events": events, "bytes": bytes},
            "pools": self.pools(),
        });
        let message = Outgoing::json(self.decoder.base.health(), sample.to_string().into_bytes());
        let _ = self.parts.link.publish(None, &message);
    }
}
