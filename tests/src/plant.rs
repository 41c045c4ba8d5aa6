//! A plant's broker from the files in deploy/mosquitto as they are shipped, but for paths and the port; and people and
//! programs of that plant, each with a certificate.

use crate::{Broker, Message, SOON, Setup};
use rumqttc::TlsConfiguration;
use rumqttc::Transport;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, SubscribeReasonCode};
use rumqttc::v5::{Client, Connection, Event, MqttOptions};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

pub struct Plant {
    pub broker: Broker,
}

/// A client with the certificate of a user; it has been let in.
pub struct Person {
    mqtt: Client,
    said: Receiver<Said>,
    /// What came and was not asked for yet.
    messages: Vec<Message>,
}

/// What a client hears of the broker.
enum Said {
    Connected,
    /// Whether the subscription was granted.
    Subscribed(bool),
    Acknowledged,
    Message(Message),
    Ended(String),
}

impl Plant {
    /// `roles` is a roles.toml.
    pub fn start(roles: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| folder.path().join(name);
        trial_ca(folder.path(), &["init"]);
        trial_ca(folder.path(), &["broker", "127.0.0.1", "localhost"]);
        fs::write(at("roles.toml"), roles).expect("the roles");
        crate::run(
            Command::new(shipped("rights"))
                .arg(at("roles.toml"))
                .arg("-o")
                .arg(at("millwright-rights.json")),
        );
        let path = folder.path().to_owned();
        let broker = Broker::of_configuration(folder, false, |port| {
            let text = configuration(&path, port);
            (text, port)
        });
        Self { broker }
    }

    /// The broker's section of an agent's configuration.
    pub fn setup(&self, user: &str) -> Setup {
        let [cert, key] = self.certificate(user);
        let broker = format!(
            "[broker.tls]\nca = '{}'\ncert = '{}'\nkey = '{}'\n",
            self.broker.file("ca.pem").display(),
            cert.display(),
            key.display()
        );
        Setup {
            name: Some(user.into()),
            broker,
            ..Setup::default()
        }
    }

    /// Connects with a user's certificate.
    pub fn person(&self, user: &str) -> Person {
        self.connect(Some(&self.certificate(user)))
            .unwrap_or_else(|e| panic!("{user} is not let in: {e}"))
    }

    /// A user's certificate and its key, made at the first call.
    fn certificate(&self, user: &str) -> [PathBuf; 2] {
        let files = ["pem", "key"].map(|ending| self.broker.file(&format!("{user}.{ending}")));
        if !files[0].exists() {
            let folder = files[0].parent().expect("the broker's folder");
            trial_ca(folder, &["client", user]);
        }
        files
    }

    /// Connects with a certificate and its key, or without, if the broker lets it.
    pub fn connect(&self, own: Option<&[PathBuf; 2]>) -> Result<Person, String> {
        static PROVIDER: Once = Once::new();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        PROVIDER.call_once(|| {
            // The client of the tests and nobody else decides here.
            let _ = rustls::crypto::ring::default_provider().install_default();
        });
        let read = |path: &PathBuf| fs::read(path).expect("a certificate's file");
        let id = format!("person-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let mut options = MqttOptions::new(id, "127.0.0.1", self.broker.port);
        options.set_keep_alive(Duration::from_secs(30));
        options.set_max_packet_size(Some(1 << 20));
        options.set_transport(Transport::tls_with_config(TlsConfiguration::Simple {
            ca: read(&self.broker.file("ca.pem")),
            alpn: None,
            client_auth: own.map(|[cert, key]| (read(cert), read(key))),
        }));
        let (mqtt, connection) = Client::new(options, 64);
        let (say, said) = channel();
        std::thread::spawn(move || listen(connection, &say));
        match said.recv_timeout(SOON) {
            Ok(Said::Connected) => Ok(Person {
                mqtt,
                said,
                messages: Vec::new(),
            }),
            Ok(Said::Ended(why)) => Err(why),
            Ok(_) => Err("it speaks before it has let us in".into()),
            Err(e) => Err(e.to_string()),
        }
    }
}

impl Person {
    /// Publishes, and waits until the broker has dealt with it, whether it passed it on or not.
    pub fn publish(&mut self, topic: &str, payload: &str, retain: bool) {
        self.mqtt
            .publish(topic, QoS::AtLeastOnce, retain, payload.to_owned())
            .expect("publishing");
        self.await_said("an acknowledgement", |said| {
            matches!(said, Said::Acknowledged).then_some(())
        });
    }

