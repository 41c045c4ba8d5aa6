//! A gateway's place in its pool: whether it takes tasks there now, what the broker was asked for, and for how long it
//! hears nothing. Its connection only brings messages; what is said of them goes over the gateway's own.

use crate::broker::{Link, Lost};
use crate::card::State;
use millwright_task::wire::Decoder;
use std::time::Duration;

/// How long the connection may be down before somebody is told.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long after the broker refused the subscription it is asked again.
const RECONSIDER: Duration = Duration::from_mins(1);

/// Which of a gateway's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    Own,
    Pool,
}

/// Why a gateway takes no tasks of its pool now, if it doesn't: this alone decides it. Only one that is well may: whatever
/// makes the state another (a drain, a journal that can't be written, no model) sends the pool's tasks to others.
/// `can_answer` is whether the gateway's own connection is there, and `refused` what the broker said to the pool's.
pub fn hindrance(state: State, can_answer: bool, refused: bool) -> Option<&'static str> {
    match state {
        State::Draining | State::Offline => Some("the gateway is shutting down"),
        State::Degraded => Some("the gateway is degraded"),
        State::Online if !can_answer => Some("there is no connection to answer over"),
        State::Online if refused => Some("the broker refuses the subscription"),
        State::Online => None,
    }
}

/// The gateway as a member.
pub struct Member {
    pub link: Link,
    /// Reads the pool's messages.
    pub decoder: Decoder,
    name: String,
    /// Whether tasks were asked for on this connection.
    asked: bool,
    /// The broker sends tasks.
    taking: bool,
    /// Since when the broker refuses the subscription.
    refused: Option<Duration>,
    /// The broker refuses the pool's cancels, which come over the gateway's own connection.
    is_deaf: bool,
    outage: Option<Outage>,
}

impl Member {
    pub fn new(name: String, link: Link, decoder: Decoder) -> Self {
        Self {
            link,
            decoder,
            name,
            asked: false,
            taking: false,
            refused: None,
            is_deaf: false,
            outage: None,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn is_taking(&self) -> bool {
        self.taking
    }

    pub fn is_refused(&self) -> bool {
        self.refused.is_some() || self.is_deaf
    }

    pub fn cancels_refused(&mut self, refused: bool) {
        self.is_deaf = refused;
    }

    /// Lets the broker be asked once more after it refused: its rules may have changed.
    pub fn reconsider(&mut self, now: Duration) {
        let is_over = |since: Duration| now.saturating_sub(since) >= RECONSIDER;
        if self.refused.is_some_and(is_over) {
            self.refused = None;
        }
    }

    /// Asks for tasks or asks for no more.
    pub fn settle(&mut self, hindrance: Option<&str>) {
        let wanted = hindrance.is_none();
        if self.asked == wanted || !self.link.is_online() {
            return;
        }
        let tasks = self.decoder.base.shared_filter(&self.name);
        let sent = if wanted {
            self.link.subscribe(&[tasks], false)
        } else {
            self.link.unsubscribe(&tasks)
        };
        if !sent {
            return;
        }
        (self.asked, self.taking) = (wanted, false);
        if let Some(why) = hindrance {
            tracing::info!("takes no tasks of the pool {}: {why}", self.name);
        }
    }

    /// The broker did what it was asked for, or refused.
    pub fn subscribed(&mut self, now: Duration, refused: bool) {
        self.refused = refused.then_some(now);
        self.taking = !refused && self.asked;
        self.outage = None;
        if refused {
            tracing::error!(
                "the broker refuses the subscription to the pool {}: check its access rules for {}",
                self.name,
                self.decoder.base
            );
        } else if self.taking {
            tracing::info!("takes tasks of the pool {}", self.name);
        }
    }

    /// The connection is gone, and with it what was asked for.
    pub fn offline(&mut self, now: Duration, lost: Lost) {
        (self.asked, self.taking, self.refused) = (false, false, None);
        let Lost { reason, needs_help } = lost;
        let reason = format!("the connection for the pool {}: {reason}", self.name);
        if needs_help {
            tracing::error!("{reason}");
        } else {
            tracing::warn!("{reason}");
        }
        let outage = self.outage.get_or_insert(Outage::new(now));
        outage.reason = reason;
        outage.is_urgent |= needs_help;
    }

    /// Why nothing is heard of the pool, once for each outage that lasts.
    pub fn due(&mut self, now: Duration) -> Option<&str> {
        self.outage.as_mut()?.due(now)
    }
}

/// A time without a connection.
struct Outage {
    since: Duration,
    reason: String,
    /// It does not pass by itself.
    is_urgent: bool,
    told: bool,
}

impl Outage {
    fn new(since: Duration) -> Self {
        Self {
            since,
            reason: String::new(),
            is_urgent: false,
            told: false,
        }
    }

    fn due(&mut self, now: Duration) -> Option<&str> {
        let is_due = self.is_urgent || now.saturating_sub(self.since) >= PATIENCE;
        if !is_due || std::mem::replace(&mut self.told, true) {
            return None;
        }
        Some(&self.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_gateway_that_is_well_heard_and_welcome_takes_the_pools_tasks() {
        assert_eq!(hindrance(State::Online, true, false), None);
        for state in [State::Draining, State::Degraded, State::Offline] {
            for (can_answer, refused) in [(true, false), (false, false), (true, true)] {
                assert!(hindrance(state, can_answer, refused).is_some(), "{state:?}");
            }
        }
        let online = |can_answer, refused| hindrance(State::Online, can_answer, refused);
        assert!(online(false, false).is_some_and(|why| why.contains("connection")));
        assert!(online(true, true).is_some_and(|why| why.contains("refuses")));
    }

    #[test]
    fn an_outage_is_told_once_when_it_lasts_and_at_once_when_it_will() {
        let at = Duration::from_secs;
        let mut outage = Outage::new(at(5));
        assert_eq!(outage.due(at(14)), None);
        assert!(outage.due(at(15)).is_some());
        assert_eq!(outage.due(at(16)), None);
        let mut outage = Outage::new(at(5));
        outage.is_urgent = true;
        assert!(outage.due(at(5)).is_some());
        assert_eq!(outage.due(at(6)), None);
    }
}
