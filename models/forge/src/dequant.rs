//! Reads a GGUF tensor's bytes: the plain kinds and the block kinds that the catalogue's files use. Rounds
//! nothing. Knows bytes and blocks, not names.
//!
//! Block layouts: ggml's `block_q4_1` and `block_q8_0`.

use crate::stored::{Eight, Four, Stored};
use anyhow::{Result, ensure};
use half::f16;

/// Weights in a block, in each of the block kinds read here.
const BLOCK: u64 = 32;
/// Scale, minimum, 16 bytes of two weights each.
const Q4_1_BYTES: usize = 20;
/// Scale, 32 weights.
const Q8_0_BYTES: usize = 34;

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    F32,
    F16,
    Q4_1,
    Q8_0,
    /// A kind that isn't read; only its number is known.
    Other(u32),
}

impl Kind {
    /// By the number in the file.
    pub fn of(number: u32) -> Self {
        match number {
            0 => Self::F32,
            1 => Self::F16,
            3 => Self::Q4_1,
            8 => Self::Q8_0,
            other => Self::Other(other),
        }
    }

    /// The bytes of `count` weights in rows of `row`; none are claimed for a kind that isn't read.
    pub fn bytes(self, count: u64, row: u64) -> Result<u64> {
        let blocks = |bytes: usize| {
            ensure!(
                row.is_multiple_of(BLOCK),
                "its rows of {row} weights are not whole blocks of {BLOCK}"
            );
            Ok((count / BLOCK).checked_mul(bytes as u64))
        };
        let bytes = match self {
            Self::F32 => count.checked_mul(4),
            Self::F16 => count.checked_mul(2),
            Self::Q4_1 => blocks(Q4_1_BYTES)?,
            Self::Q8_0 => blocks(Q8_0_BYTES)?,
            Self::Other(_) => Some(0),
        };
        bytes.ok_or_else(|| anyhow::anyhow!("its size overflows"))
    }
}

/// All weights in `bytes`, in order.
pub fn decode(kind: Kind, bytes: &[u8]) -> Result<Stored> {
    Ok(match kind {
        Kind::F32 => Stored::Plain(numbers(bytes, f32::from_le_bytes)),
        Kind::F16 => Stored::Plain(numbers(bytes, |b| f16::from_le_bytes(b).to_f32())),
        Kind::Q4_1 => Stored::Four(q4_1(bytes.as_chunks().0)),
        Kind::Q8_0 => Stored::Eight(q8_0(bytes.as_chunks().0)),
        Kind::Other(number) => {
            anyhow::bail!(
                "is stored as type {number}, which this forge doesn't read (it reads F32, F16, Q4_1 and Q8_0)"
            )
        }
    })
}

fn numbers<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| number(b)).collect()
}

/// Scale, minimum, and bytes whose low halves are the first 16 weights: they are paired anew.
fn q4_1(blocks: &[[u8; Q4_1_BYTES]]) -> Four {
    let mut four = Four::default();
    for block in blocks {
        four.scales.push(half_at(block, 0));
        four.minima.push(half_at(block, 2));
        let weight = |i: usize| (block[4 + i % 16] >> (4 * (i / 16))) & 15;
        let pairs = (0..16).map(|pair| weight(2 * pair) | weight(2 * pair + 1) << 4);
        four.pairs.extend(pairs);
    }
    four
}

fn q8_0(blocks: &[[u8; Q8_0_BYTES]]) -> Eight {
    let mut eight = Eight::default();
    for block in blocks {
        eight.scales.push(half_at(block, 0).to_f32());
        let weights = block[2..].iter().map(|byte| byte.cast_signed());
        eight.weights.extend(weights);
    }
    eight
}

fn half_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q4_1_keeps_low_halves_first() {
        let mut block = [0u8; Q4_1_BYTES];
        block[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        block[2..4].copy_from_slice(&f16::from_f32(-2.0).to_le_bytes());
        block[4] = 0xF1;
        let values = decode(Kind::Q4_1, &block).unwrap().into_values();
        assert_eq!((values[0], values[1], values[16]), (-1.5, -2.0, 5.5));
    }

    #[test]
    fn q8_0_is_signed() {
        let mut block = [0u8; Q8_0_BYTES];
        block[..2].copy_from_slice(&f16::from_f32(0.25).to_le_bytes());
        block[2] = 0xFF;
        block[33] = 127;
        let values = decode(Kind::Q8_0, &block).unwrap().into_values();
        assert_eq!((values[0], values[1], values[31]), (-0.25, 0.0, 31.75));
    }

    #[test]
    fn rows_that_are_not_whole_blocks_are_refused() {
        assert!(Kind::Q8_0.bytes(64, 16).is_err());
        assert_eq!(Kind::Q8_0.bytes(64, 32).unwrap(), 68);
        assert!(Kind::F32.bytes(u64::MAX, 1).is_err());
    }
}
