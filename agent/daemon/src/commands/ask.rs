//! `millwright ask`: the operator's client. One task, its answer on stdout, everything else on stderr.

mod pool;
mod reach;
mod screen;

use crate::broker::{self, Inbox, Link, Lost, NotSent, Outgoing, Signal, Token};
use crate::clock::random;
use anyhow::{Context, Result, bail, ensure};
use millwright_task::topic::{Base, sender_is_plain};
use millwright_task::wire::{self, Event, decode_event, id_is_plain};
use pool::Pool;
use reach::reach;
use rumqttc::v5::mqttbytes::v5::Publish;
use screen::Screen;
use serde_json::{Value, json};
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// How long the gateway gets to answer after the deadline, or after a cancel.
const PATIENCE: Duration = Duration::from_secs(10);
/// Until there is a connection at all.
const CONNECT: Duration = Duration::from_secs(15);

/// The answer goes to stdout as it comes; status and timing go to stderr. The exit code is 0 for an answer
/// and 1 for anything else. Ctrl-C cancels the task at the gateway.
#[derive(clap::Args)]
#[allow(clippy::struct_excessive_bools)] // they are flags of a command line
pub struct Args {
    /// The question; `-` reads it from stdin
    text: String,
    /// The gateway's base topic, e.g. millwright/v1/hamburg/gw-07 [default: the base of --config]
    #[arg(long, value_name = "BASE")]
    to: Option<String>,
    /// A pool instead of one gateway: its base topic, e.g. millwright/v1/hamburg/pool/line3, or with --config its name.
    /// The task is sent again while members refuse it, and when the one that accepted it goes offline
    #[arg(long, value_name = "POOL", conflicts_with = "to")]
    pool: Option<String>,
    /// Send the task to the pool again when no member accepts it within this time
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0, requires = "pool")]
    accept_within: f64,
    /// Take broker, credentials and base from an agent's configuration
    #[arg(long, value_name = "FILE", conflicts_with = "broker")]
    config: Option<PathBuf>,
    /// The broker [default: 127.0.0.1:1883]
    #[arg(long, value_name = "HOST:PORT")]
    broker: Option<String>,
    /// The broker user
    #[arg(long, conflicts_with = "config")]
    user: Option<String>,
    /// The file that holds the user's password
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "config",
        requires = "user"
    )]
    password_file: Option<PathBuf>,
    /// Connect by TLS and trust this CA (PEM)
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    ca: Option<PathBuf>,
    /// Client certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "ca", requires = "key")]
    cert: Option<PathBuf>,
    /// Client key (PEM)
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// Allow a broker on another machine without TLS
    #[arg(long)]
    plaintext: bool,
    /// Who asks: the broker's access rules tie it to the user [default: the user, or `operator`]
    #[arg(long, value_name = "NAME")]
    sender: Option<String>,
    /// The task's id; sending it again gets the same answer [default: random]
    #[arg(long)]
    id: Option<String>,
    /// Put the question through the model's chat template (the default)
    #[arg(long, conflicts_with = "raw")]
    chat: bool,
    /// Let the model continue the text as it stands
    #[arg(long)]
    raw: bool,
    /// Instructions before the question
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Tokens of the answer, at most
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// 0 takes the most likely token each time
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Draw from the K most likely tokens
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Draw from the tokens that make up this share of probability
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Leave out tokens less likely than this share of the most likely one
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Above 1, tokens that were used become less likely
    #[arg(long, value_name = "R")]
    repeat_penalty: Option<f32>,
    /// The same seed draws the same answer
    #[arg(long)]
    seed: Option<u64>,
    /// End the answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// 0 to 9; higher runs first
    #[arg(long, value_name = "P")]
    priority: Option<u8>,
    /// Give up after this time
    #[arg(long, value_name = "SECONDS", default_value_t = 120.0)]
    deadline: f64,
    /// Print the final event as one line of JSON instead of the text
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: Args) -> Result<()> {
    let (settings, base) = reach(&args)?;
    let user = settings.access.user().map(str::to_owned);
    let sender = args
        .sender
        .clone()
        .or(user)
        .unwrap_or_else(|| "operator".into());
    ensure!(
        sender_is_plain(&sender),
        "--sender must be one topic level without space, + or #"
    );
    let id = args
        .id
        .clone()
        .unwrap_or_else(|| format!("ask-{:016x}", random()));
    ensure!(
        id_is_plain(&id),
        "--id must be 1 to 64 of A-Z a-z 0-9 _ - ."
    );
    ensure!(
        (0.001..=1e6).contains(&args.deadline),
        "--deadline must be positive seconds"
    );
    ensure!(
        (0.1..=3600.0).contains(&args.accept_within),
        "--accept-within must be 0.1 to 3600 seconds"
    );
    let deadline = Duration::from_secs_f64(args.deadline);
    let task = task(&args, &id)?;
    let (link, poller, inbox) = broker::open(&settings);
    let mut poller = tokio::spawn(poller.run());
    let now = Instant::now();
    let mut asking = Asking {
        link: link.clone(),
        base,
        sender,
        id,
        task,
        deadline,
        screen: Screen::new(args.json),
        phase: Phase::Connecting,
        pool: args.pool.is_some().then(|| Pool::new(now + deadline)),
        pace: Duration::from_secs_f64(args.accept_within),
        is_heard: false,
        resend: now + CONNECT,
        give_up: now + deadline + PATIENCE,
        sent: 0,
        offline: false,
    };
    let outcome = asking.run(inbox).await;
    asking.screen.end();
    link.close();
    if tokio::time::timeout(Duration::from_secs(1), &mut poller)
        .await
        .is_err()
    {
        poller.abort();
    }
    outcome
}

