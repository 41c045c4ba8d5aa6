//! `ask --pool`: who has the task, and when it is sent again. Failover in a pool is the requester's part: the same id goes to
//! the pool until a final event comes, and the first one counts.

use super::{Asking, Phase};
use crate::clock::random;
use anyhow::Result;
use millwright_task::topic::Base;
use millwright_task::wire::{self, Body, Code, Event, Refusal};
use rumqttc::v5::mqttbytes::v5::Publish;
use serde_json::Value;
use std::collections::HashSet;
use std::time::Duration;
use tokio::time::Instant;

/// Pauses after refusals: the first, and the longest unless a member that refused before asks for more.
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_LAST: Duration = Duration::from_secs(5);

/// What is known of a task that is with a pool.
pub(super) struct Pool {
    deadline: Instant,
    /// Who accepted it last.
    holder: Option<Holder>,
    /// Somebody accepted it, and may still end it.
    was_accepted: bool,
    /// Who refused it.
    refused_by: HashSet<String>,
    /// The last refusal that another member might not repeat.
    refusal: Option<Event>,
    pause: Duration,
}

struct Holder {
    gateway: String,
    /// Where its state is.
    base: Option<Base>,
}

impl Pool {
    pub(super) fn new(deadline: Instant) -> Self {
        Self {
            deadline,
            holder: None,
            was_accepted: false,
            refused_by: HashSet::new(),
            refusal: None,
            pause: PAUSE_FIRST,
        }
    }

    /// What is left of the deadline, which runs from the first sending.
    pub(super) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    fn holder_state(&self) -> Option<String> {
        Some(self.holder.as_ref()?.base.as_ref()?.state())
    }

    fn is_held_by(&self, gateway: &str) -> bool {
        let holder = self.holder.as_ref();
        holder.is_some_and(|holder| holder.gateway == gateway)
    }

    /// How long to wait after a refusal: longer each time, and not as long as others. How long a member is full is of no
    /// interest before it is given the task a second time: the others may have room.
    fn next_pause(&mut self, gateway: &str, refusal: &Refusal, chance: u64) -> Duration {
        let is_first = self.refused_by.insert(gateway.to_owned());
        let said = refusal.retry_after_ms.filter(|_| !is_first);
        let said = Duration::from_millis(said.unwrap_or(0));
        let full = self.pause;
        self.pause = (full * 2).min(PAUSE_LAST);
        full.max(said) + full.mul_f64((chance % 1000) as f64 / 2000.0)
    }
}

/// Whether another member, or the same one later, may take what was refused.
fn may_be_taken(refusal: &Refusal) -> bool {
    matches!(
        refusal.code,
        Code::Busy | Code::DeadlineUnreachable | Code::Draining | Code::NoModel | Code::Internal
    )
}

impl Asking {
    /// What an event of a pool's member means; the one that ends it all is returned.
    pub(super) fn on_pool_event(&mut self, event: Event) -> Option<Event> {
        self.screen.show(&event);
        let pool = self.pool.as_mut()?;
        match &event.body {
            Body::Accepted { base, .. } => {
                self.accepted(&event.gateway, base.as_deref());
                None
            }
            Body::Rejected(refusal) if pool.was_accepted || may_be_taken(refusal) => {
                self.refused(event)
            }
            body if body.is_final() => Some(event),
            _ => {
                if self.phase == Phase::Sent && pool.is_held_by(&event.gateway) {
                    self.phase = Phase::Accepted;
                }
                None
            }
        }
    }

    fn accepted(&mut self, gateway: &str, base: Option<&str>) {
        if self.phase == Phase::Sent {
            self.phase = Phase::Accepted;
        }
        let Some(pool) = &mut self.pool else { return };
        pool.pause = PAUSE_FIRST;
        pool.was_accepted = true;
        pool.refusal = None;
        if pool.is_held_by(gateway) {
            return;
        }
        pool.holder = Some(Holder {
            gateway: gateway.to_owned(),
            base: base.and_then(|base| Base::parse(base).ok()),
        });
        if let Some(state) = pool.holder_state() {
            // Without room or connection nothing is lost: on the next connection the task is sent again.
            let _ = self.link.subscribe(&[state], true);
        }
    }

