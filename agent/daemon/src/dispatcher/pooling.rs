//! What the dispatcher does for its pool: it joins and leaves, and tells which of the two connections is meant.

use super::Dispatcher;
use crate::alarms::Alarm;
use crate::broker::{Link, Signal};
use crate::pool::{Via, hindrance};
use crate::worker::Prepare;
use millwright_task::topic::Base;
use millwright_task::wire::Decoder;
use serde_json::{Value, json};

impl<P: Prepare> Dispatcher<P> {
    /// What happened to the pool's connection.
    pub fn on_pool_signal(&mut self, signal: Signal) {
        let now = self.parts.clock.now().own;
        let Some(pool) = &mut self.pool else { return };
        match signal {
            Signal::Online => {
                tracing::info!("connected to the broker for the pool {}", pool.name());
            }
            Signal::Subscribed { refused } => {
                pool.subscribed(refused);
                self.alarms.clear(Alarm::Pool);
                self.judge_subscriptions();
            }
            Signal::Offline { reason } => pool.offline(now, reason),
            // Nothing is published there, and the files are the other connection's too, which tells of them.
            Signal::Delivered(_) | Signal::Refused(..) | Signal::Access(_) => {}
        }
    }

    /// Takes the pool's tasks, or no more.
    pub(super) fn settle_pool(&mut self) {
        if self.pool.is_none() {
            return;
        }
        let (state, _) = self.state();
        if let Some(pool) = &mut self.pool {
            let why = hindrance(state, self.subscribed, pool.is_refused());
            pool.settle(why);
        }
    }

    /// Raises the alarm where nothing is heard of the pool.
    pub(super) fn tick_pool(&mut self) {
        let now = self.parts.clock.now();
        if let Some(pool) = &mut self.pool
            && let Some(why) = pool.due(now.own)
        {
            self.alarms.raise(now, Alarm::Pool, why);
        }
    }

    /// One alarm for both connections: its reason says what the broker refuses.
    pub(super) fn judge_subscriptions(&mut self) {
        let own = self.is_unheard.then(|| self.decoder.base.to_string());
        let pool = self.pool.as_ref().filter(|pool| pool.is_refused());
        let pool = pool.map(|pool| format!("the pool {} ({})", pool.name(), pool.decoder.base));
        let refused: Vec<String> = own.into_iter().chain(pool).collect();
        if refused.is_empty() {
            self.alarms.clear(Alarm::Subscription);
            return;
        }
        let reason = format!(
            "the broker refuses the subscription to {}: check its access rules",
            refused.join(" and to ")
        );
        let now = self.parts.clock.now();
        self.alarms.raise(now, Alarm::Subscription, &reason);
    }

    pub(super) fn decoder(&self, via: Via) -> &Decoder {
        match (via, &self.pool) {
            (Via::Pool, Some(pool)) => &pool.decoder,
            _ => &self.decoder,
        }
    }

    pub(super) fn link(&self, via: Via) -> &Link {
        match (via, &self.pool) {
            (Via::Pool, Some(pool)) => &pool.link,
            _ => &self.parts.link,
        }
    }

    /// The base whose default topic stands in for `topic`.
    pub(super) fn base_of(&self, topic: &str) -> &Base {
        let pool = self.pool.as_ref().map(|pool| &pool.decoder.base);
        pool.filter(|base| base.holds(topic))
            .unwrap_or(&self.decoder.base)
    }

    /// The pools, as health shows them.
    pub(super) fn pools(&self) -> Value {
        let pools = self.pool.iter();
        pools
            .map(|pool| json!({"name": pool.name(), "taking": pool.is_taking()}))
            .collect()
    }
}
