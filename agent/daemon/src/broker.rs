//! The MQTT connection: bytes in and out, acknowledgements matched to what was sent. Knows packets and
//! generations; never tasks. The traps of the client library are all handled here:
//!
//! - `poll` is never cancelled (a cancelled write loses its packet) but to give the connection up, and never awaits another
//!   task of ours.
//! - After any error nothing of the old connection survives in the client: its queue, its collision, its
//!   buffered events and its requests are dropped, and [`Signal::Offline`] tells the outbox to send again.
//! - The options are made anew for each attempt: the client keeps what the last broker said of keep-alive and session.
//! - Messages are held in memory of their own: the client's keep the buffer that they were read with.
//! - A broker that breaks the protocol in a way that the client passes over loses its connection.
//! - Acknowledgements carry the connection's generation: one that comes late would acknowledge another packet.

mod access;
mod inbox;
mod link;
mod peer;
mod poller;
mod reasons;
pub mod tls;
mod visit;

pub use access::{Access, Files};
pub use link::{Link, NotSent, Outgoing, Token};
pub use peer::certificate;
pub use poller::Poller;
pub use visit::{Greeting, Taken, Visit};

use access::Credentials;
use link::Shared;
use millwright_task::limits::{
    INBOX_BRIEF_BYTES_MAX, INBOX_BYTES_MAX, INFLIGHT_MAX, PACKET_BYTES_MAX, RECEIVE_BRIEF_MAX,
    RECEIVE_MAX, REQUESTS_MAX,
};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{
    ConnectProperties, LastWill, LastWillProperties, PubAckReason, Publish,
};
use rumqttc::v5::{AsyncClient, MqttOptions};
use rumqttc::{NetworkOptions, TlsConfiguration, Transport};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc};

/// How to reach the broker.
#[derive(Debug, Clone)]
pub struct Settings {
    pub host: String,
    pub port: u16,
    pub access: Access,
    pub client_id: String,
    pub keep_alive: Duration,
    /// Zero means a clean session.
    pub session_expiry: Duration,
    pub will: Option<Will>,
}

impl Settings {
    /// Messages that the broker may have unacknowledged with us, and the bytes that we hold undecided.
    fn intake(&self) -> (usize, usize) {
        if self.session_expiry.is_zero() {
            (RECEIVE_BRIEF_MAX, INBOX_BRIEF_BYTES_MAX)
        } else {
            (RECEIVE_MAX, INBOX_BYTES_MAX)
        }
    }
}

/// What the broker publishes, retained, when the connection is lost for longer than `delay`.
#[derive(Debug, Clone)]
pub struct Will {
    pub topic: String,
    pub payload: Vec<u8>,
    pub delay: Duration,
}

/// What happened to the connection or to something sent on it.
#[derive(Debug)]
pub enum Signal {
    /// Connected; nothing is subscribed yet.
    Online,
    /// Which filters of a subscription the broker granted, in their order.
    Subscribed {
        granted: Vec<bool>,
    },
    /// The connection is gone, with all that was not acknowledged.
    Offline {
        reason: Lost,
        /// Another client came under our client id, or seems to.
        has_rival: bool,
    },
    Delivered(Token),
    Refused(Token, PubAckReason),
    /// What somebody should look after about certificates and password, or that there is nothing any more.
    Access(Option<String>),
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// A sentence for a person.
    pub reason: String,
    /// Trying again won't help until somebody changes something: the password, the certificate, the name.
    pub needs_help: bool,
}

/// A message from the broker and the connection it came on.
#[derive(Debug)]
pub struct Message {
    pub publish: Publish,
    pub generation: u64,
    /// Its bytes' room in the inbox, until it is dropped.
    _room: OwnedSemaphorePermit,
}

/// What acknowledges a message, once it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receipt {
    generation: u64,
    packet: u16,
}

impl Message {
    /// `None` for one that wants no acknowledgement.
    pub fn receipt(&self) -> Option<Receipt> {
        (self.publish.qos != QoS::AtMostOnce).then_some(Receipt {
            generation: self.generation,
            packet: self.publish.pkid,
        })
    }
}

/// What comes from the connection.
#[derive(Debug)]
pub struct Inbox {
    pub signals: mpsc::Receiver<Signal>,
    pub messages: mpsc::Receiver<Message>,
}

impl Inbox {
    /// That of a connection which is not there: nothing comes.
    pub fn closed() -> Self {
        Self {
            signals: mpsc::channel(1).1,
            messages: mpsc::channel(1).1,
        }
    }
}

/// A connection's three ends. Nothing happens until the poller is run.
pub fn open(settings: &Settings) -> (Link, Poller, Inbox) {
    let (client, eventloop) = AsyncClient::new(options(settings), REQUESTS_MAX);
    let link = Link::new(
        client,
        Arc::new(Mutex::new(Shared::default())),
        Arc::new(Notify::new()),
    );
    let (signals_tx, signals) = mpsc::channel(64);
    let (intake, messages) = inbox::open(settings.intake().1);
    let poller = Poller::new(eventloop, link.clone(), settings, signals_tx, intake);
    (link, poller, Inbox { signals, messages })
}

fn options(settings: &Settings) -> MqttOptions {
    let mut options = MqttOptions::new(&settings.client_id, &settings.host, settings.port);
    let expiry = settings.session_expiry.as_secs().min(u64::from(u32::MAX)) as u32;
    let mut properties = ConnectProperties::new();
    properties.session_expiry_interval = Some(expiry);
    properties.receive_maximum = Some(settings.intake().0 as u16);
    properties.max_packet_size = Some(PACKET_BYTES_MAX as u32);
    // A small event must not wait for the acknowledgement of the packet before it: 42 ms on Linux.
    let mut network = NetworkOptions::new();
    network.set_tcp_nodelay(true);
    options
        .set_network_options(network)
        .set_connect_properties(properties)
        .set_clean_start(expiry == 0)
        .set_keep_alive(settings.keep_alive)
        .set_manual_acks(true)
        .set_outgoing_inflight_upper_limit(INFLIGHT_MAX as u16)
        .set_connection_timeout(10);
    let access = settings.access.next();
    if let Some(Credentials { user, password }) = &access.credentials {
        options.set_credentials(user, password);
    }
    if let Some(tls) = &access.tls {
        let config = Arc::clone(&tls.config);
        options.set_transport(Transport::Tls(TlsConfiguration::Rustls(config)));
    }
    if let Some(will) = &settings.will {
        let properties = LastWillProperties {
            delay_interval: Some(will.delay.as_secs() as u32),
            payload_format_indicator: Some(1),
            message_expiry_interval: None,
            content_type: Some("application/json".into()),
            response_topic: None,
            correlation_data: None,
            user_properties: Vec::new(),
        };
        let will = LastWill::new(
            &will.topic,
            will.payload.clone(),
            QoS::AtLeastOnce,
            true,
            Some(properties),
        );
        options.set_last_will(will);
    }
    options
}
