//! A network that fails as told: a relay on the loopback interface between the agent and its broker. Knows where MQTT's
//! packets begin and of which type they are, so that it can cut at each; never what they say.

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A packet's type, as MQTT numbers them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Connect = 1,
    Connack = 2,
    Publish = 3,
    Puback = 4,
    Subscribe = 8,
    Suback = 9,
    Pingreq = 12,
    Pingresp = 13,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Direction {
    ToBroker,
    ToAgent,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Act {
    CutBefore,
    /// After half of its bytes.
    CutWithin,
    CutAfter,
    /// Sent again at once with DUP set; only one of its two acknowledgements is passed on.
    Twice,
    /// Sent after the next packet of its type, or after 50 ms.
    Late,
}

/// What to do with one packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) direction: Direction,
    pub(super) kind: Kind,
    /// Packets of this kind and direction that pass before.
    pub(super) skip: usize,
    pub(super) act: Act,
    /// How many packets in a row; cuts end it at the first.
    pub(super) times: usize,
}

/// A running relay. Its threads end with their connections, its listener with the process.
pub(super) struct Proxy {
    pub(super) port: u16,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    upstream: u16,
    /// Bytes are passed as they come: nothing is known of packets, as below TLS.
    opaque: bool,
    plan: Option<Plan>,
    acted: usize,
    delay: Duration,
    stalled: bool,
    refusing: bool,
    live: Vec<TcpStream>,
}

impl Proxy {
    pub(super) fn new(upstream: u16) -> Self {
        Self::start(upstream, false)
    }

    /// One that passes bytes without reading them: it can cut, delay and stall.
    pub(super) fn opaque(upstream: u16) -> Self {
        Self::start(upstream, true)
    }

