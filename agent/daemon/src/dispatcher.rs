//! What to do with each message, report and signal: admission decides, the journal keeps, the outbox sends.
//! Waits for nothing: every call returns at once, and [`Dispatcher::pump`] moves on what can move.

mod sayings;

use crate::broker::{Link, Message, Outgoing, Signal};
use crate::card::{Model, State};
use crate::clock::{Clock, random};
use crate::config::Config;
use crate::intake::{self, Wish};
use crate::journal::{Journal, Record};
use crate::outbox::{Outbox, Purpose};
use crate::tally::Tally;
use crate::worker::{Command, Prepare, Report, Work};
use anyhow::Result;
use millwright_engine::{Completion, Finish};
use millwright_task::admission::{Admission, Cancelled, Decision, Due, Rules};
use millwright_task::job::{Class, Outcome, Post, Product, Ticket};
use millwright_task::limits::{ANSWER_BYTES_MAX, SEED_MAX};
use millwright_task::recall::Window;
use millwright_task::wire::{self, Bounds, Code, Decoder, Provenance, Refusal, Reply, Usage};
use rumqttc::v5::mqttbytes::QoS;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// What the dispatcher is given to work with.
pub struct Parts<P: Prepare> {
    pub config: Arc<Config>,
    pub clock: Clock,
    pub model: Model,
    pub preparer: P,
    /// Tasks at the same time.
    pub slots: usize,
    /// Tokens that one task may take.
    pub context: usize,
    pub journal: Box<dyn Journal>,
    pub link: Link,
    pub commands: mpsc::Sender<Command<P::Work>>,
}

/// The agent's state between two events.
pub struct Dispatcher<P: Prepare> {
    parts: Parts<P>,
    decoder: Decoder,
    admission: Admission<(P::Work, u64)>,
    outbox: Outbox,
    tally: Tally,
    /// Text not yet sent, per running task that streams.
    texts: BTreeMap<Ticket, String>,
    seeds: HashMap<Ticket, u64>,
    /// Running tasks that the worker was told to stop: told once, so that its channel never fills.
    stopping: HashSet<Ticket>,
    state: (State, String),
    subscribed: bool,
    connections: u64,
}

impl<P: Prepare> Dispatcher<P> {
    pub fn new(parts: Parts<P>) -> Self {
        let (config, tasks) = (&parts.config, &parts.config.tasks);
        let decoder = Decoder {
            base: config.base.clone(),
            rules: config.reply_rules.clone(),
            bounds: Bounds {
                payload_bytes_max: tasks.payload_bytes_max,
                tokens_default: tasks.tokens_default,
                tokens_max: tasks.tokens_max,
                deadline_default: tasks.deadline_default,
                deadline_max: tasks.deadline_max,
            },
        };
        let admission = Admission::new(Rules {
            gateway: config.gateway.name.clone(),
            run_prefix: format!("{:08x}", random() as u32),
            queue_tasks_max: tasks.queue_max,
            queue_bytes_max: millwright_task::limits::QUEUE_BYTES_MAX,
            slots: parts.slots,
            deadline_max: tasks.deadline_max,
            window: Window {
                age_max: tasks.dedup_window,
                tasks_max: tasks.dedup_tasks_max,
                bytes_max: tasks.dedup_bytes_max,
            },
            priority_max: tasks.priority_max.clone(),
        });
        Self {
            parts,
            decoder,
            admission,
            outbox: Outbox::default(),
            tally: Tally::default(),
            texts: BTreeMap::new(),
            seeds: HashMap::new(),
            stopping: HashSet::new(),
            state: (State::Online, String::new()),
            subscribed: false,
            connections: 0,
        }
    }

    /// Whether another message may be taken in.
    pub fn has_room(&self) -> bool {
        self.outbox.has_room()
    }

    /// Whether no task waits or runs.
    pub fn is_idle(&self) -> bool {
        self.admission.is_idle()
    }

