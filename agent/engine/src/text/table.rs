//! The bytes behind each token of a byte-level vocabulary, so that decoding a token costs its length and no
//! more. Source of the alphabet: GPT-2's `bytes_to_unicode`.

use tokenizers::Tokenizer;
use tokenizers::decoders::DecoderWrapper;

/// Characters of the byte-level alphabet lie below this.
const ALPHABET_END: usize = 0x144;

/// `bytes[ends[id - 1]..ends[id]]` are the bytes of token `id`; control tokens have none.
pub(super) struct ByteTable {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl ByteTable {
    /// None where the tokenizer's decoder is not byte-level.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        if !is_byte_level(tokenizer.get_decoder()?) {
            return None;
        }
        let alphabet = alphabet();
        let added = tokenizer.get_added_tokens_decoder();
        let added_end = added.keys().max().map_or(0, |id| id + 1);
        let end = added_end.max(tokenizer.get_vocab_size(true) as u32);
        let mut table = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(end as usize),
        };
        for id in 0..end {
            let control = added.get(&id).is_some_and(|token| token.special);
            if let Some(token) = tokenizer.id_to_token(id).filter(|_| !control) {
                let start = table.bytes.len();
                let byte = |c: char| alphabet.get(c as usize).copied().flatten();
                let mapped = token.chars().try_for_each(|c| {
                    table.bytes.push(byte(c)?);
                    Some(())
                });
                // A token that is no word of the alphabet stands for itself, as in the library's decoder.
                if mapped.is_none() {
                    table.bytes.truncate(start);
                    table.bytes.extend_from_slice(token.as_bytes());
                }
            }
            table.ends.push(table.bytes.len() as u32);
        }
        table.bytes.shrink_to_fit();
        Some(table)
    }

    /// The bytes of a token; none for a control token or an id outside of the vocabulary.
    pub(super) fn token(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Heap held, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.len() + 4 * self.ends.len()
    }
}

fn is_byte_level(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteLevel(_) => true,
        DecoderWrapper::Sequence(sequence) => {
            matches!(sequence.get_decoders(), [DecoderWrapper::ByteLevel(_)])
        }
        _ => false,
    }
}

/// The byte that each character stands for: printable Latin-1 for itself, the rest in order from U+0100.
fn alphabet() -> [Option<u8>; ALPHABET_END] {
    let mut alphabet = [None; ALPHABET_END];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let char = match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => byte as usize,
            _ => {
                next += 1;
                next - 1
            }
        };
        alphabet[char] = Some(byte);
    }
    alphabet
}
