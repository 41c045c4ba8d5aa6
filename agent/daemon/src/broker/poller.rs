//! The one task that drives the client library. It reports what happened, in order; it decides nothing.

use super::access::Access;
use super::inbox::Intake;
use super::link::Link;
use super::reasons::{explain, is_closed, is_refusal, is_taken_over};
use super::{Lost, Settings, Signal, options};
use crate::clock::{latest, random};
use millwright_task::limits::INFLIGHT_MAX;
use rumqttc::Outgoing;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{
    ConnAck, Packet, PubAck, PubAckReason, Publish, SubAck, SubscribeReasonCode,
};
use rumqttc::v5::{Event, EventLoop, MqttState};
use std::collections::HashMap;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout};

const BACKOFF_FIRST: Duration = Duration::from_millis(500);
const BACKOFF_RENEWED: Duration = Duration::from_secs(4);
const BACKOFF_LAST: Duration = Duration::from_secs(30);
/// A connection that lasted this long was a good one: the next attempt follows quickly.
const STEADY: Duration = Duration::from_secs(20);
/// mosquitto 2.0.11 says nothing to whom it throws out for another client of the same id. A connection that it closes without a
/// word within this time is suspect, for the other one is away for no longer, and so many one after the other have a cause.
const CUT_WITHIN: Duration = BACKOFF_LAST.saturating_add(Duration::from_secs(5));
const CUTS_SUSPECT: u32 = 3;
/// How long the client may take for one step beyond two keep-alives: a broker that reads nothing blocks it for good.
const STUCK: Duration = Duration::from_mins(3);
/// How long a broker may take to confirm the subscription.
const SUBSCRIBING: Duration = Duration::from_secs(30);
/// How often it is looked whether certificates or password were renewed.
const LOOK: Duration = Duration::from_secs(3);
/// How long the reading of them may take; keep-alives wait for it.
const READING: Duration = Duration::from_secs(3);
/// One that takes this long may be of a mount that is gone, with another in its place: the next one begins. After twice the time each
/// time, for those that are stuck keep their threads.
const READING_GIVEN_UP: Duration = Duration::from_mins(5);

/// A subscription with how many filters, since when; `None` is the end of one.
type Asked = Option<(usize, Instant)>;

