//! The final events of the dedup window: what a resent task is answered with. Bounded by age, count and
//! bytes; at the byte bound the oldest texts go first and their outcomes stay. Never judges a task.

use crate::job::Ticket;
use crate::wire::{Format, Key};
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

/// The bounds of the window.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    pub age_max: Duration,
    pub tasks_max: usize,
    pub bytes_max: usize,
}

/// What is known of a task that reached its end.
#[derive(Debug, Clone)]
pub struct Recalled {
    /// The run that said it.
    pub ticket: Ticket,
    /// Of the task as decoded.
    pub task_digest: [u8; 32],
    /// The final event's name.
    pub event: &'static str,
    /// Of its bytes: they are answered as they are, whatever form the question has next time.
    pub format: Format,
    pub bytes_len: usize,
    /// The payload; `None` once it had to go.
    pub bytes: Option<Vec<u8>>,
    pub at: Duration,
}

/// What a bound made us forget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gone {
    /// A final event's text; its outcome stays.
    Text(Ticket),
    /// All of a final event.
    Final(Ticket),
    /// A cancel whose task never came.
    Cancel(Key),
}

/// Final events by task.
#[derive(Debug)]
pub struct Recall {
    window: Window,
    tasks: HashMap<Key, Recalled>,
    /// Oldest first; a key is in it exactly once.
    order: VecDeque<Key>,
    /// How many of `order`'s oldest have lost their text.
    bare: usize,
    bytes: usize,
    gone: Vec<Gone>,
}

impl Recalled {
    pub fn new(
        ticket: Ticket,
        at: Duration,
        task_digest: [u8; 32],
        event: &'static str,
        format: Format,
        bytes: Vec<u8>,
    ) -> Self {
        Self {
            ticket,
            task_digest,
            event,
            format,
            bytes_len: bytes.len(),
            bytes: Some(bytes),
            at,
        }
    }
}

