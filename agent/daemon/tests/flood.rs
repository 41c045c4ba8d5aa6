//! A broker that minds no receive maximum: a socket that speaks as much MQTT as that takes.

use millwright::broker::{self, Access, Files, Settings, Signal};
use millwright_task::limits::{INBOX_BYTES_MAX, PACKET_BYTES_MAX};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;
use tokio::sync::mpsc;

/// Two and a half times what is taken in at once.
const MESSAGES: u16 = (INBOX_BYTES_MAX * 5 / 2 / BYTES) as u16;
const BYTES: usize = PACKET_BYTES_MAX - 1024;

/// A packet without properties.
fn packet(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![kind];
    let mut rest = body.len();
    while rest > 127 {
        packet.push(rest as u8 | 128);
        rest >>= 7;
    }
    packet.push(rest as u8);
    packet.extend(body);
    packet
}

/// The next packet's type and the first bytes of its body; `None` when the client is gone.
fn next(socket: &mut TcpStream) -> Option<(u8, Vec<u8>)> {
    let mut byte = || {
        let mut byte = [0];
        socket.read_exact(&mut byte).ok().map(|()| byte[0])
    };
    let (kind, mut len, mut shift) = (byte()?, 0, 0);
    loop {
        let next = byte()?;
        len |= usize::from(next & 127) << shift;
        shift += 7;
        if next < 128 {
            break;
        }
    }
    let mut body = vec![0; len];
    socket.read_exact(&mut body).ok()?;
    Some((kind, body))
}

/// Accepts a client and sends it, with a resumed session, all that it has not acknowledged; tells when that is done.
fn serve(
    listener: &TcpListener,
    unacknowledged: &mut BTreeSet<u16>,
    sent: mpsc::UnboundedSender<()>,
) {
    let (mut socket, _) = listener.accept().unwrap();
    assert_eq!(next(&mut socket).unwrap().0, 0x10, "CONNECT");
    socket.write_all(&packet(0x20, &[1, 0, 0])).unwrap();
    let mut reader = socket.try_clone().unwrap();
    let messages = unacknowledged.clone();
    let writer = thread::spawn(move || {
        for id in messages {
            let head = [&[0, 1, b't'], &id.to_be_bytes()[..], &[0]].concat();
            let message = packet(0x32, &[&head[..], &vec![b'x'; BYTES]].concat());
            socket.write_all(&message).unwrap();
        }
        sent.send(()).unwrap();
    });
    while let Some((kind, body)) = next(&mut reader) {
        if kind == 0x40 {
            let id = u16::from_be_bytes([body[0], body[1]]);
            assert!(unacknowledged.remove(&id), "{id} was acknowledged twice");
        }
        if unacknowledged.is_empty() {
            break;
        }
    }
    writer.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_is_taken_in_portions_and_in_order_and_nothing_is_lost() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sent_tx, mut sent) = mpsc::unbounded_channel();
    let server = thread::spawn(move || {
        let mut unacknowledged: BTreeSet<u16> = (1..=MESSAGES).collect();
        let mut connections = 0;
        while !unacknowledged.is_empty() {
            serve(&listener, &mut unacknowledged, sent_tx.clone());
            connections += 1;
        }
        connections
    });
    let (link, poller, mut inbox) = broker::open(&Settings {
        host: "127.0.0.1".into(),
        port,
        access: Access::read(Files::default()).unwrap(),
        client_id: "gw".into(),
        keep_alive: Duration::from_mins(1),
        session_expiry: Duration::from_mins(1),
        will: None,
    });
    let poller = tokio::spawn(poller.run());
    let mut taken = Vec::new();
    while taken.len() < usize::from(MESSAGES) {
        tokio::select! {
            biased;
            signal = inbox.signals.recv() => match signal.unwrap() {
                // Nothing is decided before nearly all has come.
                Signal::Online => sent.recv().await.unwrap(),
                Signal::Offline { reason, .. } => {
                    assert!(reason.reason.contains("more at once"), "{reason}");
                }
                other => panic!("{other:?}"),
            },
            message = inbox.messages.recv() => {
                let message = message.unwrap();
                taken.push(message.publish.pkid);
                link.ack(message.receipt().expect("QoS 1"));
            }
        }
    }
    assert_eq!(taken, (1..=MESSAGES).collect::<Vec<_>>());
    assert!(server.join().unwrap() >= 2);
    link.close();
    poller.abort();
}
