//! The one task that drives the client library. It reports what happened, in order; it decides nothing.

use super::inbox::Intake;
use super::link::Link;
use super::{Lost, Settings, Signal};
use crate::clock::random;
use millwright_task::limits::INFLIGHT_MAX;
use rumqttc::Outgoing;
use rumqttc::v5::mqttbytes::v5::{
    ConnAck, ConnectReturnCode, DisconnectReasonCode, Packet, PubAck, PubAckReason,
    SubscribeReasonCode,
};
use rumqttc::v5::{ConnectionError, Event, EventLoop, MqttState, StateError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

const BACKOFF_FIRST: Duration = Duration::from_millis(500);
const BACKOFF_LAST: Duration = Duration::from_secs(30);
/// A connection that lasted this long was a good one: the next attempt follows quickly.
const STEADY: Duration = Duration::from_secs(20);

/// Drives the connection until [`Link::close`].
pub struct Poller {
    eventloop: EventLoop,
    link: Link,
    signals: mpsc::Sender<Signal>,
    intake: Intake,
    /// `host:port`, for sentences.
    place: String,
    user: Option<String>,
    backoff: Duration,
    since: Option<Instant>,
}

impl Poller {
    pub(super) fn new(
        eventloop: EventLoop,
        link: Link,
        settings: &Settings,
        signals: mpsc::Sender<Signal>,
        intake: Intake,
    ) -> Self {
        let place = format!("{}:{}", settings.host, settings.port);
        let user = settings.credentials.as_ref().map(|c| c.user.clone());
        Self {
            eventloop,
            link,
            signals,
            intake,
            place,
            user,
            backoff: BACKOFF_FIRST,
            since: None,
        }
    }

    /// Polls, reports and reconnects. Returns after [`Link::close`], or when nobody listens any more.
    pub async fn run(mut self) {
        loop {
            let mut taken_over = false;
            let (signal, lost) = match self.eventloop.poll().await {
                Ok(Event::Incoming(packet)) => (self.incoming(packet), None),
                Ok(Event::Outgoing(sent)) => {
                    self.outgoing(&sent);
                    (None, self.intake.is_behind().then(|| self.behind()))
                }
                Err(error) => {
                    taken_over = is_taken_over(&error);
                    (None, Some(self.explain(&error)))
                }
            };
            self.link.flush_acks();
            if let Some(signal) = signal
                && self.signals.send(signal).await.is_err()
            {
                return;
            }
            if let Some(reason) = lost {
                self.reset();
                if taken_over {
                    // The other one does the same when we come back: no quick fight over the session.
                    self.backoff = BACKOFF_LAST;
                }
                if self.link.lock().closing
                    || self.signals.send(Signal::Offline { reason }).await.is_err()
                {
                    return;
                }
                tokio::time::sleep(self.pause()).await;
            }
        }
    }

    fn incoming(&mut self, packet: Packet) -> Option<Signal> {
        match packet {
            Packet::ConnAck(connack) => Some(self.connected(&connack)),
            Packet::Publish(publish) => {
                let generation = self.link.lock().generation;
                self.intake.take(publish, generation);
                None
            }
            Packet::PubAck(PubAck { pkid, reason, .. }) => {
                let token = self.link.lock().inflight.remove(&pkid)?;
                self.link.wake();
                match reason {
                    PubAckReason::Success | PubAckReason::NoMatchingSubscribers => {
                        Some(Signal::Delivered(token))
                    }
                    other => Some(Signal::Refused(token, other)),
                }
            }
            Packet::SubAck(suback) => {
                let good =
                    |code: &SubscribeReasonCode| matches!(code, SubscribeReasonCode::Success(_));
                Some(Signal::Subscribed {
                    refused: !suback.return_codes.iter().all(good),
                })
            }
            _ => None,
        }
    }

    fn connected(&mut self, connack: &ConnAck) -> Signal {
        let limit = connack.properties.as_ref().and_then(|p| p.max_packet_size);
        let mut shared = self.link.lock();
        shared.generation += 1;
        shared.online = true;
        shared.packet_bytes_max = limit.map(|n| n as usize);
        self.since = Some(Instant::now());
        Signal::Online
    }

    fn outgoing(&mut self, sent: &Outgoing) {
        if let Outgoing::PubAck(_) = *sent {
            self.intake.acknowledged();
        }
        if let Outgoing::Publish(pkid) = *sent {
            let mut shared = self.link.lock();
            shared.queued = shared.queued.saturating_sub(1);
            // Packet ids come in the order in which the messages were handed over; 0 is at most once.
            if pkid != 0
                && let Some(token) = shared.handed.pop_front()
            {
                shared.inflight.insert(pkid, token);
            }
        }
        self.link.wake();
    }

    /// Drops all that the client holds of the connection that is gone.
    fn reset(&mut self) {
        let mut shared = self.link.lock();
        shared.reset();
        // Under the lock, so that nothing is handed over between the two.
        self.eventloop.clean();
        self.eventloop.pending.clear();
        // Anew: its packet ids may lie beyond what the next connection allows (rumqttc 0.25.1 wraps them only at
        // the exact maximum), and a collision left over would stop it for good.
        self.eventloop.state = MqttState::new(INFLIGHT_MAX as u16, true);
        drop(shared);
        self.intake.reset();
        if self
            .since
            .take()
            .is_some_and(|since| since.elapsed() > STEADY)
        {
            self.backoff = BACKOFF_FIRST;
        }
    }

    /// What was taken in is decided; only a new connection brings what wasn't.
    fn behind(&mut self) -> Lost {
        self.backoff = BACKOFF_FIRST;
        Lost {
            reason: format!(
                "{} sent more at once than may be held: connecting anew for the rest",
                self.place
            ),
            needs_help: false,
        }
    }

    /// The time to wait now: twice as long each time, and never the same for a hundred gateways at once.
    fn pause(&mut self) -> Duration {
        let full = self.backoff;
        self.backoff = (full * 2).min(BACKOFF_LAST);
        full / 2 + full.mul_f64((random() % 1000) as f64 / 2000.0)
    }

    fn explain(&self, error: &ConnectionError) -> Lost {
        let place = &self.place;
        let user = self.user.as_deref().unwrap_or("without a name");
        let (reason, needs_help) = match error {
            ConnectionError::ConnectionRefused(
                ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized,
            ) => (
                format!(
                    "the broker at {place} refuses user {user}: check the user and the password file"
                ),
                true,
            ),
            ConnectionError::ConnectionRefused(code) => (
                format!("the broker at {place} refuses the connection: {code:?}"),
                true,
            ),
            ConnectionError::Tls(e) => (format!("no TLS connection to {place}: {e}"), true),
            ConnectionError::Io(e) if e.kind() == std::io::ErrorKind::InvalidData => {
                (format!("no TLS connection to {place}: {e}"), true)
            }
            ConnectionError::Io(e) => (
                format!("the broker at {place} can't be reached: {e}"),
                false,
            ),
            ConnectionError::Timeout(_) => {
                (format!("the broker at {place} does not answer"), false)
            }
            error if is_taken_over(error) => (
                format!(
                    "another client connected to {place} under this client id: each gateway needs its own"
                ),
                true,
            ),
            ConnectionError::MqttState(StateError::AwaitPingResp) => {
                (format!("the broker at {place} went silent"), false)
            }
            ConnectionError::MqttState(e) => {
                (format!("the connection to {place} was lost: {e}"), false)
            }
            other => (format!("no connection to {place}: {other}"), false),
        };
        Lost { reason, needs_help }
    }
}

/// Whether another client came under our client id.
fn is_taken_over(error: &ConnectionError) -> bool {
    matches!(
        error,
        ConnectionError::MqttState(StateError::ServerDisconnect {
            reason_code: DisconnectReasonCode::SessionTakenOver,
            ..
        })
    )
}
