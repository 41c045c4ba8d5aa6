//! The sending end of the connection. Never waits: what can't be handed over now is refused, and the caller
//! tries again when [`Link::room`] says so.

use super::{Lost, Receipt};
use millwright_task::limits::{INFLIGHT_MAX, REQUESTS_MAX};
use millwright_task::wire::Format;
use rumqttc::v5::AsyncClient;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Filter, Publish, PublishProperties, RetainForwardRule};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Names something sent at least once, until the broker acknowledged it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// A message on its way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    pub topic: String,
    pub payload: Vec<u8>,
    pub retain: bool,
    pub correlation: Option<Vec<u8>>,
    /// The user property `event`.
    pub event: Option<&'static str>,
    pub format: Format,
    /// Where an answer is wanted.
    pub response_topic: Option<String>,
    /// Seconds after which the broker forgets it.
    pub expiry: Option<u32>,
}

impl Outgoing {
    /// A plain JSON message.
    pub fn json(topic: String, payload: Vec<u8>) -> Self {
        Self {
            topic,
            payload,
            retain: false,
            correlation: None,
            event: None,
            format: Format::Json,
            response_topic: None,
            expiry: None,
        }
    }

    fn properties(&self) -> PublishProperties {
        PublishProperties {
            payload_format_indicator: self.format.is_text().then_some(1),
            message_expiry_interval: self.expiry,
            topic_alias: None,
            response_topic: self.response_topic.clone(),
            correlation_data: self.correlation.clone().map(Into::into),
            user_properties: self
                .event
                .map(|e| ("event".to_owned(), e.to_owned()))
                .into_iter()
                .collect(),
            subscription_identifiers: Vec::new(),
            content_type: Some(self.format.content_type().to_owned()),
        }
    }
}

/// Why something wasn't handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotSent {
    Offline,
    /// The client has as much as it may hold.
    Full,
    /// The broker accepts no packet of this size.
    TooLarge {
        bytes: usize,
        limit: usize,
    },
    /// The client finds the topic malformed.
    Topic,
}

/// What the sending end and the poller both know.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) generation: u64,
    pub(super) online: bool,
    /// The broker's limit; `None` when it names none.
    pub(super) packet_bytes_max: Option<usize>,
    /// At-least-once publishes handed to the client, in order, which have no packet id yet.
    pub(super) handed: VecDeque<Token>,
    pub(super) inflight: HashMap<u16, Token>,
    /// Publishes handed to the client and not written yet, of either QoS.
    pub(super) queued: usize,
    /// Messages to acknowledge, in order of arrival.
    acks: VecDeque<Publish>,
    /// How many filters each subscription has that was handed to the client and not written yet, in order.
    pub(super) subscribing: VecDeque<usize>,
    pub(super) closing: bool,
}

impl Shared {
    /// Forgets everything of a connection that is gone.
    pub(super) fn reset(&mut self) {
        self.online = false;
        self.handed.clear();
        self.inflight.clear();
        self.queued = 0;
        self.acks.clear();
        self.subscribing.clear();
    }
}

/// The sending end.
#[derive(Debug, Clone)]
pub struct Link {
    client: AsyncClient,
    shared: Arc<Mutex<Shared>>,
    room: Arc<Notify>,
}

impl Link {
    pub(super) fn new(client: AsyncClient, shared: Arc<Mutex<Shared>>, room: Arc<Notify>) -> Self {
        Self {
            client,
            shared,
            room,
        }
    }

    pub fn is_online(&self) -> bool {
        self.lock().online
    }

    /// Whether the connection that brought a message is still the one.
    pub fn is_on(&self, receipt: Receipt) -> bool {
        let shared = self.lock();
        shared.online && shared.generation == receipt.generation
    }

    /// Whether what is sent now goes out soon. Deltas wait for that, and grow while they wait.
    pub fn is_fluent(&self) -> bool {
        let shared = self.lock();
        shared.online && shared.queued < INFLIGHT_MAX / 2
    }

    /// Resolves when something was written, so that there may be room.
    pub async fn room(&self) {
        self.room.notified().await;
    }

    /// Hands a message over: at least once and reported under `token`, or at most once without one.
    pub fn publish(&self, token: Option<Token>, message: &Outgoing) -> Result<(), NotSent> {
        let qos = if token.is_some() {
            QoS::AtLeastOnce
        } else {
            QoS::AtMostOnce
        };
        let properties = message.properties();
        let mut shared = self.lock();
        if !shared.online {
            return Err(NotSent::Offline);
        }
        if shared.queued + shared.acks.len() >= REQUESTS_MAX / 2 {
            return Err(NotSent::Full);
        }
        // Two more bytes than the client counts now: the packet id. Past this check an oversized packet would
        // not be refused but end the connection, again and again.
        let bytes = Publish::new(
            &message.topic,
            qos,
            message.payload.clone(),
            Some(properties.clone()),
        )
        .size()
            + 2;
        if let Some(limit) = shared.packet_bytes_max.filter(|limit| bytes > *limit) {
            return Err(NotSent::TooLarge { bytes, limit });
        }
        self.client
            .try_publish_with_properties(
                &message.topic,
                qos,
                message.retain,
                message.payload.clone(),
                properties,
            )
            .map_err(|_| {
                if rumqttc::valid_topic(&message.topic) {
                    NotSent::Full
                } else {
                    NotSent::Topic
                }
            })?;
        shared.queued += 1;
        shared.handed.extend(token);
        Ok(())
    }

    /// Subscribes at QoS 1 and never to retained messages of the past. False when there is no room for it.
    pub fn subscribe(&self, filters: &[String], retained: bool) -> bool {
        let filter = |path: &String| Filter {
            retain_forward_rule: if retained {
                RetainForwardRule::OnEverySubscribe
            } else {
                RetainForwardRule::Never
            },
            preserve_retain: true,
            ..Filter::new(path, QoS::AtLeastOnce)
        };
        let mut shared = self.lock();
        let is_sent = shared.online
            && self
                .client
                .try_subscribe_many(filters.iter().map(filter))
                .is_ok();
        if is_sent {
            shared.subscribing.push_back(filters.len());
        }
        is_sent
    }

    /// Ends a subscription. False when there is no room for that.
    pub fn unsubscribe(&self, filter: &str) -> bool {
        self.lock().online && self.client.try_unsubscribe(filter).is_ok()
    }

    /// Acknowledges a message, unless the connection it came on is gone: its packet id may by now belong to
    /// another message, and the broker sends it again anyway.
    pub fn ack(&self, receipt: Receipt) {
        let mut shared = self.lock();
        if shared.online && shared.generation == receipt.generation {
            shared.acks.push_back(Publish {
                qos: QoS::AtLeastOnce,
                pkid: receipt.packet,
                ..Publish::default()
            });
            self.flush(&mut shared);
        }
    }

    /// Says goodbye, so that the will is not published. The poller ends.
    pub fn close(&self) {
        self.lock().closing = true;
        // With a full channel or no connection the poller ends by its flag.
        let _ = self.client.try_disconnect();
    }

    /// Hands over acknowledgements that found no room.
    pub(super) fn flush_acks(&self) {
        self.flush(&mut self.lock());
    }

    fn flush(&self, shared: &mut Shared) {
        while let Some(publish) = shared.acks.front() {
            if self.client.try_ack(publish).is_err() {
                return;
            }
            shared.acks.pop_front();
        }
    }

    pub(super) fn wake(&self) {
        self.room.notify_one();
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        // No code panics while it holds the lock, and the state is valid after each statement.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)
    }
}
