//! Decides who runs, who waits and who is refused: the bounded queue, deadlines, cancels, resent tasks, the
//! drain. Never touches bytes on their way in, sockets, clocks or the model; `W` is what the model needs to
//! run a task, and is only carried.

mod judge;
mod kept;
mod overtaken;
mod pace;
mod queue;
mod slots;

pub use kept::Kept;
pub use pace::Size;
pub use slots::Suspended;

use crate::Now;
use crate::job::{Job, Outcome, Post, Product, Stop, Ticket, stopped};
use crate::pressure::Level;
use crate::recall::{Recall, Recalled, Window};
use crate::wire::{Body, Code, Event, Key, Partial, Refusal, Refused, Reply, Task, Usage};
use judge::accepted;
use overtaken::Overtaken;
use pace::Pace;
use queue::{Queue, Turn};
use std::collections::HashMap;
use std::time::Duration;

/// How long a pool's cancel waits for a task that it overtook.
const OVERHEARD: Duration = Duration::from_mins(1);

/// The configured bounds and names.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The gateway's name, for events.
    pub gateway: String,
    /// Where its state is, said to those who may not have chosen it: a pool's requesters.
    pub base: Option<String>,
    /// Makes runs unique across restarts.
    pub run_prefix: String,
    pub queue_tasks_max: usize,
    pub queue_bytes_max: usize,
    /// Tasks that the model runs at the same time; none until [`Admission::equip`] where there is no model yet.
    pub slots: usize,
    /// Tokens that the cache of those that run holds together.
    pub kv_tokens_max: usize,
    /// How long a cancel without a task is remembered.
    pub deadline_max: Duration,
    pub window: Window,
    /// What one sender may, and those of whom something else was said.
    pub share: Share,
    pub shares: HashMap<String, Share>,
}

/// What one sender may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Tasks that he may have waiting; of the queue's bytes he may have as large a part as of its tasks.
    pub tasks_max: usize,
    /// His tasks of a higher priority have this one.
    pub priority_max: u8,
}

impl Rules {
    fn share(&self, sender: &str) -> Share {
        self.shares.get(sender).copied().unwrap_or(self.share)
    }
}

/// What became of an offered task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Accepted(Ticket),
    /// It is here already; its `accepted` was said again, to the newest reply topic. The flag says that this is
    /// another than before.
    Repeated {
        moved: bool,
    },
    /// It was finished before; its final event was said again.
    Recalled,
    Refused(Code),
    /// Its cancel was here first, or its deadline had passed.
    Ended(&'static str),
}

/// Whom a cancel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addressee {
    Gateway,
    /// All members.
    Pool,
}

/// What became of a cancel.
#[derive(Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// It waited; this is its final event.
    Waiting(Post),
    /// It runs: the model must stop it, and its final event follows.
    Running(Ticket),
    /// It has ended; this says so.
    AlreadyFinal(Post),
    /// Nobody knows it yet; this says so, and that it will be cancelled if it comes.
    Unknown(Post),
    /// Nobody here knows it; if it comes soon it will be cancelled.
    Overheard,
}

/// What the passing of time brings.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Due {
    pub posts: Vec<Post>,
    /// Running tasks to stop now.
    pub stop: Vec<Ticket>,
}

/// The queue and all that is known of tasks.
#[derive(Debug)]
pub struct Admission<W> {
    rules: Rules,
    queue: Queue<W>,
    jobs: HashMap<Ticket, Held>,
    tickets: HashMap<Key, Ticket>,
    recall: Recall,
    overtaken: Overtaken,
    /// Cancels that all members of the pool heard: mostly of tasks that another one has.
    overheard: Overtaken,
    pace: Pace,
    runs: u64,
    closed: Option<Refusal>,
    /// How far the agent has stepped back.
    level: Level,
}

