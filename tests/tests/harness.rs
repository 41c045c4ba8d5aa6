//! The harness itself, without an agent: what fails here is not the agent's fault.

use millwright_tests::{BASE, Broker, Client, Outgoing, Security};
use serde_json::json;
use std::time::Duration;

#[test]
fn every_broker_delivers_what_a_gateway_says() {
    for security in [Security::Open, Security::Passwords, Security::Tls] {
        let broker = Broker::start(security);
        let (gateway, mut mes) = (
            Client::connect(&broker, "gw"),
            Client::connect(&broker, "mes"),
        );
        let done = json!({ "task": "t", "event": "done", "text": "ok" });
        gateway.publish("result/mes/t", done.to_string(), Outgoing::default());
        assert_eq!(mes.outcome("t"), done, "{security:?}");
    }
}

#[test]
fn the_acl_keeps_senders_apart() {
    let broker = Broker::start(Security::Passwords);
    let (mes, mut hmi) = (
        Client::connect(&broker, "mes"),
        Client::connect(&broker, "hmi"),
    );
    let gateway = Client::connect(&broker, "gw");
    mes.publish("result/hmi/forged", "{}", Outgoing::default());
    gateway.publish("result/hmi/real", "{}", Outgoing::default());
    let came = hmi.next("the gateway's message", |m| m.topic.starts_with(BASE));
    assert!(came.topic.ends_with("/real"), "{}", came.topic);
    assert!(
        hmi.next_within(Duration::from_millis(300), |m| m.topic.ends_with("/forged"))
            .is_none()
    );
}

#[test]
fn a_broker_restart_keeps_port_and_retained_messages() {
    let mut broker = Broker::open();
    let gateway = Client::connect(&broker, "gw");
    let retained = Outgoing {
        retain: true,
        ..Outgoing::default()
    };
    gateway.publish("state", json!({ "state": "online" }).to_string(), retained);
    Client::connect(&broker, "mes").await_state("online");
    broker.stop();
    broker.resume();
    Client::connect(&broker, "mes").await_state("online");
}

#[test]
fn a_restarted_broker_is_found_again_by_a_client() {
    let mut broker = Broker::open();
    let mut mes = Client::connect(&broker, "mes");
    broker.stop();
    broker.resume();
    let gateway = Client::connect(&broker, "gw");
    let state = json!({ "state": "online" }).to_string();
    gateway.publish(
        "state",
        state,
        Outgoing {
            retain: true,
            ..Outgoing::default()
        },
    );
    mes.await_state("online");
}
