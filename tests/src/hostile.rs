//! A broker that means harm: it speaks just enough MQTT 5 to be talked to, and does to each connection what it is told.
//! Told nothing, it passes all on to a real broker. Judges nothing.

use std::io::{Read, Write, copy};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// How long it waits for the agent within a connection.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is done to one connection; it is closed when this returns.
pub type Act = Arc<dyn Fn(&mut Peer) + Send + Sync>;

/// A listening one. Its thread ends with the test's process.
pub struct Hostile {
    pub port: u16,
    state: Arc<State>,
}

struct State {
    act: Mutex<Option<Act>>,
    ended: AtomicUsize,
    /// Connections to the real broker.
    passing: Mutex<Vec<TcpStream>>,
}

/// The agent, as the broker sees it.
pub struct Peer {
    stream: TcpStream,
    real: u16,
}

impl Hostile {
    /// One that passes on to the broker at a port until it is told otherwise.
    pub fn before(real: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let state = Arc::new(State {
            act: Mutex::new(None),
            ended: AtomicUsize::new(0),
            passing: Mutex::new(Vec::new()),
        });
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                thread::spawn(move || serve(Peer { stream, real }, &state));
            }
        });
        Self { port, state }
    }

    /// What is done to connections from now on. Those to the real broker are cut.
    pub fn act(&self, act: Option<Act>) {
        *lock(&self.state.act) = act;
        self.state.ended.store(0, Ordering::SeqCst);
        for stream in lock(&self.state.passing).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Connections since then that the act was over for.
    pub fn ended(&self) -> usize {
        self.state.ended.load(Ordering::SeqCst)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(mut peer: Peer, state: &State) {
    let act = lock(&state.act).clone();
    let Some(act) = act else {
        lock(&state.passing).extend(peer.stream.try_clone());
        peer.pass_on(None);
        return;
    };
    let _ = peer.stream.set_read_timeout(Some(PATIENCE));
    let _ = peer.stream.set_write_timeout(Some(PATIENCE));
    act(&mut peer);
    let _ = peer.stream.shutdown(Shutdown::Both);
    let now = lock(&state.act);
    // One that took long may be of the act before.
    if now.as_ref().is_some_and(|now| Arc::ptr_eq(now, &act)) {
        state.ended.fetch_add(1, Ordering::SeqCst);
    }
}

impl Peer {
    /// Takes CONNECT, and then says what it likes.
    pub fn connected(&mut self) -> bool {
        self.packet().is_some_and(|packet| packet[0] >> 4 == 1)
    }

    /// The whole handshake: CONNECT, CONNACK, SUBSCRIBE, SUBACK. Its packet id, if the agent came so far.
    pub fn subscribed(&mut self) -> Option<[u8; 2]> {
        let id = self.subscribing()?;
        self.send(&packet(0x90, &[&id[..], &[0, 1, 1]].concat()));
        Some(id)
    }

    /// Up to SUBSCRIBE, whose packet id it is.
    pub fn subscribing(&mut self) -> Option<[u8; 2]> {
        if !self.connected() {
            return None;
        }
        self.send(&CONNACK);
        loop {
            let packet = self.packet()?;
            if packet[0] >> 4 == 8 {
                let body = body(&packet);
                return Some([body[0], body[1]]);
            }
        }
    }

    /// The packet id of the next PUBLISH of QoS 1 that comes.
    pub fn published(&mut self) -> Option<[u8; 2]> {
        loop {
            let packet = self.packet()?;
            if packet[0] >> 4 == 3 && packet[0] & 6 == 2 {
                let body = body(&packet);
                let topic = usize::from(u16::from_be_bytes([body[0], body[1]]));
                return Some([body[2 + topic], body[3 + topic]]);
            }
        }
    }

    /// Whether all could be written.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// Byte by byte, for as long as the agent takes them.
    pub fn dribble(&mut self, bytes: &[u8], pause: Duration) {
        let _ = self.stream.set_nodelay(true);
        for byte in bytes {
            if !self.send(&[*byte]) {
                return;
            }
            thread::sleep(pause);
        }
    }

    /// Reads all that the agent sends from now on, in the background, so that it never has to wait for us.
    pub fn drain(&mut self) {
        if let Ok(mut stream) = self.stream.try_clone() {
            thread::spawn(move || copy(&mut stream, &mut std::io::sink()));
        }
    }

    /// Reads until the agent closes, or for a while.
    pub fn wait(&mut self, time: Duration) {
        let _ = self.stream.set_read_timeout(Some(time));
        let _ = copy(&mut self.stream, &mut std::io::sink());
    }

    /// To the real broker and back; of what that says, no more than so many bytes.
    pub fn pass_on(&mut self, limit: Option<u64>) {
        let broker = TcpStream::connect((Ipv4Addr::LOCALHOST, self.real));
        let (Ok(mut broker), Ok(mut agent)) = (broker, self.stream.try_clone()) else {
            return;
        };
        let Ok(mut back) = broker.try_clone() else {
            return;
        };
        let there = thread::spawn(move || {
            let _ = copy(&mut agent, &mut broker);
            let _ = broker.shutdown(Shutdown::Both);
        });
        let _ = match limit {
            Some(bytes) => copy(&mut Read::by_ref(&mut back).take(bytes), &mut self.stream),
            None => copy(&mut back, &mut self.stream),
        };
        let _ = self.stream.shutdown(Shutdown::Both);
        let _ = back.shutdown(Shutdown::Both);
        let _ = there.join();
    }

    fn packet(&mut self) -> Option<Vec<u8>> {
        let mut packet = vec![self.byte()?];
        let (mut length, mut shift) = (0, 0);
        loop {
            let byte = self.byte()?;
            packet.push(byte);
            length |= usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let head = packet.len();
        packet.resize(head + length, 0);
        self.stream.read_exact(&mut packet[head..]).ok()?;
        Some(packet)
    }

    fn byte(&mut self) -> Option<u8> {
        let mut byte = [0];
        self.stream.read_exact(&mut byte).ok()?;
        Some(byte[0])
    }
}

/// A session that is not present, success, no properties.
pub const CONNACK: [u8; 5] = [0x20, 3, 0, 0, 0];

/// A packet of its first byte and its body.
pub fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![first];
    packet.extend(length(body.len()));
    packet.extend(body);
    packet
}

/// A number as MQTT writes lengths.
pub fn length(mut n: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let more = n > 0x7f;
        bytes.push(n as u8 & 0x7f | u8::from(more) << 7);
        n >>= 7;
        if !more {
            return bytes;
        }
    }
}

/// A PUBLISH, of QoS 1 with a packet id and else of QoS 0.
pub fn publish(topic: &[u8], id: Option<u16>, properties: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut body = (topic.len() as u16).to_be_bytes().to_vec();
    body.extend(topic);
    body.extend(id.iter().flat_map(|id| id.to_be_bytes()));
    body.extend(length(properties.len()));
    body.extend(properties);
    body.extend(payload);
    packet(if id.is_some() { 0x32 } else { 0x30 }, &body)
}

fn body(packet: &[u8]) -> &[u8] {
    let head = packet[1..].iter().position(|b| b & 0x80 == 0).unwrap_or(0);
    &packet[head + 2..]
}