    /// Whether everything said has been acknowledged.
    pub fn is_flushed(&self) -> bool {
        self.outbox.is_empty()
    }

    /// The time until [`Self::tick`] has something to do.
    pub fn patience(&self) -> Duration {
        let now = self.parts.clock.now().boot;
        self.admission
            .next_deadline()
            .map_or(Duration::MAX, |at| at.saturating_sub(now))
    }

    pub fn on_signal(&mut self, signal: Signal) {
        let now = self.parts.clock.now().boot;
        match signal {
            Signal::Online => {
                self.connections += 1;
                self.tally.reconnects = self.connections - 1;
                tracing::info!("connected to the broker");
                if !self
                    .parts
                    .link
                    .subscribe(&self.decoder.base.inbound_filters(), false)
                {
                    tracing::error!("the subscription could not be sent");
                }
            }
            Signal::Subscribed { refused } => {
                self.subscribed = true;
                if refused && self.state.0 != State::Draining {
                    tracing::error!(
                        "the broker refuses the subscription: check its access rules for {}",
                        self.decoder.base
                    );
                    self.state = (
                        State::Degraded,
                        "the broker refuses the subscription to tasks".into(),
                    );
                } else if self.state.0 == State::Degraded {
                    self.state = (State::Online, String::new());
                }
                self.say_state();
                self.say_card();
            }
            Signal::Offline { reason } => {
                self.subscribed = false;
                self.outbox.offline();
                if reason.needs_help {
                    tracing::error!("{reason}");
                } else {
                    tracing::warn!("{reason}");
                }
            }
            Signal::Delivered(token) => self.outbox.delivered(token),
            Signal::Refused(token, why) => {
                if let Some(lost) = self.outbox.refused(now, token, why) {
                    self.last_word(lost);
                }
            }
        }
    }

    /// Decides on a message, keeps the decision, and only then acknowledges it.
    pub fn on_message(&mut self, message: &Message) -> Result<()> {
        if message.publish.qos != QoS::AtMostOnce && !self.parts.link.is_on(message.generation) {
            // Its connection is gone: the broker delivers it again, and it is decided then, once.
            return Ok(());
        }
        let now = self.parts.clock.now();
        match intake::read(&self.decoder, now, &message.publish) {
            Wish::Task(task) => self.on_task(task, &message.publish.payload)?,
            Wish::Cancel(cancel, reply) => self.on_cancel(&cancel.key, &reply)?,
            Wish::Refused(refused) => {
                let code = refused.refusal.code;
                self.tally.refused(code);
                tracing::info!(
                    sender = refused.key.sender,
                    task = refused.key.task,
                    code = code.name(),
                    "refused"
                );
                let post = self.admission.refuse(now, *refused);
                self.parts.journal.commit(&[Record::Refused {
                    key: &post.key,
                    code,
                }])?;
                self.send(post);
            }
            Wish::Nothing(why) => tracing::warn!("a message can't be answered: {why}"),
        }
        self.parts.link.ack(message.generation, &message.publish);
        Ok(())
    }

    fn on_task(&mut self, task: wire::Task, payload: &[u8]) -> Result<()> {
        let now = self.parts.clock.now();
        let seed = task.sampling.seed.unwrap_or_else(|| random() & SEED_MAX);
        let (preparer, context) = (&self.parts.preparer, self.parts.context);
        let (decision, post) = self.admission.offer(now, task, |task| {
            let work = preparer
                .prepare(intake::request(task, seed))
                .map_err(|e| intake::refusal(&e))?;
            if work.tokens_max() > context {
                return Err(Refusal::context_overflow(
                    work.tokens_max() as u64,
                    context as u64,
                ));
            }
            Ok((work, seed))
        });
        let key = &post.key;
        tracing::info!(sender = key.sender, task = key.task, "{decision:?}");
        match decision {
            Decision::Accepted(ticket) => {
                self.tally.accepted(now.boot, ticket);
                self.parts.journal.commit(&[Record::Accepted {
                    ticket,
                    key,
                    payload,
                    seed,
                }])?;
            }
            Decision::Refused(code) => {
                self.tally.refused(code);
                self.parts
                    .journal
                    .commit(&[Record::Refused { key, code }])?;
            }
            Decision::Ended(event) => {
                self.tally.ended(event);
                self.parts.journal.commit(&[Record::Final {
                    key,
                    event,
                    bytes: &post.bytes,
                }])?;
            }
            Decision::Repeated | Decision::Recalled => {}
        }
        self.send(post);
        Ok(())
    }

