//! What needs somebody to look: raised when it begins, cleared when it is over. Each alarm has a retained topic of its
//! own. Knows neither the broker nor what its causes mean.

use millwright_task::pressure::Cause;
use millwright_task::{Now, calendar};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long after the last time something is raised that has no end of its own.
const LINGER: Duration = Duration::from_hours(1);

/// The alarms there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Alarm {
    /// There is no usable model.
    Model,
    /// The journal can't be written.
    Journal,
    /// The broker refuses the subscription to tasks: the gateway's own, or its pool's.
    Subscription,
    /// The pool's connection is down.
    Pool,
    /// An answer could not be delivered and was set aside.
    Undeliverable,
    /// Another client came under this gateway's client id, or seems to.
    Session,
    /// A certificate ends soon, or what was renewed can't be used.
    Certificate,
    /// The machine is hard pressed, and the agent does less.
    Pressed(Cause),
}

impl Alarm {
    pub const ALL: [Self; 11] = [
        Self::Model,
        Self::Journal,
        Self::Subscription,
        Self::Pool,
        Self::Undeliverable,
        Self::Session,
        Self::Certificate,
        Self::Pressed(Cause::Temperature),
        Self::Pressed(Cause::Throttling),
        Self::Pressed(Cause::Memory),
        Self::Pressed(Cause::Stall),
    ];

    /// Its topic's last level.
    pub fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Journal => "journal",
            Self::Subscription => "subscription",
            Self::Pool => "pool",
            Self::Undeliverable => "undeliverable",
            Self::Session => "session",
            Self::Certificate => "certificate",
            Self::Pressed(Cause::Temperature) => "temperature",
            Self::Pressed(Cause::Throttling) => "throttling",
            Self::Pressed(Cause::Memory) => "memory",
            Self::Pressed(Cause::Stall) => "stall",
        }
    }
}

#[derive(Debug)]
struct Raised {
    since_ms: u64,
    last: Duration,
    reason: String,
    times: u64,
}

/// The alarms that are raised, and those of which something is to be said.
#[derive(Debug)]
pub struct Alarms {
    raised: BTreeMap<Alarm, Raised>,
    unsaid: BTreeSet<Alarm>,
}

impl Default for Alarms {
    /// All are to be said: an earlier life may have left one raised at the broker.
    fn default() -> Self {
        Self {
            raised: BTreeMap::new(),
            unsaid: Alarm::ALL.into(),
        }
    }
}

impl Alarms {
    pub fn raise(&mut self, now: Now, alarm: Alarm, reason: &str) {
        let raised = self.raised.entry(alarm).or_insert_with(|| Raised {
            since_ms: now.wall_ms,
            last: now.own,
            reason: String::new(),
            times: 0,
        });
        raised.last = now.own;
        raised.times += 1;
        reason.clone_into(&mut raised.reason);
        self.unsaid.insert(alarm);
    }

    pub fn clear(&mut self, alarm: Alarm) {
        if self.raised.remove(&alarm).is_some() {
            self.unsaid.insert(alarm);
        }
    }

    /// Clears what has no end of its own and did not come again.
    pub fn pass(&mut self, now: Now) {
        for alarm in [Alarm::Undeliverable, Alarm::Session] {
            let raised = self.raised.get(&alarm);
            if raised.is_some_and(|raised| now.own.saturating_sub(raised.last) > LINGER) {
                self.clear(alarm);
            }
        }
    }

    /// All are to be said again: a broker may have lost what it had retained.
    pub fn repeat(&mut self) {
        self.unsaid = Alarm::ALL.into();
    }

    /// What is to be said, once.
    pub fn take_unsaid(&mut self, gateway: &str, now: Now) -> Vec<(Alarm, Value)> {
        let unsaid = std::mem::take(&mut self.unsaid);
        let payload = |alarm: Alarm| {
            let mut json = json!({
                "gateway": gateway, "alarm": alarm.name(), "at": calendar::format(now.wall_ms),
                "raised": self.raised.contains_key(&alarm),
            });
            if let Some(raised) = self.raised.get(&alarm) {
                json["since"] = calendar::format(raised.since_ms).into();
                json["reason"] = raised.reason.clone().into();
                json["times"] = raised.times.into();
            }
            (alarm, json)
        };
        unsaid.into_iter().map(payload).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Now {
        Now {
            own: Duration::from_secs(seconds),
            wall_ms: seconds * 1000,
            synced: true,
        }
    }

    fn said(alarms: &mut Alarms, seconds: u64) -> Vec<(&'static str, bool, Option<u64>)> {
        let said = alarms.take_unsaid("gw", at(seconds));
        let short = |(alarm, json): (Alarm, Value)| {
            (alarm.name(), json["raised"] == true, json["times"].as_u64())
        };
        said.into_iter().map(short).collect()
    }

    #[test]
    fn an_alarm_is_said_when_it_changes_and_to_each_broker_anew() {
        let mut alarms = Alarms::default();
        assert_eq!(said(&mut alarms, 0).len(), Alarm::ALL.len());
        alarms.clear(Alarm::Journal);
        assert_eq!(said(&mut alarms, 1), []);
        alarms.raise(at(2), Alarm::Journal, "no space");
        assert_eq!(said(&mut alarms, 2), [("journal", true, Some(1))]);
        alarms.raise(at(3), Alarm::Journal, "no space");
        alarms.clear(Alarm::Journal);
        assert_eq!(said(&mut alarms, 3), [("journal", false, None)]);
        alarms.repeat();
        assert_eq!(said(&mut alarms, 4).len(), Alarm::ALL.len());
    }

    #[test]
    fn what_has_no_end_is_over_when_it_has_not_come_again_for_an_hour() {
        let mut alarms = Alarms::default();
        said(&mut alarms, 0);
        alarms.raise(at(10), Alarm::Undeliverable, "the broker refused it");
        alarms.raise(at(20), Alarm::Undeliverable, "the broker refused it");
        assert_eq!(said(&mut alarms, 20), [("undeliverable", true, Some(2))]);
        alarms.raise(at(30), Alarm::Session, "another client");
        assert_eq!(said(&mut alarms, 30), [("session", true, Some(1))]);
        alarms.pass(at(3600));
        assert_eq!(said(&mut alarms, 3600), []);
        alarms.pass(at(3621));
        assert_eq!(said(&mut alarms, 3621), [("undeliverable", false, None)]);
        alarms.pass(at(3631));
        assert_eq!(said(&mut alarms, 3631), [("session", false, None)]);
    }
}
