//! Whatever is said, both forms say the same; whatever comes, there is a verdict.

use super::tests::{decode, envelope, event, full, json, refused};
use super::*;
use crate::limits;
use crate::wire::{
    Body, Code, Event, Finish, Format, Partial, Provenance, Refused, Timing, Usage, decode_cancel,
    decode_event,
};
use proptest::option::of;
use proptest::prelude::*;

fn kinds() -> impl Strategy<Value = Kind> {
    let message = ("system|user|assistant", "\\PC{0,30}")
        .prop_map(|(role, content)| Message { role, content });
    prop_oneof![
        "\\PC{1,60}".prop_map(|prompt| Kind::Generate { prompt }),
        prop::collection::vec(message, 1..9).prop_map(|messages| Kind::Chat { messages }),
    ]
}

/// Tasks as senders write them, most of them within bounds.
fn tasks() -> impl Strategy<Value = TaskV1> {
    let reply = "millwright/v1/hamburg/gw-07/result/mes/[a-z]{0,4}";
    let address = (of("[a-z._/-]{1,9}"), of(reply));
    let text = (kinds(), prop::collection::vec("\\PC{1,9}", 0..10));
    let shape = (
        of(0f32..2.1),
        of(0u64..99),
        of(0f32..1.1),
        of(0f32..1.1),
        of(0.05f32..3.0),
    );
    let more = (
        of(0..limits::TOKENS_MAX as u64 + 2),
        of(0..limits::SEED_MAX),
        any::<bool>(),
    );
    let time = (
        of(1u64..4_000_000),
        of(0u64..253_402_300_800_000),
        of(0u64..11),
    );
    (address, text, shape, more, time).prop_map(|(address, text, shape, more, time)| TaskV1 {
        id: address.0,
        reply_to: address.1,
        kind: text.0,
        stop: text.1,
        temperature: shape.0,
        top_k: shape.1,
        top_p: shape.2,
        min_p: shape.3,
        repeat_penalty: shape.4,
        max_tokens: more.0,
        seed: more.1,
        stream: more.2,
        deadline_ms: time.0,
        expires_at_ms: time.1,
        priority: time.2,
    })
}

fn bodies() -> impl Strategy<Value = Body> {
    let usage = (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(a, b, c)| Usage {
        prompt_tokens: a,
        cached_tokens: b,
        generated_tokens: c,
    });
    let done = (
        "\\PC{0,60}",
        any::<bool>(),
        usage.clone(),
        0u32..100_000_000,
        "\\PC{0,9}",
    );
    let done = done.prop_map(|(text, stopped, usage, rate, model)| Body::Done {
        text,
        finish: if stopped {
            Finish::Stop
        } else {
            Finish::Length
        },
        usage,
        timing: Timing {
            queue_ms: usage.prompt_tokens,
            prefill_ms: 0,
            decode_ms: usage.cached_tokens,
            // Two digits, as it is said: of more, serde_json may lose the last bit.
            tokens_per_s: f64::from(rate) / 100.0,
        },
        provenance: Provenance {
            digest: model.clone(),
            engine: model.clone(),
            model,
            seed: usage.generated_tokens,
            exact: stopped,
        },
    });
    let code = prop::sample::select(vec![Code::Invalid, Code::Busy, Code::Internal]);
    let refusal = (
        code,
        "\\PC{0,60}",
        of("\\PC{0,9}"),
        of(any::<u64>()),
        of(any::<u64>()),
    );
    let refusal = refusal.prop_map(|(code, reason, field, a, b)| Refusal {
        field,
        limit: a,
        retry_after_ms: b,
        eta_ms: a,
        needed: b,
        available: a,
        ..Refusal::new(code, reason)
    });
    let partial = ("\\PC{0,60}", usage, "\\PC{0,60}");
    let partial = partial.prop_map(|(text, usage, reason)| Partial {
        text,
        usage,
        reason,
    });
    prop_oneof![
        (any::<u64>(), of(any::<u64>()), of("[a-z/]{1,30}")).prop_map(
            |(queue_position, eta_ms, base)| Body::Accepted {
                queue_position,
                eta_ms,
                base
            }
        ),
        ("\\PC{0,60}", any::<u64>()).prop_map(|(text, offset)| Body::Delta { text, offset }),
        done,
        refusal.clone().prop_map(Body::Rejected),
        refusal.prop_map(Body::Failed),
        partial.clone().prop_map(Body::Cancelled),
        partial.prop_map(Body::Expired),
        prop::sample::select(vec![
            Body::Started {},
            Body::AlreadyFinal {},
            Body::Unknown {}
        ]),
    ]
}

proptest! {
    #[test]
    fn both_forms_say_the_same_task(task in tasks()) {
        let in_json = decode(Format::Json, json(&task).to_string().as_bytes());
        let compact = decode(Format::Postcard, &task.encode());
        match (in_json, compact) {
            (Ok(a), Ok(mut b)) => {
                prop_assert_eq!(b.reply.format, Format::Postcard);
                (b.reply.format, b.bytes) = (a.reply.format, a.bytes);
                prop_assert_eq!(a, b);
            }
            (Err(a), Err(mut b)) => {
                prop_assert_eq!(b.reply.format, Format::Postcard);
                b.reply.format = a.reply.format;
                prop_assert_eq!(a, b);
            }
            (a, b) => prop_assert!(false, "{:?} but {:?}", a, b),
        }
    }

    #[test]
    fn events_survive_the_trip_in_both_forms(body in bodies(), run in "\\PC{0,9}", seq: u64, at_ms in 0u64..253_402_300_800_000) {
        let event = Event { run, seq, at_ms, ..event(body) };
        for format in Format::ALL {
            prop_assert_eq!(&decode_event(&format.encode(&event)).unwrap(), &event);
        }
    }

    #[test]
    fn any_truncation_is_refused_where_the_sender_can_see_it(cut in 0usize..150) {
        let bytes = full().encode();
        let cut = cut.min(bytes.len() - 1);
        let Refused { refusal, reply, .. } = refused(&bytes[..cut]);
        prop_assert_eq!(refusal.code, Code::Invalid);
        prop_assert!(refusal.field.is_some());
        prop_assert_eq!(reply.topic.ends_with("_invalid"), cut < 10, "{}", reply.topic);
    }

    #[test]
    fn any_bytes_get_a_verdict(payload in prop::collection::vec(any::<u8>(), 0..300)) {
        for payload in [&payload[..], &[&[1], &payload[..]].concat()] {
            let _ = decode(Format::Postcard, payload);
            let _ = decode_cancel(&envelope(Format::Postcard, payload));
            let _ = decode_event(payload);
        }
    }
}
