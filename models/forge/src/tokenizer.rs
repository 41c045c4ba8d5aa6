//! Builds a `tokenizer.json` of byte-level BPE from a vocabulary and its merges. Reads no file and encodes no
//! text: that is the engine's.

use anyhow::{Result, anyhow, ensure};
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

/// A vocabulary as published.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    /// Each token in GPT-2's byte alphabet; its place is its id.
    pub tokens: Vec<String>,
    /// Pairs to join, `left right`, the most wanted first.
    pub merges: Vec<String>,
    /// Ids of tokens that are markers, not text: they are found in a prompt before any splitting.
    pub special: Vec<u32>,
    pub splitting: Splitting,
}

/// How text is cut into words before the merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Splitting {
    /// GPT-2's pattern.
    Gpt2,
    /// GPT-2's pattern, and every digit by itself.
    Gpt2Digits,
}

/// The text of a `tokenizer.json`, checked by loading it.
pub fn build(vocabulary: &Vocabulary) -> Result<String> {
    let Vocabulary {
        tokens,
        merges,
        special,
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
    let added = special.iter().map(|&id| {
        let content = tokens.get(id as usize);
        let content =
            content.ok_or_else(|| anyhow!("the special token {id} is beyond the vocabulary"))?;
        Ok(json!({
            "id": id, "content": content, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false,
        }))
    });
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let splitter = match splitting {
        Splitting::Gpt2 => bytes.clone(),
        Splitting::Gpt2Digits => json!({
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": true}, bytes],
        }),
    };
    let text = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Result<Vec<Value>>>()?,
        "normalizer": null,
        "pre_tokenizer": splitter,
        "post_processor": null,
        "decoder": bytes,
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
    .to_string();
    text.parse::<Tokenizer>()
        .map_err(|e| anyhow!("the tokenizer built from the vocabulary doesn't load: {e}"))?;
    Ok(text)
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
            splitting: Splitting::Gpt2Digits,
        }
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