impl Recall {
    pub fn new(window: Window) -> Self {
        Self {
            window,
            tasks: HashMap::new(),
            order: VecDeque::new(),
            bare: 0,
            bytes: 0,
            gone: Vec::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Bytes of stored payloads.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What became of `key`, if that is within the window.
    pub fn get(&mut self, now: Duration, key: &Key) -> Option<&Recalled> {
        self.forget_old(now);
        self.tasks.get(key)
    }

    /// What bounds took since this was last asked.
    pub fn take_gone(&mut self) -> Vec<Gone> {
        std::mem::take(&mut self.gone)
    }

    /// Remembers a final event. Of one key the newest counts: an older one was forgotten, perhaps not yet on disk.
    pub fn put(&mut self, now: Duration, key: Key, recalled: Recalled) {
        self.forget_old(now);
        match self.tasks.get(&key) {
            Some(known) if known.ticket >= recalled.ticket => return,
            Some(_) => self.forget(&key),
            None => {}
        }
        while self.order.len() >= self.window.tasks_max {
            self.forget_oldest();
        }
        // Those without their text are the oldest: what is put back after a restart comes in that order.
        match &recalled.bytes {
            Some(bytes) => self.bytes += bytes.len(),
            None => self.bare = self.order.len() + 1,
        }
        self.order.push_back(key.clone());
        self.tasks.insert(key, recalled);
        while self.bytes > self.window.bytes_max {
            self.strip_oldest();
        }
    }

    fn strip_oldest(&mut self) {
        if let Some(recalled) = self
            .order
            .get(self.bare)
            .and_then(|key| self.tasks.get_mut(key))
        {
            recalled.bytes = None;
            self.bytes -= recalled.bytes_len;
            self.gone.push(Gone::Text(recalled.ticket));
        }
        self.bare += 1;
    }

    fn forget_oldest(&mut self) {
        if let Some(oldest) = self.order.front().cloned() {
            self.forget(&oldest);
        }
    }

    fn forget(&mut self, key: &Key) {
        let place = self.order.iter().position(|known| known == key);
        let (Some(place), Some(recalled)) = (place, self.tasks.remove(key)) else {
            return;
        };
        self.order.remove(place);
        self.gone.push(Gone::Final(recalled.ticket));
        if place < self.bare {
            self.bare -= 1;
        } else {
            self.bytes -= recalled.bytes_len;
        }
    }

    /// What is older than the window goes, also where nobody asks for it.
    pub fn forget_old(&mut self, now: Duration) {
        let age_max = self.window.age_max;
        let old = |r: &Recalled| now.saturating_sub(r.at) > age_max;
        while self
            .order
            .front()
            .and_then(|key| self.tasks.get(key))
            .is_some_and(old)
        {
            self.forget_oldest();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(i: u32) -> Key {
        Key {
            sender: "s".into(),
            task: i.to_string(),
        }
    }

    #[test]
    fn of_one_task_the_newest_end_counts() {
        let mut recall = Recall::new(Window {
            age_max: Duration::from_mins(1),
            tasks_max: 10,
            bytes_max: 100,
        });
        for ticket in [3, 7, 5] {
            let again = done(ticket, Duration::ZERO, ticket as usize);
            recall.put(Duration::ZERO, key(0), again);
        }
        let known = recall.get(Duration::ZERO, &key(0)).unwrap().ticket;
        assert_eq!((known, recall.len(), recall.bytes()), (Ticket(7), 1, 7));
        assert_eq!(recall.take_gone(), [Gone::Final(Ticket(3))]);
    }

    fn done(i: u32, at: Duration, len: usize) -> Recalled {
        let (ticket, text) = (Ticket(i.into()), vec![b'x'; len]);
        Recalled::new(ticket, at, [0; 32], "done", Format::Json, text)
    }

    #[test]
    fn texts_go_before_outcomes() {
        let mut recall = Recall::new(Window {
            age_max: Duration::from_mins(1),
            tasks_max: 10,
            bytes_max: 100,
        });
        for i in 0..3 {
            recall.put(Duration::ZERO, key(i), done(i, Duration::ZERO, 40));
        }
        let oldest = recall.get(Duration::ZERO, &key(0)).unwrap();
        assert_eq!(
            (oldest.bytes.is_none(), oldest.event, oldest.bytes_len),
            (true, "done", 40)
        );
        assert!(recall.get(Duration::ZERO, &key(2)).unwrap().bytes.is_some());
        assert_eq!(recall.take_gone(), [Gone::Text(Ticket(0))]);
        assert!(recall.get(Duration::from_secs(61), &key(2)).is_none());
        assert_eq!((recall.len(), recall.bytes()), (0, 0));
        let all = [0, 1, 2].map(|i| Gone::Final(Ticket(i)));
        assert_eq!(recall.take_gone(), all);
    }

    #[test]
    fn what_comes_back_without_its_text_counts_no_bytes() {
        let mut recall = Recall::new(Window {
            age_max: Duration::from_mins(1),
            tasks_max: 3,
            bytes_max: 100,
        });
        let bare = Recalled {
            bytes: None,
            ..done(0, Duration::ZERO, 90)
        };
        recall.put(Duration::ZERO, key(0), bare);
        for i in 1..4 {
            recall.put(Duration::ZERO, key(i), done(i, Duration::ZERO, 30));
        }
        assert_eq!((recall.len(), recall.bytes()), (3, 90));
        assert!(recall.get(Duration::ZERO, &key(1)).unwrap().bytes.is_some());
    }

    proptest! {
        #[test]
        fn bounds_hold_and_the_count_of_bytes_is_right(ops in proptest::collection::vec((0u32..30, 0usize..80, 0u64..20), 0..200)) {
            let mut recall = Recall::new(Window { age_max: Duration::from_secs(50), tasks_max: 7, bytes_max: 200 });
            let mut now = Duration::ZERO;
            for (i, len, pause) in ops {
                now += Duration::from_secs(pause);
                recall.put(now, key(i), done(i, now, len));
                let held: usize = recall.tasks.values().filter_map(|r| r.bytes.as_ref()).map(Vec::len).sum();
                prop_assert_eq!(held, recall.bytes());
                prop_assert!(held <= 200 && recall.len() <= 7);
                prop_assert_eq!(recall.order.len(), recall.tasks.len());
            }
        }
    }
}
