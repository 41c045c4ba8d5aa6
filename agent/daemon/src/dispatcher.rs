//! What to do with each message, report and signal: admission decides, the journal keeps, the outbox sends.
//! Waits for nothing: every call returns at once, and [`Dispatcher::pump`] moves on what can move. What is noted in the
//! journal is on disk before anybody sees it: events and acknowledgements wait for that.

mod easing;
mod keeping;
mod modelling;
mod pooling;
mod prompts;
mod running;
mod sayings;

use crate::alarms::{Alarm, Alarms};
use crate::broker::{Link, Message, Outgoing, Receipt, Signal};
use crate::card::State;
use crate::clock::{Clock, random};
use crate::config::Config;
use crate::crash;
use crate::intake::{self, Wish};
use crate::journal::{Change, Journal, Mark};
use crate::outbox::{Outbox, Purpose};
use crate::pool::{Member, Via};
use crate::tally::Tally;
use crate::worker::{Command, Prepare, Work};
use easing::Easing;
use millwright_task::admission::{Addressee, Admission, Cancelled, Decision, Due, Rules, Size};
use millwright_task::job::{Class, Post, Ticket};
use millwright_task::limits::{INBOX_MESSAGES_MAX, SEED_MAX};
use millwright_task::recall::{Gone, Window};
use millwright_task::wire::{self, Bounds, Code, Decoder, Refusal, Reply};
pub use modelling::Equipment;
use modelling::{Standing, no_model};
use pooling::OWN_FILTERS;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// What the dispatcher is given to work with.
pub struct Parts {
    pub config: Arc<Config>,
    pub clock: Clock,
    pub journal: Journal,
    pub link: Link,
    /// The pool's, if the gateway is in one.
    pub pool: Option<Link>,
}

/// A task's work, once there is a model, and its seed.
type Ready<P> = (Option<<P as Prepare>::Work>, u64);

/// The agent's state between two events.
pub struct Dispatcher<P: Prepare> {
    parts: Parts,
    decoder: Decoder,
    admission: Admission<Ready<P>>,
    standing: Standing<P>,
    outbox: Outbox,
    /// Acknowledgements that wait for the journal, in order of arrival.
    owed: VecDeque<(Mark, Via, Receipt)>,
    pool: Option<Member>,
    /// Why the journal can't be written, while it can't.
    trouble: Option<String>,
    /// The broker refuses the subscription to tasks.
    is_unheard: bool,
    is_draining: bool,
    /// The last state, and why.
    goodbye: Option<(State, String)>,
    tally: Tally,
    alarms: Alarms,
    easing: Easing,
    /// Text not yet sent, per running task that streams.
    texts: BTreeMap<Ticket, String>,
    seeds: HashMap<Ticket, u64>,
    /// Running tasks that the worker was told to stop: told once, so that its channel never fills.
    stopping: HashSet<Ticket>,
    subscribed: bool,
    connections: u64,
}

impl<P: Prepare> Dispatcher<P> {
    /// Without a model: [`Self::equip`] brings it, or [`Self::lack`] says that there is none.
    pub fn new(mut parts: Parts) -> Self {
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
        let pool = config.pool.as_ref().zip(parts.pool.take());
        let pool = pool.map(|(pool, link)| {
            let decoder = Decoder {
                base: pool.base.clone(),
                rules: pool.reply_rules.clone(),
                ..decoder.clone()
            };
            Member::new(pool.name.clone(), link, decoder)
        });
        let admission = Admission::new(Rules {
            gateway: config.gateway.name.clone(),
            base: pool.is_some().then(|| config.base.to_string()),
            run_prefix: format!("{:08x}", random() as u32),
            queue_tasks_max: tasks.queue_max,
            queue_bytes_max: millwright_task::limits::QUEUE_BYTES_MAX,
            slots: 0,
            kv_tokens_max: 0,
            deadline_max: tasks.deadline_max,
            window: Window {
                age_max: tasks.dedup_window,
                tasks_max: tasks.dedup_tasks_max,
                bytes_max: tasks.dedup_bytes_max,
            },
            share: tasks.share,
            shares: tasks.shares.clone(),
        });
        let standing = Standing::Loading(parts.clock.now().own);
        Self {
            parts,
            decoder,
            admission,
            standing,
            outbox: Outbox::default(),
            owed: VecDeque::new(),
            pool,
            trouble: None,
            is_unheard: false,
            is_draining: false,
            goodbye: None,
            tally: Tally::default(),
            alarms: Alarms::default(),
            easing: Easing::default(),
            texts: BTreeMap::new(),
            seeds: HashMap::new(),
            stopping: HashSet::new(),
            subscribed: false,
            connections: 0,
        }
    }