    fn on_cancel(&mut self, key: &wire::Key, reply: &Reply) -> Result<()> {
        match self.admission.cancel(self.parts.clock.now(), key, reply) {
            Cancelled::Waiting(post) => {
                self.conclude(None, post)?;
                self.tally.keep(|ticket| self.admission.holds(ticket));
            }
            Cancelled::Running(ticket) => self.stop(ticket),
            Cancelled::Nothing(post) => self.send(post),
        }
        Ok(())
    }

    pub fn on_report(&mut self, report: Report) -> Result<()> {
        let now = self.parts.clock.now();
        match report {
            Report::Started(ticket) => {
                if let Some(post) = self.admission.started(now, ticket) {
                    self.send(post);
                }
            }
            Report::Text(ticket, text) => {
                self.tally.text(now.boot, ticket);
                self.texts.entry(ticket).or_default().push_str(&text);
            }
            Report::Done(ticket, completion) => {
                self.flush_texts();
                let outcome = self.outcome(ticket, completion);
                self.finish(ticket, outcome)?;
            }
            Report::Stopped(ticket, completion) => {
                let product = completion.map(product).unwrap_or_default();
                self.finish(ticket, Outcome::Stopped(product))?;
            }
            Report::Failed(ticket, reason) => {
                tracing::error!("the model failed: {reason}");
                let refusal = Refusal::new(
                    Code::Internal,
                    format!("the model failed: {}", wire::echo(&reason)),
                );
                self.finish(ticket, Outcome::Failed(refusal))?;
            }
        }
        Ok(())
    }

    fn outcome(&mut self, ticket: Ticket, completion: Completion) -> Outcome {
        let finish = match completion.finish {
            Finish::Stop => wire::Finish::Stop,
            Finish::Length => wire::Finish::Length,
            Finish::Cancelled => return Outcome::Stopped(product(completion)),
        };
        let (prompt, decoded) = (
            completion.prompt_tokens as u64,
            completion.tokens.len().saturating_sub(1) as u64,
        );
        self.tally
            .speed((prompt, completion.prefill), (decoded, completion.decode));
        let model = &self.parts.model;
        let provenance = Provenance {
            model: model.title(),
            digest: model.digest.clone(),
            engine: env!("CARGO_PKG_VERSION").into(),
            seed: self.seeds.get(&ticket).copied().unwrap_or_default(),
            exact: model.exact,
        };
        Outcome::Done {
            finish,
            product: product(completion),
            provenance,
        }
    }

    fn finish(&mut self, ticket: Ticket, outcome: Outcome) -> Result<()> {
        self.texts.remove(&ticket);
        self.seeds.remove(&ticket);
        self.stopping.remove(&ticket);
        match self
            .admission
            .finish(self.parts.clock.now(), ticket, outcome)
        {
            Some(post) => self.conclude(Some(ticket), post),
            None => Ok(()),
        }
    }

    /// Keeps and sends a final event.
    fn conclude(&mut self, ticket: Option<Ticket>, post: Post) -> Result<()> {
        let (key, event) = (&post.key, post.event);
        tracing::info!(sender = key.sender, task = key.task, "{event}");
        match ticket {
            Some(ticket) => self
                .tally
                .finished(self.parts.clock.now().boot, ticket, event),
            None => self.tally.ended(event),
        }
        self.parts.journal.commit(&[Record::Final {
            key,
            event,
            bytes: &post.bytes,
        }])?;
        self.send(post);
        Ok(())
    }

