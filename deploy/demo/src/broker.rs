//! The demo's broker: rumqttd inside of this process, for this machine only. No users, no disk.

use anyhow::{Context, Result, bail};
use rumqttd::{Broker, Config, ConnectionSettings, RouterConfig, ServerSettings};
use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::thread;

/// Above the agent's largest packet.
const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// An address on the loopback interface that is free now: on `port`, or any.
pub(crate) fn reserve(port: Option<u16>) -> Result<SocketAddr> {
    let wanted = SocketAddr::from((Ipv4Addr::LOCALHOST, port.unwrap_or(0)));
    match TcpListener::bind(wanted) {
        // Released at once: rumqttd opens its own listener.
        Ok(listener) => listener
            .local_addr()
            .context("asking for the broker's port"),
        Err(e) if e.kind() == ErrorKind::AddrInUse => bail!(
            "port {} is in use by another program; choose another one with --port, or leave it out",
            wanted.port()
        ),
        Err(e) => Err(e).with_context(|| format!("the broker can't listen on {wanted}")),
    }
}

/// Starts the broker in a thread of its own, for as long as this process lives.
pub(crate) fn start(address: SocketAddr) -> Result<()> {
    let connections = ConnectionSettings {
        connection_timeout_ms: 10_000,
        max_payload_size: PAYLOAD_BYTES_MAX,
        max_inflight_count: 100,
        auth: None,
        external_auth: None,
        dynamic_filters: true,
    };
    let server = ServerSettings {
        name: "demo".into(),
        listen: address,
        tls: None,
        next_connection_delay_ms: 1,
        connections,
    };
    let config = Config {
        router: RouterConfig {
            max_connections: 16,
            max_outgoing_packet_count: 200,
            max_segment_size: PAYLOAD_BYTES_MAX,
            max_segment_count: 10,
            ..RouterConfig::default()
        },
        v5: Some(HashMap::from([("demo".to_owned(), server)])),
        ..Config::default()
    };
    let serve = move || {
        if let Err(error) = Broker::new(config).start() {
            eprintln!("demo: the broker stopped: {error}");
        }
    };
    thread::Builder::new()
        .name("broker".into())
        .spawn(serve)
        .context("the broker's thread can't be started")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    //! The demo rests on what this broker does with MQTT 5: properties, retained messages, a last will.

    use super::*;
    use rumqttc::v5::mqttbytes::QoS;
    use rumqttc::v5::mqttbytes::v5::{LastWill, Packet, Publish, PublishProperties};
    use rumqttc::v5::{AsyncClient, Event, EventLoop, MqttOptions};
    use std::time::Duration;

    async fn connect(
        address: SocketAddr,
        id: &str,
        will: Option<LastWill>,
    ) -> (AsyncClient, EventLoop) {
        let mut options = MqttOptions::new(id, address.ip().to_string(), address.port());
        options.set_session_expiry_interval(Some(3600));
        if let Some(will) = will {
            options.set_last_will(will);
        }
        let (client, mut eventloop) = AsyncClient::new(options, 16);
        for _ in 0..100 {
            match eventloop.poll().await {
                Ok(Event::Incoming(Packet::ConnAck(_))) => return (client, eventloop),
                Ok(_) => {}
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
        panic!("the broker can't be reached");
    }

    async fn message(eventloop: &mut EventLoop) -> Publish {
        let next = async {
            loop {
                if let Event::Incoming(Packet::Publish(message)) = eventloop.poll().await.unwrap() {
                    return message;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), next)
            .await
            .expect("no message came")
    }

    #[tokio::test]
    async fn it_keeps_what_the_protocol_needs() {
        let address = reserve(None).unwrap();
        start(address).unwrap();
        let will = LastWill::new("gw/state", "offline", QoS::AtLeastOnce, true, None);
        let (agent, mut agent_loop) = connect(address, "agent", Some(will)).await;
        let (operator, mut operator_loop) = connect(address, "operator", None).await;
        agent
            .subscribe("gw/task/+", QoS::AtLeastOnce)
            .await
            .unwrap();
        let properties = PublishProperties {
            response_topic: Some("gw/result/me/1".into()),
            correlation_data: Some(vec![0, 255, 7].into()),
            user_properties: vec![("event".into(), "done".into())],
            content_type: Some("application/json".into()),
            ..PublishProperties::default()
        };
        operator
            .publish_with_properties(
                "gw/task/me",
                QoS::AtLeastOnce,
                false,
                "{}",
                properties.clone(),
            )
            .await
            .unwrap();
        let driver = tokio::spawn(async move { while operator_loop.poll().await.is_ok() {} });
        let task = message(&mut agent_loop).await;
        let found = task.properties.unwrap();
        assert_eq!(found.response_topic, properties.response_topic);
        assert_eq!(found.correlation_data, properties.correlation_data);
        assert_eq!(found.user_properties, properties.user_properties);
        assert_eq!(found.content_type, properties.content_type);
        driver.abort();

        // The agent is gone without a word: its will says so, to those who come later too.
        drop((agent, agent_loop));
        tokio::time::sleep(Duration::from_millis(500)).await;
        let (watcher, mut watcher_loop) = connect(address, "watcher", None).await;
        watcher
            .subscribe("gw/state", QoS::AtLeastOnce)
            .await
            .unwrap();
        assert_eq!(message(&mut watcher_loop).await.payload, "offline");
    }

    #[test]
    fn a_port_in_use_is_a_sentence() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = reserve(Some(port)).unwrap_err().to_string();
        assert!(error.contains(&format!("port {port} is in use")), "{error}");
    }
}
