//! One accepted task's life: waiting, running, final. Numbers its events; decides nothing about others.

use crate::Now;
use crate::limits::ANSWER_BYTES_MAX;
use crate::wire::{
    Body, Code, Event, Finish, Key, Partial, Provenance, Refusal, Reply, Task, Timing, Usage,
};
use std::time::Duration;

/// How long an event must be kept and how it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// At least once.
    Progress,
    /// At most once: the final event holds the whole text.
    Delta,
    /// At least once, and again for a resent task.
    Final,
}

/// An event on its way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Post {
    /// The run that says it.
    pub ticket: Ticket,
    pub key: Key,
    pub reply: Reply,
    /// Its name, for the user property.
    pub event: &'static str,
    pub class: Class,
    pub bytes: Vec<u8>,
    /// The task's digest, where the dedup window remembers this event.
    pub remembered: Option<[u8; 32]>,
}

impl Post {
    /// `event` in the form its reader asked for.
    pub fn new(ticket: Ticket, key: &Key, reply: &Reply, event: &Event) -> Self {
        let class = match &event.body {
            Body::Delta { .. } => Class::Delta,
            body if body.is_final() => Class::Final,
            _ => Class::Progress,
        };
        let bytes = reply.format.encode(event);
        Self {
            ticket,
            key: key.clone(),
            reply: reply.clone(),
            event: event.body.name(),
            class,
            bytes,
            remembered: None,
        }
    }
}

/// Names one run: an acceptance, a refusal, a resumption, whatever is said once. Rises with each, over restarts too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Ticket(pub u64);

/// Why a running task was told to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    Cancelled,
    Expired,
    TooLarge,
}

/// How the model left a task.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Done {
        finish: Finish,
        product: Product,
        provenance: Provenance,
    },
    /// It was stopped by us; the reason is the job's.
    Stopped(Product),
    Failed(Refusal),
}

/// What the model made of a task.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Product {
    pub text: String,
    pub usage: Usage,
    pub prefill: Duration,
    pub decode: Duration,
}

/// An accepted task.
#[derive(Debug)]
pub struct Job {
    pub task: Task,
    ticket: Ticket,
    run: String,
    seq: u64,
    accepted: Duration,
    is_running: bool,
    was_suspended: bool,
    /// When it began to wait, or to run.
    since: Duration,
    /// How long it waited and ran until then.
    waited: Duration,
    served: Duration,
    /// Bytes of the answer that went out as deltas, or would have.
    offset: usize,
    pub stop: Option<Stop>,
}

impl Job {
    pub fn new(task: Task, ticket: Ticket, run: String, now: Now) -> Self {
        Self {
            task,
            ticket,
            run,
            seq: 0,
            accepted: now.own,
            is_running: false,
            was_suspended: false,
            since: now.own,
            waited: Duration::ZERO,
            served: Duration::ZERO,
            offset: 0,
            stop: None,
        }
    }

    pub fn ticket(&self) -> Ticket {
        self.ticket
    }

    pub fn is_running(&self) -> bool {
        self.is_running
    }

    /// It left the queue for the model.
    pub fn start(&mut self, now: Now) {
        self.waited += now.own.saturating_sub(self.since);
        (self.is_running, self.since) = (true, now.own);
    }

    /// It left the model for the queue.
    pub fn suspend(&mut self, now: Now) {
        self.served = self.service(now);
        (self.is_running, self.since) = (false, now.own);
        self.was_suspended = true;
    }

    /// Whether it went back to the queue once.
    pub fn was_suspended(&self) -> bool {
        self.was_suspended
    }

    /// Time since it was accepted.
    pub fn age(&self, now: Now) -> Duration {
        now.own.saturating_sub(self.accepted)
    }

    /// Time in the model so far.
    pub fn service(&self, now: Now) -> Duration {
        self.served + self.stint(now)
    }

    /// Time in the slot that it has.
    pub fn stint(&self, now: Now) -> Duration {
        let running = self.is_running.then(|| now.own.saturating_sub(self.since));
        running.unwrap_or_default()
    }

    /// The next event of this run.
    pub fn say(&mut self, gateway: &str, now: Now, body: Body) -> Post {
        let event = Event::new(&self.task.key, gateway, &self.run, self.seq, now, body);
        self.seq += 1;
        Post::new(self.ticket, &self.task.key, &self.task.reply, &event)
    }

    /// New text of the answer: a delta where the sender wants them. Says to stop when the answer outgrows
    /// its bound.
    pub fn text(&mut self, gateway: &str, now: Now, text: String) -> (Option<Post>, bool) {
        let offset = self.offset as u64;
        self.offset += text.len();
        let too_large = self.offset > ANSWER_BYTES_MAX;
        let post = (self.task.stream && !too_large)
            .then(|| self.say(gateway, now, Body::Delta { text, offset }));
        (post, too_large)
    }

    /// The body of the final event.
    pub fn outcome(&self, outcome: Outcome) -> Body {
        match outcome {
            Outcome::Failed(refusal) => Body::Failed(refusal),
            Outcome::Done { product, .. } if product.text.len() > ANSWER_BYTES_MAX => too_large(),
            Outcome::Done {
                finish,
                product,
                provenance,
            } => {
                let timing = self.timing(&product);
                Body::Done {
                    text: product.text,
                    finish,
                    usage: product.usage,
                    timing,
                    provenance,
                }
            }
            Outcome::Stopped(product) => stopped(self.stop, product),
        }
    }

    fn timing(&self, product: &Product) -> Timing {
        let seconds = product.decode.as_secs_f64();
        let rate = if seconds > 0.0 {
            // The first token is the prefill's.
            product.usage.generated_tokens.saturating_sub(1) as f64 / seconds
        } else {
            0.0
        };
        Timing {
            queue_ms: self.waited.as_millis() as u64,
            prefill_ms: product.prefill.as_millis() as u64,
            decode_ms: product.decode.as_millis() as u64,
            tokens_per_s: (rate * 100.0).round() / 100.0,
        }
    }
}

/// The final event of a task that was stopped.
pub(crate) fn stopped(stop: Option<Stop>, product: Product) -> Body {
    let partial = |reason: &str| Partial {
        text: product.text,
        usage: product.usage,
        reason: reason.to_owned(),
    };
    match stop {
        Some(Stop::Cancelled) => Body::Cancelled(partial("its sender cancelled it")),
        Some(Stop::Expired) => Body::Expired(partial("its deadline passed")),
        Some(Stop::TooLarge) => too_large(),
        None => Body::Failed(Refusal::new(
            Code::Internal,
            "the model stopped without being told to".into(),
        )),
    }
}

fn too_large() -> Body {
    let reason = format!("the answer grew beyond {ANSWER_BYTES_MAX} bytes");
    Body::Failed(Refusal::new(Code::TooLarge, reason).with_limit(ANSWER_BYTES_MAX as u64))
}
