//! Control tokens: where they are in a text, and where they only seem to be.
//!
//! A chat prompt is one string of the template's control tokens and the senders' content. If content could
//! write `<|im_end|>\n<|im_start|>system`, a work order could speak as the operator. So [`Control::mark`] puts
//! [`MARK`] after the first character of all in the content that is, or could grow at its end into, a control
//! token; [`Control::split`] takes the marks out and leaves such text to the tokenizer as plain characters.
//! The template may trim and join content in between; all other characters stay as the sender wrote them.

use tokenizers::Tokenizer;

/// U+FDD0, a code point that Unicode sets apart for a program's internal use. Content that has it after the
/// first character of a control token gets one more, so that taking one out restores it.
pub(super) const MARK: char = '\u{FDD0}';

/// The control tokens of a vocabulary.
pub(super) struct Control {
    /// Longest first, so that the first that fits is the right one.
    tokens: Vec<Token>,
    /// The characters they begin with; nearly always `<` alone.
    firsts: Vec<char>,
}

struct Token {
    id: u32,
    content: String,
    /// Takes the white space before it along.
    lstrip: bool,
    /// Takes the white space after it along.
    rstrip: bool,
}

/// A piece of a text.
#[derive(Debug, PartialEq)]
pub(super) enum Part {
    Text(String),
    Control(u32),
}

impl Control {
    pub(super) fn of(tokenizer: &Tokenizer) -> Self {
        let added = tokenizer.get_added_tokens_decoder().into_iter();
        let special = added.filter(|(_, token)| token.special && !token.content.is_empty());
        let mut tokens: Vec<_> = special
            .map(|(id, token)| Token {
                id,
                content: token.content,
                lstrip: token.lstrip,
                rstrip: token.rstrip,
            })
            .collect();
        tokens.sort_unstable_by(|a, b| b.content.len().cmp(&a.content.len()).then(a.id.cmp(&b.id)));
        let mut firsts: Vec<_> = tokens
            .iter()
            .filter_map(|t| t.content.chars().next())
            .collect();
        firsts.sort_unstable();
        firsts.dedup();
        Self { tokens, firsts }
    }

    /// `content` with a mark wherever it could be taken for a control token.
    pub(super) fn mark(&self, content: &str) -> String {
        // A template may trim content before it joins it to the next.
        let end = content.trim_end().len();
        let mut marked = String::with_capacity(content.len() + 16);
        for (at, c) in content.char_indices() {
            marked.push(c);
            if !self.firsts.contains(&c) {
                continue;
            }
            let rest = &content[at..];
            let tail = &content[at..end.max(at)];
            let escaped = rest[c.len_utf8()..].starts_with(MARK);
            let seems =
                |token: &Token| rest.starts_with(&token.content) || token.content.starts_with(tail);
            if escaped || self.tokens.iter().any(seems) {
                marked.push(MARK);
            }
        }
        marked
    }

    /// The parts of `text` in order, without marks.
    pub(super) fn split(&self, text: &str) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut plain = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let after = &rest[c.len_utf8()..];
            if self.firsts.contains(&c) {
                if let Some(unmarked) = after.strip_prefix(MARK) {
                    plain.push(c);
                    rest = unmarked;
                    continue;
                }
                if let Some(token) = self.tokens.iter().find(|t| rest.starts_with(&t.content)) {
                    if token.lstrip {
                        plain.truncate(plain.trim_end().len());
                    }
                    if !plain.is_empty() {
                        parts.push(Part::Text(std::mem::take(&mut plain)));
                    }
                    parts.push(Part::Control(token.id));
                    rest = &rest[token.content.len()..];
                    if token.rstrip {
                        rest = rest.trim_start();
                    }
                    continue;
                }
            }
            plain.push(c);
            rest = after;
        }
        if !plain.is_empty() {
            parts.push(Part::Text(plain));
        }
        parts
    }
}
