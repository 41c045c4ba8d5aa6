//! The requester of PROTOCOL.md, many times over: sends tasks, resends the same id until it holds a final event, watches
//! the whole result tree, and by another connection that nothing is said beside it. It keeps the promise's other side and
//! leaves the judging to [`crate::faults::judge`].

use super::chance::Chance;
use super::judge::{Judge, Seen, Verdict};
use super::request::Request;
use crate::BASE;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, PublishProperties};
use rumqttc::v5::{Client as Mqtt, Event, MqttOptions};
use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What is asked for.
#[derive(Clone, Copy)]
pub(super) struct Load {
    pub(super) seed: u64,
    /// Tasks in all.
    pub(super) tasks_max: usize,
    /// Tasks without an outcome at the same time.
    pub(super) open_max: usize,
    pub(super) tokens_max: u32,
    /// Between two new tasks, however few are under way.
    pub(super) pause: Duration,
    /// Of a hundred tasks, how many are cancelled.
    pub(super) cancelled: u32,
    /// How long nothing may come of a task before it is sent again.
    pub(super) patience: Duration,
    /// Whether tasks are sent again at all, but for refused ones. If not, what the agent took must be answered all the
    /// same: it was acknowledged, so it was on disk, or it was not, and the broker brings it again.
    pub(super) resends: bool,
    /// Tasks that are sent once more when all is over: the final event must come again, byte for byte.
    pub(super) again_max: usize,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            seed: 1,
            tasks_max: usize::MAX,
            open_max: 24,
            tokens_max: 24,
            pause: Duration::ZERO,
            cancelled: 10,
            patience: Duration::from_secs(1),
            resends: true,
            again_max: 1000,
        }
    }
}

/// Of a hundred tasks, how many are sent again soon after their outcome, while faults go on.
const AGAIN_SOON: u32 = 10;

/// From a task's first sending to the first sign of life from the agent, resent or not.
#[derive(Clone, Default)]
pub(super) struct Timings(Arc<Mutex<Vec<Duration>>>);

impl Timings {
    /// Where nobody takes them, later ones are not kept.
    const KEPT_MAX: usize = 100_000;

    fn add(&self, timing: Duration) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() < Self::KEPT_MAX {
            all.push(timing);
        }
    }

    /// Those since the last call.
    pub(super) fn take(&self) -> Vec<Duration> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A requester at work.
pub(super) struct Oracle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Verdict>>,
}

#[derive(Default)]
struct Shared {
    closed: AtomicBool,
    over: AtomicBool,
    settled: AtomicUsize,
}

impl Oracle {
    /// Begins once it is subscribed.
    pub(super) fn start(port: u16, load: Load, timings: Timings) -> Self {
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let thread = std::thread::spawn(move || Requester::new(port, load, own, timings).run());
        Self {
            shared,
            thread: Some(thread),
        }
    }

    /// Tasks that have their outcome.
    pub(super) fn settled(&self) -> usize {
        self.shared.settled.load(Ordering::Relaxed)
    }

    /// Sends no new tasks, waits for all outcomes, asks for them again, and judges. What has no outcome by then has none.
    pub(super) fn finish(&mut self, within: Duration) -> Verdict {
        self.shared.closed.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + within;
        let thread = self.thread.take().expect("an oracle finishes once");
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.shared.over.store(true, Ordering::Relaxed);
        thread.join().expect("the requester's thread")
    }
}

impl Drop for Oracle {
    /// Of a case that broke off, too: it sends nothing more.
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
    }
}

/// When a task is to be sent again. Of tasks with an outcome only those that are asked for again have one.
struct Pending {
    /// Not before.
    at: Instant,
    patience: Duration,
    cancel_at: Option<Instant>,
    /// It has its outcome, which is to come again.
    again: bool,
    /// When it was sent first, until something came of it.
    unheard: Option<Instant>,
}

