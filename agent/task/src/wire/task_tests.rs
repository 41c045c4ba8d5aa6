//! Tasks as senders write them, right and wrong.

use super::*;
use crate::calendar;
use crate::limits::{USER_PROPERTIES_MAX, USER_PROPERTY_BYTES_MAX};
use crate::topic::Base;
use proptest::prelude::*;
use serde_json::{Value, json};

const NOW: Now = Now {
    own: Duration::from_secs(100),
    wall_ms: 1_700_000_000_000,
    synced: true,
};

fn decoder() -> Decoder {
    let base = Base::of_gateway("hamburg", "gw-07").unwrap();
    Decoder {
        rules: ReplyRules::new(base.clone(), &["acme/answers".into(), base.results()]).unwrap(),
        base,
        bounds: Bounds {
            payload_bytes_max: 4096,
            tokens_default: 64,
            tokens_max: 512,
            deadline_default: Duration::from_mins(1),
            deadline_max: Duration::from_mins(10),
        },
    }
}

fn envelope(payload: &[u8]) -> Envelope<'_> {
    Envelope {
        sender: "mes",
        payload,
        content_type: None,
        response_topic: None,
        correlation: None,
        user_properties: &[],
        expiry: None,
        retain: false,
    }
}

fn decode(json: &Value) -> Result<Task, Box<Refused>> {
    decoder().decode(NOW, &envelope(json.to_string().as_bytes()))
}

/// A valid task with one field set to something else.
fn with(field: &str, value: Value) -> Value {
    let mut task = json!({"id": "t1", "kind": "generate", "prompt": "Hello"});
    task[field] = value;
    task
}

#[test]
fn defaults() {
    let task = decode(&with("stream", json!(true))).unwrap();
    assert_eq!(
        task.kind,
        Kind::Generate {
            prompt: "Hello".into()
        }
    );
    assert_eq!((task.max_tokens, task.priority, task.stream), (64, 5, true));
    assert!(task.sampling.temperature == 0.0 && task.sampling.seed.is_none());
    assert_eq!(task.deadline, Duration::from_secs(160));
    assert_eq!(
        task.reply.topic,
        "millwright/v1/hamburg/gw-07/result/mes/t1"
    );
}

#[test]
fn every_wrong_field_is_named() {
    let cases = [
        ("id", json!(7)),
        ("id", json!("a b")),
        ("id", json!("")),
        ("kind", json!(1)),
        ("prompt", json!(["x"])),
        ("prompt", json!("")),
        ("messages", json!([])),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(513)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(1.5)),
        ("max_tokens", json!("12")),
        ("stop", json!(3)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("hot")),
        ("top_k", json!(-2)),
        ("top_p", json!(0)),
        ("top_p", json!(1.1)),
        ("min_p", json!(2)),
        ("repeat_penalty", json!(0)),
        ("seed", json!(1u64 << 53)),
        ("deadline_ms", json!(0)),
        ("deadline_ms", json!(600_001)),
        ("expires_at", json!("tomorrow")),
        ("priority", json!(10)),
        ("stream", json!("yes")),
        ("reply_to", json!(1)),
        ("max_tokens", json!(null)),
        ("temprature", json!(1)),
    ];
    for (field, value) in cases {
        let refused = decode(&with(field, value.clone())).unwrap_err();
        assert_eq!(
            refused.refusal.field.as_deref(),
            Some(field),
            "{field}: {value} {:?}",
            refused.refusal
        );
        assert!(refused.refusal.reason.contains(field));
        assert!(matches!(refused.refusal.code, Code::Invalid), "{field}");
    }
    let refused = decode(&with("stop", json!(["ok", ""]))).unwrap_err();
    assert_eq!(refused.refusal.field.as_deref(), Some("stop[1]"));
}

#[test]
fn chat_messages_are_checked_one_by_one() {
    let chat = |messages: Value| decode(&json!({"id": "t", "kind": "chat", "messages": messages}));
    let task = chat(json!([{"role": "user", "content": "Hi"}])).unwrap();
    assert_eq!(
        task.kind,
        Kind::Chat {
            messages: vec![Message {
                role: "user".into(),
                content: "Hi".into()
            }]
        }
    );
    let field = |messages| {
        chat(messages)
            .unwrap_err()
            .refusal
            .field
            .unwrap_or_default()
    };
    assert_eq!(field(json!([{"role": "user"}])), "messages[0].content");
    assert_eq!(
        field(json!([{"role": "root", "content": ""}])),
        "messages[0].role"
    );
    assert_eq!(
        field(json!([{"role": "user", "content": "", "name": 1}])),
        "messages[0].name"
    );
    assert_eq!(field(json!({"role": "user"})), "messages");
    assert_eq!(field(json!(["Hi"])), "messages[0]");
}

