//! Decides who runs, who waits and who is refused: the bounded queue, deadlines, cancels, resent tasks, the
//! drain. Never touches bytes on their way in, sockets, clocks or the model; `W` is what the model needs to
//! run a task, and is only carried.

mod overtaken;

use crate::Now;
use crate::job::{Job, Outcome, Post, Product, Stop, Ticket, stopped};
use crate::limits;
use crate::recall::{Gone, Recall, Recalled, Window};
use crate::wire::{Body, Code, Event, Key, Partial, Refusal, Refused, Reply, Task, Usage};
use overtaken::Overtaken;
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// The configured bounds and names.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The gateway's name, for events.
    pub gateway: String,
    /// Makes runs unique across restarts.
    pub run_prefix: String,
    pub queue_tasks_max: usize,
    pub queue_bytes_max: usize,
    /// Tasks that the model runs at the same time.
    pub slots: usize,
    /// How long a cancel without a task is remembered.
    pub deadline_max: Duration,
    pub window: Window,
    /// Caps on priority by sender.
    pub priority_max: HashMap<String, u8>,
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
}

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
    /// In the order in which they will run: higher priority first, then first come.
    waiting: BTreeMap<(Reverse<u8>, Ticket), W>,
    waiting_bytes: usize,
    jobs: HashMap<Ticket, Job>,
    tickets: HashMap<Key, Ticket>,
    recall: Recall,
    overtaken: Overtaken,
    /// Moving average of a task's time in the model.
    service: Option<Duration>,
    runs: u64,
    closed: Option<Refusal>,
}

impl<W> Admission<W> {
    pub fn new(rules: Rules) -> Self {
        let overtaken = Overtaken::new(rules.deadline_max);
        let recall = Recall::new(rules.window);
        Self {
            rules,
            overtaken,
            recall,
            waiting: BTreeMap::new(),
            waiting_bytes: 0,
            jobs: HashMap::new(),
            tickets: HashMap::new(),
            service: None,
            runs: 0,
            closed: None,
        }
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
    pub fn running(&self) -> usize {
        self.jobs.len() - self.waiting.len()
    }
    /// Whether this task waits or runs.
    pub fn holds(&self, ticket: Ticket) -> bool {
        self.jobs.contains_key(&ticket)
    }
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }
    /// Tasks and payload bytes of the dedup window.
    pub fn recalled(&self) -> (usize, usize) {
        (self.recall.len(), self.recall.bytes())
    }

