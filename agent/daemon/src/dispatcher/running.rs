//! What the model tells of the tasks that run: text that goes out as it can, and their ends. Begins and stops none by itself
//! but where an answer outgrows its bound.

use super::{Dispatcher, outgoing, prompts};
use crate::card::Model;
use crate::journal::Change;
use crate::worker::{Prepare, Report};
use millwright_engine::{Completion, Finish};
use millwright_task::admission::Suspended;
use millwright_task::job::{Outcome, Post, Product, Ticket};
use millwright_task::limits::ANSWER_BYTES_MAX;
use millwright_task::wire::{self, Code, Provenance, Refusal, Usage};

impl<P: Prepare> Dispatcher<P> {
    pub fn on_report(&mut self, report: Report<P::Work>) {
        let now = self.parts.clock.now();
        match report {
            Report::Started(ticket) => {
                if let Some(post) = self.admission.started(now, ticket) {
                    self.send(post);
                }
            }
            Report::Text(ticket, text) => {
                self.tally.text(now.own, ticket);
                self.texts.entry(ticket).or_default().push_str(&text);
            }
            Report::Done(ticket, completion) => {
                self.flush_texts();
                let outcome = self.outcome(ticket, completion);
                self.finish(ticket, outcome);
            }
            Report::Stopped(ticket, completion) => {
                let product = completion.map(product).unwrap_or_default();
                self.finish(ticket, Outcome::Stopped(product));
            }
            Report::Suspended(ticket, work, completion) => {
                let product = completion.map(product).unwrap_or_default();
                self.on_suspended(ticket, work, product);
            }
            Report::Failed(ticket, reason) => {
                tracing::error!("the model failed: {reason}");
                let refusal = Refusal::new(
                    Code::Internal,
                    format!("the model failed: {}", wire::echo(&reason)),
                );
                self.finish(ticket, Outcome::Failed(refusal));
            }
        }
    }

    /// A task gave way; it waits again, unless it was to end anyway.
    fn on_suspended(&mut self, ticket: Ticket, work: P::Work, product: Product) {
        // What is sent later would come at a time when nobody could stop it.
        self.flush_last_text(ticket);
        let now = self.parts.clock.now();
        let seed = self.seeds.remove(&ticket).unwrap_or_default();
        match self
            .admission
            .suspend(now, ticket, (Some(work), seed), product)
        {
            None => {}
            Some(Suspended::Ended(post)) => self.finished(ticket, post),
            Some(Suspended::Waiting { begun }) => {
                // It has not taken the agent down.
                self.note(Change::Begun {
                    ticket,
                    times: begun,
                });
            }
        }
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
        let model = self.standing.ready().map(|equipment| &equipment.model);
        let provenance = Provenance {
            model: model.map(Model::title).unwrap_or_default(),
            digest: model.map(|m| m.digest.clone()).unwrap_or_default(),
            engine: env!("CARGO_PKG_VERSION").into(),
            seed: self.seeds.get(&ticket).copied().unwrap_or_default(),
            exact: model.is_some_and(|model| model.exact),
        };
        Outcome::Done {
            finish,
            product: product(completion),
            provenance,
        }
    }

    fn finish(&mut self, ticket: Ticket, outcome: Outcome) {
        self.flush_last_text(ticket);
        let now = self.parts.clock.now();
        if let Some(job) = self
            .admission
            .job(ticket)
            .filter(|_| self.parts.config.log_prompts)
        {
            prompts::log_answer(&job.task.key, &outcome);
        }
        if let Some(post) = self.admission.finish(now, ticket, outcome) {
            self.finished(ticket, post);
        }
    }

    fn finished(&mut self, ticket: Ticket, post: Post) {
        self.seeds.remove(&ticket);
        self.stopping.remove(&ticket);
        self.conclude(Some(ticket), post);
    }

    /// Sends the text that has come together, where the link is fluent; where it isn't, text goes on growing.
    pub(super) fn flush_texts(&mut self) {
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

    /// Sends what is left of a text in its place before what follows: a model may be done before the disk is.
    fn flush_last_text(&mut self, ticket: Ticket) {
        let Some(text) = self.texts.remove(&ticket) else {
            return;
        };
        let (post, _) = self.admission.text(self.parts.clock.now(), ticket, text);
        let sent = post.filter(|_| self.parts.link.is_online() && self.outbox.has_room());
        if let Some(post) = sent {
            self.send(post);
        }
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
