//! What a broker says, cut at each byte and changed at random: the connection's task survives all of it.

use millwright::broker::{self, Access, Files, Settings, Signal};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;
use tokio::time::timeout;

const CONNACK: &[u8] = &[0x20, 3, 0, 0, 0];
const SUBACK: &[u8] = &[0x90, 5, 0, 1, 0, 1, 1];

/// How many connections hear packets that were changed at random.
const ROUNDS: usize = 5_000;

/// What a broker may say, of each kind one.
fn packets() -> Vec<Vec<u8>> {
    let publish = |first: u8, id: &[u8], properties: &[u8]| {
        let body = [
            &[0, 8][..],
            b"b/task/s",
            id,
            &[properties.len() as u8],
            properties,
            b"{\"id\":\"a\"}",
        ];
        packet(first, &body.concat())
    };
    let all = [
        2, 0, 0, 0, 9, 3, 0, 1, b'j', 8, 0, 1, b'r', 9, 0, 1, b'c', 11, 1, 38, 0, 1, b'k', 0, 1,
        b'v', 35, 0, 1,
    ];
    let connack = [
        17, 0, 0, 0, 9, 33, 0, 9, 36, 1, 37, 1, 39, 0, 9, 0, 0, 18, 0, 1, b'i', 34, 0, 9, 31, 0, 1,
        b'r', 40, 1, 41, 1, 42, 1, 19, 0, 9,
    ];
    let head = [&[0, 0, connack.len() as u8][..], &connack].concat();
    vec![
        packet(0x20, &head),
        SUBACK.to_vec(),
        publish(0x30, &[], &[]),
        publish(0x32, &[0, 7], &all),
        publish(0x3c, &[0, 7], &[35, 0, 1]),
        vec![0x40, 2, 0, 1],
        packet(0x40, &[0, 1, 0x87, 5, 31, 0, 2, b'n', b'o']),
        vec![0x50, 2, 0, 1],
        vec![0x62, 2, 0, 1],
        vec![0x70, 2, 0, 1],
        vec![0xb0, 4, 0, 1, 0, 0],
        vec![0xd0, 0],
        packet(0xe0, &[0x8b, 5, 31, 0, 2, b'n', b'o']),
        packet(0xf0, &[0x18, 0]),
    ]
}

fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    [&[first, body.len() as u8][..], body].concat()
}

/// A broker that says these bytes, and what the connection's task makes of it. It must end well when it is told to.
async fn hear(listener: &TcpListener, bytes: &[u8]) {
    let (link, poller, mut inbox) = broker::open(&Settings {
        host: "127.0.0.1".into(),
        port: listener.local_addr().unwrap().port(),
        access: Access::read(Files::default()).unwrap(),
        client_id: "gw".into(),
        keep_alive: Duration::from_mins(1),
        session_expiry: Duration::from_mins(1),
        will: None,
    });
    let mut poller = tokio::spawn(poller.run());
    let (mut stream, _) = accept(listener);
    stream.read_exact(&mut [0]).unwrap();
    // The agent may close in the middle.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let heard = async {
        loop {
            tokio::select! {
                signal = inbox.signals.recv() => match signal {
                    // It may be gone again by now.
                    Some(Signal::Online) => drop(link.subscribe(&["a".into(), "b".into()], false)),
                    Some(Signal::Offline { .. }) | None => return,
                    Some(_) => {}
                },
                Some(message) = inbox.messages.recv() => {
                    if let Some(receipt) = message.receipt() {
                        link.ack(receipt);
                    }
                }
                ended = &mut poller => panic!("the connection's task ended: {ended:?}"),
            }
        }
    };
    timeout(Duration::from_secs(20), heard)
        .await
        .expect("the connection is given up");
    poller.abort();
    let ended = poller.await;
    assert!(
        !ended.is_err_and(|e| e.is_panic()),
        "the connection's task panicked"
    );
}

fn accept(listener: &TcpListener) -> (TcpStream, std::net::SocketAddr) {
    tokio::task::block_in_place(|| listener.accept()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_closes_at_each_byte_of_the_handshake() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let said = [CONNACK, SUBACK, &[0xd0, 0]].concat();
    for end in 0..=said.len() {
        hear(&listener, &said[..end]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_speaks_at_random() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let packets = packets();
    let mut chance = Chance(20_261_128);
    for round in 0..ROUNDS {
        let mut said = Vec::new();
        if chance.below(10) > 0 {
            said.extend(CONNACK);
        }
        if chance.below(3) > 0 {
            said.extend(SUBACK);
        }
        for _ in 0..chance.below(8) {
            let mut packet = packets[chance.below(packets.len())].clone();
            for _ in 0..chance.below(4) {
                chance.change(&mut packet);
            }
            said.extend(packet);
        }
        println!("round {round}: {said:02x?}");
        hear(&listener, &said).await;
    }
}

/// The same numbers in each run.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % n
    }

    fn change(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len().max(1));
        match (self.below(5), bytes.get_mut(at)) {
            (0, Some(byte)) => *byte = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
            (1, Some(byte)) => *byte ^= 1 << self.below(8),
            (2, Some(_)) => drop(bytes.remove(at)),
            (3, Some(_)) => bytes.truncate(at),
            _ => bytes.insert(at, self.below(256) as u8),
        }
    }
}