struct Requester {
    load: Load,
    shared: Arc<Shared>,
    mqtt: Mqtt,
    incoming: Receiver<Seen>,
    watcher: Watcher,
    judge: Judge,
    pending: Vec<Option<Pending>>,
    /// The tasks that have a `Pending`.
    open: BTreeSet<usize>,
    again: VecDeque<usize>,
    asking_again: bool,
    chance: Chance,
    timings: Timings,
    /// No new task before.
    due: Instant,
}

impl Requester {
    fn new(port: u16, load: Load, shared: Arc<Shared>, timings: Timings) -> Self {
        let (mqtt, incoming) = connect(port, load.seed);
        // A cancel and a task asked for again are no more than questions: who does not ask again may get no answer.
        let load = if load.resends {
            load
        } else {
            Load {
                cancelled: 0,
                patience: Duration::from_hours(1),
                ..load
            }
        };
        Self {
            load,
            shared,
            mqtt,
            incoming,
            watcher: Watcher::start(port, load.seed),
            judge: Judge::default(),
            pending: Vec::new(),
            open: BTreeSet::new(),
            again: VecDeque::new(),
            asking_again: false,
            chance: Chance::new(load.seed),
            timings,
            due: Instant::now(),
        }
    }

    fn run(mut self) -> Verdict {
        while !self.shared.over.load(Ordering::Relaxed) {
            if let Ok(seen) = self.incoming.recv_timeout(Duration::from_millis(5)) {
                self.take(&seen);
                while let Ok(seen) = self.incoming.try_recv() {
                    self.take(&seen);
                }
            }
            self.issue();
            self.remind();
            if self.open.is_empty() && self.is_at_the_end() {
                break;
            }
        }
        // What comes late must be right, too.
        while let Ok(seen) = self.incoming.recv_timeout(Duration::from_millis(300)) {
            self.take(&seen);
        }
        let _ = self.mqtt.disconnect();
        for topic in self.watcher.finish() {
            self.judge.stray(&topic);
        }
        self.judge.verdict()
    }

    fn take(&mut self, seen: &Seen) {
        let Some(news) = self.judge.see(seen) else {
            return;
        };
        let n = news.task;
        let now = Instant::now();
        let Some(pending) = &mut self.pending[n] else {
            return;
        };
        if let Some(sent) = pending.unheard.take() {
            self.timings.add(seen.at.saturating_duration_since(sent));
        }
        if !self.judge.is_settled(n) || (pending.again && !self.judge.is_repeated(n)) {
            // A refusal says when; any other sign of life restarts the wait.
            pending.at = now + news.retry_after.unwrap_or(pending.patience);
            return;
        }
        if !pending.again {
            self.shared.settled.fetch_add(1, Ordering::Relaxed);
            if self.load.resends && self.chance.percent(AGAIN_SOON) {
                self.again.push_back(n);
            }
        }
        self.pending[n] = None;
        self.open.remove(&n);
    }

    fn is_closed(&self) -> bool {
        let issued = self.judge.len();
        issued >= self.load.tasks_max || self.shared.closed.load(Ordering::Relaxed)
    }

    /// New tasks, and now and then one again that has its outcome; at the end only these.
    fn issue(&mut self) {
        while self.open.len() < self.load.open_max {
            let now = Instant::now();
            let closed = self.is_closed();
            let again = closed || self.chance.percent(AGAIN_SOON);
            let old = if again { self.again.pop_front() } else { None };
            let (n, cancel_at) = if let Some(n) = old {
                self.judge.ask_again(n);
                (n, None)
            } else if closed || self.due > now {
                return;
            } else {
                // Not `due` itself: what was missed while many were under way is not made up for.
                self.due = now + self.load.pause;
                let request = Request::new(self.load.seed, self.judge.len(), self.load.tokens_max);
                let cancelled = self.chance.percent(self.load.cancelled);
                // Some cancels overtake their task, some come after its end.
                let after = Duration::from_millis(self.chance.below(40));
                let n = self.judge.expect(request, cancelled);
                self.pending.push(None);
                (n, cancelled.then(|| now + after))
            };
            self.pending[n] = Some(Pending {
                at: now,
                patience: self.load.patience,
                cancel_at,
                again: old.is_some(),
                unheard: None,
            });
            self.open.insert(n);
            if cancel_at.is_some() && n.is_multiple_of(5) {
                self.cancel(n);
            }
            self.send(n);
            if n.is_multiple_of(8) {
                // The same task twice at once.
                self.send(n);
            }
        }
    }

