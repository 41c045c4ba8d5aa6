//! The broker's own certificate, looked at before it is a reason for having no connection. Speaks TLS and no MQTT.

use super::Settings;
use super::tls::validity;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, Stream};
use std::io::Write;
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

/// For all of it, and as much for each of its waits.
const PATIENCE: Duration = Duration::from_secs(10);

/// From when until when the broker's certificate is good, where there is TLS and the certificate is one that we take. Blocks
/// for some seconds at most: a resolver or a broker that takes longer is left to itself.
pub fn certificate(settings: &Settings) -> Option<(Duration, Duration)> {
    let settings = settings.clone();
    let (say, said) = sync_channel(1);
    std::thread::spawn(move || {
        // Nobody waits any more where it fails.
        let _ = say.send(look(&settings));
    });
    said.recv_timeout(PATIENCE).ok()?
}

fn look(settings: &Settings) -> Option<(Duration, Duration)> {
    let config = Arc::clone(&settings.access.next().tls.as_ref()?.config);
    let name = ServerName::try_from(settings.host.clone()).ok()?;
    let mut addresses = (settings.host.as_str(), settings.port)
        .to_socket_addrs()
        .ok()?;
    let mut socket = addresses.find_map(|at| TcpStream::connect_timeout(&at, PATIENCE).ok())?;
    socket.set_read_timeout(Some(PATIENCE)).ok()?;
    socket.set_write_timeout(Some(PATIENCE)).ok()?;
    let mut tls = ClientConnection::new(config, name).ok()?;
    // Nothing is written: flushing completes the handshake. A broker that refuses us has shown its certificate by then.
    let _ = Stream::new(&mut tls, &mut socket).flush();
    let lives = tls.peer_certificates()?.iter().map(validity);
    let life = lives.flatten().min_by_key(|(_, ends)| *ends);
    tls.send_close_notify();
    let _ = tls.write_tls(&mut socket);
    life
}