    fn start(upstream: u16, opaque: bool) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let shared = Arc::new(Mutex::new(Shared {
            upstream,
            opaque,
            ..Shared::default()
        }));
        let own = Arc::clone(&shared);
        std::thread::spawn(move || {
            for agent in listener.incoming().flatten() {
                relay(&own, agent);
            }
        });
        Self { port, shared }
    }

    /// Replaces what was planned.
    pub(super) fn plan(&self, plan: Plan) {
        lock(&self.shared).plan = Some(plan);
    }

    /// Whether all that was planned has happened.
    pub(super) fn is_done(&self) -> bool {
        lock(&self.shared).plan.is_none()
    }

    /// How often it did what was planned.
    pub(super) fn acted(&self) -> usize {
        lock(&self.shared).acted
    }

    /// Holds each packet back for a while.
    pub(super) fn delay(&self, by: Duration) {
        lock(&self.shared).delay = by;
    }

    /// Nothing passes, nothing is closed.
    pub(super) fn stall(&self, stalled: bool) {
        lock(&self.shared).stalled = stalled;
    }

    /// Cuts all connections, and lets no new one through while `refusing`.
    pub(super) fn cut(&self, refusing: bool) {
        let mut shared = lock(&self.shared);
        shared.refusing = refusing;
        for stream in shared.live.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn relay(shared: &Arc<Mutex<Shared>>, agent: TcpStream) {
    let upstream = {
        let shared = lock(shared);
        (!shared.refusing).then_some(shared.upstream)
    };
    // Without a broker the agent's connection closes, as a refused one would.
    let Some(Ok(broker)) = upstream.map(|port| TcpStream::connect((Ipv4Addr::LOCALHOST, port)))
    else {
        return;
    };
    let clone = |stream: &TcpStream| stream.try_clone().expect("a second handle");
    {
        let mut shared = lock(shared);
        shared.live.extend([clone(&agent), clone(&broker)]);
        // Handles of connections long gone would add up.
        let old = shared.live.len().saturating_sub(64);
        shared.live.drain(..old);
    }
    let doubled = Arc::new(Mutex::new(HashSet::new()));
    for (direction, from, to) in [
        (Direction::ToBroker, clone(&agent), clone(&broker)),
        (Direction::ToAgent, broker, agent),
    ] {
        let _ = (from.set_nodelay(true), to.set_nodelay(true));
        let pump = Pump {
            direction,
            shared: Arc::clone(shared),
            doubled: Arc::clone(&doubled),
            to,
            late: None,
        };
        std::thread::spawn(move || pump.run(from));
    }
}

type Doubled = HashSet<(Direction, [u8; 2])>;

/// One direction of one connection.
struct Pump {
    direction: Direction,
    shared: Arc<Mutex<Shared>>,
    /// Whose next acknowledgement is kept back: the receiver's direction and the packet's id.
    doubled: Arc<Mutex<Doubled>>,
    to: TcpStream,
    late: Option<Vec<u8>>,
}

impl Pump {
    fn run(mut self, mut from: TcpStream) {
        let opaque = lock(&self.shared).opaque;
        let _ = from.set_read_timeout(Some(Duration::from_millis(50)));
        let (mut held, mut chunk) = (Vec::new(), vec![0; 1 << 16]);
        let mut open = true;
        while open {
            match from.read(&mut chunk) {
                Ok(0) => break,
                Ok(n) => held.extend_from_slice(&chunk[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    open = self.send_late();
                    continue;
                }
                Err(_) => break,
            }
            self.wait();
            if opaque {
                open = self.to.write_all(&held).is_ok();
                held.clear();
            }
            while open && let Some(length) = packet_length(&held) {
                let packet: Vec<u8> = held.drain(..length).collect();
                open = self.pass(packet);
            }
        }
        // What was passed on before is still delivered.
        let _ = self.to.shutdown(Shutdown::Write);
        let _ = from.shutdown(Shutdown::Both);
    }

    fn wait(&self) {
        let delay = lock(&self.shared).delay;
        std::thread::sleep(delay);
        while lock(&self.shared).stalled {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether the connection goes on.
    fn pass(&mut self, packet: Vec<u8>) -> bool {
        let act = self.act_on(packet[0] >> 4);
        if packet[0] >> 4 == Kind::Puback as u8 && self.is_second_ack(&packet) {
            return true;
        }
        match act {
            None => self.to.write_all(&packet).is_ok() && self.send_late(),
            Some(Act::CutBefore) => false,
            Some(Act::CutWithin) => {
                let _ = self.to.write_all(&packet[..packet.len() / 2]);
                false
            }
            Some(Act::CutAfter) => {
                let _ = self.to.write_all(&packet);
                false
            }
            Some(Act::Twice) => {
                let mut again = packet.clone();
                again[0] |= 0b1000;
                if let Some(id) = publish_id(&packet) {
                    let mut doubled = self.doubled.lock().unwrap_or_else(PoisonError::into_inner);
                    doubled.insert((self.direction, id));
                } else {
                    // QoS 0 has no DUP: the same bytes twice.
                    again.clone_from(&packet);
                }
                self.to.write_all(&packet).is_ok() && self.to.write_all(&again).is_ok()
            }
            Some(Act::Late) if self.late.is_some() => {
                self.to.write_all(&packet).is_ok() && self.send_late()
            }
            Some(Act::Late) => {
                self.late = Some(packet);
                true
            }
        }
    }

    fn send_late(&mut self) -> bool {
        self.late
            .take()
            .is_none_or(|packet| self.to.write_all(&packet).is_ok())
    }

    fn act_on(&self, kind: u8) -> Option<Act> {
        let mut shared = lock(&self.shared);
        let plan = shared.plan.as_mut()?;
        if plan.direction != self.direction || plan.kind as u8 != kind {
            return None;
        }
        if plan.skip > 0 {
            plan.skip -= 1;
            return None;
        }
        let act = plan.act;
        plan.times -= 1;
        if plan.times == 0 || matches!(act, Act::CutBefore | Act::CutWithin | Act::CutAfter) {
            shared.plan = None;
        }
        shared.acted += 1;
        Some(act)
    }

    /// Whether this acknowledges a message that was sent twice, for the first time.
    /// A broker may have given the id away by the time of the second.
    fn is_second_ack(&self, packet: &[u8]) -> bool {
        let sender = match self.direction {
            Direction::ToBroker => Direction::ToAgent,
            Direction::ToAgent => Direction::ToBroker,
        };
        let start = header_length(packet).unwrap_or(2);
        let id = [packet[start], packet[start + 1]];
        let mut doubled = self.doubled.lock().unwrap_or_else(PoisonError::into_inner);
        doubled.remove(&(sender, id))
    }
}

/// Bytes of the fixed header: the type and the remaining length in base 128. None: more have to come.
fn header_length(bytes: &[u8]) -> Option<usize> {
    let last = bytes.iter().skip(1).take(4).position(|b| b & 128 == 0)?;
    Some(last + 2)
}

/// Bytes of the first packet, if it is here whole.
fn packet_length(bytes: &[u8]) -> Option<usize> {
    let header = header_length(bytes)?;
    let digits = bytes[1..header].iter().rev();
    let rest = digits.fold(0, |sum, b| sum << 7 | usize::from(b & 127));
    (bytes.len() >= header + rest).then_some(header + rest)
}

/// The packet id of a PUBLISH that has one.
fn publish_id(packet: &[u8]) -> Option<[u8; 2]> {
    if packet[0] & 0b110 == 0 {
        return None;
    }
    let start = header_length(packet)?;
    let topic = usize::from(u16::from_be_bytes([packet[start], packet[start + 1]]));
    let at = start + 2 + topic;
    Some([*packet.get(at)?, *packet.get(at + 1)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_told_apart() {
        assert_eq!(packet_length(&[0x30]), None);
        assert_eq!(packet_length(&[0xc0, 0, 0xd0, 0]), Some(2));
        let mut long = vec![0x30, 0x80 | 0x2c, 1];
        long.resize(3 + 171, 0);
        assert_eq!(packet_length(&long), None);
        long.push(0);
        assert_eq!(
            (header_length(&long), packet_length(&long)),
            (Some(3), Some(175))
        );
    }

    #[test]
    fn a_publish_shows_its_id_where_it_has_one() {
        assert_eq!(publish_id(&[0x32, 6, 0, 2, b'a', b'b', 1, 2]), Some([1, 2]));
        assert_eq!(publish_id(&[0x30, 4, 0, 2, b'a', b'b']), None);
    }

    /// What a broker gets of these packets, sent through a proxy with a plan.
    fn passed(act: Act, packets: &[&[u8]]) -> Vec<u8> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let proxy = Proxy::new(listener.local_addr().unwrap().port());
        proxy.plan(Plan {
            direction: Direction::ToBroker,
            kind: Kind::Publish,
            skip: 1,
            act,
            times: 1,
        });
        let mut agent = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port)).unwrap();
        // It may be cut off before all is written.
        let written = packets
            .iter()
            .try_for_each(|packet| agent.write_all(packet));
        let _ = written.and_then(|()| agent.shutdown(Shutdown::Write));
        let mut got = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut got).unwrap();
        assert!(proxy.is_done() && proxy.acted() == 1);
        got
    }

    #[test]
    fn the_second_packet_meets_its_fate() {
        let [a, b, c] = [b'a', b'b', b'c'].map(|topic| [0x32, 5, 0, 1, topic, 0, topic]);
        let after = |act| passed(act, &[&a, &b, &c]);
        assert_eq!(after(Act::CutBefore), a);
        assert_eq!(after(Act::CutWithin), [&a[..], &b[..3]].concat());
        assert_eq!(after(Act::CutAfter), [a, b].concat());
        assert_eq!(after(Act::Late), [a, c, b].concat());
        let mut again = b;
        again[0] = 0x3a;
        assert_eq!(after(Act::Twice), [a, b, again, c].concat());
    }
}
