//! Who has a slot of the model: the next in turn when one is free, and when none is, one of a higher priority in the place of
//! one of a lower. Decides nothing about who waits where.

use super::pace::Size;
use super::queue::Turn;
use super::{Admission, Held};
use crate::Now;
use crate::job::{Outcome, Post, Product, Ticket};
use crate::limits::SUSPENDED_TASKS_MAX;

/// What became of a task that gave way.
#[derive(Debug, PartialEq, Eq)]
pub enum Suspended {
    /// It waits again. The model began with it so often without an end, not counting this time.
    Waiting { begun: u32 },
    /// It was cancelled meanwhile, or its deadline passed: its final event.
    Ended(Post),
}

impl<W> Admission<W> {
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

    /// A running task that is to give way to the next in turn: put aside between two steps, and then handed to
    /// [`Self::suspend`]. Each is named once. A waiting task has the earlier turn only by its priority or by its age, so that a
    /// stream of higher ones holds none up for ever.
    pub fn yielding(&mut self) -> Option<Ticket> {
        let (turn, priority, size) = self.queue.first()?;
        let mut room = self.room();
        let leaving = self.jobs.values().filter(|held| held.yields);
        leaving.for_each(|held| room.free(held.size));
        if room.takes(size) || self.suspended() >= SUSPENDED_TASKS_MAX {
            return None;
        }
        let lower = |held: &&Held| held.may_yield(turn, priority);
        let mut all = room;
        let jobs = self.jobs.values();
        jobs.filter(lower).for_each(|held| all.free(held.size));
        if !all.takes(size) {
            return None;
        }
        let jobs = self.jobs.values_mut();
        let last = jobs
            .filter(|held| held.may_yield(turn, priority))
            .max_by_key(|held| (held.turn, held.job.ticket()))?;
        last.yields = true;
        Some(last.job.ticket())
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
    pub(super) fn may_yield(&self, turn: Turn, priority: u8) -> bool {
        let is_lower = self.job.task.priority < priority && self.turn > turn;
        is_lower && self.job.is_running() && !self.yields && self.job.stop.is_none()
    }

    fn is_suspended(&self) -> bool {
        !self.job.is_running() && self.job.was_suspended()
    }
}

/// Slots and cache; below zero where a task is larger than it said, or slots were taken away.
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
