//! What comes from the broker: a task, a cancel, an event, with its topic and properties. The input's first byte says
//! which properties there are, and whether the form is the compact one; the rest is cut at zero bytes into them and the
//! payload, the user properties into lines.
#![no_main]

use libfuzzer_sys::fuzz_target;
use millwright_fuzz::guard::{Limits, guarded, note_panics};
use millwright_fuzz::heap::Counted;
use millwright_task::Now;
use millwright_task::limits::{ECHO_BYTES_MAX, PAYLOAD_BYTES_MAX, TOKENS_MAX};
use millwright_task::topic::{Base, ReplyRules};
use millwright_task::wire::{
    Bounds, Decoder, Envelope, Format, decode_cancel, decode_event, echo, printable,
};
use std::time::Duration;

#[global_allocator]
static HEAP: Counted = Counted;

const NOW: Now = Now {
    own: Duration::from_secs(100),
    wall_ms: 1_790_000_000_000,
    synced: true,
};

fuzz_target!(
    init: { note_panics(); },
    |input: &[u8]| { guarded("read", Limits::SMALL, || read(input)); }
);

fn read(input: &[u8]) {
    let Some((&kind, rest)) = input.split_first() else {
        return;
    };
    let has_pairs = kind & 64 != 0;
    let mut parts = rest.splitn(4 + usize::from(has_pairs), |b| *b == 0);
    let mut part = |bit: u8| parts.next().filter(|_| kind & bit != 0);
    let text = |bytes: Option<&'_ [u8]>| bytes.map(|b| String::from_utf8_lossy(b).into_owned());
    let (content_type, response_topic) = (text(part(1)), text(part(2)));
    let correlation = part(4);
    let content_type = match kind & 32 {
        0 => content_type.as_deref(),
        _ => Some(Format::Postcard.content_type()),
    };
    let pairs = has_pairs
        .then(|| text(parts.next()))
        .flatten()
        .unwrap_or_default();
    let pair = |line: &str| {
        line.split_once('=')
            .map(|(name, value)| (name.into(), value.into()))
    };
    let pairs: Vec<(String, String)> = pairs.lines().filter_map(pair).collect();
    let payload = parts.next().unwrap_or_default();
    let envelope = Envelope {
        sender: "mes",
        payload,
        content_type,
        response_topic: response_topic.as_deref(),
        correlation,
        user_properties: &pairs,
        expiry: (kind & 8 != 0).then_some(Duration::from_secs(u64::from(kind))),
        retain: kind & 16 != 0,
    };
    let base = Base::parse("millwright/v1/plant/gw").expect("a base");
    let decoder = Decoder {
        rules: ReplyRules::new(base.clone(), &[]).expect("rules"),
        base,
        bounds: Bounds {
            payload_bytes_max: PAYLOAD_BYTES_MAX,
            tokens_default: 64,
            tokens_max: TOKENS_MAX,
            deadline_default: Duration::from_secs(60),
            deadline_max: Duration::from_secs(3600),
        },
    };
    match decoder.decode(NOW, &envelope) {
        Ok(task) => {
            assert!(task.deadline > Duration::ZERO && task.max_tokens <= TOKENS_MAX);
            assert!(decoder.rules.check("mes", &task.reply.topic).is_ok());
            assert_eq!(Some(task.reply.format), Format::of(content_type));
        }
        Err(refused) => {
            assert!(decoder.rules.check("mes", &refused.reply.topic).is_ok());
            assert!(refused.refusal.reason.len() <= 1024);
        }
    }
    let _ = decode_cancel(&envelope);
    if let Ok(event) = decode_event(payload) {
        let again = decode_event(&Format::Postcard.encode(&event)).expect("its own bytes");
        assert_eq!(again, event);
    }
    let said = String::from_utf8_lossy(payload);
    let _ = decoder.base.inbound(&said);
    assert!(echo(&said).len() <= ECHO_BYTES_MAX);
    assert!(
        !printable(&said)
            .chars()
            .any(|c| c.is_control() && c != '\n' && c != '\t')
    );
}
