//! The fields of a frozen struct one after the other, so that one that can't be read has a name. A struct in postcard is
//! its fields without anything between. Takes no memory beyond the payload's size.

use super::VERSION;
use crate::wire::event::{Code, Refusal};
use crate::wire::task::few;
use postcard::Error;
use serde::Deserialize;

/// What of a payload is not read yet.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Takes the version byte off.
    pub(super) fn open(payload: &'a [u8]) -> Result<Self, Refusal> {
        match payload.split_first() {
            Some((&VERSION, rest)) => Ok(Self(rest)),
            Some((other, _)) => {
                let reason = format!("is {other}; this gateway reads {VERSION}");
                Err(Refusal::field("version", &reason))
            }
            None => Err(Refusal::field("version", "is missing")),
        }
    }

    /// The next field: a number, a flag, a text, or an option of one. A list goes through [`Self::list`].
    pub(super) fn next<T: Deserialize<'a>>(&mut self, name: &str) -> Result<T, Refusal> {
        let read = postcard::take_from_bytes(self.0);
        let (value, rest) = read.map_err(|e| Refusal::field(name, why(&e)))?;
        self.0 = rest;
        Ok(value)
    }

    /// The next field, which is a list of no more than so many.
    pub(super) fn list<T>(
        &mut self,
        name: &str,
        max: usize,
        item: impl Fn(&mut Self, &str) -> Result<T, Refusal>,
    ) -> Result<Vec<T>, Refusal> {
        let len = self.next(name)?;
        few(name, len, max)?;
        (0..len)
            .map(|i| item(self, &format!("{name}[{i}]")))
            .collect()
    }

    /// Nothing may follow.
    pub(super) fn end(self) -> Result<(), Refusal> {
        match self.0.len() {
            0 => Ok(()),
            more => {
                let reason = format!("the payload goes on for {more} bytes after its last field");
                Err(Refusal::new(Code::Invalid, reason))
            }
        }
    }
}

fn why(error: &Error) -> &'static str {
    match error {
        Error::DeserializeUnexpectedEnd => "is cut off: the payload ends before it does",
        Error::DeserializeBadUtf8 => "is not UTF-8",
        Error::DeserializeBadBool => "must be 0 or 1",
        Error::DeserializeBadOption => "must begin with 0, for none, or 1",
        Error::DeserializeBadVarint => "is a larger number than fits",
        _ => "can't be read",
    }
}
