//! One answer's way from tokens to text. Emits whole characters only, withholds what may begin a stop
//! string, and emits the same text however the tokens cut it up.

use super::Text;
use std::sync::Arc;

/// Without a byte-level vocabulary, tokens that don't yet end a character are held back; more than this many
/// (a character has at most 4 bytes) are no character, and are let go.
const UNFINISHED_TOKENS_MAX: usize = 8;

/// What a token adds to an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// New text; empty where a character is unfinished or a stop string may have begun.
    pub text: String,
    /// A stop string is complete; it is not part of the text, and nothing comes after it.
    pub stopped: bool,
}

/// Turns the tokens of one answer into text.
#[derive(Clone)]
pub struct TextStream {
    text: Arc<Text>,
    stop: Vec<String>,
    decoder: Decoder,
    /// Decoded, but possibly the beginning of a stop string.
    withheld: String,
    emitted: String,
    stopped: bool,
}

#[derive(Clone)]
enum Decoder {
    /// The bytes of an unfinished character.
    Bytes(Vec<u8>),
    Prefix(Prefix),
}

/// Decodes a short window of tokens twice and takes the difference: for vocabularies whose tokens have no
/// bytes of their own (SentencePiece's spaces and byte fallback).
#[derive(Clone, Default)]
struct Prefix {
    window: Vec<u32>,
    /// What the first `decoded` tokens of the window say; emitted already.
    said: String,
    decoded: usize,
}

impl TextStream {
    /// `stop` are the strings that end the answer; empty ones are ignored.
    pub fn new(text: Arc<Text>, stop: Vec<String>) -> Self {
        let decoder = match text.table {
            Some(_) => Decoder::Bytes(Vec::new()),
            None => Decoder::Prefix(Prefix::default()),
        };
        Self {
            text,
            stop: stop.into_iter().filter(|s| !s.is_empty()).collect(),
            decoder,
            withheld: String::new(),
            emitted: String::new(),
            stopped: false,
        }
    }

    /// Takes the next token. After a stop string nothing more is taken.
    pub fn push(&mut self, token: u32) -> Pushed {
        if !self.stopped {
            match &mut self.decoder {
                Decoder::Bytes(pending) => {
                    if let Some(table) = &self.text.table {
                        pending.extend_from_slice(table.token(token));
                    }
                    take_characters(pending, &mut self.withheld);
                }
                Decoder::Prefix(prefix) => prefix.push(&self.text, token, &mut self.withheld),
            }
        }
        self.release()
    }

    /// Ends the answer and returns what was withheld. A character that stayed unfinished becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        if !self.stopped {
            match &mut self.decoder {
                Decoder::Bytes(pending) => {
                    self.withheld.push_str(&String::from_utf8_lossy(pending));
                    pending.clear();
                }
                Decoder::Prefix(prefix) => prefix.flush(&self.text, &mut self.withheld),
            }
        }
        // The last characters may complete a stop string (U+FFFD can be part of one).
        let mut rest = self.release().text;
        rest.push_str(&self.withheld);
        self.emitted.push_str(&self.withheld);
        self.withheld.clear();
        self.stopped = true;
        rest
    }

    /// All that was emitted so far.
    pub fn text(&self) -> &str {
        &self.emitted
    }

    /// Emits what can't become part of a stop string any more.
    fn release(&mut self) -> Pushed {
        let end = match first_stop(&self.withheld, &self.stop) {
            Some(start) => {
                self.stopped = true;
                start
            }
            None => self.withheld.len() - longest_beginning(&self.withheld, &self.stop),
        };
        let text: String = self.withheld.drain(..end).collect();
        if self.stopped {
            self.withheld.clear();
        }
        self.emitted.push_str(&text);
        Pushed {
            text,
            stopped: self.stopped,
        }
    }
}

/// Where the stop string begins that is complete first; of two that end together, the longer one. Judging
/// by the end makes the outcome independent of how many characters arrive at once.
fn first_stop(text: &str, stop: &[String]) -> Option<usize> {
    let found = stop
        .iter()
        .filter_map(|s| text.find(s.as_str()).map(|at| (at + s.len(), at)));
    found.min().map(|(_, start)| start)
}

/// The length of the longest end of `text` that a stop string begins with.
fn longest_beginning(text: &str, stop: &[String]) -> usize {
    let of = |s: &String| {
        let ends = s.char_indices().map(|(at, _)| at).filter(|&at| at > 0);
        ends.filter(|&at| text.ends_with(&s[..at]))
            .max()
            .unwrap_or(0)
    };
    stop.iter().map(of).max().unwrap_or(0)
}

/// Moves whole characters from `pending` to `text`; bytes that are no character become U+FFFD as
/// `String::from_utf8_lossy` does it, an unfinished one stays.
fn take_characters(pending: &mut Vec<u8>, text: &mut String) {
    loop {
        match std::str::from_utf8(pending) {
            Ok(valid) => {
                text.push_str(valid);
                pending.clear();
                return;
            }
            Err(e) => {
                let valid = e.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&pending[..valid]));
                let Some(wrong) = e.error_len() else {
                    pending.drain(..valid);
                    return;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                pending.drain(..valid + wrong);
            }
        }
    }
}

impl Prefix {
    fn push(&mut self, text: &Text, token: u32, out: &mut String) {
        self.window.push(token);
        let whole = self.decode(text);
        let unfinished = self.window.len() - self.decoded <= UNFINISHED_TOKENS_MAX;
        if whole.ends_with(char::REPLACEMENT_CHARACTER) && unfinished {
            return;
        }
        self.emit(text, &whole, out);
    }

    fn flush(&mut self, text: &Text, out: &mut String) {
        let whole = self.decode(text);
        self.emit(text, &whole, out);
    }

    /// Emits what `whole` says beyond the prefix; the tokens just decoded become the next prefix.
    fn emit(&mut self, text: &Text, whole: &str, out: &mut String) {
        // The prefix is what the same tokens said without those after them: a decoder that looks back can
        // change it, then the common part counts as emitted.
        let same = whole
            .chars()
            .zip(self.said.chars())
            .take_while(|(a, b)| a == b);
        let emitted: usize = same.map(|(c, _)| c.len_utf8()).sum();
        out.push_str(&whole[emitted..]);
        self.window.drain(..self.decoded);
        self.decoded = self.window.len();
        self.said = self.decode(text);
    }

    fn decode(&self, text: &Text) -> String {
        // Ids outside of the vocabulary are skipped by the library; its decoders fail on no token list.
        text.tokenizer
            .decode(&self.window, true)
            .unwrap_or_default()
    }
}