    /// Whether another message may be taken in.
    pub fn has_room(&self) -> bool {
        let is_owing = self.owed.len() >= INBOX_MESSAGES_MAX;
        let has_room = self.outbox.has_room() && self.parts.journal.has_room();
        has_room && !is_owing && !self.is_settling()
    }

    /// Whether nothing is left to be done before the agent may leave. What waits goes on at the next start.
    pub fn is_done(&self) -> bool {
        self.admission.running() == 0 && self.is_flushed()
    }

    /// Whether everything said has been acknowledged, and all that was noted is on disk.
    pub fn is_flushed(&self) -> bool {
        self.outbox.is_empty() && self.parts.journal.is_settled()
    }

    /// The time until [`Self::tick`] has something to do.
    pub fn patience(&self) -> Duration {
        let now = self.parts.clock.now().own;
        self.admission
            .next_deadline()
            .map_or(Duration::MAX, |at| at.saturating_sub(now))
    }

    pub fn on_signal(&mut self, signal: Signal) {
        let now = self.parts.clock.now().own;
        match signal {
            Signal::Online => {
                self.connections += 1;
                self.tally.reconnects = self.connections - 1;
                tracing::info!("connected to the broker");
                let link = &self.parts.link;
                if !link.subscribe(&self.filters(), false) && link.is_online() {
                    tracing::error!("the subscription could not be sent");
                }
            }
            Signal::Subscribed { granted } => {
                let (own, pool) = granted.split_at(OWN_FILTERS.min(granted.len()));
                self.subscribed = true;
                self.is_unheard = own.contains(&false);
                if let Some(member) = &mut self.pool {
                    member.cancels_refused(pool.contains(&false));
                }
                if self.is_unheard {
                    tracing::error!(
                        "the broker refuses the subscription: check its access rules for {}",
                        self.decoder.base
                    );
                }
                self.judge_subscriptions();
                self.say_state();
                self.say_card();
                self.alarms.repeat();
            }
            Signal::Offline { reason, has_rival } => {
                self.subscribed = false;
                self.outbox.offline();
                if has_rival {
                    let now = self.parts.clock.now();
                    self.alarms.raise(now, Alarm::Session, &reason.reason);
                }
                if reason.needs_help {
                    tracing::error!("{reason}");
                } else {
                    tracing::warn!("{reason}");
                }
            }
            Signal::Delivered(token) => {
                crash::point("before-delivered");
                if let Some((key, ticket)) = self.outbox.delivered(token) {
                    self.delivered(&key, ticket);
                }
            }
            Signal::Refused(token, why) => {
                if let Some(lost) = self.outbox.refused(now, token, why) {
                    self.last_word(lost);
                }
            }
            Signal::Access(Some(why)) => {
                tracing::error!("{why}");
                let now = self.parts.clock.now();
                self.alarms.raise(now, Alarm::Certificate, &why);
            }
            Signal::Access(None) => self.alarms.clear(Alarm::Certificate),
        }
    }