    /// Judges a task. `prepare` makes it ready for the model, and is called only when nothing else speaks
    /// against it. The post is what its sender is told.
    pub fn offer(
        &mut self,
        now: Now,
        mut task: Task,
        prepare: impl FnOnce(&Task) -> Result<W, Refusal>,
    ) -> (Decision, Post) {
        let cap = self.rules.priority_max.get(&task.key.sender).copied();
        task.priority = task.priority.min(cap.unwrap_or(limits::PRIORITY_MAX));
        if let Some(known) = self.judge_known(now, &task) {
            return known;
        }
        if self.overtaken.take(now.own, &task.key) {
            return self.end(now, &task, Stop::Cancelled);
        }
        if task.deadline <= now.own {
            return self.end(now, &task, Stop::Expired);
        }
        match self.judge_room(now, &task).and_then(|()| prepare(&task)) {
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

    /// A task of this key that is here, or was.
    fn judge_known(&mut self, now: Now, task: &Task) -> Option<(Decision, Post)> {
        if let Some(&ticket) = self.tickets.get(&task.key) {
            let job = self.jobs.get(&ticket)?;
            let (ahead, eta) = self.outlook(
                if job.is_running() {
                    u8::MAX
                } else {
                    job.task.priority
                },
                ticket,
            );
            let job = self.jobs.get_mut(&ticket)?;
            if job.task.digest != task.digest {
                return Some(self.conflict(now, task));
            }
            // The newest reply topic counts: the sender may have reconnected elsewhere.
            let moved = job.task.reply != task.reply;
            job.task.reply = task.reply.clone();
            let body = Body::Accepted {
                queue_position: ahead,
                eta_ms: eta,
            };
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
        let (key, reply, event) = (task.key.clone(), task.reply.clone(), recalled.event);
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

    fn judge_room(&self, now: Now, task: &Task) -> Result<(), Refusal> {
        if let Some(refusal) = &self.closed {
            return Err(refusal.clone());
        }
        let retry = self.service.unwrap_or(Duration::from_secs(1)).as_millis() as u64;
        let busy = |reason: String, limit: usize| {
            let refusal = Refusal::new(Code::Busy, reason).with_limit(limit as u64);
            Err(Refusal {
                retry_after_ms: Some(retry),
                ..refusal
            })
        };
        let (tasks, bytes) = (self.rules.queue_tasks_max, self.rules.queue_bytes_max);
        // A free slot is room too: the queue may be configured to hold nothing.
        if self.waiting.len() >= tasks && self.jobs.len() >= self.rules.slots + tasks {
            return busy(
                format!("{} tasks are waiting, as many as may", self.waiting.len()),
                tasks,
            );
        }
        if self.waiting_bytes + task.bytes > bytes {
            return busy(
                format!(
                    "the waiting tasks hold {} of {bytes} bytes",
                    self.waiting_bytes
                ),
                bytes,
            );
        }
        let ahead = self
            .waiting
            .range(..(Reverse(task.priority), Ticket(u64::MAX)))
            .count();
        if let Some(wait) = self
            .wait(ahead)
            .filter(|wait| now.own + *wait > task.deadline)
        {
            let eta = wait.as_millis() as u64;
            let reason = format!("it would start in about {eta} ms, after its deadline");
            return Err(Refusal {
                eta_ms: Some(eta),
                ..Refusal::new(Code::DeadlineUnreachable, reason)
            });
        }
        Ok(())
    }

    fn accept(&mut self, now: Now, task: Task, work: W) -> (Decision, Post) {
        let (ticket, run) = self.next_run();
        let post = self.admit(now, Job::new(task, ticket, run, now), work);
        (Decision::Accepted(ticket), post)
    }

    /// Puts a task into the queue.
    fn admit(&mut self, now: Now, mut job: Job, work: W) -> Post {
        let (ticket, priority) = (job.ticket(), job.task.priority);
        let (ahead, eta) = self.outlook(priority, ticket);
        let body = Body::Accepted {
            queue_position: ahead,
            eta_ms: eta,
        };
        let post = job.say(&self.rules.gateway, now, body);
        self.waiting_bytes += job.task.bytes;
        self.waiting.insert((Reverse(priority), ticket), work);
        self.tickets.insert(job.task.key.clone(), ticket);
        self.jobs.insert(ticket, job);
        post
    }

    /// Takes a task up again that was accepted before a restart, under a new run: whatever the queue's bounds are by now.
    /// `Err` is the final event of one that ends here.
    pub fn resume(
        &mut self,
        now: Now,
        kept: Kept,
        prepare: impl FnOnce(&Task) -> Result<W, Refusal>,
    ) -> Result<Post, Post> {
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
        } else if begun >= limits::BEGUN_MAX {
            let reason = format!("the gateway went down {begun} times while it ran this task");
            Err(Body::Failed(Refusal::new(Code::Internal, reason)))
        } else {
            prepare(&job.task).map_err(Body::Failed)
        };
        match ended {
            Ok(work) => Ok(self.admit(now, job, work)),
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
        gone
    }

    /// The next task to run, if a slot is free.
    pub fn next(&mut self, now: Now) -> Option<(Ticket, W)> {
        if self.running() >= self.rules.slots {
            return None;
        }
        let ((_, ticket), work) = self.waiting.pop_first()?;
        let job = self.jobs.get_mut(&ticket)?;
        self.waiting_bytes -= job.task.bytes;
        job.start(now);
        Some((ticket, work))
    }

    /// A running task.
    pub fn job(&self, ticket: Ticket) -> Option<&Job> {
        self.jobs.get(&ticket)
    }

    /// The model began with a task.
    pub fn started(&mut self, now: Now, ticket: Ticket) -> Option<Post> {
        self.say(ticket, now, Body::Started {})
    }

    /// The model made text. The flag says that the task must be stopped now: its answer outgrew its bound.
    pub fn text(&mut self, now: Now, ticket: Ticket, text: String) -> (Option<Post>, bool) {
        let Some(job) = self.jobs.get_mut(&ticket) else {
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
        let job = self.jobs.get(&ticket)?;
        let service = job.service(now);
        let whole = matches!(outcome, Outcome::Done { .. });
        let body = job.outcome(now, outcome);
        if whole {
            self.service = Some(self.service.map_or(service, |s| (s * 3 + service) / 4));
        }
        self.close_job(now, ticket, body)
    }

    /// Stops `key` at its sender's wish. `reply` is where to say that there is nothing to stop.
    pub fn cancel(&mut self, now: Now, key: &Key, reply: &Reply) -> Cancelled {
        if let Some(&ticket) = self.tickets.get(key) {
            if let Some(post) = self.stop_waiting(now, ticket, Stop::Cancelled) {
                return Cancelled::Waiting(post);
            }
            if let Some(job) = self.jobs.get_mut(&ticket) {
                job.stop.get_or_insert(Stop::Cancelled);
            }
            return Cancelled::Running(ticket);
        }
        if self.recall.get(now.own, key).is_some() {
            let post = self.say_alone(now, key, reply, Body::AlreadyFinal {});
            return Cancelled::AlreadyFinal(post);
        }
        self.overtaken.put(now.own, key.clone());
        Cancelled::Unknown(self.say_alone(now, key, reply, Body::Unknown {}))
    }

    /// Expires what is past its deadline. Each running task is named once.
    pub fn tick(&mut self, now: Now) -> Due {
        let late = |job: &&Job| job.task.deadline <= now.own && job.stop.is_none();
        let mut late: Vec<_> = self.jobs.values().filter(late).map(Job::ticket).collect();
        late.sort_unstable();
        let mut due = Due::default();
        for ticket in late {
            if let Some(post) = self.stop_waiting(now, ticket, Stop::Expired) {
                due.posts.push(post);
            } else if let Some(job) = self.jobs.get_mut(&ticket) {
                job.stop = Some(Stop::Expired);
                due.stop.push(ticket);
            }
        }
        due
    }

    /// When [`Self::tick`] next has something to do.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.jobs
            .values()
            .filter(|job| job.stop.is_none())
            .map(|job| job.task.deadline)
            .min()
    }

    /// Refuses new tasks with `refusal` from now on; what is here goes on.
    pub fn close(&mut self, refusal: Refusal) {
        self.closed = Some(refusal);
    }

    /// Ends a task that waits; `None` when it runs.
    fn stop_waiting(&mut self, now: Now, ticket: Ticket, why: Stop) -> Option<Post> {
        let job = self.jobs.get_mut(&ticket).filter(|job| !job.is_running())?;
        self.waiting.remove(&(Reverse(job.task.priority), ticket));
        self.waiting_bytes -= job.task.bytes;
        job.stop = Some(why);
        self.close_job(now, ticket, stopped(Some(why), Product::default()))
    }

    fn close_job(&mut self, now: Now, ticket: Ticket, body: Body) -> Option<Post> {
        let mut post = self.say(ticket, now, body)?;
        let job = self.jobs.remove(&ticket)?;
        self.tickets.remove(&job.task.key);
        self.remember(now, job.task.digest, &mut post);
        Some(post)
    }

    fn remember(&mut self, now: Now, task_digest: [u8; 32], post: &mut Post) {
        post.remembered = Some(task_digest);
        let bytes = post.bytes.clone();
        let recalled = Recalled::new(post.ticket, now.own, task_digest, post.event, bytes);
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
        Some(
            self.jobs
                .get_mut(&ticket)?
                .say(&self.rules.gateway, now, body),
        )
    }

    fn next_run(&mut self) -> (Ticket, String) {
        self.runs += 1;
        let ticket = Ticket(self.runs);
        (ticket, self.run(ticket))
    }

    fn run(&self, ticket: Ticket) -> String {
        format!("{}-{}", self.rules.run_prefix, ticket.0)
    }

    /// How many wait before a task of this priority, and in how many milliseconds it should be done.
    fn outlook(&self, priority: u8, ticket: Ticket) -> (u64, Option<u64>) {
        let ahead = self.waiting.range(..(Reverse(priority), ticket)).count();
        let eta = self
            .wait(ahead)
            .zip(self.service)
            .map(|(wait, service)| (wait + service).as_millis() as u64);
        (ahead as u64, eta)
    }

    /// The time until a slot is free for a task with `ahead` before it; unknown until one task was timed.
    fn wait(&self, ahead: usize) -> Option<Duration> {
        let rounds = (self.running() + ahead) / self.rules.slots.max(1);
        // On average, those that run are half done.
        Some(self.service? * (2 * rounds as u32).saturating_sub(1) / 2)
    }
}

#[cfg(test)]
#[path = "admission/tests.rs"]
mod tests;