    /// A member refuses. While another has the task that says nothing.
    fn refused(&mut self, event: Event) -> Option<Event> {
        let pool = self.pool.as_mut()?;
        let Body::Rejected(refusal) = &event.body else {
            return Some(event);
        };
        match self.phase {
            Phase::Cancelling if pool.holder.is_none() => return Some(event),
            Phase::Sent => {}
            _ => return None,
        }
        let pause = pool.next_pause(&event.gateway, refusal, random());
        let line = format!(
            "{} refused ({}); sent again in {:.1} s",
            wire::printable(&event.gateway),
            refusal.code.name(),
            pause.as_secs_f64()
        );
        self.resend = Instant::now() + pause.min(pool.left());
        pool.refusal = Some(event);
        self.screen.status(&line);
        None
    }

    /// The state of a gateway that accepted the task.
    pub(super) fn on_holder_state(&mut self, publish: &Publish) -> Result<()> {
        let Some(pool) = &mut self.pool else {
            return Ok(());
        };
        let is_its = pool.holder_state();
        let is_its = is_its.is_some_and(|topic| topic.as_bytes() == publish.topic.as_ref());
        let is_late = pool.left().is_zero();
        let Some(holder) = pool.holder.as_mut().filter(|_| is_its) else {
            return Ok(());
        };
        let name = wire::printable(&holder.gateway);
        let state: Value = serde_json::from_slice(&publish.payload).unwrap_or_default();
        let is_waiting = matches!(self.phase, Phase::Sent | Phase::Accepted);
        match state["state"].as_str() {
            // It keeps what it accepted, and goes on with it when it is back.
            Some("online") | None => Ok(()),
            Some("offline") if is_waiting && !is_late => {
                let line = format!("{name} is offline; sent again to the pool");
                self.screen.status(&line);
                self.send_anew()
            }
            // Draining or degraded: what it has may wait there, unless it is heard of.
            Some(other) => {
                let line = format!("{name} is {}", wire::printable(other));
                self.screen.status(&line);
                if self.phase == Phase::Accepted {
                    self.phase = Phase::Sent;
                    self.resend = Instant::now() + self.pace;
                }
                Ok(())
            }
        }
    }

    /// Nobody is known to have the task: to the pool with it.
    pub(super) fn send_anew(&mut self) -> Result<()> {
        if let Some(pool) = &mut self.pool {
            pool.holder = None;
            self.phase = Phase::Sent;
        }
        self.send()
    }

    /// Nobody accepted in time, or a pause is over.
    pub(super) fn on_pool_silence(&mut self) -> Result<()> {
        let Some(pool) = &mut self.pool else {
            return Ok(());
        };
        if pool.left().is_zero() {
            // Who is late may still say something, but for those who only refused.
            self.resend = self.give_up;
            return match pool.refusal.take() {
                Some(refusal) => self.screen.finish(refusal),
                None => Ok(()),
            };
        }
        if self.sent == 1 && pool.refusal.is_none() {
            self.screen
                .status("no member accepted it yet; sending again until one does");
        }
        self.send_anew()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_are_no_shorter_than_asked_for() {
        let mut pool = Pool::new(Instant::now());
        let refusal = |retry_after_ms| Refusal {
            retry_after_ms,
            ..Refusal::new(Code::Busy, "full".into())
        };
        let minute = Some(60_000);
        let first = pool.next_pause("gw-1", &refusal(minute), 0);
        let other = pool.next_pause("gw-2", &refusal(minute), 0);
        assert_eq!((first, other), (PAUSE_FIRST, PAUSE_FIRST * 2));
        let again = pool.next_pause("gw-1", &refusal(minute), 0);
        assert_eq!(again, Duration::from_mins(1));
        let mut pool = Pool::new(Instant::now());
        let mut next = |said, chance| pool.next_pause("gw-1", &refusal(said), chance);
        let pauses: Vec<_> = (0..8).map(|_| next(None, 0)).collect();
        assert_eq!(pauses[0], PAUSE_FIRST);
        assert!(pauses.is_sorted());
        assert_eq!(pauses[7], PAUSE_LAST);
        assert!(next(None, 999) > PAUSE_LAST);
        assert!(next(Some(u64::MAX), 999) > PAUSE_LAST);
    }

    #[test]
    fn only_what_depends_on_the_member_is_tried_elsewhere() {
        for code in [
            Code::Busy,
            Code::DeadlineUnreachable,
            Code::Draining,
            Code::NoModel,
            Code::Internal,
        ] {
            assert!(may_be_taken(&Refusal::new(code, String::new())));
        }
        for code in [
            Code::Invalid,
            Code::TooLarge,
            Code::Conflict,
            Code::ContextOverflow,
            Code::Unsupported,
        ] {
            assert!(!may_be_taken(&Refusal::new(code, String::new())));
        }
    }
}