    /// Decides on a message and notes the decision. It is acknowledged, and the decision said, when that is on disk.
    pub fn on_message(&mut self, via: Via, message: &Message) {
        let receipt = message.receipt();
        if receipt.is_some_and(|receipt| !self.link(via).is_on(receipt)) {
            // Its connection is gone: the broker delivers it again, and it is decided then, once. Of a pool's task its
            // sender does that.
            return;
        }
        let now = self.parts.clock.now();
        let (decoder, to) = self.addressee(&message.publish.topic);
        match intake::read(decoder, now, &message.publish) {
            Wish::Task(task) => self.on_task(task),
            Wish::Cancel(key, reply) => self.on_cancel(&key, &reply, to),
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
                self.say(post);
            }
            Wish::Nothing(why) => tracing::warn!("a message can't be answered: {why}"),
        }
        let owed = receipt.map(|receipt| (self.parts.journal.mark(), via, receipt));
        self.owed.extend(owed);
    }

    fn on_task(&mut self, task: wire::Task) {
        let now = self.parts.clock.now();
        let seed = task.sampling.seed.unwrap_or_else(|| random() & SEED_MAX);
        let standing = &self.standing;
        let prepared = |task: &wire::Task| {
            let equipment = standing.ready().ok_or_else(no_model)?;
            prepare(&equipment.preparer, equipment.context, task, seed)
        };
        if self.parts.config.log_prompts {
            prompts::log_prompt(&task);
        }
        let (decision, post) = self.admission.offer(now, task, prepared);
        let key = &post.key;
        tracing::info!(sender = key.sender, task = key.task, "{decision:?}");
        match decision {
            Decision::Accepted(ticket) => {
                self.tally.accepted(now.own, ticket);
                if let Some(job) = self.admission.job(ticket) {
                    let task = Box::new(job.task.clone());
                    self.note(Change::Accepted { ticket, task, seed });
                }
                self.send(post);
            }
            Decision::Refused(code) => {
                self.tally.refused(code);
                self.say(post);
            }
            Decision::Ended(event) => {
                self.tally.ended(event);
                self.note(Change::CancelGone(post.key.clone()));
                self.say(post);
            }
            Decision::Repeated { moved } => {
                if moved {
                    let (ticket, reply) = (post.ticket, post.reply.clone());
                    self.note(Change::Moved { ticket, reply });
                }
                self.send(post);
            }
            Decision::Recalled => self.send(post),
        }
    }

    fn on_cancel(&mut self, key: &wire::Key, reply: &Reply, to: Addressee) {
        let now = self.parts.clock.now();
        match self.admission.cancel(now, key, reply, to) {
            Cancelled::Waiting(post) => {
                self.conclude(None, post);
                self.tally.keep(|ticket| self.admission.holds(ticket));
            }
            Cancelled::Running(ticket) => {
                if !self.stopping.contains(&ticket) {
                    self.note(Change::Cancelled(ticket));
                }
                self.stop(ticket);
            }
            Cancelled::Unknown(post) => {
                let (key, at) = (post.key.clone(), now.own);
                self.note(Change::CancelKept { key, at });
                self.say(post);
            }
            Cancelled::Overheard => {}
            Cancelled::AlreadyFinal(post) => self.say(post),
        }
    }

    /// Keeps and sends the final event of an accepted task; `ran` if it was with the model.
    fn conclude(&mut self, ran: Option<Ticket>, post: Post) {
        let (key, event) = (&post.key, post.event);
        tracing::info!(sender = key.sender, task = key.task, "{event}");
        match ran {
            Some(ticket) => {
                let now = self.parts.clock.now().own;
                self.tally.finished(now, ticket, event);
            }
            None => self.tally.ended(event),
        }
        self.note(Change::Ended(post.ticket));
        self.say(post);
    }

    /// Deadlines, and alarms that pass.
    pub fn tick(&mut self) {
        self.lose_patience();
        self.alarms.pass(self.parts.clock.now());
        self.miss_sensors();
        self.tick_pool();
        let Due { posts, stop } = self.admission.tick(self.parts.clock.now());
        for ticket in stop {
            self.stop(ticket);
        }
        if !posts.is_empty() {
            for post in posts {
                self.conclude(None, post);
            }
            self.tally.keep(|ticket| self.admission.holds(ticket));
        }
    }

    /// New tasks are refused from now on, and none is begun.
    pub fn drain(&mut self) {
        self.is_draining = true;
        self.settle_gate();
        self.say_state();
    }

    /// Closes the gate for as long as anything speaks against all new tasks.
    fn settle_gate(&mut self) {
        let refusal = if self.is_draining {
            let reason = "this gateway is shutting down: send the task again when it is online";
            Some(Refusal::new(Code::Draining, reason.into()))
        } else if let Some(why) = &self.trouble {
            let reason = format!("the gateway can't write its journal ({why}): try later");
            Some(Refusal::new(Code::Internal, reason))
        } else {
            self.standing.ready().is_none().then(no_model)
        };
        self.admission.close(refusal);
    }

    /// Whether the broker has the last state. If not, the will must say that the agent is gone.
    pub fn has_said_goodbye(&self) -> bool {
        self.goodbye.is_some() && self.subscribed && !self.outbox.has_retained()
    }

    /// Says the last state. What has not ended goes on at the next start; what was interrupted in order has not
    /// taken the agent down.
    pub fn say_goodbye(&mut self, state: State, reason: &str) {
        if state == State::Offline {
            let interrupted: Vec<_> = self.admission.interrupted().collect();
            for (ticket, times) in interrupted {
                self.note(Change::Begun { ticket, times });
            }
        }
        let left = self.admission.waiting() + self.admission.running();
        let rest = match left {
            0 => String::new(),
            left => format!("; {left} tasks go on when it is started again"),
        };
        self.goodbye = Some((state, format!("{reason}{rest}")));
        self.say_state();
    }

    fn stop(&mut self, ticket: Ticket) {
        if self.stopping.insert(ticket) {
            self.standing.tell(Command::Stop(ticket));
        }
    }

    /// Moves on what can move: tasks to the model, what was noted to the disk, and what is there to the broker.
    pub fn pump(&mut self) {
        let now = self.parts.clock.now();
        while self.outbox.has_room()
            && self.parts.journal.has_room()
            && !self.is_draining
            && let Some((ticket, (work, seed), times)) = self.admission.next(now)
        {
            self.seeds.insert(ticket, seed);
            self.note(Change::Begun { ticket, times });
            // Always there: without a model there is no slot.
            if let Some(work) = work {
                self.standing.tell(Command::Start(ticket, work));
            }
        }
        self.tell_level();
        if !self.is_draining {
            for ticket in self.admission.yielding(now) {
                self.standing.tell(Command::Suspend(ticket));
            }
        }
        for gone in self.admission.take_gone() {
            self.note(match gone {
                Gone::Text(ticket) => Change::Stripped(ticket),
                Gone::Final(ticket) => Change::Forgotten(ticket),
                Gone::Cancel(key) => Change::CancelGone(key),
            });
        }
        self.settle_pool();
        let kept = self.parts.journal.kept();
        while let Some(&(mark, via, receipt)) = self.owed.front()
            && mark <= kept
        {
            crash::point("before-ack");
            self.link(via).ack(receipt);
            crash::point("after-ack");
            self.owed.pop_front();
        }
        for lost in self.outbox.pump(now.own, kept, &self.parts.link) {
            self.last_word(lost);
        }
        self.say_alarms();
        self.flush_texts();
        let clock = &self.parts.clock;
        self.parts
            .journal
            .flush(|| clock.journal(), self.is_draining);
    }

    /// Sends an event once all that was noted is on disk.
    fn send(&mut self, post: Post) {
        let purpose = match post.class {
            Class::Final => Purpose::Answer {
                key: post.key.clone(),
                ticket: post.ticket,
            },
            Class::Progress => Purpose::Progress,
            Class::Delta => Purpose::Delta,
        };
        let after = self.parts.journal.mark();
        self.outbox.push(purpose, outgoing(post), after);
    }
}

/// What the model needs to run a task, or why it can't.
fn prepare<P: Prepare>(
    preparer: &P,
    context: usize,
    task: &wire::Task,
    seed: u64,
) -> Result<(Ready<P>, Size), Refusal> {
    let work = preparer
        .prepare(intake::request(task, seed))
        .map_err(|e| intake::refusal(&e))?;
    if work.tokens_max() > context {
        return Err(Refusal::context_overflow(
            work.tokens_max() as u64,
            context as u64,
        ));
    }
    let prompt_tokens = work.prompt_tokens();
    let size = Size {
        prompt_tokens,
        kv_tokens: work.kv_tokens(),
        answer_tokens: work.tokens_max().saturating_sub(prompt_tokens),
    };
    Ok(((Some(work), seed), size))
}

fn outgoing(post: Post) -> Outgoing {
    Outgoing {
        correlation: post.reply.correlation,
        event: Some(post.event),
        format: post.reply.format,
        ..Outgoing::json(post.reply.topic, post.bytes)
    }
}
