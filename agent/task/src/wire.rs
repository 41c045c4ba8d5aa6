//! Bytes to tasks and cancels, events to bytes. Judges form and bounds of one message; never whether there
//! is room to run it. There are two forms, JSON and the compact one, and one set of checks.

mod cancel;
mod compact;
mod event;
mod fields;
mod json;
mod task;

pub use cancel::decode_cancel;
pub use compact::{CancelV1, TaskV1};
pub use event::{
    Body, Clock, Code, Event, EventError, Finish, Partial, Provenance, Refusal, Timing, Usage,
    decode_event,
};
pub use task::{Bounds, Decoder, FIELDS, Kind, Message, Refused, Sampling, Task};

use crate::limits::{ECHO_BYTES_MAX, USER_PROPERTIES_MAX, USER_PROPERTY_BYTES_MAX};
use std::fmt::Write as _;
use std::time::Duration;

/// One message as the broker delivered it.
#[derive(Debug, Clone, Copy)]
pub struct Envelope<'a> {
    /// From the topic: MQTT itself never says who published.
    pub sender: &'a str,
    pub payload: &'a [u8],
    pub content_type: Option<&'a str>,
    pub response_topic: Option<&'a str>,
    pub correlation: Option<&'a [u8]>,
    pub user_properties: &'a [(String, String)],
    /// What is left of the MQTT message expiry.
    pub expiry: Option<Duration>,
    pub retain: bool,
}

impl Envelope<'_> {
    /// What must hold before the payload is looked into; its form.
    fn judge(&self, payload_bytes_max: usize) -> Result<Format, Refusal> {
        let too_large = |reason, limit: usize| {
            Err(Refusal::new(Code::TooLarge, reason).with_limit(limit as u64))
        };
        let properties = self.user_properties;
        if properties.len() > USER_PROPERTIES_MAX {
            let reason = format!("it has more than {USER_PROPERTIES_MAX} user properties");
            return too_large(reason, USER_PROPERTIES_MAX);
        }
        let bytes: usize = properties.iter().map(|(k, v)| k.len() + v.len()).sum();
        if bytes > USER_PROPERTY_BYTES_MAX {
            let reason =
                format!("its user properties have more than {USER_PROPERTY_BYTES_MAX} bytes");
            return too_large(reason, USER_PROPERTY_BYTES_MAX);
        }
        let Some(format) = Format::of(self.content_type) else {
            return Err(Refusal::new(Code::Unsupported, Format::expected()));
        };
        let bytes = self.payload.len();
        if bytes > payload_bytes_max {
            let reason = format!("the payload has {bytes} bytes; {payload_bytes_max} are allowed");
            return too_large(reason, payload_bytes_max);
        }
        Ok(format)
    }
}

/// Whose task: the idempotency key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub sender: String,
    pub task: String,
}

/// Where a task's events go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub topic: String,
    pub correlation: Option<Vec<u8>>,
    pub format: Format,
}

/// The form of a payload: the answer comes in the form of the question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Json,
    /// The compact form, version 1.
    Postcard,
}

impl Format {
    pub const ALL: [Self; 2] = [Self::Json, Self::Postcard];

    /// The form named by a content type; absent means JSON.
    pub fn of(content_type: Option<&str>) -> Option<Self> {
        let Some(text) = content_type else {
            return Some(Self::Json);
        };
        let essence = text.split(';').next().unwrap_or(text).trim();
        let named = |format: &Self| essence.eq_ignore_ascii_case(format.content_type());
        Self::ALL.into_iter().find(named)
    }

    /// What a content type must be.
    fn expected() -> String {
        let names = Self::ALL.map(Self::content_type);
        format!("the content type must be {}", names.join(" or "))
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Postcard => "application/vnd.millwright.v1+postcard",
        }
    }

    /// Whether payloads are UTF-8: MQTT's Payload Format Indicator.
    pub fn is_text(self) -> bool {
        self == Self::Json
    }

    /// An event in this form.
    pub fn encode(self, event: &Event) -> Vec<u8> {
        match self {
            // Events hold strings, integers and finite numbers under string keys: nothing that JSON lacks.
            Self::Json => serde_json::to_vec(event).unwrap_or_default(),
            Self::Postcard => compact::encode_event(event),
        }
    }
}

/// Whether `id` is 1–64 of `A–Z a–z 0–9 _ - .` and not the reserved `_invalid`.
pub fn id_is_plain(id: &str) -> bool {
    (1..=crate::limits::ID_BYTES_MAX).contains(&id.len())
        && id != crate::topic::INVALID_TASK
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
}

/// At most 64 bytes of an input, with control characters escaped: what a `reason` may repeat.
pub fn echo(input: &str) -> String {
    let mut out = String::new();
    for c in input.chars() {
        let piece = escape_char(c);
        if out.len() + piece.len() + '…'.len_utf8() > ECHO_BYTES_MAX {
            out.push('…');
            break;
        }
        out.push_str(&piece);
    }
    out
}

/// At most `bytes_max` of a text, on one line and escaped, and how much was left out: for logs.
pub fn excerpt(text: &str, bytes_max: usize) -> String {
    let mut out = String::new();
    for (at, c) in text.char_indices() {
        let piece = escape_char(c);
        if out.len() + piece.len() > bytes_max {
            let _ = write!(out, "… ({} bytes more)", text.len() - at);
            break;
        }
        out.push_str(&piece);
    }
    out
}

/// `text` with everything escaped that could drive a terminal or reorder what a reader sees; newlines and
/// tabs stay.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '\n' | '\t') {
            out.push(c);
        } else {
            out.push_str(&escape_char(c));
        }
    }
    out
}

fn escape_char(c: char) -> String {
    // Bidirectional overrides and zero-width characters deceive a reader as control characters do a terminal.
    let deceptive = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
    if c.is_control() || deceptive {
        c.escape_unicode().to_string()
    } else {
        c.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(printable("a\u{1b}[31mb\nc"), "a\\u{1b}[31mb\nc");
        assert_eq!(printable("a\u{202e}b"), "a\\u{202e}b");
        assert_eq!(echo("x\ny"), "x\\u{a}y");
    }

    #[test]
    fn excerpts_are_one_line_and_say_what_they_leave_out() {
        assert_eq!(
            excerpt("a\n\u{202e}b\u{1b}[2J", 64),
            "a\\u{a}\\u{202e}b\\u{1b}[2J"
        );
        assert_eq!(excerpt("äöü", 4), "äö… (2 bytes more)");
        assert_eq!(excerpt("", 4), "");
    }

    #[test]
    fn content_types() {
        assert_eq!(Format::of(None), Some(Format::Json));
        assert_eq!(
            Format::of(Some("Application/JSON; charset=utf-8")),
            Some(Format::Json)
        );
        assert_eq!(
            Format::of(Some("application/vnd.millwright.v1+postcard")),
            Some(Format::Postcard)
        );
        assert_eq!(
            Format::of(Some("application/vnd.millwright.v2+postcard")),
            None
        );
        assert_eq!(Format::of(Some("")), None);
    }

    #[test]
    fn ids() {
        assert!(id_is_plain("A-z_0.9"));
        for bad in ["", "a/b", "ä", "a b", "+", "_invalid", &"x".repeat(65)] {
            assert!(!id_is_plain(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn echoes_are_short_and_plain(text in "\\PC*|[\\x00-\\x7f]*") {
            let echo = echo(&text);
            prop_assert!(echo.len() <= ECHO_BYTES_MAX);
            prop_assert!(!echo.chars().any(char::is_control));
        }
    }
}