    /// Sends again what has waited long enough.
    fn remind(&mut self) {
        let now = Instant::now();
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        for n in self.open.iter().copied().collect::<Vec<_>>() {
            let Some(pending) = &mut self.pending[n] else {
                continue;
            };
            let cancel = due(pending.cancel_at);
            if cancel {
                pending.cancel_at = None;
            }
            let again = due(Some(pending.at));
            if cancel || (again && self.judge.wants_cancel_reply(n)) {
                self.cancel(n);
            }
            if again {
                self.send(n);
            }
        }
    }

    fn send(&mut self, n: usize) {
        let request = self.judge.request(n);
        let properties = PublishProperties {
            response_topic: request.reply.clone(),
            correlation_data: request.correlation.clone().map(Into::into),
            ..PublishProperties::default()
        };
        let topic = format!("{BASE}/task/{}", request.sender);
        let payload = request.payload();
        let sent = self.mqtt.try_publish_with_properties(
            topic,
            QoS::AtLeastOnce,
            false,
            payload,
            properties,
        );
        let Some(pending) = &mut self.pending[n] else {
            return;
        };
        // While the broker is away nothing is sent; it is tried soon again.
        let wait = if sent.is_ok() {
            self.judge.sent(n);
            if !pending.again && self.judge.is_sent_once(n) {
                pending.unheard = Some(Instant::now());
            }
            let wait = pending.patience;
            pending.patience = (wait * 3 / 2).min(Duration::from_secs(10).max(wait));
            wait
        } else {
            Duration::from_millis(100)
        };
        pending.at = Instant::now() + wait;
    }

    fn cancel(&mut self, n: usize) {
        let request = self.judge.request(n);
        let topic = format!("{BASE}/cancel/{}", request.sender);
        let payload = serde_json::json!({ "task": request.id }).to_string();
        // A lost cancel is sent again with its task.
        if self
            .mqtt
            .try_publish(topic, QoS::AtLeastOnce, false, payload)
            .is_ok()
        {
            self.judge.cancel_sent(n);
        }
    }

    fn is_at_the_end(&mut self) -> bool {
        if !self.is_closed() {
            return false;
        }
        if !self.asking_again {
            self.asking_again = true;
            let all = self.judge.len();
            self.again = (all.saturating_sub(self.load.again_max)..all).collect();
        }
        self.again.is_empty()
    }
}

/// Hears every topic there is, and keeps those on which neither requesters nor a gateway have anything to say.
struct Watcher {
    mqtt: Mqtt,
    over: Arc<AtomicBool>,
    thread: JoinHandle<BTreeSet<String>>,
}