    /// Deadlines.
    pub fn tick(&mut self) -> Result<()> {
        let due = self.admission.tick(self.parts.clock.now());
        self.settle(due)
    }

    /// New tasks are refused from now on.
    pub fn drain(&mut self) {
        let reason = "this gateway is shutting down: send the task again when it is online";
        self.admission
            .close(Refusal::new(Code::Draining, reason.into()));
        self.set_state(State::Draining, "shutting down");
    }

    /// The grace is over: what waits ends, what runs is stopped.
    pub fn stop_everything(&mut self) -> Result<()> {
        let due = self.admission.stop_everything(self.parts.clock.now());
        self.settle(due)
    }

    fn settle(&mut self, due: Due) -> Result<()> {
        due.stop.into_iter().for_each(|ticket| self.stop(ticket));
        if due.posts.is_empty() {
            return Ok(());
        }
        due.posts
            .into_iter()
            .try_for_each(|post| self.conclude(None, post))?;
        self.tally.keep(|ticket| self.admission.holds(ticket));
        Ok(())
    }

    fn stop(&mut self, ticket: Ticket) {
        if self.stopping.insert(ticket) {
            // Never full (see `worker::spawn`); when the thread is gone, the agent ends anyway.
            let _ = self.parts.commands.try_send(Command::Stop(ticket));
        }
    }

    /// Moves on what can move: tasks to the model, events and text to the broker.
    pub fn pump(&mut self) {
        let now = self.parts.clock.now();
        while self.outbox.has_room()
            && let Some((ticket, (work, seed))) = self.admission.next(now)
        {
            self.seeds.insert(ticket, seed);
            let _ = self.parts.commands.try_send(Command::Start(ticket, work));
        }
        for lost in self.outbox.pump(now.boot, &self.parts.link) {
            self.last_word(lost);
        }
        self.flush_texts();
    }

    /// Sends the text that has come together, where the link is fluent; where it isn't, text goes on growing.
    fn flush_texts(&mut self) {
        let now = self.parts.clock.now();
        let online = self.parts.link.is_online();
        let fluent = online && self.outbox.is_all_sent() && self.parts.link.is_fluent();
        for ticket in self.texts.keys().copied().collect::<Vec<_>>() {
            let long = |text: &String| text.len() > ANSWER_BYTES_MAX / 4;
            // Offline, deltas are lost by right: the final event holds the whole text.
            if (fluent || !online || self.texts.get(&ticket).is_some_and(long))
                && let Some(text) = self.texts.remove(&ticket)
            {
                let (post, stop) = self.admission.text(now, ticket, text);
                if stop {
                    self.stop(ticket);
                }
                if let Some(post) = post.filter(|_| fluent) {
                    let _ = self.parts.link.publish(None, &outgoing(post));
                }
            }
        }
    }

    fn send(&mut self, post: Post) {
        let purpose = match post.class {
            Class::Final => Purpose::Final(post.key.clone()),
            Class::Progress | Class::Delta => Purpose::Progress,
        };
        self.outbox.push(purpose, outgoing(post));
    }
}

fn product(completion: Completion) -> Product {
    let usage = Usage {
        prompt_tokens: completion.prompt_tokens as u64,
        cached_tokens: 0,
        generated_tokens: completion.tokens.len() as u64,
    };
    Product {
        text: completion.text,
        usage,
        prefill: completion.prefill,
        decode: completion.decode,
    }
}

fn outgoing(post: Post) -> Outgoing {
    Outgoing {
        correlation: post.reply.correlation,
        event: Some(post.event),
        content_type: Some(post.reply.format.content_type()),
        ..Outgoing::json(post.reply.topic, post.bytes)
    }
}
