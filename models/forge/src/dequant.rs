//! Reads a GGUF tensor's bytes: the plain kinds and the block kinds of the files that are used here. What fits
//! blocks of 32 with one scale is carried so, unrounded; the rest becomes f32. Knows bytes and blocks, not names.
//!
//! Block layouts and what they mean: `ggml-common.h` and `ggml-quants.c`, <https://github.com/ggml-org/ggml>

use crate::stored::{Eight, Four, Stored};
use anyhow::{Result, ensure};
use half::{bf16, f16};

/// Weights in a block of the older kinds.
const BLOCK: u64 = 32;
/// Weights in a block of the k-quants.
const SUPER: u64 = 256;
/// Scale, minimum, 16 bytes of two weights each.
const Q4_1_BYTES: usize = 20;
/// Scale, 32 fifth bits, 16 bytes of two weights' other four.
const Q5_0_BYTES: usize = 22;
/// Scale, 32 weights.
const Q8_0_BYTES: usize = 34;
/// Scale, scale of minima, 12 bytes of six-bit scales and minima, 128 bytes of two weights each.
const Q4_K_BYTES: usize = 144;
/// 128 bytes of two weights' low four bits, 64 of four weights' high two, 16 scales, a scale of them.
const Q6_K_BYTES: usize = 210;

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    F32,
    F16,
    Bf16,
    Q4_1,
    Q5_0,
    Q8_0,
    Q4K,
    Q6K,
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
            6 => Self::Q5_0,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            14 => Self::Q6K,
            30 => Self::Bf16,
            other => Self::Other(other),
        }
    }

    /// The bytes of `count` weights in rows of `row`; none are claimed for a kind that isn't read.
    pub fn bytes(self, count: u64, row: u64) -> Result<u64> {
        let blocks = |block: u64, bytes: usize| {
            ensure!(
                row.is_multiple_of(block),
                "its rows of {row} weights are not whole blocks of {block}"
            );
            Ok((count / block).checked_mul(bytes as u64))
        };
        let bytes = match self {
            Self::F32 => count.checked_mul(4),
            Self::F16 | Self::Bf16 => count.checked_mul(2),
            Self::Q4_1 => blocks(BLOCK, Q4_1_BYTES)?,
            Self::Q5_0 => blocks(BLOCK, Q5_0_BYTES)?,
            Self::Q8_0 => blocks(BLOCK, Q8_0_BYTES)?,
            Self::Q4K => blocks(SUPER, Q4_K_BYTES)?,
            Self::Q6K => blocks(SUPER, Q6_K_BYTES)?,
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
        Kind::Bf16 => Stored::Plain(numbers(bytes, |b| bf16::from_le_bytes(b).to_f32())),
        Kind::Q4_1 => Stored::Four(q4_1(bytes.as_chunks().0)),
        Kind::Q5_0 => Stored::Eight(q5_0(bytes.as_chunks().0)),
        Kind::Q8_0 => Stored::Eight(q8_0(bytes.as_chunks().0)),
        Kind::Q4K => Stored::Plain(bytes.as_chunks().0.iter().flat_map(q4_k).collect()),
        Kind::Q6K => Stored::Plain(bytes.as_chunks().0.iter().flat_map(q6_k).collect()),
        Kind::Other(number) => {
            anyhow::bail!(
                "is stored as type {number}, which this forge doesn't read (it reads F32, F16, BF16, Q4_1, Q5_0, Q8_0, Q4_K and Q6_K)"
            )
        }
    })
}

