//! The KV cache: one arena of 64-token blocks shared by all slots. Knows where keys and values lie, not what they
//! mean. A slot reserves all the blocks it will ever need before it starts, so a running task never runs out.

use crate::recipe::Geometry;
use millwright_kernels::{KV_BLOCK, Kernel, KvBlock};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Positions in a block. Attention's tiles are these blocks, so results don't depend on where blocks lie.
pub(crate) const BLOCK_TOKENS: usize = KV_BLOCK;

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum KvPrecision {
    #[default]
    #[serde(rename = "f16")]
    F16,
    /// Bytes with a scale per key and value: half the memory and traffic, at a loss of fidelity.
    #[serde(rename = "int8")]
    I8,
}

impl KvPrecision {
    /// Bytes that a position takes in the arena.
    pub(crate) fn bytes_per_position(self, geometry: Geometry) -> usize {
        let vector = match self {
            Self::F16 => 2 * geometry.head_dim,
            Self::I8 => geometry.head_dim + size_of::<f32>(),
        };
        2 * geometry.layers * geometry.kv_heads * vector
    }
}

impl fmt::Display for KvPrecision {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::F16 => "f16",
            Self::I8 => "int8",
        })
    }
}

impl FromStr for KvPrecision {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "f16" => Ok(Self::F16),
            "int8" => Ok(Self::I8),
            _ => Err("it is f16 or int8"),
        }
    }
}

/// `[block][layer][kv_head]`, each with keys `[head_dim][64]` and then values `[64][head_dim]`.
#[derive(Debug)]
pub(crate) struct Arena {
    geometry: Geometry,
    numbers: Numbers,
    free: Vec<u32>,
    slots: Vec<Vec<u32>>,
    blocks: usize,
    /// One head's vector, rounded.
    half: Vec<u16>,
    byte: Vec<i8>,
}

/// Zeroed by the allocator, so pages are resident only once written.
#[derive(Debug)]
enum Numbers {
    F16(Vec<u16>),
    I8 {
        bytes: Vec<i8>,
        /// `[block][layer][kv_head][key, value]`
        scales: Vec<[f32; BLOCK_TOKENS]>,
    },
}

impl Arena {
    /// An arena for `tokens` positions in all, rounded up to whole blocks.
    pub(crate) fn new(
        geometry: Geometry,
        precision: KvPrecision,
        slots: usize,
        tokens: usize,
    ) -> Self {
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        let heads = blocks * geometry.layers * geometry.kv_heads;
        let len = heads * Self::head_len(geometry);
        Self {
            geometry,
            numbers: match precision {
                KvPrecision::F16 => Numbers::F16(vec![0; len]),
                KvPrecision::I8 => Numbers::I8 {
                    bytes: vec![0; len],
                    scales: vec![[0.0; BLOCK_TOKENS]; 2 * heads],
                },
            },
            free: (0..blocks as u32).rev().collect(),
            slots: vec![Vec::new(); slots],
            blocks,
            half: vec![0; geometry.head_dim],
            byte: vec![0; geometry.head_dim],
        }
    }

    /// Whether this many positions could be reserved now.
    pub(crate) fn fits(&self, tokens: usize) -> bool {
        tokens.div_ceil(BLOCK_TOKENS) <= self.free.len()
    }

    /// Reserves blocks for a slot that holds none; `false` if they aren't there.
    pub(crate) fn reserve(&mut self, slot: usize, tokens: usize) -> bool {
        debug_assert!(self.slots[slot].is_empty());
        if !self.fits(tokens) {
            return false;
        }
        let left = self.free.len() - tokens.div_ceil(BLOCK_TOKENS);
        self.slots[slot] = self.free.split_off(left);
        true
    }

    /// Gives a slot's blocks back.
    pub(crate) fn release(&mut self, slot: usize) {
        self.free.append(&mut self.slots[slot]);
    }

    pub(crate) fn tokens_max(&self) -> usize {
        self.blocks * BLOCK_TOKENS
    }

    pub(crate) fn tokens_used(&self) -> usize {
        (self.blocks - self.free.len()) * BLOCK_TOKENS
    }

    /// Bytes that one position takes in the cache: read once per later token.
    pub(crate) fn bytes_per_position(&self) -> usize {
        let precision = match self.numbers {
            Numbers::F16(_) => KvPrecision::F16,
            Numbers::I8 { .. } => KvPrecision::I8,
        };
        precision.bytes_per_position(self.geometry)
    }

