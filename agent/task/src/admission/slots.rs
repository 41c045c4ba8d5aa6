//! Who has a slot of the model: the next in turn when one is free, and when none is, one of a higher priority in the place of
//! one of a lower. Decides nothing about who waits where.

use super::pace::Size;
use super::queue::Turn;
use super::{Admission, Held};
use crate::Now;
use crate::job::{Outcome, Post, Product, Ticket};
use crate::limits::SUSPENDED_TASKS_MAX;
use crate::wire::{Body, Refusal, Task};
use std::time::Duration;

/// What became of a task that gave way.
#[derive(Debug, PartialEq, Eq)]
pub enum Suspended {
    /// It waits again. The model began with it so often without an end, not counting this time.
    Waiting { begun: u32 },
    /// It was cancelled meanwhile, or its deadline passed: its final event.
    Ended(Post),
}

impl<W> Admission<W> {
    /// There is a model: it runs so many tasks at a time, whose cache has so many tokens, and what waits is made ready for it.
    /// The posts are the final events of those that it doesn't take.
    pub fn equip(
        &mut self,
        now: Now,
        slots: usize,
        kv_tokens_max: usize,
        mut prepare: impl FnMut(&Task, W) -> Result<(W, Size), Refusal>,
    ) -> Vec<Post> {
        (self.rules.slots, self.rules.kv_tokens_max) = (slots, kv_tokens_max);
        let mut refused = Vec::new();
        self.queue.renew(|ticket, work| {
            let held = self.jobs.get_mut(&ticket)?;
            match prepare(&held.job.task, work) {
                Ok(work) => {
                    held.size = work.1;
                    Some(work)
                }
                Err(refusal) => {
                    refused.push((ticket, refusal));
                    None
                }
            }
        });
        let ended = refused
            .into_iter()
            .map(|(ticket, refusal)| self.close_job(now, ticket, Body::Failed(refusal)));
        ended.flatten().collect()
    }

    /// The next task to run, if there is room, and how often it is begun with this.
    pub fn next(&mut self, now: Now) -> Option<(Ticket, W, u32)> {
        let (_, _, size) = self.queue.first()?;
        if !self.room().takes(size) {
            return None;
        }
        let (ticket, work) = self.queue.pop()?;
        let held = self.jobs.get_mut(&ticket)?;
        held.job.start(now);
        held.begun += 1;
        Some((ticket, work, held.begun))
    }

    /// Running tasks that are to give way to the next in turn: put aside between two steps, and then handed to
    /// [`Self::suspend`]. Each is named once. One gives way to a higher priority until it has waited for as long as the
    /// difference counts, so that a stream of higher ones holds none up for ever.
    pub fn yielding(&mut self, now: Now) -> Vec<Ticket> {
        let Some((turn, priority, size)) = self.queue.first() else {
            return Vec::new();
        };
        let mut room = self.room();
        let jobs = self.jobs.values();
        let leaving = jobs.filter(|held| held.yields || held.is_stopping());
        leaving.for_each(|held| room.free(held.size));
        // What ran when slots were taken away goes on.
        if room.takes(size) || self.running() > self.slots() {
            return Vec::new();
        }
        let lower = |held: &&Held| held.may_yield(now, turn, priority);
        let mut lower: Vec<_> = self.jobs.values().filter(lower).collect();
        lower.sort_by_key(|held| std::cmp::Reverse((held.turn_at(now), held.job.ticket())));
        lower.truncate(SUSPENDED_TASKS_MAX.saturating_sub(self.suspended()));
        let mut chosen = Vec::new();
        for held in lower {
            room.free(held.size);
            chosen.push(held.job.ticket());
            if room.takes(size) {
                break;
            }
        }
        if !room.takes(size) {
            // Not even all of them would do.
            return Vec::new();
        }
        // However long they waited, the one that they make room for comes first.
        let behind = turn.later(Duration::from_millis(1));
        for ticket in &chosen {
            if let Some(held) = self.jobs.get_mut(ticket) {
                (held.yields, held.turn) = (true, held.turn.max(behind));
            }
        }
        chosen
    }

    /// The model put a task aside that was to give way; `product` is what it made of it until now.
    pub fn suspend(
        &mut self,
        now: Now,
        ticket: Ticket,
        work: W,
        product: Product,
    ) -> Option<Suspended> {
        let held = self.jobs.get_mut(&ticket)?;
        if held.job.stop.is_some() {
            let post = self.finish(now, ticket, Outcome::Stopped(product))?;
            return Some(Suspended::Ended(post));
        }
        held.job.suspend(now);
        held.yields = false;
        held.begun = held.begun.saturating_sub(1);
        held.product = product;
        let begun = held.begun;
        let work = (work, held.size);
        self.queue.put_back(held.turn, ticket, &held.job.task, work);
        Some(Suspended::Waiting { begun })
    }

    /// Those that were put aside, or are about to be.
    fn suspended(&self) -> usize {
        let jobs = self.jobs.values();
        jobs.filter(|held| held.yields || held.is_suspended())
            .count()
    }

    /// What is free beside those that run.
    fn room(&self) -> Room {
        let mut room = Room {
            slots: self.slots() as isize,
            kv_tokens: self.rules.kv_tokens_max as isize,
            is_idle: self.running() == 0,
        };
        let running = self.jobs.values().filter(|held| held.job.is_running());
        for held in running {
            room.slots -= 1;
            room.kv_tokens -= held.size.kv_tokens as isize;
        }
        room
    }
}

impl Held {
    /// Whether it gives its slot to one that waits.
    pub(super) fn may_yield(&self, now: Now, turn: Turn, priority: u8) -> bool {
        let is_lower = self.job.task.priority < priority && self.turn_at(now) > turn;
        is_lower && self.job.is_running() && !self.yields && self.job.stop.is_none()
    }

    /// Its turn, which waiting brings nearer and running does not.
    fn turn_at(&self, now: Now) -> Turn {
        self.turn.later(self.job.stint(now))
    }

    /// The model was told to let go of it.
    fn is_stopping(&self) -> bool {
        self.job.is_running() && self.job.stop.is_some()
    }

    fn is_suspended(&self) -> bool {
        !self.job.is_running() && self.job.was_suspended()
    }
}

/// Slots and cache; below zero where slots were taken away.
#[derive(Clone, Copy)]
struct Room {
    slots: isize,
    kv_tokens: isize,
    is_idle: bool,
}

impl Room {
    /// Whether a task may begin. An idle model takes any, and says so if it can't.
    fn takes(self, size: Size) -> bool {
        let has_room = self.slots > 0 && size.kv_tokens as isize <= self.kv_tokens;
        has_room || (self.is_idle && self.slots > 0)
    }

    fn free(&mut self, size: Size) {
        self.slots += 1;
        self.kv_tokens += size.kv_tokens as isize;
    }
}
