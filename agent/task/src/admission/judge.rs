//! Whether a task may come in: one that is known, room, a machine that is hard pressed, time until its deadline. Changes nothing
//! but where a known task's answer goes.

use super::pace::Size;
use super::queue::Turn;
use super::{Admission, Decision, Held, Rules};
use crate::Now;
use crate::job::{Post, Ticket};
use crate::limits::PRIORITY_DEFAULT;
use crate::pressure::{CALM, Level};
use crate::wire::{Body, Code, Refusal, Reply, Task};
use std::time::Duration;

/// When one who found no room may try again: before anything was measured, and at least and at most.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_mins(1);

impl<W> Admission<W> {
    /// A task of this key that is here, or was.
    pub(super) fn judge_known(&mut self, now: Now, task: &Task) -> Option<(Decision, Post)> {
        if let Some(&ticket) = self.tickets.get(&task.key) {
            let (ahead, eta) = self.outlook(now, self.jobs.get(&ticket)?);
            let job = &mut self.jobs.get_mut(&ticket)?.job;
            if job.task.digest != task.digest {
                return Some(self.conflict(now, task));
            }
            // The newest reply topic counts: the sender may have reconnected elsewhere.
            let moved = job.task.reply != task.reply;
            job.task.reply = task.reply.clone();
            let body = accepted(&self.rules, ahead, eta);
            return Some((
                Decision::Repeated { moved },
                job.say(&self.rules.gateway, now, body),
            ));
        }
        let recalled = self.recall.get(now.own, &task.key)?;
        if recalled.task_digest != task.digest {
            return Some(self.conflict(now, task));
        }
        let Some(bytes) = recalled.bytes.clone() else {
            let reason = format!(
                "the task ended as {} with {} bytes, which are no longer kept: send it under a new id",
                recalled.event, recalled.bytes_len
            );
            let body = Body::Failed(Refusal::new(Code::Internal, reason));
            return Some((
                Decision::Recalled,
                self.say_alone(now, &task.key, &task.reply, body),
            ));
        };
        let (key, event) = (task.key.clone(), recalled.event);
        // Byte for byte what was said, so in the form in which it was said.
        let reply = Reply {
            format: recalled.format,
            ..task.reply.clone()
        };
        let (ticket, class) = (recalled.ticket, crate::job::Class::Final);
        Some((
            Decision::Recalled,
            Post {
                ticket,
                key,
                reply,
                event,
                class,
                bytes,
                remembered: Some(task.digest),
            },
        ))
    }

    fn conflict(&mut self, now: Now, task: &Task) -> (Decision, Post) {
        let reason = "another task with this id was sent before: use a new id".into();
        let refusal = Refusal::new(Code::Conflict, reason);
        (
            Decision::Refused(Code::Conflict),
            self.reject(now, &task.key, &task.reply, refusal),
        )
    }

    pub(super) fn judge_room(&self, now: Now, task: &Task) -> Result<(), Refusal> {
        if let Some(refusal) = &self.closed {
            return Err(refusal.clone());
        }
        self.judge_level(task)?;
        let busy = |reason: String, limit: usize| {
            let refusal = Refusal::new(Code::Busy, reason).with_limit(limit as u64);
            // When a slot is free, and with it a place in the queue.
            let running = |held: &&Held| held.job.is_running();
            let retry = self.end_of(now, running, std::iter::empty(), Size::default());
            let retry = retry.unwrap_or(RETRY).clamp(RETRY_MIN, RETRY_MAX);
            Err(Refusal {
                retry_after_ms: Some(retry.as_millis() as u64),
                ..refusal
            })
        };
        let (tasks, bytes) = (self.queue_tasks_max(), self.rules.queue_bytes_max);
        let (waiting, held) = (self.queue.len(), self.queue.bytes());
        // A free slot is room too: the queue may be configured to hold nothing.
        let is_free = self.jobs.len() < self.slots() + tasks;
        if waiting >= tasks && !is_free {
            let reason = format!("{waiting} tasks are waiting, as many as may");
            return busy(reason, tasks);
        }
        if held + task.bytes > bytes {
            let reason = format!("the waiting tasks hold {held} of {bytes} bytes");
            return busy(reason, bytes);
        }
        let (own, own_bytes) = self.queue.held_by(&task.key.sender);
        let (whole, share) = (
            self.rules.queue_tasks_max.max(1),
            self.rules.share(&task.key.sender).tasks_max,
        );
        // Of a queue that is half open, half.
        let most = (share * tasks).div_ceil(whole);
        if own >= most && self.jobs.len() >= self.slots() {
            let reason = format!("{own} tasks of this sender are waiting, as many as one may have");
            return busy(reason, most);
        }
        let most = (bytes as u64 * share as u64).div_ceil(whole as u64) as usize;
        if own > 0 && own_bytes + task.bytes > most {
            let reason = format!("this sender's waiting tasks hold {own_bytes} of {most} bytes");
            return busy(reason, most);
        }
        Ok(())
    }

