//! Lives at random, with restarts: what must hold whatever happens, and the map of agent/ARCHITECTURE.md.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

#[derive(Debug, Clone)]
enum Op {
    Offer(u8, u8, u64),
    Cancel(u8),
    Next,
    Finish(bool),
    /// One is told to give way.
    Yield,
    /// The model put one aside that was told to.
    Suspend,
    Pass(u64),
    /// The answer outgrows its bound.
    Outgrow,
    /// It was away for so many seconds.
    Restart(u64),
    /// There is a model, which takes the tasks that wait, or doesn't.
    Equip(bool),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        5 => (0u8..12, 0u8..10, 1u64..80).prop_map(|(id, p, d)| Op::Offer(id, p, d)),
        2 => (0u8..12).prop_map(Op::Cancel),
        4 => Just(Op::Next),
        4 => any::<bool>().prop_map(Op::Finish),
        3 => Just(Op::Yield),
        3 => Just(Op::Suspend),
        3 => (0u64..20).prop_map(Op::Pass),
        1 => Just(Op::Outgrow),
        1 => (0u64..20).prop_map(Op::Restart),
        1 => (0u8..5).prop_map(|n| Op::Equip(n > 0)),
    ];
    proptest::collection::vec(op, 0..120)
}

/// A gate, and what a journal would hold of it.
struct Life {
    rules: Rules,
    gate: Admission<()>,
    now: u64,
    open: HashMap<String, Kept>,
    finals: Vec<(Key, Recalled)>,
    running: Vec<Ticket>,
    yielding: Vec<Ticket>,
}

impl Life {
    fn new(rules: Rules) -> Self {
        Self {
            gate: Admission::new(rules.clone()),
            rules,
            now: 0,
            open: HashMap::new(),
            finals: Vec::new(),
            running: Vec::new(),
            yielding: Vec::new(),
        }
    }

    fn obey(&mut self, op: &Op) {
        match *op {
            Op::Offer(id, priority, seconds) => self.offer(&id.to_string(), priority, seconds),
            Op::Cancel(id) => self.cancel(&id.to_string()),
            Op::Next => {
                if let Some((ticket, (), begun)) = self.gate.next(at(self.now)) {
                    let kept = self.kept(ticket);
                    kept.begun += 1;
                    assert_eq!(kept.begun, begun);
                    self.running.push(ticket);
                }
            }
            Op::Finish(whole) => {
                if let Some(ticket) = self.running.pop() {
                    let nothing = Outcome::Stopped(Product::default());
                    let outcome = if whole { done("x") } else { nothing };
                    let post = self.gate.finish(at(self.now), ticket, outcome).unwrap();
                    self.end(&post);
                    assert!(self.gate.finish(at(self.now), ticket, done("x")).is_none());
                }
            }
            Op::Yield => {
                let more = self.gate.yielding(at(self.now));
                assert!(!more.iter().any(|ticket| self.yielding.contains(ticket)));
                self.yielding.extend(more);
            }
            Op::Suspend => {
                if let Some(ticket) = self.yielding.pop() {
                    self.suspend(ticket);
                }
            }
            Op::Pass(seconds) => {
                self.now += seconds;
                let due = self.gate.tick(at(self.now));
                due.posts.iter().for_each(|post| self.end(post));
                assert!(due.stop.iter().all(|t| self.running.contains(t)));
            }
            Op::Outgrow => {
                if let Some(&ticket) = self.running.first() {
                    let text = "x".repeat(limits::ANSWER_BYTES_MAX + 1);
                    self.gate.text(at(self.now), ticket, text);
                }
            }
            Op::Restart(seconds) => self.restart(seconds),
            Op::Equip(takes) => self.equip(takes),
        }
    }

    /// Or it was done before the model heard of it.
    fn suspend(&mut self, ticket: Ticket) {
        let ran = self.running.len();
        self.running.retain(|running| *running != ticket);
        let is_stopping = self.gate.job(ticket).is_some_and(|job| job.stop.is_some());
        let product = Product::default();
        match self.gate.suspend(at(self.now), ticket, (), product) {
            None => assert_eq!(self.running.len(), ran),
            Some(Suspended::Ended(post)) => {
                assert!(is_stopping);
                self.end(&post);
            }
            Some(Suspended::Waiting { begun }) => {
                assert!(!is_stopping);
                self.kept(ticket).begun = begun;
            }
        }
    }

    fn offer(&mut self, id: &str, priority: u8, seconds: u64) {
        let deadline = Duration::from_secs(self.now + seconds);
        let task = Task {
            priority,
            deadline,
            ..task(id)
        };
        let (decision, post) = self.gate.offer(at(self.now), task.clone(), |_| Ok(work()));
        if let Decision::Ended(_) = decision {
            self.remember(&post);
        }
        if let Decision::Accepted(ticket) = decision {
            let kept = Kept {
                ticket,
                task,
                begun: 0,
                cancelled: false,
            };
            assert!(self.open.insert(id.into(), kept).is_none());
        }
    }

    fn cancel(&mut self, id: &str) {
        match self
            .gate
            .cancel(at(self.now), &key(id), &reply("x"), Addressee::Gateway)
        {
            Cancelled::Waiting(post) => self.end(&post),
            Cancelled::Running(ticket) => {
                assert!(self.running.contains(&ticket));
                self.kept(ticket).cancelled = true;
            }
            Cancelled::Overheard => panic!("it was to the gateway"),
            Cancelled::AlreadyFinal(post) | Cancelled::Unknown(post) => {
                assert!(!self.open.contains_key(&post.key.task));
            }
        }
    }

