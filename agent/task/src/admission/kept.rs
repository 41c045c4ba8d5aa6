//! What a journal keeps of the gate's knowledge over a restart, and what the gate forgets meanwhile.

use super::Admission;
use super::pace::Size;
use crate::Now;
use crate::job::{Job, Post, Product, Stop, Ticket, stopped};
use crate::limits::BEGUN_MAX;
use crate::recall::{Gone, Recalled};
use crate::wire::{Body, Code, Key, Refusal, Task};
use std::time::Duration;

/// An accepted task as the journal kept it.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    pub ticket: Ticket,
    pub task: Task,
    /// How often the model began with it.
    pub begun: u32,
    /// Its sender cancelled it while it ran.
    pub cancelled: bool,
}

impl<W> Admission<W> {
    /// Takes a task up again that was accepted before a restart, under a new run: whatever the queue's bounds are by now.
    /// [`Self::equip`] makes it ready. `Err` is the final event of one that ends here.
    pub fn resume(&mut self, now: Now, kept: Kept, work: (W, Size)) -> Result<Post, Post> {
        let Kept {
            ticket,
            task,
            begun,
            cancelled,
        } = kept;
        self.runs = self.runs.max(ticket.0);
        let run = self.run(ticket);
        let mut job = Job::new(task, ticket, run, now);
        let nothing = Product::default();
        let ended = if cancelled {
            Err(stopped(Some(Stop::Cancelled), nothing))
        } else if job.task.deadline <= now.own {
            Err(stopped(Some(Stop::Expired), nothing))
        } else if begun >= BEGUN_MAX {
            let reason = format!("the gateway went down {begun} times while it ran this task");
            Err(Body::Failed(Refusal::new(Code::Internal, reason)))
        } else {
            Ok(work)
        };
        match ended {
            Ok(work) => Ok(self.admit(now, job, begun, work)),
            Err(body) => {
                let mut post = job.say(&self.rules.gateway, now, body);
                self.remember(now, job.task.digest, &mut post);
                Err(post)
            }
        }
    }

    /// Remembers a final event of before a restart. They come oldest first.
    pub fn recall(&mut self, now: Now, key: Key, recalled: Recalled) {
        self.runs = self.runs.max(recalled.ticket.0);
        self.recall.put(now.own, key, recalled);
    }

    /// Remembers a cancel of before a restart. They come oldest first.
    pub fn recall_cancel(&mut self, at: Duration, key: Key) {
        self.overtaken.put(at, key);
    }

    /// Names later runs than any that was named before a restart.
    pub fn count_from(&mut self, last: Ticket) {
        self.runs = self.runs.max(last.0);
    }

    /// What bounds made us forget since this was last asked.
    pub fn take_gone(&mut self) -> Vec<Gone> {
        let mut gone = self.recall.take_gone();
        gone.append(&mut self.overtaken.take_gone());
        // These are nobody's but ours.
        drop(self.overheard.take_gone());
        gone
    }

    /// Those that run, and how often each had been begun before.
    pub fn interrupted(&self) -> impl Iterator<Item = (Ticket, u32)> {
        let running = self.jobs.iter().filter(|(_, held)| held.job.is_running());
        running.map(|(ticket, held)| (*ticket, held.begun - 1))
    }
}