/// Plain numbers, little-endian.
pub(crate) fn numbers<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f32) -> Vec<f32> {
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

/// As in `q4_1` the low halves come first; the fifth bit of weight `i` is bit `i` of a word, and 16 is zero.
fn q5_0(blocks: &[[u8; Q5_0_BYTES]]) -> Eight {
    let mut eight = Eight::default();
    for block in blocks {
        eight.scales.push(half_at(block, 0).to_f32());
        let low = |i: usize| (block[6 + i % 16] >> (4 * (i / 16))) & 15;
        let high = |i: usize| (block[2 + i / 8] >> (i % 8)) & 1;
        let weights = (0..32).map(|i| (low(i) | high(i) << 4).cast_signed() - 16);
        eight.weights.extend(weights);
    }
    eight
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

/// Eight sub-blocks of 32, of which each pair shares 32 bytes: low halves, then high ones. The products of the two
/// scales are exact in f32, so that each weight is rounded once, by the subtraction.
fn q4_k(block: &[u8; Q4_K_BYTES]) -> [f32; SUPER as usize] {
    let (scale, minimum) = (half_at(block, 0).to_f32(), half_at(block, 2).to_f32());
    let subs: [(f32, f32); 8] = std::array::from_fn(|sub| {
        let (scale_bits, minimum_bits) = six_bits(&block[4..16], sub);
        let (scale_bits, minimum_bits) = (f32::from(scale_bits), f32::from(minimum_bits));
        (scale * scale_bits, minimum * minimum_bits)
    });
    std::array::from_fn(|i| {
        let (sub, pair) = (i / 32, i / 64);
        let weight = (block[16 + pair * 32 + i % 32] >> (4 * (sub % 2))) & 15;
        subs[sub].0 * f32::from(weight) - subs[sub].1
    })
}

/// Scale and minimum of a sub-block. Those of the first four lie in the low six bits of bytes 0 to 3 and 4 to 7; of
/// the others the low four bits share bytes 8 to 11 and the high two are the first ones' top bits.
fn six_bits(bytes: &[u8], sub: usize) -> (u8, u8) {
    if sub < 4 {
        return (bytes[sub] & 63, bytes[sub + 4] & 63);
    }
    let (low, scale_top, minimum_top) = (bytes[sub + 4], bytes[sub - 4], bytes[sub]);
    (
        low & 15 | (scale_top >> 6) << 4,
        low >> 4 | (minimum_top >> 6) << 4,
    )
}

/// Two halves of 128 weights; in each, 64 bytes hold the low four bits of two and 32 the high two bits of four. A
/// scale serves 16 weights, and 32 is zero. Every product is exact in f32.
fn q6_k(block: &[u8; Q6_K_BYTES]) -> [f32; SUPER as usize] {
    let scale = half_at(block, 208).to_f32();
    std::array::from_fn(|i| {
        let (half, quarter, at) = (i / 128, i % 128 / 32, i % 32);
        let low = block[half * 64 + quarter % 2 * 32 + at] >> (4 * (quarter / 2)) & 15;
        let high = block[128 + half * 32 + at] >> (2 * quarter) & 3;
        let weight = (low | high << 4).cast_signed() - 32;
        scale * f32::from(block[192 + i / 16].cast_signed()) * f32::from(weight)
    })
}

fn half_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// One block of each kind, random but for its scales, and the bits of what the Python package `gguf` 0.19.0
    /// (`quants.dequantize`) makes of it; all in hexadecimal, little-endian.
    const GOLDENS: &str = include_str!("dequant/goldens.json");

    #[derive(serde::Deserialize)]
    struct Golden {
        kind: u32,
        block: String,
        values: String,
    }

    fn bytes(hex: &str) -> Vec<u8> {
        let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(byte).collect()
    }

    #[test]
    fn blocks_hold_bit_for_bit_what_the_reference_says() {
        let goldens: BTreeMap<String, Golden> = serde_json::from_str(GOLDENS).unwrap();
        assert_eq!(goldens.len(), 6);
        for (name, golden) in goldens {
            let block = bytes(&golden.block);
            let found = decode(Kind::of(golden.kind), &block).unwrap();
            let found: Vec<u32> = found.into_values().iter().map(|v| v.to_bits()).collect();
            let expected = bytes(&golden.values);
            let expected: Vec<u32> = expected
                .as_chunks()
                .0
                .iter()
                .map(|&b| u32::from_le_bytes(b))
                .collect();
            assert_eq!(found, expected, "{name}");
        }
    }

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
        assert!(Kind::Q4K.bytes(512, 32).is_err());
        assert_eq!(Kind::Q6K.bytes(512, 256).unwrap(), 420);
        assert!(Kind::F32.bytes(u64::MAX, 1).is_err());
    }
}
