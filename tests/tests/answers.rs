//! From a task to its answer, over a real broker, with the tiny model.

use millwright_tests::{Agent, BASE, Broker, Client, Outgoing};
use rumqttc::v5::mqttbytes::v5::PublishProperties;
use serde_json::{Value, json};

fn started(sender: &str) -> (Broker, Agent, Client) {
    let broker = Broker::open();
    let agent = Agent::start(&broker);
    let mut client = Client::connect(&broker, sender);
    client.await_state("online");
    (broker, agent, client)
}

fn names(events: &[Value]) -> Vec<&str> {
    events
        .iter()
        .filter_map(|event| event["event"].as_str())
        .collect()
}

#[test]
fn a_task_is_answered_in_a_stream_that_shows_every_byte_once() {
    let (_broker, _agent, mut mes) = started("mes");
    mes.generate("t-1", 200);
    let events = mes.events("t-1");
    let names = names(&events);
    assert_eq!(names[..2], ["accepted", "started"], "{names:?}");
    assert!(
        names[2..names.len() - 1]
            .iter()
            .all(|name| *name == "delta"),
        "{names:?}"
    );
    let mut text = String::new();
    let mut seq = None;
    for event in &events {
        assert_eq!(
            (&event["sender"], &event["gateway"]),
            (&json!("mes"), &json!("gw-1"))
        );
        assert_eq!(event["run"], events[0]["run"]);
        assert!(event["seq"].as_u64() > seq, "seq rises: {names:?}");
        seq = event["seq"].as_u64();
        if event["event"] == "delta" {
            assert_eq!(event["offset"], text.len());
            text += event["text"].as_str().unwrap();
        }
    }
    let done = events.last().unwrap();
    assert_eq!(done["text"], text.as_str(), "{done}");
    assert!(
        done["finish"] == "length" || done["finish"] == "stop",
        "{done}"
    );
    let generated = done["usage"]["generated_tokens"].as_u64().unwrap();
    assert!((1..=200).contains(&generated), "{done}");
    assert!(
        done["usage"]["prompt_tokens"].as_u64().unwrap() >= 1,
        "{done}"
    );
    for name in ["queue_ms", "prefill_ms", "decode_ms", "tokens_per_s"] {
        assert!(done["timing"][name].is_number(), "{name}: {done}");
    }
    assert!(
        done["provenance"]["digest"].is_string() && done["provenance"]["exact"].is_boolean(),
        "{done}"
    );
}

#[test]
fn without_a_stream_there_is_the_final_event_alone() {
    let (_broker, _agent, mut mes) = started("mes");
    mes.task(&json!({ "id": "quiet", "kind": "generate", "prompt": "The pump", "max_tokens": 8, "stream": false }));
    let events = mes.events("quiet");
    assert!(!names(&events).contains(&"delta"), "{:?}", names(&events));
    assert_eq!(events.last().unwrap()["event"], "done");
}

#[test]
fn a_chat_goes_through_the_models_template() {
    let (_broker, _agent, mut mes) = started("mes");
    mes.task(&json!({ "id": "chat", "kind": "chat", "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 8 }));
    mes.task(&json!({ "id": "plain", "kind": "generate", "prompt": "Hello", "max_tokens": 8 }));
    let (chat, plain) = (mes.outcome("chat"), mes.outcome("plain"));
    let prompt = |event: &Value| event["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(
        (&chat["event"], &plain["event"]),
        (&json!("done"), &json!("done"))
    );
    assert!(prompt(&chat) > prompt(&plain), "{chat}\n{plain}");
}

#[test]
fn the_same_task_gives_the_same_text_alone_or_among_others() {
    let (_broker, _agent, mut mes) = started("mes");
    let sampled = |id: &str| {
        json!({ "id": id, "kind": "generate", "prompt": "The pump", "max_tokens": 32,
            "temperature": 0.9, "top_p": 0.95, "seed": 7 })
    };
    mes.task(&sampled("alone"));
    let alone = mes.outcome("alone");
    for n in 0..4 {
        mes.generate(&format!("other-{n}"), 32);
    }
    mes.task(&sampled("among"));
    let among = mes.outcome("among");
    assert_eq!(alone["event"], "done");
    assert_eq!(
        (&alone["text"], &alone["usage"]["generated_tokens"]),
        (&among["text"], &among["usage"]["generated_tokens"])
    );
    assert_eq!(among["provenance"]["seed"], 7);
}

#[test]
fn a_resent_task_is_run_once_and_answered_with_the_same_bytes() {
    let (_broker, _agent, mut mes) = started("mes");
    let task = json!({ "id": "again", "kind": "generate", "prompt": "The pump", "max_tokens": 8 });
    let done = |mes: &mut Client| {
        let topic = format!("{BASE}/result/mes/again");
        mes.next("the final event", |m| {
            m.topic == topic && m.json()["event"] == "done"
        })
        .payload
    };
    mes.task(&task);
    let first = done(&mut mes);
    mes.task(&task);
    assert_eq!(first, done(&mut mes));
    mes.task(
        &json!({ "id": "again", "kind": "generate", "prompt": "Another pump", "max_tokens": 8 }),
    );
    let refused = mes.event("again", "rejected");
    assert_eq!(refused["code"], "conflict");
}

#[test]
fn senders_do_not_share_ids() {
    let (broker, _agent, mut mes) = started("mes");
    let mut hmi = Client::connect(&broker, "hmi");
    mes.generate("x", 4);
    hmi.task(&json!({ "id": "x", "kind": "generate", "prompt": "Another", "max_tokens": 4 }));
    assert_eq!(mes.outcome("x")["sender"], "mes");
    assert_eq!(hmi.outcome("x")["sender"], "hmi");
}

#[test]
fn response_topic_and_correlation_come_back() {
    let (_broker, _agent, mut mes) = started("mes");
    let topic = format!("{BASE}/result/mes/elsewhere/42");
    let properties = PublishProperties {
        response_topic: Some(topic.clone()),
        correlation_data: Some(vec![0xAB, 0, 0xFF].into()),
        ..PublishProperties::default()
    };
    // Without an id, the correlation data is it.
    let task = json!({ "kind": "generate", "prompt": "The pump", "max_tokens": 4 });
    mes.publish(
        "task/mes",
        task.to_string(),
        Outgoing {
            properties,
            ..Outgoing::default()
        },
    );
    let done = mes.next("the answer", |m| {
        m.topic == topic && m.json()["event"] == "done"
    });
    assert_eq!(done.json()["task"], "ab00ff");
    assert_eq!(
        done.properties.correlation_data.as_deref(),
        Some(&[0xAB, 0, 0xFF][..])
    );
    assert!(
        done.properties
            .user_properties
            .contains(&("event".into(), "done".into()))
    );
    assert!(!done.retain);
}

#[test]
fn a_payload_can_say_where_to_answer() {
    let (_broker, _agent, mut mes) = started("mes");
    let topic = format!("{BASE}/result/mes/from-311");
    mes.task(&json!({ "id": "t", "kind": "generate", "prompt": "x", "max_tokens": 2, "reply_to": topic }));
    let done = mes.next("the answer", |m| {
        m.topic == topic && m.json()["event"] == "done"
    });
    assert_eq!(done.json()["task"], "t");
}
