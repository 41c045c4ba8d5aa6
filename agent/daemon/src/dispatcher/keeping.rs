//! What the dispatcher and the journal have with each other: what was kept is taken up, what is said is kept, and a disk
//! that refuses closes the gate.

use super::{Dispatcher, outgoing};
use crate::alarms::Alarm;
use crate::crash;
use crate::journal::{Change, Past, Written};
use crate::worker::Prepare;
use millwright_task::admission::Size;
use millwright_task::job::{Class, Post, Ticket};
use millwright_task::wire;

impl<P: Prepare> Dispatcher<P> {
    /// Takes up what the journal held: answers that were not delivered, tasks that had not ended and wait for the model.
    pub fn resume(&mut self, past: Past) {
        let now = self.parts.clock.now();
        let here = self.parts.clock.boot_id();
        let rebooted = past.stamp.is_some_and(|stamp| stamp.boot_id != here);
        self.admission.count_from(past.last);
        for (key, recalled) in past.finals {
            self.admission.recall(now, key, recalled);
        }
        for (at, key) in past.cancels {
            self.admission.recall_cancel(at, key);
        }
        let (answers, tasks) = (past.unsent.len(), past.open.len());
        if answers + tasks > 0 {
            tracing::info!(answers, tasks, "taken up from the journal");
        }
        for post in past.unsent {
            self.admission.count_from(post.ticket);
            self.send(post);
        }
        for (mut kept, seed) in past.open {
            crash::point("during-replay");
            if rebooted {
                // Power went, whatever it ran.
                kept.begun = 0;
            }
            let ticket = kept.ticket;
            // It is made ready when there is a model.
            let work = ((None, seed), Size::default());
            match self.admission.resume(now, kept, work) {
                Ok(post) => {
                    self.tally.accepted(now.own, ticket);
                    self.send(post);
                }
                Err(post) => self.conclude(None, post),
            }
        }
    }

    /// The journal's thread wrote, or could not.
    pub fn on_written(&mut self, written: Written) {
        match written {
            Written::Kept { mark, bytes } => {
                self.parts.journal.keep(mark, bytes);
                if self.trouble.take().is_some() {
                    tracing::info!("the journal can be written again");
                    self.alarms.clear(Alarm::Journal);
                    self.settle_gate();
                    self.say_state();
                }
            }
            Written::Trouble(why) => {
                if self.trouble.as_ref() != Some(&why) {
                    tracing::error!("the journal can't be written, and is tried again: {why}");
                    let now = self.parts.clock.now();
                    self.alarms.raise(now, Alarm::Journal, &why);
                    self.trouble = Some(why);
                    self.settle_gate();
                    self.say_state();
                }
            }
        }
    }

    /// The broker has an answer, or nobody will.
    pub(super) fn delivered(&mut self, key: &wire::Key, ticket: Ticket) {
        self.note(Change::Delivered(ticket));
        // Its text stayed until now.
        if self
            .admission
            .is_stripped(self.parts.clock.now(), key, ticket)
        {
            self.note(Change::Stripped(ticket));
        }
    }

    pub(super) fn note(&mut self, change: Change) {
        self.parts.journal.note(change);
    }

    /// Keeps what is said until it is delivered, and sends it. While the disk refuses, a refusal is also said at once:
    /// its sender can't wait for that.
    pub(super) fn say(&mut self, post: Post) {
        if self.trouble.is_some() && post.event == "rejected" {
            let _ = self.parts.link.publish(None, &outgoing(post.clone()));
        }
        let at = self.parts.clock.now().own;
        self.note(Change::Said {
            post: post.clone(),
            at,
        });
        self.send(Post {
            class: Class::Final,
            ..post
        });
    }
}
