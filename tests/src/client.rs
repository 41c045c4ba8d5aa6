//! A requester: publishes tasks, collects what comes back. Its user name is the sender.

use crate::{BASE, Broker, SOON};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, Publish, PublishProperties};
use rumqttc::v5::{Client as Mqtt, Event, MqttOptions};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Without a final event for this long, [`Client::insist`] sends again.
const RESEND: Duration = Duration::from_secs(3);

/// A message as it came.
#[derive(Debug, Clone)]
pub struct Message {
    pub topic: String,
    pub payload: Vec<u8>,
    pub retain: bool,
    pub properties: PublishProperties,
}

/// What to publish besides a topic and a payload.
#[derive(Default, Clone)]
pub struct Outgoing {
    pub retain: bool,
    pub properties: PublishProperties,
}

/// A connected client, subscribed to the results for its sender, the gateway's state and its card.
pub struct Client {
    mqtt: Mqtt,
    /// Of the gateway or the pool that it asks.
    base: String,
    sender: String,
    incoming: Receiver<Message>,
    /// One for each SUBACK.
    subscribed: Receiver<()>,
    /// Received, but not yet asked for.
    kept: VecDeque<Message>,
}

impl Message {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.payload).unwrap_or_else(|e| {
            panic!(
                "{}: {e}: {}",
                self.topic,
                String::from_utf8_lossy(&self.payload)
            )
        })
    }
}

impl Client {
    /// Connects as `sender`, with the password that [`Security::Passwords`](crate::Security) gives it.
    pub fn connect(broker: &Broker, sender: &str) -> Self {
        Self::at(broker, sender, BASE)
    }

    /// The same, for another gateway or a pool.
    pub fn at(broker: &Broker, sender: &str, base: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!(
            "{sender}-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let mut options = MqttOptions::new(id, "127.0.0.1", broker.client_port);
        if broker.knows_users {
            options.set_credentials(sender, format!("{sender}-secret"));
        }
        options.set_max_packet_size(Some(1 << 20));
        options.set_keep_alive(Duration::from_secs(5));
        let (mqtt, mut connection) = Mqtt::new(options, 256);
        let (collected, incoming) = channel();
        let (confirmed, subscribed) = channel();
        let filters = [
            format!("{base}/result/{sender}/#"),
            format!("{base}/state"),
            format!("{base}/card"),
        ];
        let again = mqtt.clone();
        // Ends with the last handle of the client, or when the test no longer listens.
        std::thread::spawn(move || {
            for event in connection.iter() {
                match event {
                    // At every connection: the session is clean.
                    Ok(Event::Incoming(Packet::ConnAck(_))) => {
                        for filter in &filters {
                            let _ = again.try_subscribe(filter, QoS::AtLeastOnce);
                        }
                    }
                    Ok(Event::Incoming(Packet::SubAck(_))) => {
                        let _ = confirmed.send(());
                    }
                    Ok(Event::Incoming(Packet::Publish(publish))) => {
                        if collected.send(Message::from(publish)).is_err() {
                            return;
                        }
                    }
                    Ok(_) => {}
                    Err(_) => std::thread::sleep(Duration::from_millis(50)),
                }
            }
        });
        for _ in 0..3 {
            subscribed
                .recv_timeout(SOON)
                .expect("the client is subscribed");
        }
        Self {
            mqtt,
            base: base.into(),
            sender: sender.into(),
            incoming,
            subscribed,
            kept: VecDeque::new(),
        }
    }

    /// Subscribes, and waits until the broker has done it.
    pub fn subscribe(&self, filter: &str) {
        self.subscribed.try_iter().for_each(drop);
        self.mqtt
            .subscribe(filter, QoS::AtLeastOnce)
            .expect("subscribing");
        self.subscribed
            .recv_timeout(SOON)
            .expect("the broker confirms the subscription");
    }

    /// Publishes to `{base}/{tail}`.
    pub fn publish(&self, tail: &str, payload: impl Into<Vec<u8>>, with: Outgoing) {
        let Outgoing { retain, properties } = with;
        let payload = payload.into();
        let sent = self.mqtt.publish_with_properties(
            format!("{}/{tail}", self.base),
            QoS::AtLeastOnce,
            retain,
            payload,
            properties,
        );
        sent.expect("publishing");
    }

    /// Sends a task as it stands.
    pub fn task(&self, task: &Value) {
        self.raw(task.to_string());
    }

    /// Sends a payload where tasks go.
    pub fn raw(&self, payload: impl Into<Vec<u8>>) {
        self.publish(
            &format!("task/{}", self.sender),
            payload,
            Outgoing::default(),
        );
    }

    /// Sends a `generate` task of `tokens` tokens.
    pub fn generate(&self, id: &str, tokens: u32) {
        self.task(&json!({ "id": id, "kind": "generate", "prompt": "The pump", "max_tokens": tokens, "stream": true }));
    }

    pub fn cancel(&self, id: &str) {
        self.publish(
            &format!("cancel/{}", self.sender),
            json!({ "task": id }).to_string(),
            Outgoing::default(),
        );
    }

    /// The next message that `wanted` picks; others are kept for later.
    pub fn next(&mut self, what: &str, wanted: impl Fn(&Message) -> bool) -> Message {
        let found = self.next_within(SOON, wanted);
        found.unwrap_or_else(|| panic!("{what}: not within {SOON:?}; kept: {:#?}", self.kept))
    }

    /// The same, or none within a time: to show that something does not come.
    pub fn next_within(
        &mut self,
        time: Duration,
        wanted: impl Fn(&Message) -> bool,
    ) -> Option<Message> {
        if let Some(at) = self.kept.iter().position(&wanted) {
            return self.kept.remove(at);
        }
        let deadline = Instant::now() + time;
        loop {
            match self
                .incoming
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(message) if wanted(&message) => return Some(message),
                Ok(message) => self.kept.push_back(message),
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => panic!("the client's thread ended"),
            }
        }
    }

