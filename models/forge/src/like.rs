//! Random models in the shape of real ones, to test size and speed where no download is wanted: seeded, always
//! the same bytes, nonsense in every answer. Weights are drawn as blocks, in the precision of the bundle, at the
//! speed of a disk; the small model that tests read closely is `tiny`.

use crate::Precision;
use crate::bundle;
use crate::llama::{Decoder, Part, Shape, Weights};
use crate::quant::BLOCK;
use crate::stored::{Eight, Four, Stored};
use crate::tiny::{description, hash, normal, seed, spread};
use anyhow::{Context, Result};
use clap::ValueEnum;
use half::f16;
use indicatif::ProgressBar;
use std::ops::Range;
use std::path::Path;

/// Whose shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Like {
    /// SmolLM2-135M
    #[value(name = "135m")]
    SmolLm2_135M,
    /// Qwen2.5-0.5B, but without its biases
    #[value(name = "0.5b")]
    Qwen25_05B,
    /// Qwen2.5-1.5B, but without its biases
    #[value(name = "1.5b")]
    Qwen25_15B,
}

impl Like {
    /// What such a model is called.
    pub fn name(self) -> String {
        let size = self.to_possible_value();
        format!("like-{}", size.expect("no value is skipped").get_name())
    }

    /// The sizes that the model's makers publish.
    pub fn shape(self) -> Shape {
        let smol = Shape {
            layers: 30,
            width: 576,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            mlp: 1536,
            vocab: 49_152,
            context: 8192,
            rope_base: 100_000.0,
            epsilon: 1e-5,
        };
        let qwen = Shape {
            layers: 24,
            width: 896,
            heads: 14,
            kv_heads: 2,
            head_dim: 64,
            mlp: 4864,
            vocab: 151_936,
            context: 32_768,
            rope_base: 1e6,
            epsilon: 1e-6,
        };
        match self {
            Self::SmolLm2_135M => smol,
            Self::Qwen25_05B => qwen,
            Self::Qwen25_15B => Shape {
                layers: 28,
                width: 1536,
                heads: 12,
                head_dim: 128,
                mlp: 8960,
                ..qwen
            },
        }
    }
}

/// Writes a bundle of random weights of this shape into `dir`, which is created if need be: the same bytes
/// every time. The bar advances by one for each weight. The shape's vocabulary needs room for 259 tokens.
pub fn write(
    dir: &Path,
    name: &str,
    shape: &Shape,
    precision: Precision,
    bar: &ProgressBar,
) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("{} can't be created", dir.display()))?;
    let source = "seeded random weights, to test size and speed";
    let description = description(name, shape, source)?;
    let decoder = &description.decoder;
    let weights = Blocks { decoder, precision };
    bundle::write(dir, &description, precision, &weights, bar)
}

/// Weights drawn as blocks of uniform integers, scaled to the part's deviation, more or less by block.
struct Blocks<'a> {
    decoder: &'a Decoder,
    precision: Precision,
}

impl Weights for Blocks<'_> {
    fn load(&self, part: Part, rows: Range<usize>) -> Result<Stored> {
        let [all, columns] = self.decoder.shape.of(part);
        let seed = seed(self.decoder, part)? as u64;
        let (mean, deviation) = spread(part, columns);
        if all == 1 {
            let draw = |i| mean + deviation * normal(seed << 32 | i as u64);
            return Ok(Stored::Plain((0..columns).map(draw).collect()));
        }
        let blocks = columns / BLOCK;
        let range = rows.start * blocks..rows.end * blocks;
        // A block has eight numbers at most; no part has 2³² blocks.
        let draws = range.map(|block| Draws(seed << 40 | (block as u64) << 3));
        Ok(if self.precision == Precision::Q4 && part != Part::Embed {
            Stored::Four(four(draws, deviation))
        } else {
            Stored::Eight(eight(draws, deviation))
        })
    }
}

/// The numbers of one block.
struct Draws(u64);

impl Draws {
    fn bytes(&self, at: u64) -> [u8; 8] {
        hash(self.0 | at).to_le_bytes()
    }

    /// Uniform in 0.75 to 1.25.
    fn factor(&self) -> f32 {
        0.75 + f32::from(self.bytes(7)[0]) / 510.0
    }
}

fn eight(draws: impl Iterator<Item = Draws>, deviation: f32) -> Eight {
    // The standard deviation of what is uniform in ±127.
    let unit = deviation / 73.6;
    let mut out = Eight::default();
    for draw in draws {
        for at in 0..4 {
            let weights = draw.bytes(at).map(|byte| byte.cast_signed().max(-127));
            out.weights.extend(weights);
        }
        out.scales
            .push(f16::from_f32(unit * draw.factor()).to_f32());
    }
    out
}

fn four(draws: impl Iterator<Item = Draws>, deviation: f32) -> Four {
    // The standard deviation of what is uniform in 0 to 15.
    let unit = deviation / 4.61;
    let mut out = Four::default();
    for draw in draws {
        (0..2).for_each(|at| out.pairs.extend(draw.bytes(at)));
        let scale = f16::from_f32(unit * draw.factor());
        out.scales.push(scale);
        out.minima.push(f16::from_f32(-7.5 * scale.to_f32()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Shape = Shape {
        layers: 1,
        width: 64,
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
        mlp: 96,
        vocab: 600,
        context: 64,
        rope_base: 10_000.0,
        epsilon: 1e-5,
    };

    #[test]
    fn weights_have_their_deviation_whatever_the_precision_and_the_pieces() {
        for precision in [Precision::Int8, Precision::Q4] {
            let weights = Blocks {
                decoder: &Decoder::llama(SMALL),
                precision,
            };
            let load = |rows| weights.load(Part::Gate(0), rows).unwrap().into_values();
            let whole = load(0..96);
            assert_eq!(whole, [load(0..5), load(5..96)].concat());
            let squares: f32 = whole.iter().map(|v| v * v).sum();
            let (expected, found) = (1.5 / 8.0, (squares / whole.len() as f32).sqrt());
            assert!((found / expected - 1.0).abs() < 0.05, "{found}");
        }
    }

    #[test]
    fn a_model_is_a_sound_bundle_with_tokens_for_every_output() {
        for precision in Precision::ALL {
            let dir = tempfile::tempdir().unwrap();
            write(
                dir.path(),
                "small",
                &SMALL,
                precision,
                &ProgressBar::hidden(),
            )
            .unwrap();
            let bundle = millwright_engine::bundle::Bundle::open(dir.path()).unwrap();
            bundle.verify().unwrap();
            assert_eq!(bundle.manifest.precision, precision.to_string());
            let path = dir.path().join(millwright_engine::bundle::TOKENIZER);
            let tokenizer = tokenizers::Tokenizer::from_file(path).unwrap();
            assert_eq!(tokenizer.get_vocab_size(true), SMALL.vocab);
            let ids = tokenizer.encode("the pump <599>", false).unwrap();
            assert_eq!(
                tokenizer.decode(ids.get_ids(), false).unwrap(),
                "the pump <599>"
            );
        }
    }

    #[test]
    fn the_shapes_are_sound() {
        for (like, millions) in [
            (Like::SmolLm2_135M, 134),
            (Like::Qwen25_05B, 494),
            (Like::Qwen25_15B, 1543),
        ] {
            let decoder = Decoder::llama(like.shape());
            decoder.check().unwrap();
            assert_eq!(decoder.weights() / 1_000_000, millions);
        }
    }
}
