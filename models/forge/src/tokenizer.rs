//! Builds a `tokenizer.json` of byte-level BPE from a vocabulary and its merges. Reads no file and encodes no
//! text: that is the engine's.

use anyhow::{Result, anyhow, ensure};
use serde_json::{Map, Value, json};

/// A vocabulary as published.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    /// Each token in GPT-2's byte alphabet; its place is its id.
    pub tokens: Vec<String>,
    /// Pairs to join, `left right`, the most wanted first.
    pub merges: Vec<String>,
    /// Ids of tokens that are markers, not text: they are found in a prompt before any splitting.
    pub special: Vec<u32>,
    /// Ids of tokens that are found before any splitting too, but stay text: `<tool_call>`.
    pub defined: Vec<u32>,
    pub splitting: Splitting,
}

/// How text is cut into words before the merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Splitting {
    /// GPT-2's pattern.
    Gpt2,
    /// GPT-2's pattern, and every digit by itself.
    Gpt2Digits,
    /// [`QWEN2`], after composing what can be composed (NFC).
    Qwen2,
}

/// The pattern that Qwen2's `tokenizer.json` splits by: a contraction, letters with one character in front, one digit,
/// punctuation with the line ends behind it, line ends, blanks.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The text of a `tokenizer.json`. Whether it loads is for the bundle's writer to see.
pub fn build(vocabulary: &Vocabulary) -> Result<String> {
    let Vocabulary {
        tokens,
        merges,
        special,
        defined,
        splitting,
    } = vocabulary;
    let mut vocab = Map::new();
    for (id, token) in tokens.iter().enumerate() {
        let earlier = vocab.insert(token.clone(), json!(id));
        ensure!(earlier.is_none(), "the vocabulary has {token:?} twice");
    }
    for merge in merges {
        let known = merge.split_once(' ').is_some_and(|(left, right)| {
            [left, right, &format!("{left}{right}")]
                .iter()
                .all(|t| vocab.contains_key(*t))
        });
        ensure!(
            known,
            "the merge {merge:?} is not a pair of tokens that join to a token"
        );
    }
    let mut added: Vec<(u32, bool)> = special.iter().map(|&id| (id, true)).collect();
    added.extend(defined.iter().map(|&id| (id, false)));
    added.sort_unstable();
    let added = added.into_iter().map(|(id, special)| {
        let content = tokens.get(id as usize);
        let content =
            content.ok_or_else(|| anyhow!("the added token {id} is beyond the vocabulary"))?;
        Ok(json!({
            "id": id, "content": content, "special": special, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false,
        }))
    });
    let bytes = |split: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": split,
        })
    };
    let sequence =
        |first: Value, then: Value| json!({"type": "Sequence", "pretokenizers": [first, then]});
    let splitter = match splitting {
        Splitting::Gpt2 => bytes(true),
        Splitting::Gpt2Digits => sequence(
            json!({"type": "Digits", "individual_digits": true}),
            bytes(true),
        ),
        Splitting::Qwen2 => sequence(
            json!({
                "type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": false,
            }),
            bytes(false),
        ),
    };
    let normaliser = match splitting {
        Splitting::Gpt2 | Splitting::Gpt2Digits => Value::Null,
        Splitting::Qwen2 => json!({"type": "NFC"}),
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Result<Vec<Value>>>()?,
        "normalizer": normaliser,
        "pre_tokenizer": splitter,
        "post_processor": null,
        "decoder": bytes(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges,
        },
    })
    .to_string())
}

/// GPT-2's alphabet: a printable character for each of the 256 bytes.
pub fn byte_alphabet() -> [char; 256] {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut spare = 256..;
    std::array::from_fn(|byte| match byte as u8 {
        byte if printable(byte) => char::from(byte),
        _ => spare
            .next()
            .and_then(char::from_u32)
            .expect("256 + n is a character for n < 256"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_and(more: &[&str], merges: &[&str]) -> Vocabulary {
        let alphabet = byte_alphabet().map(String::from);
        Vocabulary {
            tokens: alphabet
                .into_iter()
                .chain(more.iter().map(|t| (*t).to_owned()))
                .collect(),
            merges: merges.iter().map(|m| (*m).to_owned()).collect(),
            special: vec![],
            defined: vec![],
            splitting: Splitting::Gpt2Digits,
        }
    }

    fn pieces(vocabulary: &Vocabulary, text: &str) -> Vec<String> {
        let tokenizer: tokenizers::Tokenizer = build(vocabulary).unwrap().parse().unwrap();
        let pre = tokenizer.get_pre_tokenizer().unwrap();
        let normal = tokenizer.get_normalizer().map_or(text.to_owned(), |n| {
            let mut text = tokenizers::NormalizedString::from(text);
            tokenizers::Normalizer::normalize(n, &mut text).unwrap();
            text.get().to_owned()
        });
        let mut cut = tokenizers::PreTokenizedString::from(normal.as_str());
        tokenizers::PreTokenizer::pre_tokenize(pre, &mut cut).unwrap();
        let pieces = cut.get_splits(
            tokenizers::OffsetReferential::Original,
            tokenizers::OffsetType::Byte,
        );
        pieces
            .into_iter()
            .map(|(_, (from, to), _)| normal[from..to].to_owned())
            .collect()
    }

    #[test]
    fn qwen2_cuts_words_digits_and_blanks_as_published() {
        let vocabulary = Vocabulary {
            splitting: Splitting::Qwen2,
            ..bytes_and(&[], &[])
        };
        let check = |text: &str, expected: &[&str]| {
            assert_eq!(pieces(&vocabulary, text), expected, "{text:?}");
        };
        check(
            "It'S 1234 bar",
            &["It", "'S", " ", "1", "2", "3", "4", " bar"],
        );
        check("a  b\n\n  c", &["a", " ", " b", "\n\n", " ", " c"]);
        check("(x) != y;\n}", &["(x", ")", " !=", " y", ";\n", "}"]);
        // Composed before it is cut.
        check("u\u{308}ber", &["\u{fc}ber"]);
    }

    #[test]
    fn a_defined_token_is_found_whole_and_stays_text() {
        let mut vocabulary = bytes_and(&["<tool_call>", "<|end|>"], &[]);
        (vocabulary.defined, vocabulary.special) = (vec![256], vec![257]);
        let tokenizer: tokenizers::Tokenizer = build(&vocabulary).unwrap().parse().unwrap();
        let ids = tokenizer.encode("a<tool_call><|end|>", false).unwrap();
        assert_eq!(ids.get_ids()[1..], [256, 257]);
        let text = tokenizer.decode(ids.get_ids(), true).unwrap();
        assert_eq!(text, "a<tool_call>");
    }

    #[test]
    fn a_merge_of_unknown_tokens_is_refused() {
        let error = build(&bytes_and(&[], &["t h"])).unwrap_err().to_string();
        assert!(error.contains("\"t h\""), "{error}");
        assert!(build(&bytes_and(&["th"], &["t h"])).is_ok());
    }

    #[test]
    fn a_repeated_token_is_refused() {
        let error = build(&bytes_and(&["a"], &[])).unwrap_err().to_string();
        assert!(error.contains("twice"), "{error}");
    }

    #[test]
    fn the_alphabet_is_gpt2s() {
        let alphabet = byte_alphabet();
        assert_eq!(
            (
                alphabet[b' ' as usize],
                alphabet[b'\n' as usize],
                alphabet[0xAD]
            ),
            ('Ġ', 'Ċ', 'Ń')
        );
        let distinct: std::collections::HashSet<char> = alphabet.into_iter().collect();
        assert_eq!(distinct.len(), 256);
    }
}
