//! Turns a GGUF tensor's bytes into f32: the plain kinds and the block kinds that the catalogue's files use.
//! Knows bytes and blocks, not names.
//!
//! Block layouts: ggml's `block_q4_1` and `block_q8_0`.

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
pub fn dequantise(kind: Kind, bytes: &[u8]) -> Result<Vec<f32>> {
    Ok(match kind {
        Kind::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&b| f32::from_le_bytes(b))
            .collect(),
        Kind::F16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&b| f16::from_le_bytes(b).to_f32())
            .collect(),
        Kind::Q4_1 => bytes.as_chunks().0.iter().flat_map(q4_1).collect(),
        Kind::Q8_0 => bytes.as_chunks().0.iter().flat_map(q8_0).collect(),
        Kind::Other(number) => {
            anyhow::bail!(
                "is stored as type {number}, which this forge doesn't read (it reads F32, F16, Q4_1 and Q8_0)"
            )
        }
    })
}

/// `scale · q + minimum`; the first 16 weights are the low halves of the bytes.
fn q4_1(block: &[u8; Q4_1_BYTES]) -> [f32; BLOCK as usize] {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    std::array::from_fn(|i| {
        let byte = block[4 + i % 16];
        let q = if i < 16 { byte & 15 } else { byte >> 4 };
        f32::from(q) * scale + minimum
    })
}

fn q8_0(block: &[u8; Q8_0_BYTES]) -> [f32; BLOCK as usize] {
    let scale = half_at(block, 0);
    std::array::from_fn(|i| f32::from(block[2 + i].cast_signed()) * scale)
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
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
        let values = dequantise(Kind::Q4_1, &block).unwrap();
        assert_eq!((values[0], values[1], values[16]), (-1.5, -2.0, 5.5));
    }

    #[test]
    fn q8_0_is_signed() {
        let mut block = [0u8; Q8_0_BYTES];
        block[..2].copy_from_slice(&f16::from_f32(0.25).to_le_bytes());
        block[2] = 0xFF;
        block[33] = 127;
        let values = dequantise(Kind::Q8_0, &block).unwrap();
        assert_eq!((values[0], values[1], values[31]), (-0.25, 0.0, 31.75));
    }

    #[test]
    fn rows_that_are_not_whole_blocks_are_refused() {
        assert!(Kind::Q8_0.bytes(64, 16).is_err());
        assert_eq!(Kind::Q8_0.bytes(64, 32).unwrap(), 68);
        assert!(Kind::F32.bytes(u64::MAX, 1).is_err());
    }
}
