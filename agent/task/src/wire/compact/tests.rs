//! The compact form's bytes, and that it says what JSON says.

use super::*;
use crate::topic::{Base, ReplyRules};
use crate::wire::task::hex;
use crate::wire::{
    Body, Bounds, Clock, Code, Decoder, Envelope, Event, EventError, Finish, Format, Partial,
    Provenance, Refused, Task, Timing, Usage, decode_cancel, decode_event,
};
use crate::{Now, calendar, limits};
use serde_json::{Value, json};
use std::time::Duration;

const NOW: Now = Now {
    own: Duration::from_secs(100),
    wall_ms: 1_799_409_658_379,
    synced: true,
};
const PAGE: &str = include_str!("../../../PROTOCOL.md");

fn decoder() -> Decoder {
    let base = Base::of_gateway("hamburg", "gw-07").unwrap();
    Decoder {
        rules: ReplyRules::new(base.clone(), &[]).unwrap(),
        base,
        bounds: Bounds {
            payload_bytes_max: limits::PAYLOAD_BYTES_MAX,
            tokens_default: 64,
            tokens_max: limits::TOKENS_MAX,
            deadline_default: Duration::from_mins(1),
            deadline_max: Duration::from_hours(1),
        },
    }
}

pub(super) fn envelope(format: Format, payload: &[u8]) -> Envelope<'_> {
    Envelope {
        sender: "mes",
        payload,
        content_type: Some(format.content_type()),
        response_topic: None,
        user_properties: &[],
        correlation: None,
        expiry: None,
        retain: false,
    }
}

pub(super) fn decode(format: Format, payload: &[u8]) -> Result<Task, Box<Refused>> {
    decoder().decode(NOW, &envelope(format, payload))
}

pub(super) fn refused(payload: &[u8]) -> Refused {
    *decode(Format::Postcard, payload).unwrap_err()
}

fn least() -> TaskV1 {
    TaskV1 {
        id: Some("t1".into()),
        kind: Kind::Generate { prompt: "x".into() },
        ..TaskV1::default()
    }
}

pub(super) fn full() -> TaskV1 {
    let message = |role: &str, content: &str| Message {
        role: role.into(),
        content: content.into(),
    };
    TaskV1 {
        id: Some("wo-4711".into()),
        reply_to: Some("millwright/v1/hamburg/gw-07/result/mes/x".into()),
        kind: Kind::Chat {
            messages: vec![message("system", "be brief"), message("user", "why?")],
        },
        max_tokens: Some(300),
        stop: vec!["\n".into(), "é".into()],
        temperature: Some(0.7),
        top_k: Some(40),
        top_p: Some(0.9),
        min_p: Some(0.05),
        repeat_penalty: Some(1.1),
        seed: Some(limits::SEED_MAX),
        deadline_ms: Some(8000),
        expires_at_ms: Some(NOW.wall_ms + 1000),
        priority: Some(9),
        stream: true,
    }
}

pub(super) fn event(body: Body) -> Event {
    Event {
        task: "wo-4711".into(),
        sender: "mes".into(),
        gateway: "gw-07".into(),
        run: "9c2f3a1b-8".into(),
        seq: 2,
        at_ms: NOW.wall_ms,
        clock: Clock::Synced,
        body,
    }
}

fn delta() -> Body {
    Body::Delta {
        text: " is hot".into(),
        offset: 0,
    }
}

fn done() -> Body {
    Body::Done {
        text: "The bearing of pump 7 is hot: stop the pump and look at its lubrication.".into(),
        finish: Finish::Stop,
        usage: Usage {
            prompt_tokens: 31,
            cached_tokens: 0,
            generated_tokens: 17,
        },
        timing: Timing {
            queue_ms: 1,
            prefill_ms: 23,
            decode_ms: 84,
            tokens_per_s: 190.48,
        },
        provenance: Provenance {
            model: "smollm2-135m-int8 1".into(),
            digest: "sha256:".to_owned() + &"5e".repeat(32),
            engine: "0.1.0".into(),
            seed: 0x0012_3456_789a_bcde,
            exact: true,
        },
    }
}

