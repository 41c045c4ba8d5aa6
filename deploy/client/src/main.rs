//! An operator's program to start from: sends one task in the compact form, prints the text as it comes, and sends the same
//! id again until it holds a final event, which is what the protocol promises. The exit code is 0 for an answer.
//! Without TLS: for a broker on this machine, or give `options` a transport.

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use millwright_task::wire::{
    Body, Event, Format, Kind, TaskV1, decode_event, id_is_plain, printable,
};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, PubAckReason, PublishProperties, SubscribeReasonCode};
use rumqttc::v5::{Client, Event as Mqtt, MqttOptions};
use std::io::{Write, stdout};
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// Without a word from the gateway for this long, the same id is sent again.
const RESEND: Duration = Duration::from_secs(5);

/// How long after the deadline the gateway may take to say what became of it.
const GRACE: Duration = Duration::from_secs(10);

#[derive(Parser)]
struct Args {
    /// The task's id: the same id gets the same answer
    id: String,
    /// What the model continues
    prompt: String,
    /// The gateway's base topic, e.g. millwright/v1/hamburg/gw-07
    #[arg(long)]
    base: String,
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    #[arg(long, default_value_t = 1883)]
    port: u16,
    /// The broker user, who is also the sender
    #[arg(long, default_value = "operator")]
    user: String,
    #[arg(long)]
    password_file: Option<PathBuf>,
    #[arg(long, default_value_t = 60)]
    max_tokens: u64,
    #[arg(long, default_value_t = 120)]
    deadline_s: u32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(
        id_is_plain(&args.id),
        "an id is 1 to 64 of A-Z a-z 0-9 _ - ."
    );
    let (client, mut connection) = Client::new(options(&args)?, 16);
    let (sender, incoming) = sync_channel(64);
    // A thread of its own: a poll that is broken off may lose a packet.
    std::thread::spawn(move || {
        for event in connection.iter() {
            if event.is_err() {
                std::thread::sleep(Duration::from_secs(1));
            }
            if sender.send(event).is_err() {
                return;
            }
        }
    });
    let results = format!("{}/result/{}/{}", args.base, args.user, args.id);
    let give_up = Instant::now() + Duration::from_secs(u64::from(args.deadline_s)) + GRACE;
    let mut resend = Instant::now() + RESEND;
    let (mut shown, mut subscribed) = (String::new(), false);
    while Instant::now() < give_up {
        match incoming.recv_timeout(resend.saturating_duration_since(Instant::now())) {
            // Subscribed before anything is sent, so that no event is missed; after each reconnect too.
            Ok(Ok(Mqtt::Incoming(Packet::ConnAck(_)))) => {
                client.try_subscribe(&results, QoS::AtLeastOnce)?;
            }
            Ok(Ok(Mqtt::Incoming(Packet::SubAck(ack)))) => {
                let may = matches!(ack.return_codes[..], [SubscribeReasonCode::Success(_)]);
                ensure!(may, "the broker doesn't let {} read {results}", args.user);
                subscribed = true;
                send(&client, &args, give_up)?;
            }
            Ok(Ok(Mqtt::Incoming(Packet::PubAck(ack)))) => match ack.reason {
                PubAckReason::Success | PubAckReason::NoMatchingSubscribers => {}
                why => bail!("the broker doesn't take the task: {why:?}"),
            },
            Ok(Ok(Mqtt::Incoming(Packet::Publish(publish)))) => {
                resend = Instant::now() + RESEND;
                if show(&decode_event(&publish.payload)?, &mut shown)? {
                    return Ok(());
                }
            }
            Ok(Ok(_)) => {}
            Ok(Err(lost)) => {
                subscribed = false;
                eprintln!("{lost}; connecting again");
            }
            Err(RecvTimeoutError::Timeout) => {
                resend = Instant::now() + RESEND;
                if subscribed {
                    send(&client, &args, give_up)?;
                }
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the connection's thread ended"),
        }
    }
    bail!("no answer from {}", args.base)
}

fn options(args: &Args) -> Result<MqttOptions> {
    let client_id = format!("{}-{}", args.user, std::process::id());
    let mut options = MqttOptions::new(client_id, &args.host, args.port);
    // An answer may have 128 KiB; the library takes 10 unless told.
    options.set_max_packet_size(Some(1 << 20));
    if let Some(path) = &args.password_file {
        let password = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        options.set_credentials(&args.user, password.trim_end_matches(['\r', '\n']));
    }
    Ok(options)
}

/// With what is left of the deadline: the gateway counts from its receipt.
fn send(client: &Client, args: &Args, give_up: Instant) -> Result<()> {
    let Args { base, user, id, .. } = args;
    let left = give_up.saturating_duration_since(Instant::now());
    let left = left.saturating_sub(GRACE).max(Duration::from_secs(1));
    let prompt = args.prompt.clone();
    let task = TaskV1 {
        id: Some(id.clone()),
        kind: Kind::Generate { prompt }, // or Kind::Chat
        max_tokens: Some(args.max_tokens),
        deadline_ms: Some(left.as_millis() as u64),
        stream: true,
        ..TaskV1::default()
    };
    let properties = PublishProperties {
        content_type: Some(Format::Postcard.content_type().into()),
        response_topic: Some(format!("{base}/result/{user}/{id}")),
        correlation_data: Some(id.clone().into()),
        message_expiry_interval: Some(left.as_secs() as u32),
        ..PublishProperties::default()
    };
    let (topic, qos) = (format!("{base}/task/{user}"), QoS::AtLeastOnce);
    Ok(client.try_publish_with_properties(topic, qos, false, task.encode(), properties)?)
}

/// Prints what is new; whether this was the answer. Another end is an error.
fn show(event: &Event, shown: &mut String) -> Result<bool> {
    match &event.body {
        Body::Delta { text, offset } if *offset == shown.len() as u64 => {
            print!("{}", printable(text));
            shown.push_str(text);
            stdout().flush()?;
        }
        // After a gap: the final event has the whole text.
        Body::Delta { .. } => {}
        Body::Done { text, .. } => match text.strip_prefix(shown.as_str()) {
            Some(rest) => println!("{}", printable(rest)),
            None => println!("\n{}", printable(text)),
        },
        Body::Rejected(why) | Body::Failed(why) => {
            bail!("{}: {}", event.body.name(), printable(&why.reason))
        }
        other if other.is_final() => bail!("{}", other.name()),
        other => eprintln!("{}", other.name()),
    }
    Ok(event.body.is_final())
}