    /// Subscribes; whether it was granted.
    pub fn subscribe(&mut self, filter: &str) -> bool {
        self.mqtt
            .subscribe(filter, QoS::AtLeastOnce)
            .expect("subscribing");
        self.await_said("a SUBACK", |said| match said {
            Said::Subscribed(granted) => Some(*granted),
            _ => None,
        })
    }

    /// The next message.
    pub fn next(&mut self, what: &str) -> Message {
        while self.messages.is_empty() {
            self.await_said(what, |said| matches!(said, Said::Message(_)).then_some(()));
        }
        self.messages.remove(0)
    }

    /// All that came until now: the broker answers in order, and what it passed on before this question comes first.
    pub fn came(&mut self) -> Vec<Message> {
        self.subscribe("asked/whether/all/has/come");
        std::mem::take(&mut self.messages)
    }

    fn await_said<T>(&mut self, what: &str, wanted: impl Fn(&Said) -> Option<T>) -> T {
        loop {
            let said = self.said.recv_timeout(SOON);
            let said = said.unwrap_or_else(|e| panic!("{what}: {e}"));
            let found = wanted(&said);
            match said {
                Said::Message(message) => self.messages.push(message),
                Said::Ended(why) => panic!("{what}: the connection ended: {why}"),
                _ => {}
            }
            if let Some(found) = found {
                return found;
            }
        }
    }
}

/// Tells all that the broker says, until the connection ends; it is not made again.
fn listen(mut connection: Connection, say: &Sender<Said>) {
    for event in connection.iter() {
        let said = match event {
            Ok(Event::Incoming(Packet::ConnAck(_))) => Said::Connected,
            Ok(Event::Incoming(Packet::SubAck(ack))) => Said::Subscribed(matches!(
                ack.return_codes.first(),
                Some(SubscribeReasonCode::Success(_))
            )),
            Ok(Event::Incoming(Packet::PubAck(_))) => Said::Acknowledged,
            Ok(Event::Incoming(Packet::Publish(publish))) => Said::Message(publish.into()),
            Ok(_) => continue,
            Err(e) => Said::Ended(e.to_string()),
        };
        let ended = matches!(said, Said::Ended(_));
        if say.send(said).is_err() || ended {
            return;
        }
    }
}

/// A file of deploy/mosquitto.
pub fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy/mosquitto")
        .join(name)
}

/// Runs the shipped script in a folder, where it must succeed.
pub fn trial_ca(folder: &Path, arguments: &[&str]) {
    crate::run(
        Command::new(shipped("trial-ca"))
            .arg("--dir")
            .arg(folder)
            .args(arguments),
    );
}

/// The shipped configuration, with what Debian's says before it. Each path and the port is replaced, or this fails.
fn configuration(folder: &Path, port: u16) -> String {
    let mut text = fs::read_to_string(shipped("millwright.conf")).expect("the configuration");
    let at = |name: &str| folder.join(name).display().to_string();
    let plugin = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"]
        .map(|folder| format!("{folder}/mosquitto_dynamic_security.so"))
        .into_iter()
        .find(|path| Path::new(path).exists())
        .expect("mosquitto's plugin, which Debian's package has");
    for (old, new) in [
        (
            "/usr/lib/x86_64-linux-gnu/mosquitto_dynamic_security.so",
            plugin,
        ),
        (
            "/etc/mosquitto/millwright-rights.json",
            at("millwright-rights.json"),
        ),
        ("/etc/mosquitto/certs/broker.pem", at("broker.pem")),
        ("/etc/mosquitto/certs/broker.key", at("broker.key")),
        (
            "cafile /etc/mosquitto/ca_certificates/ca.pem",
            format!("cafile {}", at("ca.pem")),
        ),
        ("listener 8883\n", format!("listener {port} 127.0.0.1\n")),
    ] {
        assert!(text.contains(old), "millwright.conf says nothing of {old}");
        text = text.replace(old, &new);
    }
    // Without `user`, a mosquitto started by root could not read its files here.
    format!(
        "user root\npersistence_location {}/\nlog_dest file {}\nlog_type all\n{text}",
        folder.display(),
        at("mosquitto.log")
    )
}
