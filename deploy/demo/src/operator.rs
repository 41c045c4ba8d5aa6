//! The operator: sends work orders as tasks over MQTT and shows the events that come back. Speaks only what
//! agent and operator agreed on: topics and JSON.

use crate::screen::{self, Screen};
use crate::{GATEWAY, OPERATOR, SITE};
use anyhow::{Context, Result, bail};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, Publish};
use rumqttc::v5::{AsyncClient, Event, EventLoop, MqttOptions};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

const ORDERS: &str = include_str!("../work-orders/orders.jsonl");
const INSTRUCTION: &str = "You help the maintenance crew of a mine. Say in one or two sentences what the work order asks for.";
/// An answer of [`TOKENS`] takes under a second here, and some seconds on a small board.
const TOKENS: u32 = 60;
const HEALTH_WITHIN: Duration = Duration::from_secs(5);
const ANSWER_WITHIN: Duration = Duration::from_mins(2);
/// The broker's thread may need a moment before it listens.
const CONNECT_ATTEMPTS: u32 = 50;

/// The operator's connection.
pub(crate) struct Operator {
    client: AsyncClient,
    eventloop: EventLoop,
    screen: Screen,
}

/// How it went.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    pub(crate) answered: usize,
    pub(crate) tokens: u64,
    pub(crate) decode_ms: u64,
    pub(crate) took: Duration,
}

/// The texts of the work orders.
pub(crate) fn orders() -> Result<Vec<String>> {
    let text = |line: &str| -> Result<String> {
        let order: Value = serde_json::from_str(line)?;
        Ok(order["text"].as_str().context("it has no text")?.to_owned())
    };
    let orders = ORDERS.lines().map(text).collect::<Result<_>>();
    orders.context("work-orders/orders.jsonl")
}

fn topic(tail: &str) -> String {
    format!("millwright/v1/{SITE}/{GATEWAY}/{tail}")
}

impl Operator {
    /// Connects and subscribes to what the gateway says to this operator.
    pub(crate) async fn connect(address: SocketAddr) -> Result<Self> {
        let ip = address.ip().to_string();
        let mut options = MqttOptions::new("demo-operator", ip, address.port());
        options.set_max_packet_size(Some(1 << 20));
        let (client, eventloop) = AsyncClient::new(options, 64);
        let mut operator = Self {
            client,
            eventloop,
            screen: Screen::default(),
        };
        operator.await_connection().await?;
        for tail in ["state", "health", &format!("result/{OPERATOR}/#")] {
            operator
                .client
                .try_subscribe(topic(tail), QoS::AtLeastOnce)?;
        }
        Ok(operator)
    }

    async fn await_connection(&mut self) -> Result<()> {
        for attempt in 1.. {
            match self.eventloop.poll().await {
                Ok(Event::Incoming(Packet::ConnAck(_))) => break,
                Ok(_) => {}
                Err(error) if attempt == CONNECT_ATTEMPTS => {
                    return Err(error).context("the broker can't be reached");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
        Ok(())
    }

    /// Waits for the agent to say `online`.
    pub(crate) async fn wait_until_online(&mut self) -> Result<()> {
        loop {
            let message = self.next().await?;
            let body = json_of(&message)?;
            if message.topic == topic("state") {
                match body["state"].as_str() {
                    Some("online") => return Ok(()),
                    Some("offline") | None => {}
                    Some(state) => screen::fact("agent", &format!("{state} {}", body["reason"])),
                }
            }
        }
    }

    /// Sends all orders at once, as a shift's backlog would come, and shows what happens until each has its
    /// final event.
    pub(crate) async fn run(&mut self, orders: &[String]) -> Result<Summary> {
        let began = Instant::now();
        let mut summary = Summary::default();
        let mut open = Vec::new();
        for (number, order) in orders.iter().enumerate() {
            let id = format!("order-{}", number + 1);
            self.send(&id, order)?;
            screen::sent(&id, order);
            open.push(id);
        }
        while !open.is_empty() {
            let message = tokio::time::timeout(ANSWER_WITHIN, self.next()).await;
            let message = message.with_context(|| {
                let waited = ANSWER_WITHIN.as_secs();
                format!(
                    "{} had no answer, and nothing came for {waited} s",
                    open.join(", ")
                )
            })??;
            let event = json_of(&message)?;
            if message.topic == topic("health") {
                screen::health(&event);
            } else if message.topic.starts_with(topic("result/").as_bytes()) {
                self.screen.event(&event);
                judge(&event, &mut open, &mut summary);
            }
        }
        summary.took = began.elapsed();
        // How the gateway is after the work: its next sample.
        let sample = async {
            loop {
                let message = self.next().await?;
                if message.topic == topic("health") {
                    return json_of(&message);
                }
            }
        };
        if let Ok(sample) = tokio::time::timeout(HEALTH_WITHIN, sample).await {
            screen::health(&sample?);
        }
        Ok(summary)
    }

    fn send(&self, id: &str, order: &str) -> Result<()> {
        let task = json!({
            "id": id,
            "kind": "chat",
            "messages": [
                { "role": "system", "content": INSTRUCTION },
                { "role": "user", "content": order },
            ],
            "max_tokens": TOKENS,
            "stream": true,
        });
        let topic = topic(&format!("task/{OPERATOR}"));
        let sent = self
            .client
            .try_publish(topic, QoS::AtLeastOnce, false, task.to_string());
        sent.context("the task can't be sent")
    }

    async fn next(&mut self) -> Result<Publish> {
        loop {
            match self
                .eventloop
                .poll()
                .await
                .context("the broker's connection broke")?
            {
                Event::Incoming(Packet::Publish(message)) => return Ok(message),
                Event::Incoming(Packet::Disconnect(reason)) => {
                    bail!("the broker ended the connection: {:?}", reason.reason_code)
                }
                _ => {}
            }
        }
    }
}

/// Takes a task off the open ones with its final event; one that comes twice counts once.
fn judge(event: &Value, open: &mut Vec<String>, summary: &mut Summary) {
    let is_final = ["done", "rejected", "failed", "cancelled", "expired"]
        .iter()
        .any(|name| event["event"] == *name);
    let Some(at) = open
        .iter()
        .position(|id| event["task"] == **id)
        .filter(|_| is_final)
    else {
        return;
    };
    open.swap_remove(at);
    if event["event"] == "done" {
        summary.answered += 1;
        summary.tokens += event["usage"]["generated_tokens"].as_u64().unwrap_or(0);
        summary.decode_ms += event["timing"]["decode_ms"].as_u64().unwrap_or(0);
    }
}

fn json_of(message: &Publish) -> Result<Value> {
    let topic = String::from_utf8_lossy(&message.topic);
    serde_json::from_slice(&message.payload).with_context(|| format!("what came on {topic}"))
}
