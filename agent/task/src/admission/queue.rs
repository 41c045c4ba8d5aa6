//! Who waits, and in which order they run. Each task has a turn when it arrives, and who has the earliest runs next:
//!
//! - The tasks of one sender take turns one after the other, each as long as it should take. So who floods waits behind
//!   his own, and another's single task runs soon.
//! - Each step of priority puts the turn [`AGEING`] earlier. So whoever has waited that much longer counts as one higher,
//!   and none waits for ever.
//!
//! That is start-time fair queueing (Goyal, Vin, Cheng: 1996) with real time in the place of virtual time, which is enough
//! where tasks are refused that would come too late.

use super::pace::Size;
use crate::job::Ticket;
use crate::wire::Task;
use std::collections::BTreeMap;
use std::time::Duration;

/// A priority's worth of waiting.
const AGEING: Duration = Duration::from_secs(15);

/// A place in the order, the earliest first: milliseconds of the gateway's own time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn(i64);

impl Turn {
    pub(super) fn later(self, by: Duration) -> Self {
        Self(self.0 + by.as_millis() as i64)
    }
}

#[derive(Debug)]
struct Waiting<W> {
    work: W,
    size: Size,
    sender: String,
    priority: u8,
    bytes: usize,
    /// When the sender's next one of no higher priority may have its turn.
    until: i64,
}

/// The tasks that wait.
#[derive(Debug)]
pub(super) struct Queue<W> {
    waiting: BTreeMap<(Turn, Ticket), Waiting<W>>,
    bytes: usize,
}

impl<W> Queue<W> {
    pub(super) fn new() -> Self {
        Self {
            waiting: BTreeMap::new(),
            bytes: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Payload bytes of all.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many one sender has here, and their payload bytes.
    pub(super) fn held_by(&self, sender: &str) -> (usize, usize) {
        let own = self.waiting.values().filter(|w| w.sender == sender);
        own.fold((0, 0), |(n, bytes), w| (n + 1, bytes + w.bytes))
    }

    /// The turn that a task would have now.
    pub(super) fn turn(&self, now: Duration, task: &Task) -> Turn {
        let ageing = AGEING.as_millis() as i64 * i64::from(task.priority);
        Turn(self.begin(now, task) - ageing)
    }

    /// Puts a task into its turn, for about `service`.
    pub(super) fn put(
        &mut self,
        now: Duration,
        ticket: Ticket,
        task: &Task,
        work: (W, Size),
        service: Duration,
    ) -> Turn {
        let turn = self.turn(now, task);
        let until = self.begin(now, task) + service.as_millis() as i64;
        self.insert((turn, ticket), task, work, until);
        turn
    }

    /// Puts a task back into a turn that it has. Its sender's others had theirs beside it, and do.
    pub(super) fn put_back(&mut self, turn: Turn, ticket: Ticket, task: &Task, work: (W, Size)) {
        self.insert((turn, ticket), task, work, 0);
    }

    fn insert(&mut self, place: (Turn, Ticket), task: &Task, (work, size): (W, Size), until: i64) {
        self.bytes += task.bytes;
        let waiting = Waiting {
            work,
            size,
            sender: task.key.sender.clone(),
            priority: task.priority,
            bytes: task.bytes,
            until,
        };
        self.waiting.insert(place, waiting);
    }

    /// The next one to run: its turn, its priority and its size.
    pub(super) fn first(&self) -> Option<(Turn, u8, Size)> {
        let ((turn, _), waiting) = self.waiting.first_key_value()?;
        Some((*turn, waiting.priority, waiting.size))
    }

    /// The next one to run.
    pub(super) fn pop(&mut self) -> Option<(Ticket, W)> {
        let ((_, ticket), waiting) = self.waiting.pop_first()?;
        self.bytes -= waiting.bytes;
        Some((ticket, waiting.work))
    }

    /// Makes each one's work anew, in the turn that it has. Of whom nothing comes, leaves.
    pub(super) fn renew(&mut self, mut work: impl FnMut(Ticket, W) -> Option<(W, Size)>) {
        for (place, waiting) in std::mem::take(&mut self.waiting) {
            match work(place.1, waiting.work) {
                Some((work, size)) => {
                    let waiting = Waiting {
                        work,
                        size,
                        ..waiting
                    };
                    self.waiting.insert(place, waiting);
                }
                None => self.bytes -= waiting.bytes,
            }
        }
    }

    pub(super) fn remove(&mut self, turn: Turn, ticket: Ticket) {
        if let Some(waiting) = self.waiting.remove(&(turn, ticket)) {
            self.bytes -= waiting.bytes;
        }
    }

    /// The sizes of those before a turn, in order.
    pub(super) fn before(&self, turn: Turn, ticket: Ticket) -> impl Iterator<Item = Size> {
        self.waiting.range(..(turn, ticket)).map(|(_, w)| w.size)
    }

    /// Behind the sender's own of at least that priority, and never in the past.
    fn begin(&self, now: Duration, task: &Task) -> i64 {
        let own = |w: &&Waiting<W>| w.sender == task.key.sender && w.priority >= task.priority;
        let last = self.waiting.values().filter(own).map(|w| w.until).max();
        last.unwrap_or_default().max(now.as_millis() as i64)
    }
}