    /// The keys and values of one block of a slot.
    pub(crate) fn block(
        &self,
        slot: usize,
        index: usize,
        layer: usize,
        head: usize,
    ) -> KvBlock<'_> {
        let place = self.place(slot, index, layer, head);
        let len = Self::head_len(self.geometry);
        match &self.numbers {
            Numbers::F16(numbers) => {
                let (keys, values) = numbers[place * len..][..len].split_at(len / 2);
                KvBlock::F16 { keys, values }
            }
            Numbers::I8 { bytes, scales } => {
                let (keys, values) = bytes[place * len..][..len].split_at(len / 2);
                KvBlock::I8 {
                    keys,
                    values,
                    key_scales: &scales[2 * place],
                    value_scales: &scales[2 * place + 1],
                }
            }
        }
    }

    /// Rounds and stores the key and the value of one position, each `[head_dim]`.
    #[allow(clippy::too_many_arguments)] // a place of four coordinates
    pub(crate) fn store(
        &mut self,
        kernel: Kernel,
        slot: usize,
        position: usize,
        layer: usize,
        head: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let place = self.place(slot, position / BLOCK_TOKENS, layer, head);
        let (dim, len) = (self.geometry.head_dim, Self::head_len(self.geometry));
        let at = position % BLOCK_TOKENS;
        match &mut self.numbers {
            Numbers::F16(numbers) => {
                let (keys, values) = numbers[place * len..][..len].split_at_mut(len / 2);
                kernel.to_f16(key, &mut self.half);
                scatter(&self.half, keys, at);
                kernel.to_f16(value, &mut values[at * dim..][..dim]);
            }
            Numbers::I8 { bytes, scales } => {
                let (keys, values) = bytes[place * len..][..len].split_at_mut(len / 2);
                scales[2 * place][at] = kernel.to_i8(key, &mut self.byte);
                scatter(&self.byte, keys, at);
                scales[2 * place + 1][at] = kernel.to_i8(value, &mut values[at * dim..][..dim]);
            }
        }
    }

    /// Which of all heads' blocks this is.
    fn place(&self, slot: usize, index: usize, layer: usize, head: usize) -> usize {
        let block = self.slots[slot][index] as usize;
        (block * self.geometry.layers + layer) * self.geometry.kv_heads + head
    }

    /// Numbers of one block of one head.
    fn head_len(geometry: Geometry) -> usize {
        2 * BLOCK_TOKENS * geometry.head_dim
    }
}

/// Writes a key as column `at` of `[head_dim][64]`.
fn scatter<T: Copy>(key: &[T], keys: &mut [T], at: usize) {
    for (number, row) in key.iter().zip(keys.chunks_exact_mut(BLOCK_TOKENS)) {
        row[at] = *number;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_reserved_whole_given_back_and_never_shared() {
        let geometry = Geometry {
            layers: 2,
            kv_heads: 1,
            head_dim: 4,
            positions: 200,
        };
        let mut arena = Arena::new(geometry, KvPrecision::F16, 2, 200);
        assert_eq!(arena.tokens_max(), 256);
        assert!(arena.reserve(0, 65));
        assert!(!arena.fits(129));
        assert!(arena.reserve(1, 128));
        assert_eq!(arena.tokens_used(), 256);
        let kernel = Kernel::best();
        arena.store(kernel, 0, 64, 1, 0, &[7.0; 4], &[1.0; 4]);
        arena.store(kernel, 1, 64, 1, 0, &[9.0; 4], &[1.0; 4]);
        let first = |arena: &Arena, slot| match arena.block(slot, 1, 1, 0) {
            KvBlock::F16 { keys, .. } => keys[0],
            KvBlock::I8 { .. } => unreachable!("the arena holds f16"),
        };
        assert_eq!(first(&arena, 0), 0x4700);
        assert_eq!(first(&arena, 1), 0x4880);
        arena.release(0);
        assert_eq!(arena.tokens_used(), 128);
        assert!(!arena.fits(129) && arena.reserve(0, 128));
    }
    #[test]
    fn keys_lie_in_columns_and_values_in_rows() {
        let geometry = Geometry {
            layers: 1,
            kv_heads: 2,
            head_dim: 4,
            positions: 64,
        };
        let (key, value) = ([1.0, 2.0, 3.0, -4.0], [0.5, 0.25, 0.0, -8.0]);
        let mut arena = Arena::new(geometry, KvPrecision::I8, 1, 64);
        assert_eq!(arena.bytes_per_position(), 2 * 2 * (4 + 4));
        assert!(arena.reserve(0, 64));
        arena.store(Kernel::best(), 0, 5, 0, 1, &key, &value);
        let KvBlock::I8 {
            keys,
            values,
            key_scales,
            value_scales,
        } = arena.block(0, 0, 0, 1)
        else {
            unreachable!("the arena holds bytes")
        };
        for at in 0..4 {
            let stored = f32::from(keys[at * 64 + 5]) * key_scales[5];
            assert!((stored - key[at]).abs() < 0.02);
            let stored = f32::from(values[5 * 4 + at]) * value_scales[5];
            assert!((stored - value[at]).abs() < 0.04);
        }
    }
}