#[test]
fn an_unknown_kind_is_unsupported() {
    assert_eq!(
        decode(&with("kind", json!("classify")))
            .unwrap_err()
            .refusal
            .code,
        Code::Unsupported
    );
}

#[test]
fn what_is_not_json_is_refused_where_the_sender_can_see_it() {
    let refused = |payload: &[u8]| decoder().decode(NOW, &envelope(payload)).unwrap_err();
    for (payload, part) in [
        (&b""[..], "not valid JSON"),
        (b"{\"id\": \"a\"", "not valid JSON"),
        (b"\xff\xfe", "UTF-8 at byte 0"),
        (b"[1]", "not a JSON object"),
        (b"{\"id\":\"a\",\"id\":\"b\"}", "`id` appears twice"),
    ] {
        let refused = refused(payload);
        assert!(
            refused.refusal.reason.contains(part),
            "{}",
            refused.refusal.reason
        );
        assert_eq!(
            refused.reply.topic,
            "millwright/v1/hamburg/gw-07/result/mes/_invalid"
        );
        assert_eq!(refused.key.task, INVALID_TASK);
    }
    let deep = "[".repeat(4000);
    assert!(
        refused(deep.as_bytes())
            .refusal
            .reason
            .contains("recursion limit")
    );
}

#[test]
fn the_envelope_is_judged_too() {
    let payload = with("id", json!("t1")).to_string();
    let code = |envelope: Envelope<'_>| decoder().decode(NOW, &envelope).unwrap_err().refusal.code;
    let plain = envelope(payload.as_bytes());
    assert_eq!(
        code(Envelope {
            retain: true,
            ..plain
        }),
        Code::Invalid
    );
    assert_eq!(
        code(Envelope {
            content_type: Some("text/plain"),
            ..plain
        }),
        Code::Unsupported
    );
    assert_eq!(
        code(Envelope {
            correlation: Some(&[0; 257]),
            ..plain
        }),
        Code::TooLarge
    );
    assert_eq!(code(envelope(&[b' '; 4097])), Code::TooLarge);
    let many = vec![(String::new(), String::new()); USER_PROPERTIES_MAX + 1];
    let long = [("name".to_owned(), "v".repeat(USER_PROPERTY_BYTES_MAX - 3))];
    for user_properties in [&many[..], &long[..]] {
        // Not JSON: it is refused before that is looked at.
        let with = Envelope {
            user_properties,
            ..envelope(b"{")
        };
        assert_eq!(code(with), Code::TooLarge);
    }
    let fitting = vec![(String::new(), "v".repeat(128)); USER_PROPERTIES_MAX];
    let with = Envelope {
        user_properties: &fitting,
        ..envelope(b"{")
    };
    assert_eq!(code(with), Code::Invalid);
}

#[test]
fn correlation_data_stands_in_for_the_id() {
    let payload = br#"{"kind": "generate", "prompt": "x"}"#;
    let task = decoder()
        .decode(
            NOW,
            &Envelope {
                correlation: Some(&[0xab, 1]),
                ..envelope(payload)
            },
        )
        .unwrap();
    assert_eq!(task.key.task, "ab01");
    assert_eq!(task.reply.correlation.as_deref(), Some(&[0xab, 1][..]));
    let refused = decoder().decode(NOW, &envelope(payload)).unwrap_err();
    assert_eq!(refused.refusal.field.as_deref(), Some("id"));
}

#[test]
fn the_reply_topic_is_the_response_topic_then_reply_to_then_the_default() {
    let payload = with("reply_to", json!("acme/answers/b")).to_string();
    let both = Envelope {
        response_topic: Some("acme/answers/a"),
        ..envelope(payload.as_bytes())
    };
    assert_eq!(
        decoder().decode(NOW, &both).unwrap().reply.topic,
        "acme/answers/a"
    );
    assert_eq!(
        decode(&with("reply_to", json!("acme/answers/b")))
            .unwrap()
            .reply
            .topic,
        "acme/answers/b"
    );

    let refused = decode(&with("reply_to", json!("acme/other"))).unwrap_err();
    assert_eq!(refused.refusal.code, Code::ForbiddenReplyTopic);
    assert_eq!(
        refused.reply.topic,
        "millwright/v1/hamburg/gw-07/result/mes/t1"
    );
    let forbidden = Envelope {
        response_topic: Some("$SYS/x"),
        ..envelope(payload.as_bytes())
    };
    let refused = decoder().decode(NOW, &forbidden).unwrap_err();
    assert_eq!(refused.refusal.code, Code::ForbiddenReplyTopic);
    assert_eq!(
        refused.reply.topic,
        "millwright/v1/hamburg/gw-07/result/mes/t1"
    );
}