    /// Whether a machine that is hard pressed takes such a task.
    fn judge_level(&self, task: &Task) -> Result<(), Refusal> {
        let what = match self.level {
            Level::Normal | Level::Eased => return Ok(()),
            Level::Strained if task.priority >= PRIORITY_DEFAULT => return Ok(()),
            Level::Strained => format!("tasks below priority {PRIORITY_DEFAULT}"),
            Level::Critical => "new tasks".into(),
        };
        let reason = format!("the gateway is hard pressed and takes no {what}: see its state");
        Err(Refusal {
            retry_after_ms: Some(CALM.as_millis() as u64),
            ..Refusal::new(Code::Busy, reason)
        })
    }

    /// Whether a task can be done by its deadline, as far as is known.
    pub(super) fn judge_time(&self, now: Now, task: &Task, size: Size) -> Result<(), Refusal> {
        let turn = self.queue.turn(now.own, task);
        let eta = self.eta(now, (turn, task.priority), Ticket(u64::MAX), size);
        match eta.filter(|eta| now.own + *eta > task.deadline) {
            None => Ok(()),
            Some(eta) => {
                let eta = eta.as_millis() as u64;
                let reason = format!("it would be done in about {eta} ms, after its deadline");
                Err(Refusal {
                    eta_ms: Some(eta),
                    ..Refusal::new(Code::DeadlineUnreachable, reason)
                })
            }
        }
    }

    /// How many wait before a task that is here, and how long from now until it should be done.
    pub(super) fn outlook(&self, now: Now, held: &Held) -> (u64, Option<Duration>) {
        if held.job.is_running() {
            let service = self.pace.service(held.size);
            let left = service.map(|all| all.saturating_sub(held.job.service(now)));
            return (0, left);
        }
        let ticket = held.job.ticket();
        let ahead = self.queue.before(held.turn, ticket).count();
        let turn = (held.turn, held.job.task.priority);
        let eta = self.eta(now, turn, ticket, held.size);
        (ahead as u64, eta)
    }

    /// How long from now until a task with that turn and priority should be done.
    pub(super) fn eta(
        &self,
        now: Now,
        (turn, priority): (Turn, u8),
        ticket: Ticket,
        size: Size,
    ) -> Option<Duration> {
        let stays = |held: &&Held| held.job.is_running() && !held.may_yield(now, turn, priority);
        self.end_of(now, stays, self.queue.before(turn, ticket), size)
    }

    fn end_of(
        &self,
        now: Now,
        stays: impl Fn(&&Held) -> bool,
        before: impl Iterator<Item = Size>,
        size: Size,
    ) -> Option<Duration> {
        let running = self.jobs.values().filter(stays);
        let running = running.map(|held| (held.size, held.job.service(now)));
        self.pace.finish(self.slots(), running, before, size)
    }
}

pub(super) fn accepted(rules: &Rules, ahead: u64, eta: Option<Duration>) -> Body {
    Body::Accepted {
        queue_position: ahead,
        eta_ms: eta.map(|eta| eta.as_millis() as u64),
        base: rules.base.clone(),
    }
}