fn task(args: &Args, id: &str) -> Result<Value> {
    let mut text = args.text.clone();
    if text == "-" {
        text.clear();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("stdin can't be read")?;
    }
    let mut task = json!({
        "id": id, "stream": !args.json, "deadline_ms": (args.deadline * 1000.0).ceil() as u64,
    });
    if args.raw {
        task["kind"] = "generate".into();
        task["prompt"] = text.into();
    } else {
        let system = args
            .system
            .iter()
            .map(|s| json!({"role": "system", "content": s}));
        task["kind"] = "chat".into();
        task["messages"] = system
            .chain([json!({"role": "user", "content": text})])
            .collect();
    }
    let optional = [
        ("max_tokens", args.max_tokens.map(Value::from)),
        ("temperature", args.temperature.map(Value::from)),
        ("top_k", args.top_k.map(Value::from)),
        ("top_p", args.top_p.map(Value::from)),
        ("min_p", args.min_p.map(Value::from)),
        ("repeat_penalty", args.repeat_penalty.map(Value::from)),
        ("seed", args.seed.map(Value::from)),
        ("priority", args.priority.map(Value::from)),
        (
            "stop",
            (!args.stop.is_empty()).then(|| args.stop.clone().into()),
        ),
    ];
    for (field, value) in optional {
        if let Some(value) = value {
            task[field] = value;
        }
    }
    Ok(task)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Connecting,
    /// Sent, not yet accepted.
    Sent,
    Accepted,
    Cancelling,
}

/// One task on its way.
struct Asking {
    link: Link,
    base: Base,
    sender: String,
    id: String,
    task: Value,
    deadline: Duration,
    screen: Screen,
    phase: Phase,
    /// Where `base` is a pool's.
    pool: Option<Pool>,
    /// Without `accepted` for this long, the same id is sent again.
    pace: Duration,
    /// The subscription to answers is in place on this connection.
    is_heard: bool,
    resend: Instant,
    give_up: Instant,
    sent: u64,
    /// The gateway's last known state is offline.
    offline: bool,
}

impl Asking {
    async fn run(&mut self, mut inbox: Inbox) -> Result<()> {
        loop {
            tokio::select! {
                Some(signal) = inbox.signals.recv() => self.on_signal(signal)?,
                Some(message) = inbox.messages.recv() => {
                    let last = self.on_message(&message.publish)?;
                    if let Some(receipt) = message.receipt() {
                        self.link.ack(receipt);
                    }
                    if let Some(event) = last {
                        return self.screen.finish(event);
                    }
                }
                () = sleep_until(self.resend), if self.phase != Phase::Accepted => self.on_silence()?,
                () = sleep_until(self.give_up) => bail!(self.silence()),
                _ = tokio::signal::ctrl_c() => self.on_interrupt()?,
            }
        }
    }

    fn on_signal(&mut self, signal: Signal) -> Result<()> {
        match signal {
            Signal::Online => {
                // First of all, so that no event and no state is missed.
                let mut filters = vec![self.base.result(&self.sender, &self.id)];
                if self.pool.is_none() {
                    filters.push(self.base.state());
                }
                self.is_heard = false;
                ensure!(
                    self.link.subscribe(&filters, true),
                    "the subscription could not be sent"
                );
            }
            Signal::Subscribed { granted } if self.is_heard => {
                if granted.contains(&false) {
                    self.screen.status(
                        "the broker doesn't let us read the gateway's state: should it go offline, that is not seen",
                    );
                }
            }
            Signal::Subscribed { granted } if granted.contains(&false) => {
                bail!(
                    "the broker doesn't let {} read answers and state below {}",
                    self.sender,
                    self.base
                )
            }
            Signal::Subscribed { .. } => {
                self.is_heard = true;
                // After a reconnect too: events may have been lost, and the same id gets the same answer.
                self.repeat()?;
                if self.phase == Phase::Connecting {
                    self.phase = Phase::Sent;
                }
            }
            Signal::Offline {
                reason: Lost { reason, needs_help },
                ..
            } => {
                ensure!(!needs_help && self.phase != Phase::Connecting, "{reason}");
                self.screen.status(&format!("{reason}; connecting again"));
            }
            Signal::Delivered(_) | Signal::Access(None) => {}
            Signal::Access(Some(why)) => self.screen.status(&why),
            Signal::Refused(_, why) => bail!(
                "the broker doesn't let {} send tasks to {}: {why:?}",
                self.sender,
                self.base
            ),
        }
        Ok(())
    }

