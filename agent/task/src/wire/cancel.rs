//! A cancel message, in whatever form it came. Knows its form; not whether there is such a task.

use super::compact::CancelV1;
use super::event::{Code, Refusal};
use super::{Envelope, Format, Key, echo, id_is_plain};
use crate::limits::CANCEL_BYTES_MAX;

/// Reads a sender's wish to stop one of its own tasks: which, or why it can't be said.
pub fn decode_cancel(envelope: &Envelope<'_>) -> Result<Key, Refusal> {
    if envelope.retain {
        return Err(Refusal::new(
            Code::Invalid,
            "a cancel must not be published with RETAIN".into(),
        ));
    }
    let format = envelope.judge(CANCEL_BYTES_MAX)?;
    let CancelV1 { task } = match format {
        Format::Json => CancelV1::from_json(envelope.payload)?,
        Format::Postcard => CancelV1::from_compact(envelope.payload)?,
    };
    if !id_is_plain(&task) {
        return Err(Refusal::field(
            "task",
            &format!("is no task id: {}", echo(&task)),
        ));
    }
    Ok(Key {
        sender: envelope.sender.to_owned(),
        task,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    #[test]
    fn reads_and_refuses() {
        let key = decode_cancel(&envelope(br#"{"task": "a-1"}"#)).unwrap();
        assert_eq!(
            key,
            Key {
                sender: "mes".into(),
                task: "a-1".into()
            }
        );
        for (payload, part) in [
            (&b"{}"[..], "`task` is missing"),
            (br#"{"task": 7}"#, "must be a string"),
            (br#"{"task": "a/b"}"#, "no task id"),
            (br#"{"task": "a", "why": 1}"#, "`why` is unknown"),
            (b"", "not valid JSON"),
            (b"[]", "not a JSON object"),
            (&[b' '; CANCEL_BYTES_MAX + 1], "1024 are allowed"),
        ] {
            let refusal = decode_cancel(&envelope(payload)).unwrap_err();
            assert!(refusal.reason.contains(part), "{}", refusal.reason);
        }
        assert!(
            decode_cancel(&Envelope {
                retain: true,
                ..envelope(br#"{"task": "a"}"#)
            })
            .is_err()
        );
    }

    proptest! {
        #[test]
        fn any_bytes_get_a_verdict(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_cancel(&envelope(&payload));
        }
    }
}
