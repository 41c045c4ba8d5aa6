//! A short stay at the broker, for who sets a gateway up: what the broker says of itself, and what it lets this user do.
//! It has a client id of its own, no session and no will, so that an agent which runs meanwhile is not disturbed. Each
//! step ends within its time, whatever the broker does.

use super::reasons::explain;
use super::{Lost, Settings, options};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{
    Filter, Packet, PubAckReason, Publish, PublishProperties, RetainForwardRule,
    SubscribeReasonCode,
};
use rumqttc::v5::{AsyncClient, ConnectionError, Event, EventLoop};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// Until the broker has taken us in, and until it answers one packet.
const CONNECT: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_secs(5);
/// How long a message that the broker took may take to come back.
const RETURN: Duration = Duration::from_secs(1);
/// Messages that are remembered.
const HEARD_MAX: usize = 64;

/// What the broker said when it took us in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// Bytes of a packet; `None` is MQTT's own limit.
    pub packet_bytes_max: Option<u32>,
    pub qos_max: u8,
    pub keeps_retained: bool,
    pub has_wildcards: bool,
    pub shares_subscriptions: bool,
}

/// What came of a publication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    Yes,
    /// The broker says that this user may not.
    Forbidden,
    Refused(PubAckReason),
}

/// A connection of this kind.
pub struct Visit {
    client: AsyncClient,
    eventloop: EventLoop,
    settings: Settings,
    heard: Vec<Publish>,
}

impl Visit {
    /// Connects. `role` tells its client id from the agent's own.
    pub async fn begin(settings: &Settings, role: &str) -> Result<(Self, Greeting), Lost> {
        let settings = Settings {
            client_id: format!("{}-{role}", settings.client_id),
            keep_alive: Duration::from_mins(1),
            session_expiry: Duration::ZERO,
            will: None,
            ..settings.clone()
        };
        let (client, eventloop) = AsyncClient::new(options(&settings), 8);
        let mut visit = Self {
            client,
            eventloop,
            settings,
            heard: Vec::new(),
        };
        let within = Instant::now() + CONNECT;
        loop {
            if let Packet::ConnAck(connack) = visit.packet(within, true).await? {
                let said = connack.properties.as_ref();
                let is = |flag: Option<u8>| flag != Some(0);
                let greeting = Greeting {
                    packet_bytes_max: said.and_then(|s| s.max_packet_size),
                    qos_max: said.and_then(|s| s.max_qos).unwrap_or(2),
                    keeps_retained: is(said.and_then(|s| s.retain_available)),
                    has_wildcards: is(said.and_then(|s| s.wildcard_subscription_available)),
                    shares_subscriptions: is(said.and_then(|s| s.shared_subscription_available)),
                };
                return Ok((visit, greeting));
            }
        }
    }

    /// Whether the broker grants it. Messages come by QoS 0, so that nothing is owed for them.
    pub async fn subscribe(&mut self, filter: &str, retained: bool) -> Result<bool, Lost> {
        let mut filter = Filter::new(filter, QoS::AtMostOnce);
        filter.retain_forward_rule = if retained {
            RetainForwardRule::OnEverySubscribe
        } else {
            RetainForwardRule::Never
        };
        if self.client.try_subscribe_many([filter]).is_err() {
            return Ok(false);
        }
        let within = Instant::now() + STEP;
        loop {
            if let Packet::SubAck(suback) = self.packet(within, false).await? {
                let granted =
                    |code: &SubscribeReasonCode| matches!(code, SubscribeReasonCode::Success(_));
                return Ok(suback.return_codes.iter().all(granted));
            }
        }
    }

    /// Publishes, not retained, and waits for the broker's word on it. It goes out of date within a second.
    pub async fn publish(&mut self, topic: &str, payload: &[u8]) -> Result<Taken, Lost> {
        let sent = self.client.try_publish_with_properties(
            topic,
            QoS::AtLeastOnce,
            false,
            payload.to_vec(),
            short_lived(),
        );
        if sent.is_err() {
            return Ok(Taken::Refused(PubAckReason::TopicNameInvalid));
        }
        let within = Instant::now() + STEP;
        loop {
            if let Packet::PubAck(puback) = self.packet(within, false).await? {
                return Ok(match puback.reason {
                    PubAckReason::Success | PubAckReason::NoMatchingSubscribers => Taken::Yes,
                    PubAckReason::NotAuthorized => Taken::Forbidden,
                    other => Taken::Refused(other),
                });
            }
        }
    }

    /// Publishes by QoS 0, for as short a time: not every broker keeps it from the session of a client that is away. False
    /// when there is no room for it.
    pub fn whisper(&self, topic: &str, payload: &[u8]) -> bool {
        let sent = self.client.try_publish_with_properties(
            topic,
            QoS::AtMostOnce,
            false,
            payload.to_vec(),
            short_lived(),
        );
        sent.is_ok()
    }

    /// The newest message of a topic, if one came or comes within a moment.
    pub async fn hear(&mut self, topic: &str) -> Result<Option<Publish>, Lost> {
        let within = Instant::now() + RETURN;
        loop {
            let heard = self.heard.iter().rev().find(|m| m.topic == topic);
            if let Some(message) = heard {
                return Ok(Some(message.clone()));
            }
            match timeout_at(within, self.eventloop.poll()).await {
                Err(_) => return Ok(None),
                Ok(Ok(event)) => self.note(&event),
                Ok(Err(e)) => return Err(self.lost(&e, false)),
            }
        }
    }

    /// Says goodbye, so that the broker logs no broken connection.
    pub async fn end(mut self) {
        if self.client.try_disconnect().is_ok() {
            let within = Instant::now() + Duration::from_millis(500);
            while let Ok(Ok(_)) = timeout_at(within, self.eventloop.poll()).await {}
        }
    }

    /// The next packet that comes.
    async fn packet(&mut self, within: Instant, is_new: bool) -> Result<Packet, Lost> {
        loop {
            match timeout_at(within, self.eventloop.poll()).await {
                Err(_) => {
                    let reason = format!("the broker at {} does not answer", self.place());
                    return Err(Lost {
                        reason,
                        needs_help: false,
                    });
                }
                Ok(Err(e)) => return Err(self.lost(&e, is_new)),
                Ok(Ok(event)) => {
                    self.note(&event);
                    if let Event::Incoming(packet) = event {
                        return Ok(packet);
                    }
                }
            }
        }
    }

    fn note(&mut self, event: &Event) {
        if let Event::Incoming(Packet::Publish(message)) = event
            && self.heard.len() < HEARD_MAX
        {
            self.heard.push(message.clone());
        }
    }

    fn lost(&self, error: &ConnectionError, is_new: bool) -> Lost {
        explain(error, &self.place(), &self.settings.access, is_new)
    }

    fn place(&self) -> String {
        format!("{}:{}", self.settings.host, self.settings.port)
    }
}

/// Good for a second.
fn short_lived() -> PublishProperties {
    PublishProperties {
        message_expiry_interval: Some(1),
        ..PublishProperties::default()
    }
}
