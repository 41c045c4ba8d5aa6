//! Cancels that came before their task. Bounded by count and age; the oldest goes first.

use crate::limits::CANCELS_MAX;
use crate::recall::Gone;
use crate::wire::Key;
use std::collections::VecDeque;
use std::time::Duration;

#[derive(Debug)]
pub(super) struct Overtaken {
    age_max: Duration,
    /// Oldest first. Searched in order: there are few, and each is looked for once per new task.
    keys: VecDeque<(Duration, Key)>,
    gone: Vec<Gone>,
}

impl Overtaken {
    pub(super) fn new(age_max: Duration) -> Self {
        Self {
            age_max,
            keys: VecDeque::new(),
            gone: Vec::new(),
        }
    }

    pub(super) fn put(&mut self, now: Duration, key: Key) {
        self.keys.retain(|(_, k)| *k != key);
        if self.keys.len() >= CANCELS_MAX {
            self.forget_oldest();
        }
        self.keys.push_back((now, key));
    }

    /// What bounds took since this was last asked.
    pub(super) fn take_gone(&mut self) -> Vec<Gone> {
        std::mem::take(&mut self.gone)
    }

    fn forget_oldest(&mut self) {
        let oldest = self.keys.pop_front();
        self.gone.extend(oldest.map(|(_, key)| Gone::Cancel(key)));
    }

    pub(super) fn forget_old(&mut self, now: Duration) {
        let age_max = self.age_max;
        let is_old = |(at, _): &(Duration, Key)| now.saturating_sub(*at) > age_max;
        while self.keys.front().is_some_and(is_old) {
            self.forget_oldest();
        }
    }

    /// Whether `key` was cancelled; the cancel is used up.
    pub(super) fn take(&mut self, now: Duration, key: &Key) -> bool {
        self.forget_old(now);
        let Some(at) = self.keys.iter().position(|(_, k)| k == key) else {
            return false;
        };
        self.keys.remove(at);
        true
    }
}