/// An accepted task that has not ended.
#[derive(Debug)]
struct Held {
    job: Job,
    size: Size,
    /// Its place in the queue, while it waits.
    turn: Turn,
    /// How long after its acceptance it should be done; unknown before a first task was measured.
    eta: Option<Duration>,
    /// How often the model began with it, over restarts.
    begun: u32,
    /// The model was told to put it aside.
    yields: bool,
    /// What the model had made of it when it put it aside.
    product: Product,
}

impl<W> Admission<W> {
    pub fn new(rules: Rules) -> Self {
        let overtaken = Overtaken::new(rules.deadline_max);
        let recall = Recall::new(rules.window);
        Self {
            rules,
            overtaken,
            overheard: Overtaken::new(OVERHEARD),
            recall,
            queue: Queue::new(),
            jobs: HashMap::new(),
            tickets: HashMap::new(),
            pace: Pace::default(),
            runs: 0,
            closed: None,
            level: Level::default(),
        }
    }

    pub fn waiting(&self) -> usize {
        self.queue.len()
    }
    pub fn running(&self) -> usize {
        self.jobs.len() - self.queue.len()
    }
    /// Whether this task waits or runs.
    pub fn holds(&self, ticket: Ticket) -> bool {
        self.jobs.contains_key(&ticket)
    }
    #[cfg(test)]
    fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }
    /// Tasks and payload bytes of the dedup window.
    pub fn recalled(&self) -> (usize, usize) {
        (self.recall.len(), self.recall.bytes())
    }

    /// How far estimates of tasks' times were from the truth, as a moving average of shares of it.
    pub fn estimate_error(&self) -> Option<f64> {
        self.pace.error()
    }

    /// Judges a task. `prepare` makes it ready for the model, and is called only when nothing else speaks
    /// against it. The post is what its sender is told.
    pub fn offer(
        &mut self,
        now: Now,
        mut task: Task,
        prepare: impl FnOnce(&Task) -> Result<(W, Size), Refusal>,
    ) -> (Decision, Post) {
        let share = self.rules.share(&task.key.sender);
        task.priority = task.priority.min(share.priority_max);
        if let Some(known) = self.judge_known(now, &task) {
            return known;
        }
        let overheard = self.overheard.take(now.own, &task.key);
        if self.overtaken.take(now.own, &task.key) || overheard {
            return self.end(now, &task, Stop::Cancelled);
        }
        if task.deadline <= now.own {
            return self.end(now, &task, Stop::Expired);
        }
        let judged = self.judge_room(now, &task).and_then(|()| prepare(&task));
        let judged = judged.and_then(|work| self.judge_time(now, &task, work.1).map(|()| work));
        match judged {
            Ok(work) => self.accept(now, task, work),
            Err(refusal) => (
                Decision::Refused(refusal.code),
                self.reject(now, &task.key, &task.reply, refusal),
            ),
        }
    }

    /// Says why a message wasn't a task.
    pub fn refuse(&mut self, now: Now, refused: Refused) -> Post {
        self.reject(now, &refused.key, &refused.reply, refused.refusal)
    }

    fn accept(&mut self, now: Now, task: Task, work: (W, Size)) -> (Decision, Post) {
        let (ticket, run) = self.next_run();
        let post = self.admit(now, Job::new(task, ticket, run, now), 0, work);
        (Decision::Accepted(ticket), post)
    }

    /// Puts a task into the queue.
    fn admit(&mut self, now: Now, job: Job, begun: u32, work: (W, Size)) -> Post {
        let (ticket, size) = (job.ticket(), work.1);
        let service = self.pace.service(size).unwrap_or(Duration::from_secs(1));
        let share = service / self.slots().max(1) as u32;
        let turn = self.queue.put(now.own, ticket, &job.task, work, share);
        let priority = job.task.priority;
        let mut held = Held {
            job,
            size,
            turn,
            eta: self.eta(now, (turn, priority), ticket, size),
            begun,
            yields: false,
            product: Product::default(),
        };
        let ahead = self.queue.before(turn, ticket).count();
        let body = accepted(&self.rules, ahead as u64, held.eta);
        let post = held.job.say(&self.rules.gateway, now, body);
        self.tickets.insert(held.job.task.key.clone(), ticket);
        self.jobs.insert(ticket, held);
        post
    }

    /// An accepted task that has not ended.
    pub fn job(&self, ticket: Ticket) -> Option<&Job> {
        self.jobs.get(&ticket).map(|held| &held.job)
    }

    /// The model began with a task.
    pub fn started(&mut self, now: Now, ticket: Ticket) -> Option<Post> {
        self.say(ticket, now, Body::Started {})
    }

    /// The model made text. The flag says that the task must be stopped now: its answer outgrew its bound.
    pub fn text(&mut self, now: Now, ticket: Ticket, text: String) -> (Option<Post>, bool) {
        let Some(Held { job, .. }) = self.jobs.get_mut(&ticket) else {
            return (None, false);
        };
        let (post, too_large) = job.text(&self.rules.gateway, now, text);
        let stop = too_large && job.stop.is_none();
        if stop {
            job.stop = Some(Stop::TooLarge);
        }
        (post, stop)
    }

    /// The model is done with a task: its final event, which is remembered.
    pub fn finish(&mut self, now: Now, ticket: Ticket, outcome: Outcome) -> Option<Post> {
        let held = self.jobs.get(&ticket)?;
        if let Outcome::Done { product, .. } = &outcome {
            // One that was put aside had its prompt computed twice.
            if !held.job.was_suspended() {
                self.pace.learn(held.size, product);
            }
            if let Some(eta) = held.eta {
                self.pace.judge(eta, held.job.age(now));
            }
        }
        let body = held.job.outcome(outcome);
        self.close_job(now, ticket, body)
    }

    /// Stops `key` at its sender's wish. `reply` is where to say that there is nothing to stop; of a pool's cancel that is
    /// not said, since another member may have the task.
    pub fn cancel(&mut self, now: Now, key: &Key, reply: &Reply, to: Addressee) -> Cancelled {
        if let Some(&ticket) = self.tickets.get(key) {
            if let Some(post) = self.stop_waiting(now, ticket, Stop::Cancelled) {
                return Cancelled::Waiting(post);
            }
            if let Some(held) = self.jobs.get_mut(&ticket) {
                held.job.stop.get_or_insert(Stop::Cancelled);
            }
            return Cancelled::Running(ticket);
        }
        if self.recall.get(now.own, key).is_some() {
            let post = self.say_alone(now, key, reply, Body::AlreadyFinal {});
            return Cancelled::AlreadyFinal(post);
        }
        if to == Addressee::Pool {
            self.overheard.put(now.own, key.clone());
            return Cancelled::Overheard;
        }
        self.overtaken.put(now.own, key.clone());
        Cancelled::Unknown(self.say_alone(now, key, reply, Body::Unknown {}))
    }

    /// Expires what is past its deadline, and forgets answers and cancels that are old enough. Each running task is named once.
    pub fn tick(&mut self, now: Now) -> Due {
        self.recall.forget_old(now.own);
        self.overtaken.forget_old(now.own);
        let jobs = self.jobs.values().map(|held| &held.job);
        let late = jobs.filter(|job| job.task.deadline <= now.own && job.stop.is_none());
        let mut late: Vec<_> = late.map(Job::ticket).collect();
        late.sort_unstable();
        let mut due = Due::default();
        for ticket in late {
            if let Some(post) = self.stop_waiting(now, ticket, Stop::Expired) {
                due.posts.push(post);
            } else if let Some(held) = self.jobs.get_mut(&ticket) {
                held.job.stop = Some(Stop::Expired);
                due.stop.push(ticket);
            }
        }
        due
    }

    /// When [`Self::tick`] next has something to expire.
    pub fn next_deadline(&self) -> Option<Duration> {
        let jobs = self.jobs.values().map(|held| &held.job);
        let open = jobs.filter(|job| job.stop.is_none());
        open.map(|job| job.task.deadline).min()
    }

    /// Refuses new tasks with `refusal` from now on, or takes them again; what is here goes on.
    pub fn close(&mut self, refusal: Option<Refusal>) {
        self.closed = refusal;
    }

    /// Steps back, or does more again. What runs goes on.
    pub fn ease(&mut self, level: Level) {
        self.level = level;
    }

    /// Tasks that may run at the same time now.
    fn slots(&self) -> usize {
        match self.rules.slots {
            0 => 0,
            slots => self.level.of(slots),
        }
    }

    /// Tasks that may wait now.
    fn queue_tasks_max(&self) -> usize {
        match self.level {
            Level::Normal | Level::Eased => self.rules.queue_tasks_max,
            Level::Strained | Level::Critical => self.rules.queue_tasks_max / 2,
        }
    }

    /// Whether a final event's text went before the event was delivered.
    pub fn is_stripped(&mut self, now: Now, key: &Key, ticket: Ticket) -> bool {
        let recalled = self.recall.get(now.own, key);
        recalled.is_some_and(|recalled| recalled.ticket == ticket && recalled.bytes.is_none())
    }

    /// Ends a task that waits; `None` when it runs.
    fn stop_waiting(&mut self, now: Now, ticket: Ticket, why: Stop) -> Option<Post> {
        let waiting = |held: &&mut Held| !held.job.is_running();
        let held = self.jobs.get_mut(&ticket).filter(waiting)?;
        self.queue.remove(held.turn, ticket);
        held.job.stop = Some(why);
        let product = std::mem::take(&mut held.product);
        self.close_job(now, ticket, stopped(Some(why), product))
    }

    fn close_job(&mut self, now: Now, ticket: Ticket, body: Body) -> Option<Post> {
        let mut post = self.say(ticket, now, body)?;
        let Held { job, .. } = self.jobs.remove(&ticket)?;
        self.tickets.remove(&job.task.key);
        self.remember(now, job.task.digest, &mut post);
        Some(post)
    }

    fn remember(&mut self, now: Now, task_digest: [u8; 32], post: &mut Post) {
        post.remembered = Some(task_digest);
        let (format, bytes) = (post.reply.format, post.bytes.clone());
        let recalled = Recalled::new(post.ticket, now.own, task_digest, post.event, format, bytes);
        self.recall.put(now.own, post.key.clone(), recalled);
    }

    /// The final event of a task that never waited; remembered, as `cancelled` and `expired` are.
    fn end(&mut self, now: Now, task: &Task, why: Stop) -> (Decision, Post) {
        let reason = if why == Stop::Cancelled {
            "its cancel came first"
        } else {
            "its deadline had passed on arrival"
        };
        let partial = Partial {
            text: String::new(),
            usage: Usage::default(),
            reason: reason.into(),
        };
        let body = if why == Stop::Cancelled {
            Body::Cancelled(partial)
        } else {
            Body::Expired(partial)
        };
        let mut post = self.say_alone(now, &task.key, &task.reply, body);
        self.remember(now, task.digest, &mut post);
        (Decision::Ended(post.event), post)
    }

    fn reject(&mut self, now: Now, key: &Key, reply: &Reply, refusal: Refusal) -> Post {
        self.say_alone(now, key, reply, Body::Rejected(refusal))
    }

    /// The one event of a run of its own.
    pub fn say_alone(&mut self, now: Now, key: &Key, reply: &Reply, body: Body) -> Post {
        let (ticket, run) = self.next_run();
        let event = Event::new(key, &self.rules.gateway, &run, 0, now, body);
        Post::new(ticket, key, reply, &event)
    }

    fn say(&mut self, ticket: Ticket, now: Now, body: Body) -> Option<Post> {
        let job = &mut self.jobs.get_mut(&ticket)?.job;
        Some(job.say(&self.rules.gateway, now, body))
    }

    fn next_run(&mut self) -> (Ticket, String) {
        self.runs += 1;
        let ticket = Ticket(self.runs);
        (ticket, self.run(ticket))
    }

    fn run(&self, ticket: Ticket) -> String {
        format!("{}-{}", self.rules.run_prefix, ticket.0)
    }
}

#[cfg(test)]
mod tests;