    fn kept(&mut self, ticket: Ticket) -> &mut Kept {
        let mut all = self.open.values_mut();
        all.find(|kept| kept.ticket == ticket).unwrap()
    }

    fn end(&mut self, post: &Post) {
        assert_eq!(post.class, Class::Final);
        let kept = self.open.remove(&post.key.task);
        assert_eq!(kept.expect("it ends once").ticket, post.ticket);
        self.remember(post);
    }

    fn remember(&mut self, post: &Post) {
        let now = Duration::from_secs(self.now);
        let (format, bytes) = (post.reply.format, post.bytes.clone());
        let recalled = Recalled::new(post.ticket, now, [1; 32], post.event, format, bytes);
        self.finals.push((post.key.clone(), recalled));
    }

    fn equip(&mut self, takes: bool) {
        let refusal = || Refusal::context_overflow(9, 8);
        let prepare = |_: &Task, ()| takes.then(work).ok_or_else(refusal);
        let (slots, kv_tokens) = (self.rules.slots, self.rules.kv_tokens_max);
        let waiting = self.gate.waiting();
        let ended = self.gate.equip(at(self.now), slots, kv_tokens, prepare);
        assert_eq!(ended.len(), if takes { 0 } else { waiting });
        for post in &ended {
            self.end(post);
        }
    }

    fn restart(&mut self, seconds: u64) {
        self.now += seconds;
        let now = at(self.now);
        self.gate = Admission::new(self.rules.clone());
        self.running.clear();
        self.yielding.clear();
        for (key, recalled) in self.finals.clone() {
            self.gate.recall(now, key, recalled);
        }
        let mut open: Vec<_> = self.open.values().cloned().collect();
        open.sort_by_key(|kept| kept.ticket);
        for kept in open {
            let ticket = kept.ticket;
            let is_late = kept.task.deadline <= now.own;
            let must_end = kept.cancelled || kept.begun >= 5 || is_late;
            match self.gate.resume(now, kept, work()) {
                Ok(post) => assert_eq!((post.ticket, must_end), (ticket, false)),
                Err(post) => self.end(&post),
            }
        }
    }

    /// Where a task is, by the names of agent/ARCHITECTURE.md.
    fn state(&mut self, id: &str) -> &'static str {
        let job = self.gate.tickets.get(&key(id));
        match job.and_then(|ticket| self.gate.job(*ticket)) {
            Some(job) if !job.is_running() => "waiting",
            Some(job) if job.stop.is_some() => "stopping",
            Some(_) => "running",
            None => {
                let now = Duration::from_secs(self.now);
                let is_known = self.gate.recall.get(now, &key(id)).is_some();
                if is_known { "final" } else { "new" }
            }
        }
    }
}

/// The states of a task's life and what leads from one to another, as the map has them: from, whether by a restart, to.
fn on_the_map() -> BTreeSet<(&'static str, bool, &'static str)> {
    let map = include_str!("../../../../ARCHITECTURE.md");
    let section = map.split("## A task's life").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    let row = |line: &'static str| {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        (cells[0], cells[1].starts_with("a restart"), cells[2])
    };
    rows.map(row).collect()
}

#[test]
fn the_map_shows_the_transitions_that_there_are() {
    const IDS: [&str; 6] = ["0", "1", "2", "3", "4", "5"];
    let rules = Rules {
        slots: 2,
        queue_tasks_max: 3,
        share: share(3, 9),
        window: Window {
            age_max: Duration::from_mins(1),
            ..rules().window
        },
        ..rules()
    };
    let mut life = Life::new(rules);
    let mut seen = BTreeSet::new();
    let mut seed = 7u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    for _ in 0..40_000 {
        let op = match random(20) {
            0..5 => Op::Offer(random(6) as u8, random(10) as u8, 1 + random(40)),
            5..7 => Op::Cancel(random(6) as u8),
            7..10 => Op::Next,
            10..12 => Op::Finish(random(2) == 0),
            12 | 13 => Op::Pass(random(6)),
            14 => Op::Outgrow,
            15 | 16 => Op::Yield,
            17 | 18 => Op::Suspend,
            _ if random(2) == 0 => Op::Restart(random(6)),
            _ => Op::Equip(random(6) > 0),
        };
        let before = IDS.map(|id| life.state(id));
        life.obey(&op);
        let after = IDS.map(|id| life.state(id));
        let is_restart = matches!(op, Op::Restart(_));
        let moved = before.into_iter().zip(after).filter(|(a, b)| a != b);
        seen.extend(moved.map(|(from, to)| (from, is_restart, to)));
    }
    assert_eq!(seen, on_the_map());
}

proptest! {
    /// Whatever happens, restarts too, each accepted task gets exactly one final event, and the bounds hold.
    #[test]
    fn every_accepted_task_ends_exactly_once(ops in ops()) {
        let rules = Rules { slots: 2, queue_tasks_max: 3, queue_bytes_max: 350, share: share(3, 9), ..rules() };
        let mut life = Life::new(rules);
        for op in ops {
            life.obey(&op);
            let (gate, running) = (&life.gate, life.running.len());
            prop_assert!(gate.running() == running && running <= 2);
            // What ran before a restart waits again.
            prop_assert!(gate.waiting() <= 5 && gate.queue.bytes() <= 550);
            prop_assert_eq!(gate.waiting() + gate.running(), life.open.len());
            prop_assert_eq!(gate.is_idle(), life.open.is_empty());
        }
    }
}
