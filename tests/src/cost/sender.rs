//! A requester that does next to nothing but look at the clock: tasks of one token go out, their events are told apart by
//! topic and user property, never parsed. Judges nothing; that is the fault suite's.

use crate::BASE;
use rumqttc::NetworkOptions;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, Publish};
use rumqttc::v5::{Client as Mqtt, Event, MqttOptions};
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// What came of a task.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Accepted,
    Done,
    Refused,
    /// Published by this client to itself.
    Echo,
    /// Failed, cancelled, expired: nothing that these tasks should come to.
    Other,
}

struct Arrival {
    task: u64,
    kind: Kind,
    at: Instant,
}

/// What a sender saw.
#[derive(Default)]
pub(super) struct Seen {
    /// From publishing to the first event.
    pub(super) accepted: Vec<Duration>,
    /// From publishing to the answer.
    pub(super) done: Vec<Duration>,
    /// When the last answer came. What never ends is waited for beyond it.
    pub(super) last_done: Option<Instant>,
    pub(super) refused: usize,
    /// Ended in another way, or not at all.
    pub(super) lost: usize,
}

impl Seen {
    pub(super) fn add(&mut self, other: Self) {
        self.accepted.extend(other.accepted);
        self.done.extend(other.done);
        self.last_done = self.last_done.max(other.last_done);
        self.refused += other.refused;
        self.lost += other.lost;
    }
}

/// How tasks follow each other.
#[derive(Clone, Copy)]
pub(super) enum Pace {
    /// So many under way, a new one for each that ended.
    Open(usize),
    /// At even times, whatever became of the others.
    Every(Duration),
    /// One after the other, so long after the answer.
    Gap(Duration),
}

pub(super) struct Sender {
    mqtt: Mqtt,
    name: String,
    incoming: Receiver<Arrival>,
    next: u64,
    open: HashMap<u64, Instant>,
    /// When a task that was refused for now may be tried again.
    pause: Option<Instant>,
    seen: Seen,
}

/// What is waited for after the last task was sent.
const LAST: Duration = Duration::from_secs(10);
/// A sender that is refused stands back for so long: the load is to be at the capacity, not above.
const STAND_BACK: Duration = Duration::from_millis(50);

impl Sender {
    pub(super) fn connect(port: u16, name: &str) -> Self {
        let id = format!("{name}-{}", std::process::id());
        let mut options = MqttOptions::new(id, "127.0.0.1", port);
        options.set_keep_alive(Duration::from_secs(30));
        // What this end delays would be counted as the agent's.
        let mut network = NetworkOptions::new();
        network.set_tcp_nodelay(true);
        options.set_network_options(network);
        let (mqtt, mut connection) = Mqtt::new(options, 512);
        let (arrived, incoming) = channel();
        let (confirmed, subscribed) = channel();
        let filters = [format!("{BASE}/result/{name}/+"), format!("echo/{name}/+")];
        for filter in filters {
            mqtt.subscribe(filter, QoS::AtLeastOnce)
                .expect("room for a subscription");
        }
        std::thread::spawn(move || {
            for event in connection.iter() {
                match event {
                    Ok(Event::Incoming(Packet::Publish(publish))) => {
                        let arrival = arrival(&publish);
                        if arrival.is_some_and(|a| arrived.send(a).is_err()) {
                            return;
                        }
                    }
                    Ok(Event::Incoming(Packet::SubAck(_))) => {
                        let _ = confirmed.send(());
                    }
                    Ok(_) => {}
                    Err(_) => return,
                }
            }
        });
        for _ in 0..2 {
            subscribed
                .recv_timeout(crate::SOON)
                .expect("the sender is subscribed");
        }
        Self {
            mqtt,
            name: name.to_owned(),
            incoming,
            next: 0,
            open: HashMap::new(),
            pause: None,
            seen: Seen::default(),
        }
    }

