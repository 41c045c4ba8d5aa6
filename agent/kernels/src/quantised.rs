//! A buffer of quantised activations, reused from step to step.
//! Groups of eight tokens lie together, `[group][block][token: 8]`, so that a register tile of tokens reads one stream.

use crate::generic::Sink;
use crate::packed::BLOCK;
use crate::pool::Shareable;

/// Tokens that lie together.
pub(crate) const GROUP: usize = 8;

/// Quantised activations `[m, k]`: bytes, and per token and block of 32 a scale and sums. Also plain f32,
/// which is what the `reference` kernel keeps instead.
#[derive(Default)]
pub struct Quantised {
    m: usize,
    k: usize,
    q: Vec<[[i8; BLOCK]; GROUP]>,
    scale: Vec<[f32; GROUP]>,
    /// −128 times the sum of the block: what symmetric 8-bit weights need, and apart since they are the usual ones.
    offset: Vec<[i32; GROUP]>,
    sums: Vec<Sums>,
    pub(crate) plain: Vec<f32>,
    /// Which of the two was written last.
    pub(crate) is_plain: bool,
}

/// What affine weights and groups of 16 need to know of a block.
#[derive(Copy, Clone, Default)]
pub(crate) struct Sums {
    /// −128 times the sum of each half.
    pub(crate) offset: [[i32; GROUP]; 2],
    /// The sum of the block, and of each half, times the scale.
    pub(crate) block: [f32; GROUP],
    pub(crate) half: [[f32; GROUP]; 2],
}

/// Activations of a group of tokens, all `[blocks]`.
#[derive(Copy, Clone)]
pub(crate) struct GroupView<'a> {
    pub(crate) q: &'a [[[i8; BLOCK]; GROUP]],
    pub(crate) scale: &'a [[f32; GROUP]],
    pub(crate) offset: &'a [[i32; GROUP]],
    pub(crate) sums: &'a [Sums],
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
        // Nothing holds if what follows panics.
        (self.m, self.k) = (0, 0);
        let blocks = m
            .div_ceil(GROUP)
            .checked_mul(k / BLOCK)
            .expect("activations fit the memory");
        if blocks > self.q.len() {
            self.q.resize(blocks, [[0; BLOCK]; GROUP]);
            self.scale.resize(blocks, [0.0; GROUP]);
            self.offset.resize(blocks, [0; GROUP]);
            self.sums.resize(blocks, Sums::default());
        }
        (self.m, self.k) = (m, k);
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

    #[inline(always)]
    pub(crate) fn group(&self, group: usize) -> GroupView<'_> {
        let blocks = self.k / BLOCK;
        let range = group * blocks..(group + 1) * blocks;
        GroupView {
            q: &self.q[range.clone()],
            scale: &self.scale[range.clone()],
            offset: &self.offset[range.clone()],
            sums: &self.sums[range],
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
            sums: Shareable(self.sums.as_mut_ptr()),
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
    sums: Shareable<Sums>,
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

impl Slot<'_> {
    /// Where a block of this token lies: the index of its group's block.
    #[inline(always)]
    fn place(&self, block: usize) -> (usize, usize) {
        assert!(block < self.slots.blocks);
        let group = self.token / GROUP;
        (group * self.slots.blocks + block, self.token % GROUP)
    }
}

impl Sink for Slot<'_> {
    #[inline(always)]
    fn bytes(&mut self, block: usize) -> &mut [i8; BLOCK] {
        let (at, lane) = self.place(block);
        // SAFETY: in bounds by the assertions in `token` and `place`; this token is written through this slot
        // only, and other tokens are other elements, which no reference made here covers.
        unsafe { &mut *self.slots.q.at(at).cast::<[i8; BLOCK]>().add(lane) }
    }

    #[inline(always)]
    fn finish(&mut self, block: usize, scale: f32, halves: [i32; 2]) {
        let (at, lane) = self.place(block);
        let sum = halves[0] + halves[1];
        // SAFETY: as above; only single elements of this token are written, through pointers.
        unsafe {
            let sums = self.slots.sums.at(at);
            (*self.slots.scale.at(at).cast::<f32>().add(lane)) = scale;
            (*self.slots.offset.at(at).cast::<i32>().add(lane)) = -128 * sum;
            (&raw mut (*sums).block[lane]).write(sum as f32 * scale);
            for (half, sum) in halves.into_iter().enumerate() {
                (&raw mut (*sums).offset[half][lane]).write(-128 * sum);
                (&raw mut (*sums).half[half][lane]).write(sum as f32 * scale);
            }
        }
    }
}
