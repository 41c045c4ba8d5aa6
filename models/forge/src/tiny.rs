//! A small seeded model for tests: the shape and the files of a real one, random weights, no download. It
//! answers nonsense, always the same.

use crate::Precision;
use crate::bundle::{self, Description, Licence};
use crate::llama::{Decoder, Part, Shape, Weights};
use crate::stored::Stored;
use crate::tokenizer::{self, Splitting, Vocabulary, byte_alphabet};
use anyhow::{Context, Result};
use indicatif::ProgressBar;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// The catalogue's name for it.
pub const NAME: &str = "tiny";
/// Raised when its bytes change, so that cached copies are made anew.
pub const VERSION: &str = "1";

const VOCAB: usize = 400;
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// What the merges are learnt from.
const TEXT: &str = "the pump on the cooling line makes a grinding noise and the bearing is hot . the operator \
    stopped the machine and the technician replaced the seal . the motor of the conveyor trips when it starts \
    under load ; the current is too high . pressure in the tank falls slowly , so there is a leak at the valve . \
    what is the cause and what should the team check first ? the answer is in the report of the last shift . \
    temperature , vibration and oil level were normal . you are a helpful assistant . system user assistant";
const TEMPLATE: &str = "{% for message in messages %}\
    {% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nYou are a small test model.<|im_end|>\n' }}{% endif %}\
    {{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Writes the tiny bundle into `dir`, which is created if need be: the same bytes every time.
pub fn write(dir: &Path, precision: Precision) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("{} can't be created", dir.display()))?;
    let bar = ProgressBar::hidden();
    bundle::write(dir, &whole()?, precision, &Seeded, &bar)
}

/// All of it but its weights, which are [`Seeded`].
pub(crate) fn whole() -> Result<Description> {
    description(NAME, &shape(), "seeded random weights, for tests")
}

/// Its sizes.
pub fn shape() -> Shape {
    Shape {
        layers: 2,
        width: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        mlp: 128,
        vocab: VOCAB,
        context: 256,
        rope_base: 10_000.0,
        epsilon: 1e-5,
    }
}

/// Of a model with random weights: names nobody and chats in a simple template.
pub(crate) fn description(name: &str, shape: &Shape, source: &str) -> Result<Description> {
    Ok(Description {
        name: name.to_owned(),
        version: VERSION.to_owned(),
        decoder: Decoder::llama(shape.clone()),
        tokenizer: tokenizer::build(&vocabulary(shape.vocab))?,
        chat_template: Some(TEMPLATE.to_owned()),
        stop_tokens: vec!["<|im_end|>".to_owned()],
        licence: Licence::apache(),
        source: source.to_owned(),
        others: vec![],
    })
}

/// The special tokens, every byte, as many merges as this size has room for and the text has words for, and
/// then tokens that no text leads to.
fn vocabulary(size: usize) -> Vocabulary {
    let alphabet = byte_alphabet();
    let mut tokens: Vec<String> = SPECIAL.map(str::to_owned).into();
    tokens.extend(alphabet.map(String::from));
    let mut words: Vec<Vec<String>> = TEXT
        .split_whitespace()
        .map(|word| {
            std::iter::once('Ġ')
                .chain(word.chars())
                .map(String::from)
                .collect()
        })
        .collect();
    let mut merges = Vec::new();
    while tokens.len() < size {
        let Some((left, right)) = commonest_pair(&words) else {
            break;
        };
        let joined = format!("{left}{right}");
        for word in &mut words {
            join(word, &left, &right);
        }
        merges.push(format!("{left} {right}"));
        // Two merges may spell the same token; it has one id.
        if !tokens.contains(&joined) {
            tokens.push(joined);
        }
    }
    tokens.extend((tokens.len()..size).map(|id| format!("<{id}>")));
    Vocabulary {
        tokens,
        merges,
        special: vec![0, 1, 2],
        defined: vec![],
        splitting: Splitting::Gpt2Digits,
    }
}

fn commonest_pair(words: &[Vec<String>]) -> Option<(String, String)> {
    let mut counts = BTreeMap::new();
    for pair in words.iter().flat_map(|word| word.windows(2)) {
        *counts.entry((&pair[0], &pair[1])).or_insert(0) += 1;
    }
    let (pair, _) = counts.into_iter().max_by_key(|&(_, count)| count)?;
    Some((pair.0.clone(), pair.1.clone()))
}

