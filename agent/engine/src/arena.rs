//! The KV cache: one arena of 64-token blocks shared by all slots. Knows where keys and values lie, not what they
//! mean. A slot reserves all the blocks it will ever need before it starts, so a running task never runs out.

use crate::recipe::Geometry;

/// Positions in a block. Attention's tiles are these blocks, so results don't depend on where blocks lie.
pub(crate) const BLOCK_TOKENS: usize = 64;

/// Keys and values as f16 bits: `[block][layer][kv_head][key, value][64][head_dim]`.
#[derive(Debug)]
pub(crate) struct Arena {
    geometry: Geometry,
    /// Zeroed by the allocator, so pages are resident only once written.
    data: Vec<u16>,
    free: Vec<u32>,
    slots: Vec<Vec<u32>>,
    blocks: usize,
}

impl Arena {
    /// An arena for `tokens` positions in all, rounded up to whole blocks.
    pub(crate) fn new(geometry: Geometry, slots: usize, tokens: usize) -> Self {
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        let data = vec![0; blocks * Self::block_len(geometry)];
        let free = (0..blocks as u32).rev().collect();
        Self {
            geometry,
            data,
            free,
            slots: vec![Vec::new(); slots],
            blocks,
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

    /// Bytes of keys and values, in all layers, that one position takes.
    pub(crate) fn bytes_per_position(&self) -> usize {
        Self::block_len(self.geometry) / BLOCK_TOKENS * size_of::<u16>()
    }

    pub(crate) fn tokens_max(&self) -> usize {
        self.blocks * BLOCK_TOKENS
    }

    pub(crate) fn tokens_used(&self) -> usize {
        (self.blocks - self.free.len()) * BLOCK_TOKENS
    }

    /// The keys and values of one block of a slot, each `[64, head_dim]`.
    pub(crate) fn block(
        &self,
        slot: usize,
        index: usize,
        layer: usize,
        head: usize,
    ) -> (&[u16], &[u16]) {
        let len = BLOCK_TOKENS * self.geometry.head_dim;
        let at = self.offset(slot, index, layer, head);
        self.data[at..at + 2 * len].split_at(len)
    }

    /// Where the key and the value of one position go, each `[head_dim]`.
    pub(crate) fn row_mut(
        &mut self,
        slot: usize,
        position: usize,
        layer: usize,
        head: usize,
    ) -> (&mut [u16], &mut [u16]) {
        let dim = self.geometry.head_dim;
        let at = self.offset(slot, position / BLOCK_TOKENS, layer, head);
        let (keys, values) =
            self.data[at..at + 2 * BLOCK_TOKENS * dim].split_at_mut(BLOCK_TOKENS * dim);
        let row = position % BLOCK_TOKENS * dim;
        (&mut keys[row..row + dim], &mut values[row..row + dim])
    }

    fn offset(&self, slot: usize, index: usize, layer: usize, head: usize) -> usize {
        let block = self.slots[slot][index] as usize;
        let pair = 2 * BLOCK_TOKENS * self.geometry.head_dim;
        block * Self::block_len(self.geometry) + (layer * self.geometry.kv_heads + head) * pair
    }

    fn block_len(geometry: Geometry) -> usize {
        geometry.layers * geometry.kv_heads * 2 * BLOCK_TOKENS * geometry.head_dim
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
        let mut arena = Arena::new(geometry, 2, 200);
        assert_eq!(arena.tokens_max(), 256);
        assert!(arena.reserve(0, 65));
        assert!(!arena.fits(129));
        assert!(arena.reserve(1, 128));
        assert_eq!(arena.tokens_used(), 256);
        arena.row_mut(0, 64, 1, 0).0.fill(7);
        arena.row_mut(1, 64, 1, 0).0.fill(9);
        assert_eq!(arena.block(0, 1, 1, 0).0[0], 7);
        assert_eq!(arena.block(1, 1, 1, 0).0[0], 9);
        arena.release(0);
        assert_eq!(arena.tokens_used(), 128);
        assert!(!arena.fits(129) && arena.reserve(0, 128));
    }
}
