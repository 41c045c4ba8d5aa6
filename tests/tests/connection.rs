//! What others do to the agent's connection: take its session, bound its packets.

use millwright_tests::{Agent, BASE, Broker, Client, Keeps, Message, Setup, await_some};
use rumqttc::v5::{Client as Mqtt, MqttOptions};
use serde_json::json;
use std::sync::mpsc::{Sender, TryRecvError, channel};

/// A client under the agent's own client id, which comes back at once whenever it is thrown out, until what this returns is dropped.
fn rival(port: u16) -> Sender<()> {
    let options = MqttOptions::new("millwright-plant-gw-1", "127.0.0.1", port);
    let (_mqtt, mut connection) = Mqtt::new(options, 8);
    let (goes_on, is_over) = channel();
    std::thread::spawn(move || {
        for _ in connection.iter() {
            if is_over.try_recv() == Err(TryRecvError::Disconnected) {
                return;
            }
        }
    });
    goes_on
}

#[test]
fn a_session_that_another_client_takes_is_told_and_not_fought_over() {
    let broker = Broker::open();
    let agent = Agent::start(&broker);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    mes.subscribe(&format!("{BASE}/alarm/#"));
    let rival = rival(broker.client_port);
    await_some("the log says what it may be", || {
        agent.log().contains("under this client id").then_some(())
    });
    drop(rival);
    let is_raised = |m: &Message| m.topic.ends_with("/alarm/session") && m.json()["raised"] == true;
    let alarm = mes.next("the alarm", is_raised).json();
    let reason = alarm["reason"].as_str().unwrap();
    assert!(reason.contains("each gateway needs its own"), "{alarm}");
    // Without pauses it would have been hundreds of times.
    let log = agent.log();
    assert!(log.matches("connected to the broker").count() < 8, "{log}");
    let task = json!({ "id": "after", "kind": "generate", "prompt": "x", "max_tokens": 4 });
    assert_eq!(mes.insist(&task)["event"], "done");
}

#[test]
fn an_answer_beyond_the_brokers_packets_is_told_of_and_the_connection_stays() {
    let broker = Broker::quiet(Keeps::AtTheEnd, "max_packet_size 900");
    let agent = Agent::with(&broker, &Setup::default());
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    mes.subscribe(&format!("{BASE}/alarm/#"));
    let task = |id: &str, tokens: u32| json!({ "id": id, "kind": "generate", "prompt": "The pump", "max_tokens": tokens, "stream": false });
    mes.task(&task("large", 240));
    let failed = mes.outcome("large");
    assert_eq!(failed["code"], "reply_undeliverable", "{failed}");
    let reason = failed["reason"].as_str().unwrap();
    assert!(reason.contains("900"), "{failed}");
    mes.next("an alarm", |m| {
        m.topic.ends_with("/alarm/undeliverable") && m.json()["raised"] == true
    });
    mes.task(&task("small", 4));
    assert_eq!(mes.outcome("small")["event"], "done");
    let log = agent.log();
    assert_eq!(log.matches("connected to the broker").count(), 1, "{log}");
}