fn refusal() -> Refusal {
    Refusal {
        code: Code::Internal,
        reason: "why".into(),
        field: Some("prompt".into()),
        limit: Some(1),
        retry_after_ms: Some(200),
        eta_ms: Some(30_000),
        needed: Some(4),
        available: None,
    }
}

fn partial() -> Partial {
    Partial {
        text: "so far".into(),
        usage: Usage {
            prompt_tokens: 1,
            cached_tokens: 2,
            generated_tokens: 3,
        },
        reason: "asked".into(),
    }
}

/// One of each, with its stored bytes.
fn events() -> [(Body, &'static str); 10] {
    let accepted = Body::Accepted {
        queue_position: 2,
        eta_ms: Some(1500),
        base: Some("acme/gw-07".into()),
    };
    [
        (accepted, include_str!("frozen/accepted")),
        (Body::Started {}, include_str!("frozen/started")),
        (delta(), include_str!("frozen/delta")),
        (done(), include_str!("frozen/done")),
        (Body::Rejected(refusal()), include_str!("frozen/rejected")),
        (Body::Failed(refusal()), include_str!("frozen/failed")),
        (Body::Cancelled(partial()), include_str!("frozen/cancelled")),
        (Body::Expired(partial()), include_str!("frozen/expired")),
        (Body::AlreadyFinal {}, include_str!("frozen/already_final")),
        (Body::Unknown {}, include_str!("frozen/unknown")),
    ]
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .chars()
        .filter_map(|c| c.to_digit(16).map(|d| d as u8))
        .collect();
    digits
        .chunks(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect()
}

/// Version 1, byte by byte: whoever changes it makes a version 2.
#[test]
fn structs_are_frozen() {
    let tasks = [
        (least(), include_str!("frozen/task-least")),
        (full(), include_str!("frozen/task-full")),
    ];
    for (task, frozen) in tasks {
        let mut read = TaskV1::default();
        assert_eq!(read.read_compact(&unhex(frozen)), Ok(()));
        assert_eq!((&read, hex(&read.encode())), (&task, frozen.trim().into()));
    }
    let frozen = include_str!("frozen/cancel");
    let cancel = CancelV1::from_compact(&unhex(frozen)).unwrap();
    assert_eq!(
        (cancel.task.as_str(), hex(&cancel.encode())),
        ("wo-4711", frozen.trim().into())
    );
    for (body, frozen) in events() {
        let (name, expected) = (body.name(), event(body));
        let read = decode_event(&unhex(frozen)).unwrap();
        assert_eq!(read, expected, "{name}");
        assert_eq!(
            hex(&Format::Postcard.encode(&read)),
            frozen.trim(),
            "{name}"
        );
    }
}

#[test]
fn codes_are_numbered_as_they_are() {
    let codes = [
        Code::Invalid,
        Code::TooLarge,
        Code::ContextOverflow,
        Code::Busy,
        Code::DeadlineUnreachable,
        Code::Conflict,
        Code::Unsupported,
        Code::Draining,
        Code::NoModel,
        Code::ForbiddenReplyTopic,
        Code::ClockUnsynced,
        Code::ReplyUndeliverable,
        Code::Internal,
    ];
    for (number, code) in codes.into_iter().enumerate() {
        assert_eq!(postcard::to_stdvec(&code).unwrap(), [number as u8]);
    }
    for (number, finish) in [Finish::Stop, Finish::Length].into_iter().enumerate() {
        assert_eq!(postcard::to_stdvec(&finish).unwrap(), [number as u8]);
    }
    for (number, clock) in [Clock::Synced, Clock::Unsynced].into_iter().enumerate() {
        assert_eq!(postcard::to_stdvec(&clock).unwrap(), [number as u8]);
    }
}

#[test]
fn what_can_not_be_read_is_named_and_answered_in_the_compact_form() {
    let bytes = least().encode();
    let with = |at: usize, put: &[u8]| [&bytes[..at], put, &bytes[at + 1..]].concat();
    // version, id (4), reply_to, kind, prompt (2), max_tokens, stop, temperature, ...
    let cases = [
        (vec![], "version", "is missing"),
        (with(0, &[2]), "version", "is 2"),
        (bytes[..1].to_vec(), "id", "is cut off"),
        (with(1, &[2]), "id", "must begin with 0"),
        (with(3, &[0xff]), "id", "is not UTF-8"),
        (with(2, &[0xff, 0xff, 0xff, 0x7f]), "id", "is cut off"),
        (with(5, &[1, 0x45, b'a']), "reply_to", "is cut off"),
        (with(6, &[0xff; 9]), "kind", "larger number"),
        (with(7, &[0]), "max_tokens", "must begin"),
        (with(9, &[1, 0]), "max_tokens", "is 0; it must be 1 to 8192"),
        (with(10, &[9]), "stop", "has 9 entries; 8 are allowed"),
        (with(10, &[1, 0]), "stop[0]", "must have 1 to 64 bytes"),
        (with(11, &[1, 0, 0, 0xc0, 0x7f]), "temperature", "is NaN"),
        (with(11, &[1, 0, 0, 0x80, 0x7f]), "temperature", "is inf"),
        (with(12, &[1, 0xff, 0xff, 0x7f]), "top_k", "is 2097151"),
        (with(13, &[1, 0, 0, 0x80, 0xff]), "top_p", "is -inf"),
        (with(19, &[1, 10]), "priority", "is 10; it must be 0 to 9"),
        (with(20, &[2]), "stream", "must be 0 or 1"),
    ];
    for (payload, field, reason) in cases {
        let Refused { refusal, reply, .. } = refused(&payload);
        assert_eq!(refusal.field.as_deref(), Some(field), "{}", refusal.reason);
        assert!(refusal.reason.contains(reason), "{}", refusal.reason);
        assert_eq!(
            (refusal.code, reply.format),
            (Code::Invalid, Format::Postcard)
        );
        let task = if matches!(field, "version" | "id") {
            "_invalid"
        } else {
            "t1"
        };
        let topic = format!("millwright/v1/hamburg/gw-07/result/mes/{task}");
        assert_eq!(reply.topic, topic, "{field}");
    }
    let more = refused(&[bytes.as_slice(), &[0, 0]].concat()).refusal;
    assert!(
        more.reason.contains("goes on for 2 bytes"),
        "{}",
        more.reason
    );
    let kind = refused(&with(6, &[7])).refusal;
    assert_eq!(
        (kind.code, kind.field.as_deref()),
        (Code::Unsupported, Some("kind"))
    );
}

#[test]
fn a_list_is_bounded_before_it_is_read() {
    let messages = |count: &[u8]| {
        let head = [1, 1, 2, b't', b'1', 0, 1];
        [&head, count, &[0; 600]].concat()
    };
    let refusal = refused(&messages(&[0x81, 1])).refusal;
    assert_eq!(refusal.limit, Some(128));
    let refusal = refused(&messages(&[255, 255, 255, 255, 255, 255, 255, 255, 255, 1])).refusal;
    assert!(refusal.reason.contains("has 18446744073709551615 entries"));
    let cut = refused(&messages(&[2])[..11]).refusal;
    assert_eq!(cut.field.as_deref(), Some("messages[1].content"));
    let task = TaskV1 {
        kind: Kind::Chat {
            messages: vec![Message {
                role: "root".into(),
                content: String::new(),
            }],
        },
        ..least()
    };
    let role = refused(&task.encode()).refusal;
    assert_eq!(role.field.as_deref(), Some("messages[0].role"));
}

#[test]
fn cancels_are_read_and_refused() {
    let read = |payload: &[u8]| decode_cancel(&envelope(Format::Postcard, payload));
    assert_eq!(read(b"\x01\x03a-1").unwrap().task, "a-1");
    for payload in [&b""[..], b"\x02\x01a", b"\x01", b"\x01\x01ab", b"\x01\x01/"] {
        assert!(read(payload).is_err(), "{payload:?}");
    }
}

#[test]
fn what_is_no_event_is_no_event() {
    let bytes = Format::Postcard.encode(&event(done()));
    let error = |payload: &[u8]| decode_event(payload).unwrap_err();
    assert!(matches!(error(&[2, 0]), EventError::Version(2)));
    let more = [bytes.as_slice(), &[0]].concat();
    assert!(matches!(error(&more), EventError::Trailing(1)));
    for cut in 1..bytes.len() {
        assert!(matches!(error(&bytes[..cut]), EventError::Postcard(_)));
    }
    let rate = 190.48f64.to_le_bytes();
    let at = bytes.windows(8).position(|w| w == rate).unwrap();
    let mut endless = bytes.clone();
    endless[at..at + 8].copy_from_slice(&f64::INFINITY.to_le_bytes());
    assert!(matches!(error(&endless), EventError::NotFinite));
}

/// The hex of the page's blocks is what the code makes.
#[test]
fn the_page_shows_what_is_sent() {
    let section = PAGE.split("## The compact form").nth(1).unwrap();
    let blocks = section.split("```").skip(1).step_by(2);
    let bytes = blocks.take(2).map(|block| {
        let digits = block.lines().filter_map(|line| line.split("  ").next());
        unhex(&digits.collect::<String>())
    });
    let task = TaskV1 {
        id: Some("wo-4711".into()),
        kind: Kind::Generate {
            prompt: "The pump".into(),
        },
        max_tokens: Some(60),
        deadline_ms: Some(8000),
        stream: true,
        ..TaskV1::default()
    };
    let expected = [task.encode(), Format::Postcard.encode(&event(delta()))];
    assert_eq!(
        bytes.map(|b| hex(&b)).collect::<Vec<_>>(),
        expected.map(|b| hex(&b))
    );
}

#[test]
fn the_page_says_what_is_saved() {
    let chat = TaskV1 {
        id: Some("wo-4711".into()),
        kind: Kind::Chat {
            messages: vec![Message {
                role: "user".into(),
                content: "What does a slew pump do?".into(),
            }],
        },
        max_tokens: Some(60),
        deadline_ms: Some(8000),
        stream: true,
        ..TaskV1::default()
    };
    let said = |body| {
        let event = event(body);
        [Format::Json, Format::Postcard].map(|format| format.encode(&event).len())
    };
    let rows = [
        (
            "a chat task with a question of 25 letters",
            [json(&chat).to_string().len(), chat.encode().len()],
        ),
        ("`delta` of 7 letters", said(delta())),
        ("`done` with an answer of 72 letters", said(done())),
    ];
    for (what, [json, compact]) in rows {
        let row = format!("| {what} | {json} | {compact} |");
        assert!(PAGE.contains(&row), "PROTOCOL.md should have: {row}");
    }
}

/// The same task in JSON, as a sender would write it.
pub(super) fn json(task: &TaskV1) -> Value {
    let mut json = match &task.kind {
        Kind::Generate { prompt } => json!({"kind": "generate", "prompt": prompt}),
        Kind::Chat { messages } => json!({"kind": "chat", "messages": messages}),
    };
    let float = |x: Option<f32>| x.map(Value::from);
    let whole = |n: Option<u64>| n.map(Value::from);
    let text = |text: &Option<String>| text.clone().map(Value::from);
    let fields = [
        ("id", text(&task.id)),
        ("reply_to", text(&task.reply_to)),
        ("max_tokens", whole(task.max_tokens)),
        ("stop", (!task.stop.is_empty()).then(|| json!(task.stop))),
        ("temperature", float(task.temperature)),
        ("top_k", whole(task.top_k)),
        ("top_p", float(task.top_p)),
        ("min_p", float(task.min_p)),
        ("repeat_penalty", float(task.repeat_penalty)),
        ("seed", whole(task.seed)),
        ("deadline_ms", whole(task.deadline_ms)),
        (
            "expires_at",
            task.expires_at_ms.map(|ms| json!(calendar::format(ms))),
        ),
        ("priority", whole(task.priority)),
        ("stream", task.stream.then_some(json!(true))),
    ];
    for (field, value) in fields {
        if let Some(value) = value {
            json[field] = value;
        }
    }
    json
}
