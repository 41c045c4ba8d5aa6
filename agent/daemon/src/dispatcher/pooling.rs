//! What the dispatcher does for its pool: it joins and leaves, and tells which of the two connections is meant.

use super::Dispatcher;
use crate::alarms::Alarm;
use crate::broker::{Link, Signal};
use crate::pool::{Via, hindrance};
use crate::worker::Prepare;
use millwright_task::admission::Addressee;
use millwright_task::topic::Base;
use millwright_task::wire::Decoder;
use serde_json::{Value, json};

/// How many filters are the gateway's own.
pub(super) const OWN_FILTERS: usize = 2;

impl<P: Prepare> Dispatcher<P> {
    /// What happened to the pool's connection.
    pub fn on_pool_signal(&mut self, signal: Signal) {
        let now = self.parts.clock.now().own;
        let Some(pool) = &mut self.pool else { return };
        match signal {
            Signal::Online => {
                tracing::info!("connected to the broker for the pool {}", pool.name());
            }
            Signal::Subscribed { granted } => {
                pool.subscribed(now, granted.contains(&false));
                self.alarms.clear(Alarm::Pool);
                self.judge_subscriptions();
            }
            Signal::Offline { reason, .. } => pool.offline(now, reason),
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
        if let Some(pool) = &mut self.pool {
            pool.reconsider(now.own);
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

    /// What is subscribed on the gateway's own connection: behind its own its pool's cancels, so that the session keeps
    /// them.
    pub(super) fn filters(&self) -> Vec<String> {
        let own: [String; OWN_FILTERS] = self.decoder.base.inbound_filters();
        let own = own.into_iter();
        let pool = self.pool.as_ref();
        own.chain(pool.map(|pool| pool.decoder.base.cancel("+")))
            .collect()
    }

    /// Whom a topic is for, and who reads it.
    pub(super) fn addressee(&self, topic: &[u8]) -> (&Decoder, Addressee) {
        let topic = str::from_utf8(topic).unwrap_or_default();
        match &self.pool {
            Some(pool) if pool.decoder.base.inbound(topic).is_some() => {
                (&pool.decoder, Addressee::Pool)
            }
            _ => (&self.decoder, Addressee::Gateway),
        }
    }

    pub(super) fn link(&self, via: Via) -> &Link {
        match (via, &self.pool) {
            (Via::Pool, Some(pool)) => &pool.link,
            _ => &self.parts.link,
        }
    }

    /// The bases whose default topics stand in for `topic`: where it doesn't say whether the task was the pool's, both.
    pub(super) fn bases_of(&self, topic: &str) -> Vec<Base> {
        let pool = self.pool.iter().map(|pool| &pool.decoder.base);
        let all: Vec<_> = [&self.decoder.base].into_iter().chain(pool).collect();
        let holding: Vec<_> = all.iter().filter(|base| base.holds(topic)).collect();
        let bases = if holding.is_empty() {
            all.iter().collect()
        } else {
            holding
        };
        bases.into_iter().copied().cloned().collect()
    }

    /// The pools, as health shows them.
    pub(super) fn pools(&self) -> Value {
        let pools = self.pool.iter();
        pools
            .map(|pool| json!({"name": pool.name(), "taking": pool.is_taking()}))
            .collect()
    }
}