/// Drives the connection until [`Link::close`].
pub struct Poller {
    eventloop: EventLoop,
    link: Link,
    signals: mpsc::Sender<Signal>,
    intake: Intake,
    settings: Settings,
    /// `host:port`, for sentences.
    place: String,
    backoff: Duration,
    /// Connections, one after the other, that were closed without a word soon after they began.
    cuts: u32,
    /// When the broker took us in, while it has us.
    since: Option<Instant>,
    looked: Instant,
    /// A look that was not waited for any longer, since when; and how many before it never ended.
    reading: Option<(JoinHandle<(bool, Access)>, Instant)>,
    stuck: u32,
    /// What was last said about certificates and password.
    complaint: Option<String>,
    /// The longest until the next ping.
    ping: Duration,
    /// What the broker was asked to confirm, by packet id.
    asked: HashMap<u16, Asked>,
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
        Self {
            eventloop,
            link,
            signals,
            intake,
            settings: settings.clone(),
            place,
            backoff: BACKOFF_FIRST,
            cuts: 0,
            since: None,
            looked: Instant::now(),
            reading: None,
            stuck: 0,
            complaint: None,
            ping: settings.keep_alive,
            asked: HashMap::new(),
        }
    }

    /// Polls, reports and reconnects. Returns after [`Link::close`], or when nobody listens any more.
    pub async fn run(mut self) {
        loop {
            let (mut taken_over, mut closed) = (false, false);
            let renewed = self.look().await;
            if self.say_complaint().await.is_err() {
                return;
            }
            // Cancelled, it loses what it was writing; so the connection is given up, too.
            let polled = if renewed {
                None
            } else {
                Some(timeout(self.patience(), self.eventloop.poll()).await)
            };
            let (signal, lost) = match polled {
                None => (None, Some(Self::renewed())),
                Some(Ok(Ok(Event::Incoming(packet)))) => match self.incoming(packet) {
                    Ok(signal) => (signal, self.overdue()),
                    Err(what) => (None, Some(self.broken(what))),
                },
                Some(Ok(Ok(Event::Outgoing(sent)))) => {
                    self.outgoing(&sent);
                    let is_behind = self.intake.is_behind();
                    (
                        None,
                        is_behind.then(|| self.behind()).or_else(|| self.overdue()),
                    )
                }
                Some(Ok(Err(error))) => {
                    taken_over = is_taken_over(&error);
                    closed = is_closed(&error);
                    let is_new = self.since.is_none();
                    let lost = explain(&error, &self.place, &self.settings.access, is_new);
                    if is_new && is_refusal(&error) {
                        self.settings.access.refused();
                    }
                    (None, Some(lost))
                }
                Some(Err(_)) => (None, Some(self.stuck())),
            };
            self.link.flush_acks();
            if let Some(signal) = signal
                && self.signals.send(signal).await.is_err()
            {
                return;
            }
            if let Some(mut reason) = lost {
                let lasted = self.since.map(|since| since.elapsed());
                self.cuts = cuts(self.cuts, closed, lasted);
                // A client without a session of its own has a name that nobody else has.
                let suspected =
                    self.cuts >= CUTS_SUSPECT && !self.settings.session_expiry.is_zero();
                if suspected {
                    reason = suspicion(&reason, self.cuts);
                }
                self.reset();
                if renewed {
                    // A plant renews many gateways' files at once: they don't come back in one moment.
                    self.backoff = BACKOFF_RENEWED;
                }
                if taken_over {
                    // The other one does the same when we come back: no quick fight over the session.
                    self.backoff = BACKOFF_LAST;
                }
                let has_rival = taken_over || suspected;
                let signal = Signal::Offline { reason, has_rival };
                if self.link.lock().closing || self.signals.send(signal).await.is_err() {
                    return;
                }
                tokio::time::sleep(pause(&mut self.backoff)).await;
            }
        }
    }

    /// What a packet means, or what is wrong with it. The client passes over much that no broker may send.
    fn incoming(&mut self, packet: Packet) -> Result<Option<Signal>, &'static str> {
        match packet {
            Packet::ConnAck(_) if self.since.is_some() => Err("a second CONNACK"),
            Packet::ConnAck(connack) => self.connected(&connack).map(Some),
            Packet::Publish(publish) => self.message(publish).map(|()| None),
            Packet::PubAck(puback) => Ok(self.acknowledged(&puback)),
            Packet::SubAck(suback) => self.subscribed(&suback).map(Some),
            Packet::UnsubAck(unsuback) => match self.asked.remove(&unsuback.pkid) {
                Some(None) => Ok(None),
                _ => Err("an UNSUBACK that ends no subscription"),
            },
            Packet::PingResp(_) => Ok(None),
            _ => Err("a packet that nobody asked for"),
        }
    }

    fn message(&mut self, publish: Publish) -> Result<(), &'static str> {
        let properties = publish.properties.as_ref();
        if properties.is_some_and(|p| p.topic_alias.is_some()) || publish.topic.is_empty() {
            // The client keeps the buffers of all of them.
            return Err("a topic alias, of which we allow none");
        }
        if publish.qos == QoS::ExactlyOnce {
            return Err("a message of QoS 2, to which we never subscribe");
        }
        let generation = self.link.lock().generation;
        self.intake.take(publish, generation);
        Ok(())
    }

    fn acknowledged(&mut self, puback: &PubAck) -> Option<Signal> {
        let token = self.link.lock().inflight.remove(&puback.pkid)?;
        self.link.wake();
        match puback.reason {
            PubAckReason::Success | PubAckReason::NoMatchingSubscribers => {
                Some(Signal::Delivered(token))
            }
            other => Some(Signal::Refused(token, other)),
        }
    }

    fn subscribed(&mut self, suback: &SubAck) -> Result<Signal, &'static str> {
        let asked = self.asked.remove(&suback.pkid);
        let fits = |(filters, _): (usize, Instant)| filters == suback.return_codes.len();
        if !asked.flatten().is_some_and(fits) {
            return Err("a SUBACK that fits no subscription");
        }
        let good = |code: &SubscribeReasonCode| matches!(code, SubscribeReasonCode::Success(_));
        Ok(Signal::Subscribed {
            granted: suback.return_codes.iter().map(good).collect(),
        })
    }

    fn connected(&mut self, connack: &ConnAck) -> Result<Signal, &'static str> {
        let properties = connack.properties.as_ref();
        if properties.is_some_and(|p| p.receive_max == Some(0)) {
            return Err("a receive maximum of 0");
        }
        // The client takes the broker's keep-alive as it is: 0 would be pings without end, and with more than ours it
        // would be slow to see that a connection is dead. The first ping still comes when the broker says.
        let (own, said) = (
            self.settings.keep_alive,
            self.eventloop.options.keep_alive(),
        );
        if said.is_zero() || said > own {
            self.eventloop.options.set_keep_alive(own);
        }
        self.ping = said.max(own);
        self.settings.access.taken();
        let limit = properties.and_then(|p| p.max_packet_size);
        let mut shared = self.link.lock();
        shared.generation += 1;
        shared.online = true;
        shared.packet_bytes_max = limit.map(|n| n as usize);
        self.since = Some(Instant::now());
        Ok(Signal::Online)
    }

    fn outgoing(&mut self, sent: &Outgoing) {
        if let Outgoing::PubAck(_) = *sent {
            self.intake.acknowledged();
        }
        if let Outgoing::Subscribe(pkid) = *sent {
            let filters = self.link.lock().subscribing.pop_front();
            let asked = filters.map(|filters| (filters, Instant::now()));
            self.asked.insert(pkid, asked);
        }
        if let Outgoing::Unsubscribe(pkid) = *sent {
            self.asked.insert(pkid, None);
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
        self.asked.clear();
        self.ping = self.settings.keep_alive;
        if let Some(since) = self.since.take() {
            self.settings.access.lost();
            if since.elapsed() > STEADY {
                self.backoff = BACKOFF_FIRST;
            }
        }
    }

    /// Looks whether certificates or password were renewed, before each attempt and now and then. Whether a connection
    /// that stands was made with others: the session outlives another, and it shows at once whether they are any good.
    ///
    /// A file on a mount that is gone holds up whoever reads it: then the connection goes on with what was read before.
    async fn look(&mut self) -> bool {
        let is_online = self.since.is_some();
        if is_online && self.looked.elapsed() < LOOK {
            return false;
        }
        self.looked = Instant::now();
        let renewed = self.refresh(is_online).await;
        if !is_online {
            self.eventloop.options = options(&self.settings);
        }
        renewed && is_online
    }

    async fn refresh(&mut self, is_online: bool) -> bool {
        let given_up = READING_GIVEN_UP * 2u32.saturating_pow(self.stuck);
        if let Some((reading, since)) = &self.reading
            && !reading.is_finished()
            && since.elapsed() < given_up
        {
            return false;
        }
        let mut access = self.settings.access.clone();
        let mut reading = spawn_blocking(move || (access.refresh(is_online), access));
        match timeout(READING, &mut reading).await {
            Ok(Ok((renewed, access))) => {
                self.settings.access = access;
                (self.reading, self.stuck) = (None, 0);
                renewed
            }
            // Of the panic the log tells.
            Ok(Err(_)) => false,
            Err(_) => {
                self.settings.access.stands_still(READING);
                if let Some((before, _)) = self.reading.replace((reading, Instant::now()))
                    && !before.is_finished()
                {
                    self.stuck += 1;
                }
                false
            }
        }
    }

    async fn say_complaint(&mut self) -> Result<(), mpsc::error::SendError<Signal>> {
        let complaint = self.settings.access.complaint(latest());
        if complaint == self.complaint {
            return Ok(());
        }
        self.complaint.clone_from(&complaint);
        self.signals.send(Signal::Access(complaint)).await
    }

    /// The client says something at least as often as it pings.
    fn patience(&self) -> Duration {
        STUCK + 2 * self.ping
    }

    fn overdue(&self) -> Option<Lost> {
        let subscriptions = self.asked.values().flatten();
        let mut late = subscriptions.filter(|(_, at)| at.elapsed() > SUBSCRIBING);
        late.next().map(|_| self.broken("no SUBACK"))
    }

    fn broken(&self, what: &str) -> Lost {
        Lost {
            reason: format!("the broker at {} breaks the protocol: {what}", self.place),
            needs_help: true,
        }
    }

    fn stuck(&self) -> Lost {
        Lost {
            reason: format!("the broker at {} reads nothing any more", self.place),
            needs_help: false,
        }
    }

    fn renewed() -> Lost {
        Lost {
            reason: "certificates or password were renewed: connecting anew with them".into(),
            needs_help: false,
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
}

/// Connections cut so far, with one that is gone: whether the other end closed it without a word, and how long after the CONNACK.
fn cuts(before: u32, is_closed: bool, lasted: Option<Duration>) -> u32 {
    match lasted {
        Some(lasted) if is_closed && lasted < CUT_WITHIN => before + 1,
        _ => 0,
    }
}

fn suspicion(lost: &Lost, cuts: u32) -> Lost {
    Lost {
        reason: format!(
            "{}, {cuts} times by now soon after it began: another client may connect under this client id; each gateway \
             needs its own",
            lost.reason
        ),
        needs_help: true,
    }
}

/// The time to wait now: twice as long each time, and never the same for a hundred gateways at once.
fn pause(backoff: &mut Duration) -> Duration {
    let full = *backoff;
    *backoff = (full * 2).min(BACKOFF_LAST);
    full / 2 + full.mul_f64((random() % 1000) as f64 / 2000.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn only_connections_that_are_closed_soon_one_after_the_other_are_suspect() {
        let soon = Some(Duration::from_secs(1));
        let mut count = 0;
        for _ in 0..CUTS_SUSPECT {
            count = cuts(count, true, soon);
        }
        assert_eq!(count, CUTS_SUSPECT);
        // As soon as another gateway of the same name that waits for as long as may be.
        assert_eq!(cuts(count, true, Some(BACKOFF_LAST)), count + 1);
        // One that lasted, one that was ended here, and a broker that is away.
        assert_eq!(cuts(count, true, Some(CUT_WITHIN)), 0);
        assert_eq!(cuts(count, false, soon), 0);
        assert_eq!(cuts(count, true, None), 0);
    }

    #[test]
    fn pauses_double_up_to_a_bound_and_differ_between_gateways() {
        let mut pauses = HashSet::new();
        for _gateway in 0..20 {
            let mut backoff = BACKOFF_FIRST;
            for n in 0..12 {
                let full = (BACKOFF_FIRST * 2u32.pow(n)).min(BACKOFF_LAST);
                let pause = pause(&mut backoff);
                assert!(pause >= full / 2 && pause < full, "{pause:?} of {full:?}");
                pauses.insert(pause);
            }
        }
        assert!(pauses.len() > 100, "{}", pauses.len());
    }
}