    /// Waits for the gateway's state.
    pub fn await_state(&mut self, state: &str) -> Value {
        let topic = format!("{}/state", self.base);
        self.next(&format!("state {state}"), |m| {
            m.topic == topic && m.json()["state"] == state
        })
        .json()
    }

    /// The next event of a task with this name.
    pub fn event(&mut self, id: &str, name: &str) -> Value {
        self.next(&format!("{name} for {id}"), |m| {
            is_event(m, id) && m.json()["event"] == name
        })
        .json()
    }

    /// All events of a task up to its final one, in their order.
    pub fn events(&mut self, id: &str) -> Vec<Value> {
        let mut events = Vec::new();
        loop {
            let event = self
                .next(&format!("an event for {id}"), |m| is_event(m, id))
                .json();
            events.push(event.clone());
            if is_final(&event) {
                return events;
            }
        }
    }

    /// A task's final event.
    pub fn outcome(&mut self, id: &str) -> Value {
        self.events(id).pop().expect("events end with a final one")
    }

    /// The requester's side of the promise: sends the same task again until there is an outcome. One that was refused is
    /// sent again too, when the refusal says or soon.
    pub fn insist(&mut self, task: &Value) -> Value {
        let id = task["id"].as_str().expect("the task has an id");
        let deadline = Instant::now() + 4 * SOON;
        while Instant::now() < deadline {
            self.task(task);
            let is_last = |m: &Message| is_event(m, id) && is_final(&m.json());
            let Some(last) = self.next_within(RESEND, is_last) else {
                continue;
            };
            let event = last.json();
            if event["event"] != "rejected" {
                return event;
            }
            let pause = event["retry_after_ms"].as_u64().unwrap_or(100);
            std::thread::sleep(Duration::from_millis(pause).min(RESEND));
        }
        panic!("{id} has no outcome; kept: {:#?}", self.kept);
    }

    /// What the agent says to something without an id.
    pub fn refusal(&mut self) -> Value {
        let topic = format!("{}/result/{}/_invalid", self.base, self.sender);
        self.next("a refusal on _invalid", |m| m.topic == topic)
            .json()
    }
}

impl From<Publish> for Message {
    fn from(publish: Publish) -> Self {
        Self {
            topic: String::from_utf8_lossy(&publish.topic).into_owned(),
            payload: publish.payload.to_vec(),
            retain: publish.retain,
            properties: publish.properties.unwrap_or_default(),
        }
    }
}

fn is_event(message: &Message, id: &str) -> bool {
    !message.topic.ends_with("/state")
        && !message.topic.ends_with("/card")
        && message.json()["task"] == id
}

fn is_final(event: &Value) -> bool {
    let finals = ["done", "rejected", "failed", "cancelled", "expired"];
    finals.iter().any(|name| event["event"] == *name)
}