#[test]
fn the_earliest_deadline_wins() {
    let mut task = with("deadline_ms", json!(9000));
    let left = |task: &Value, expiry: Option<u64>| {
        let payload = task.to_string();
        let envelope = Envelope {
            expiry: expiry.map(Duration::from_secs),
            ..envelope(payload.as_bytes())
        };
        decoder()
            .decode(NOW, &envelope)
            .unwrap()
            .deadline
            .checked_sub(NOW.own)
            .unwrap()
    };
    assert_eq!(left(&task, Some(20)), Duration::from_secs(9));
    assert_eq!(left(&task, Some(4)), Duration::from_secs(4));
    task["expires_at"] = json!(calendar::format(NOW.wall_ms + 2500));
    assert_eq!(left(&task, Some(4)), Duration::from_millis(2500));
    assert_eq!(
        left(&with("expires_at", json!("2001-01-01T00:00:00Z")), None),
        Duration::ZERO
    );
    assert_eq!(
        left(&with("stream", json!(true)), Some(86_400)),
        Duration::from_mins(10)
    );
    let unsynced = Now {
        synced: false,
        ..NOW
    };
    let refused = decoder()
        .decode(unsynced, &envelope(task.to_string().as_bytes()))
        .unwrap_err();
    assert_eq!(refused.refusal.code, Code::ClockUnsynced);
}

#[test]
fn sameness_ignores_id_reply_and_deadline_and_nothing_else() {
    let base = decode(&with("id", json!("t1"))).unwrap().digest;
    for (field, value) in [
        ("id", json!("t2")),
        ("reply_to", json!("acme/answers/x")),
        ("deadline_ms", json!(5)),
    ] {
        assert_eq!(decode(&with(field, value)).unwrap().digest, base, "{field}");
    }
    for (field, value) in [
        ("prompt", json!("Bye")),
        ("seed", json!(1)),
        ("max_tokens", json!(3)),
        ("stop", json!("x")),
    ] {
        assert_ne!(decode(&with(field, value)).unwrap().digest, base, "{field}");
    }
}

/// They are in journals that older versions wrote: the SHA-256 of this text.
#[test]
fn digests_stay_what_they_were() {
    let tasks = [
        (
            json!({"id": "t", "kind": "generate", "prompt": "Hello"}),
            r#"[{"generate":{"prompt":"Hello"}},64,[],{"temperature":0.0,"top_k":0,"top_p":1.0,"min_p":0.0,"repeat_penalty":1.0,"seed":null},5,false]"#,
        ),
        (
            json!({"id": "t", "kind": "chat", "messages": [{"role": "user", "content": "Hi"}], "stop": "a", "temperature": 0.7}),
            r#"[{"chat":{"messages":[{"role":"user","content":"Hi"}]}},64,["a"],{"temperature":0.7,"top_k":0,"top_p":1.0,"min_p":0.0,"repeat_penalty":1.0,"seed":null},5,false]"#,
        ),
    ];
    for (task, text) in tasks {
        let digest: [u8; 32] = Sha256::digest(text).into();
        assert_eq!(decode(&task).unwrap().digest, digest, "{text}");
    }
}

proptest! {
    #[test]
    fn any_bytes_get_a_verdict(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = decoder().decode(NOW, &envelope(&payload));
    }

    #[test]
    fn any_truncation_is_refused(cut in 0usize..60) {
        let payload = with("stream", json!(true)).to_string();
        let cut = cut.min(payload.len() - 1);
        prop_assert!(decoder().decode(NOW, &envelope(&payload.as_bytes()[..cut])).is_err());
    }

    #[test]
    fn reasons_repeat_little(field in "[a-z]{1,200}", id in "\\PC{0,200}") {
        for task in [with(&format!("{field}x_"), json!(1)), with("id", json!(id)), with("kind", json!(id)), with("expires_at", json!(id)), with("reply_to", json!(id))] {
            if let Err(refused) = decode(&task) {
                prop_assert!(refused.refusal.reason.len() < 400);
                prop_assert!(!refused.refusal.reason.chars().any(char::is_control));
            }
        }
    }

    #[test]
    fn answers_never_leave_the_allowed_trees(id in "\\PC{0,20}", reply in "[a-z/+#$]{0,20}", correlation in proptest::collection::vec(any::<u8>(), 0..40)) {
        let mut task = with("id", json!(id));
        task["reply_to"] = json!(reply);
        let payload = task.to_string();
        let envelope = Envelope { correlation: Some(&correlation), ..envelope(payload.as_bytes()) };
        let topic = match decoder().decode(NOW, &envelope) {
            Ok(task) => task.reply.topic,
            Err(refused) => refused.reply.topic,
        };
        prop_assert!(topic.starts_with("acme/answers/") || topic.starts_with("millwright/v1/hamburg/gw-07/result/mes/"));
    }
}