    fn on_message(&mut self, publish: &Publish) -> Result<Option<Event>> {
        if publish.topic.as_ref() != self.base.result(&self.sender, &self.id).as_bytes() {
            match self.pool {
                Some(_) => self.on_holder_state(publish)?,
                None => self.on_state(publish),
            }
            return Ok(None);
        }
        let event = decode_event(&publish.payload)
            .ok()
            .filter(|e| e.task == self.id && e.sender == self.sender);
        Ok(event.and_then(|event| match self.pool {
            Some(_) => self.on_pool_event(event),
            None => self.on_event(event),
        }))
    }

    fn on_event(&mut self, event: Event) -> Option<Event> {
        if self.phase == Phase::Sent {
            self.phase = Phase::Accepted;
        }
        self.screen.show(&event);
        if self.phase == Phase::Cancelling && matches!(event.body, wire::Body::Unknown {}) {
            // The gateway never had it and remembers the cancel: nothing will come.
            self.give_up = Instant::now();
        }
        event.body.is_final().then_some(event)
    }

    fn on_state(&mut self, publish: &Publish) {
        let state: Value = serde_json::from_slice(&publish.payload).unwrap_or_default();
        let word = |key: &str| wire::printable(state[key].as_str().unwrap_or_default());
        match state["state"].as_str() {
            // Said afresh: it started anew, and may have forgotten what it had accepted.
            Some("online")
                if (std::mem::take(&mut self.offline) || !publish.retain)
                    && self.phase != Phase::Connecting =>
            {
                self.screen.status("the gateway is back; sent again");
                let _ = self.repeat();
            }
            Some("online") | None => {}
            Some(other) => {
                self.offline = other == "offline";
                self.screen.status(&format!(
                    "the gateway is {}: {}",
                    wire::printable(other),
                    word("reason")
                ));
            }
        }
    }

    /// The same id again: the gateway runs it once.
    fn on_silence(&mut self) -> Result<()> {
        ensure!(
            self.phase != Phase::Connecting,
            "no connection to the broker"
        );
        if self.phase == Phase::Cancelling {
            return self.send_cancel();
        }
        if self.pool.is_some() {
            return self.on_pool_silence();
        }
        if self.sent == 1 {
            self.screen
                .status("no answer yet; sending again until there is one");
        }
        self.send()
    }

    fn send(&mut self) -> Result<()> {
        self.sent += 1;
        self.resend = Instant::now() + self.pace;
        let mut deadline = self.deadline;
        if let Some(pool) = &self.pool {
            // Another member counts from its own receipt.
            deadline = pool.left();
            self.resend = self.resend.min(Instant::now() + deadline);
            self.task["deadline_ms"] = (deadline.as_millis() as u64).max(1).into();
        }
        let expiry = deadline.as_secs().max(1).min(u64::from(u32::MAX)) as u32;
        let payload = self.task.to_string().into_bytes();
        let message = Outgoing {
            expiry: Some(expiry),
            ..Outgoing::json(self.base.task(&self.sender), payload)
        };
        match self.link.publish(Some(Token(self.sent)), &message) {
            Err(NotSent::TooLarge { bytes, limit }) => {
                bail!("the task has {bytes} bytes and the broker takes {limit}")
            }
            // Offline or full: the next silence tries again.
            _ => Ok(()),
        }
    }

    /// What was wanted last, again.
    fn repeat(&mut self) -> Result<()> {
        match self.phase {
            Phase::Cancelling => self.send_cancel(),
            _ => self.send_anew(),
        }
    }

    fn on_interrupt(&mut self) -> Result<()> {
        ensure!(
            !matches!(self.phase, Phase::Cancelling | Phase::Connecting),
            "interrupted"
        );
        self.screen
            .status("cancelling; Ctrl-C again leaves at once");
        self.phase = Phase::Cancelling;
        self.give_up = Instant::now() + PATIENCE;
        self.send_cancel()
    }

    fn send_cancel(&mut self) -> Result<()> {
        let payload = json!({"task": self.id}).to_string().into_bytes();
        let message = Outgoing::json(self.base.cancel(&self.sender), payload);
        self.sent += 1;
        self.resend = Instant::now() + self.pace;
        match self.link.publish(Some(Token(self.sent)), &message) {
            // Offline or full: the next silence tries again.
            Ok(()) | Err(NotSent::Offline | NotSent::Full) => Ok(()),
            Err(e) => bail!("the cancel could not be sent ({e:?})"),
        }
    }

    fn silence(&self) -> String {
        let base = &self.base;
        match self.phase {
            Phase::Connecting => "no connection to the broker".into(),
            Phase::Sent if self.pool.is_some() => {
                format!(
                    "no answer from the pool {base}: is that its base, and is a member running?"
                )
            }
            Phase::Sent => {
                format!("no answer from {base}: is that the gateway's base, and is it running?")
            }
            Phase::Accepted => format!("{base} accepted the task and did not finish it in time"),
            Phase::Cancelling => "cancelled; the gateway did not confirm that it ran".into(),
        }
    }
}