fn join(word: &mut Vec<String>, left: &str, right: &str) {
    let mut at = 0;
    while at + 1 < word.len() {
        if word[at] == left && word[at + 1] == right {
            let tail = word.remove(at + 1);
            word[at].push_str(&tail);
        }
        at += 1;
    }
}

/// Its weights, drawn one by one from the part's own seed.
#[derive(Debug)]
pub struct Seeded;

impl Weights for Seeded {
    fn load(&self, part: Part, rows: Range<usize>) -> Result<Stored> {
        let decoder = Decoder::llama(shape());
        let [_, columns] = decoder.shape.of(part);
        let (seed, (mean, deviation)) = (seed(&decoder, part)?, spread(part, columns));
        let draw = |i| mean + deviation * normal((seed as u64) << 32 | i as u64);
        let range = rows.start * columns..rows.end * columns;
        Ok(Stored::Plain(range.map(draw).collect()))
    }
}

/// A number for each part.
pub(crate) fn seed(decoder: &Decoder, part: Part) -> Result<usize> {
    let at = decoder.parts().iter().position(|p| *p == part);
    at.context("not a part of the model")
}

/// Mean and standard deviation of a part's weights. The embedding is small beside what the layers add, else a
/// tied head would only repeat the last token.
pub(crate) fn spread(part: Part, columns: usize) -> (f32, f32) {
    match part {
        Part::Embed => (0.0, 0.25),
        Part::FinalNorm | Part::AttentionNorm(_) | Part::MlpNorm(_) => (1.0, 0.1),
        Part::Output(_) | Part::Down(_) => (0.0, 2.0 / (columns as f32).sqrt()),
        _ => (0.0, 1.5 / (columns as f32).sqrt()),
    }
}

/// A number that is nearly normal, from a counter: the sum of four 16-bit parts of one hash, so that no
/// platform's logarithm has a say.
pub(crate) fn normal(counter: u64) -> f32 {
    let z = hash(counter);
    let sum: u64 = (0..4).map(|part| (z >> (16 * part)) & 0xFFFF).sum();
    // Four uniform parts have mean 2 and variance 4 / 12.
    (sum as f32 / 65536.0 - 2.0) * 1.732_050_8
}

/// SplitMix64's finaliser (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
pub(crate) fn hash(counter: u64) -> u64 {
    let mut z = counter.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use millwright_engine::bundle::{Bundle, TOKENIZER};
    use tokenizers::Tokenizer;

    #[test]
    fn it_is_a_valid_bundle_and_the_same_every_time() {
        for precision in Precision::ALL {
            let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            write(a.path(), precision).unwrap();
            write(b.path(), precision).unwrap();
            let (a, b) = (
                Bundle::open(a.path()).unwrap(),
                Bundle::open(b.path()).unwrap(),
            );
            a.verify().unwrap();
            assert_eq!(a.manifest, b.manifest);
            assert_eq!(a.manifest.files.len(), 5);
        }
    }

    #[test]
    fn its_tokenizer_takes_any_text_and_gives_it_back() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), Precision::Int8).unwrap();
        let tokenizer = Tokenizer::from_file(dir.path().join(TOKENIZER)).unwrap();
        assert_eq!(tokenizer.get_vocab_size(true), VOCAB);
        for text in [
            "the pump is hot.",
            "",
            "  two\n\nlines\t",
            "Dichtung: 12,5 °C → größer ✓",
            "日本語 🛠️ e\u{301}",
            "\0\u{7f}",
        ] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), text);
        }
        let ids = tokenizer.encode("<|im_start|>the pump", false).unwrap();
        assert_eq!(ids.get_ids()[0], 1);
        assert!(ids.len() <= 4, "the merges apply: {:?}", ids.get_tokens());
    }

    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/full", dir.path().join("model.onnx.data")).unwrap();
        let error = write(dir.path(), Precision::Int8).unwrap_err();
        assert!(crate::cache::is_full(&error), "{error:#}");
        assert!(
            format!("{error:#}").contains("model.onnx.data"),
            "{error:#}"
        );
    }
}