impl Watcher {
    /// Begins once it is subscribed.
    fn start(port: u16, seed: u64) -> Self {
        let id = format!("watcher-{}-{port}-{seed}", std::process::id());
        let mut options = MqttOptions::new(id, "127.0.0.1", port);
        options.set_max_packet_size(Some(1 << 20));
        let (mqtt, mut connection) = Mqtt::new(options, 16);
        let again = mqtt.clone();
        let over = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&over);
        let (confirmed, subscribed) = channel();
        let thread = std::thread::spawn(move || {
            let mut strays = BTreeSet::new();
            loop {
                match connection.recv() {
                    Ok(Ok(Event::Incoming(Packet::ConnAck(_)))) => {
                        let _ = again.try_subscribe("#", QoS::AtMostOnce);
                    }
                    Ok(Ok(Event::Incoming(Packet::SubAck(_)))) => {
                        let _ = confirmed.send(());
                    }
                    Ok(Ok(Event::Incoming(Packet::Publish(publish)))) => {
                        let topic = String::from_utf8_lossy(&publish.topic);
                        if !is_known(&topic) {
                            strays.insert(topic.into_owned());
                        }
                    }
                    Ok(Ok(Event::Outgoing(rumqttc::Outgoing::Disconnect))) | Err(_) => {
                        return strays;
                    }
                    Ok(Ok(_)) => {}
                    Ok(Err(_)) if is_over.load(Ordering::Relaxed) => return strays,
                    Ok(Err(_)) => std::thread::sleep(Duration::from_millis(50)),
                }
            }
        });
        subscribed
            .recv_timeout(crate::SOON)
            .expect("the watcher is subscribed");
        Self { mqtt, over, thread }
    }

    fn finish(self) -> BTreeSet<String> {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.mqtt.disconnect();
        self.thread.join().expect("the watcher's thread")
    }
}

/// Whether the protocol has this topic.
fn is_known(topic: &str) -> bool {
    let tail = topic.strip_prefix(BASE).and_then(|t| t.strip_prefix('/'));
    let levels: Vec<_> = tail.unwrap_or_default().split('/').collect();
    matches!(
        levels[..],
        ["state" | "card" | "health"] | ["task" | "cancel" | "alarm", _] | ["result", _, _, ..]
    )
}

/// A clean session, subscribed anew at each connection: what the broker loses, resending repairs.
fn connect(port: u16, seed: u64) -> (Mqtt, Receiver<Seen>) {
    let id = format!("oracle-{}-{port}-{seed}", std::process::id());
    let mut options = MqttOptions::new(id, "127.0.0.1", port);
    options.set_max_packet_size(Some(1 << 20));
    options.set_keep_alive(Duration::from_secs(30));
    let (mqtt, mut connection) = Mqtt::new(options, 4096);
    let (seen, incoming) = channel();
    let (confirmed, subscribed) = channel();
    let again = mqtt.clone();
    std::thread::spawn(move || {
        loop {
            match connection.recv() {
                Ok(Ok(Event::Incoming(Packet::ConnAck(_)))) => {
                    let _ = again.try_subscribe(format!("{BASE}/result/#"), QoS::AtLeastOnce);
                }
                Ok(Ok(Event::Incoming(Packet::SubAck(_)))) => {
                    let _ = confirmed.send(());
                }
                Ok(Ok(Event::Incoming(Packet::Publish(publish)))) => {
                    if seen.send(Seen::from(publish)).is_err() {
                        return;
                    }
                }
                Ok(Ok(Event::Outgoing(rumqttc::Outgoing::Disconnect))) | Err(_) => return,
                Ok(Ok(_)) => {}
                Ok(Err(_)) => {
                    // What the client would send again by itself could block it for good.
                    connection.eventloop.pending.clear();
                    connection.eventloop.state.collision = None;
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    });
    subscribed
        .recv_timeout(crate::SOON)
        .expect("the requester is subscribed");
    (mqtt, incoming)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_that_nobody_has_are_told_apart() {
        let known = [
            "state",
            "health",
            "alarm/model",
            "result/mes/t/own",
            "task/hmi",
        ];
        for tail in known {
            assert!(is_known(&format!("{BASE}/{tail}")), "{tail}");
        }
        for tail in ["", "stateX", "state/x", "alarm", "result/mes", "task/hmi/x"] {
            assert!(!is_known(&format!("{BASE}/{tail}")), "{tail}");
        }
        assert!(!is_known("elsewhere/result/mes/t") && !is_known(BASE));
    }
}
