//! A buffer of quantised activations, reused from step to step.
//! Groups of eight tokens lie together, `[group][block][token: 8]`, so that a register tile of tokens reads one stream.

use crate::generic::{GROUP, GroupView, Sink};
use crate::packed::BLOCK;
use crate::pool::Shareable;

/// Quantised activations `[m, k]`: bytes, and per token and block of 32 a scale and the sum. Also plain f32,
/// which is what the `reference` kernel keeps instead.
#[derive(Default)]
pub struct Quantised {
    m: usize,
    k: usize,
    q: Vec<[[i8; BLOCK]; GROUP]>,
    scale: Vec<[f32; GROUP]>,
    /// −128 times the sum of the block.
    offset: Vec<[i32; GROUP]>,
    pub(crate) plain: Vec<f32>,
}

impl Quantised {
    /// An empty buffer, `[0, 0]`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes it `[m, k]`. Allocates only to become larger than it ever was; what it holds afterwards is unspecified.
    ///
    /// # Panics
    /// If `k` is not a multiple of 32.
    pub fn resize(&mut self, m: usize, k: usize) {
        assert!(
            k.is_multiple_of(BLOCK),
            "activations of width {k} have no whole blocks of {BLOCK}"
        );
        (self.m, self.k) = (m, k);
        let blocks = m.div_ceil(GROUP) * (k / BLOCK);
        if blocks > self.q.len() {
            self.q.resize(blocks, [[0; BLOCK]; GROUP]);
            self.scale.resize(blocks, [0.0; GROUP]);
            self.offset.resize(blocks, [0; GROUP]);
        }
    }

    /// Tokens.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Width.
    pub fn k(&self) -> usize {
        self.k
    }

    /// One token's block: its 32 bytes, its scale, the sum of the bytes.
    pub fn block(&self, token: usize, block: usize) -> (&[i8; BLOCK], f32, i32) {
        assert!(
            token < self.m && block < self.k / BLOCK,
            "no block {block} of token {token}"
        );
        let (at, lane) = (token / GROUP * (self.k / BLOCK) + block, token % GROUP);
        (
            &self.q[at][lane],
            self.scale[at][lane],
            self.offset[at][lane] / -128,
        )
    }

    pub(crate) fn group(&self, group: usize) -> GroupView<'_> {
        let blocks = self.k / BLOCK;
        let range = group * blocks..(group + 1) * blocks;
        GroupView {
            q: &self.q[range.clone()],
            scale: &self.scale[range.clone()],
            offset: &self.offset[range],
        }
    }

    /// Room for `[m, k]` f32, for the kernel that does not quantise.
    pub(crate) fn grow_plain(&mut self) {
        if self.plain.len() < self.m * self.k {
            self.plain.resize(self.m * self.k, 0.0);
        }
    }

    pub(crate) fn slots(&mut self) -> Slots {
        Slots {
            m: self.m,
            blocks: self.k / BLOCK,
            q: Shareable(self.q.as_mut_ptr()),
            scale: Shareable(self.scale.as_mut_ptr()),
            offset: Shareable(self.offset.as_mut_ptr()),
        }
    }
}

/// Write access to all tokens of a [`Quantised`] for several threads, as long as it stays borrowed.
pub(crate) struct Slots {
    m: usize,
    blocks: usize,
    q: Shareable<[[i8; BLOCK]; GROUP]>,
    scale: Shareable<[f32; GROUP]>,
    offset: Shareable<[i32; GROUP]>,
}

/// Write access to one token.
pub(crate) struct Slot<'a> {
    slots: &'a Slots,
    token: usize,
}

impl Slots {
    /// # Safety
    /// The buffer that this came from is still mutably borrowed and not resized, and no other slot of the same
    /// token exists.
    pub(crate) unsafe fn token(&self, token: usize) -> Slot<'_> {
        assert!(token < self.m, "token {token} of {}", self.m);
        Slot { slots: self, token }
    }
}

impl Sink for Slot<'_> {
    #[inline(always)]
    fn put(&mut self, block: usize) -> (&mut [i8; BLOCK], &mut f32, &mut i32) {
        assert!(block < self.slots.blocks);
        let (at, lane) = (
            self.token / GROUP * self.slots.blocks + block,
            self.token % GROUP,
        );
        // SAFETY: in bounds by the two assertions; this token is written through this slot only, and other
        // tokens are other elements, which no reference made here covers.
        unsafe {
            (
                &mut *self.slots.q.at(at).cast::<[i8; BLOCK]>().add(lane),
                &mut *self.slots.scale.at(at).cast::<f32>().add(lane),
                &mut *self.slots.offset.at(at).cast::<i32>().add(lane),
            )
        }
    }
}