    /// Sends tasks for a while, or up to a number, and waits for what is under way.
    pub(super) fn run(&mut self, pace: Pace, time: Duration, tasks_max: usize) -> Seen {
        let began = Instant::now();
        let last = self.next.saturating_add(tasks_max as u64);
        let mut due = began;
        while began.elapsed() < time && self.next < last {
            let now = Instant::now();
            if self.pause.is_some_and(|until| until <= now) {
                self.pause = None;
            }
            let may = match pace {
                _ if self.pause.is_some() => false,
                Pace::Open(most) => self.open.len() < most,
                Pace::Every(_) => due <= now,
                Pace::Gap(_) => self.open.is_empty() && due <= now,
            };
            if may {
                self.send_task();
                if let Pace::Every(step) = pace {
                    due += step;
                }
                continue;
            }
            let next = match pace {
                _ if self.pause.is_some() => self.pause,
                Pace::Gap(_) if !self.open.is_empty() => None,
                Pace::Open(_) => None,
                Pace::Every(_) | Pace::Gap(_) => Some(due),
            };
            let end = began + time;
            let ended = self.take(next.unwrap_or(end).min(end));
            if let (true, Pace::Gap(gap)) = (ended, pace) {
                due = Instant::now() + gap;
            }
        }
        let end = Instant::now() + LAST;
        while !self.open.is_empty() && Instant::now() < end {
            self.take(end);
        }
        self.seen.lost += self.open.len();
        self.open.clear();
        std::mem::take(&mut self.seen)
    }

    /// Round trips through the broker alone, one at a time.
    pub(super) fn echo(&mut self, times: usize, gap: Duration) -> Vec<Duration> {
        for _ in 0..times {
            self.next += 1;
            let topic = format!("echo/{}/{}", self.name, self.next);
            self.publish(topic, vec![b'x'; 80]);
            let end = Instant::now() + LAST;
            while !self.open.is_empty() && Instant::now() < end {
                self.take(end);
            }
            std::thread::sleep(gap);
        }
        std::mem::take(&mut self.seen.accepted)
    }

    fn send_task(&mut self) {
        self.next += 1;
        let n = self.next;
        let topic = format!("{BASE}/task/{}", self.name);
        let payload = format!(
            r#"{{"id":"{n}","kind":"generate","prompt":"The pump","max_tokens":1,"deadline_ms":600000}}"#
        );
        self.publish(topic, payload.into_bytes());
    }

    fn publish(&mut self, topic: String, payload: Vec<u8>) {
        self.open.insert(self.next, Instant::now());
        self.mqtt
            .publish(topic, QoS::AtLeastOnce, false, payload)
            .expect("the client's thread runs");
    }

    /// Takes what comes first, if it comes in time. Whether a task ended with it.
    fn take(&mut self, until: Instant) -> bool {
        let wait = until.saturating_duration_since(Instant::now());
        let arrival = match self.incoming.recv_timeout(wait) {
            Ok(arrival) => arrival,
            Err(RecvTimeoutError::Timeout) => return false,
            Err(RecvTimeoutError::Disconnected) => panic!("the broker closed the connection"),
        };
        let Some(&sent) = self.open.get(&arrival.task) else {
            return false;
        };
        let latency = arrival.at.saturating_duration_since(sent);
        match arrival.kind {
            Kind::Accepted => {
                self.seen.accepted.push(latency);
                return false;
            }
            Kind::Echo => self.seen.accepted.push(latency),
            Kind::Done => {
                self.seen.done.push(latency);
                self.seen.last_done = Some(arrival.at);
            }
            Kind::Refused => {
                self.seen.refused += 1;
                self.pause = Some(Instant::now() + STAND_BACK);
            }
            Kind::Other => self.seen.lost += 1,
        }
        self.open.remove(&arrival.task);
        true
    }
}

fn arrival(publish: &Publish) -> Option<Arrival> {
    let at = Instant::now();
    let topic = str::from_utf8(&publish.topic).ok()?;
    let task = topic.rsplit('/').next()?.parse().ok()?;
    let properties = publish.properties.as_ref();
    let event = properties
        .and_then(|p| p.user_properties.iter().find(|(name, _)| name == "event"))
        .map(|(_, event)| event.as_str());
    let kind = match event {
        _ if topic.starts_with("echo/") => Kind::Echo,
        Some("accepted") => Kind::Accepted,
        Some("done") => Kind::Done,
        Some("rejected") => Kind::Refused,
        // The first event of a task is `accepted`.
        Some("started" | "delta") => return None,
        _ => Kind::Other,
    };
    Some(Arrival { task, kind, at })
}
