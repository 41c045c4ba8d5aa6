//! A buffer of quantised activations, reused from step to step.
//! Octets of tokens lie together, `[octet][block][token: 8]`, so that a register tile of tokens reads one stream.

use crate::packed::{BLOCK, Kind};
use crate::pool::Shareable;
use std::marker::PhantomData;

/// Tokens that lie together.
pub(crate) const OCTET: usize = 8;

/// Quantised activations `[m, k]`: bytes, and per token and block of 32 a scale and sums; behind all tokens perhaps
/// their remainders, which are what rounding took from each, quantised in their turn. Also plain f32, which is what the
/// `reference` kernel keeps instead.
pub struct Quantised {
    m: usize,
    k: usize,
    q: Vec<[[i8; BLOCK]; OCTET]>,
    scale: Vec<[f32; OCTET]>,
    /// −128 times the sum of the block: what symmetric 8-bit weights need, and apart since they are the usual ones.
    offset: Vec<[i32; OCTET]>,
    sums: Vec<Sums>,
    /// What is to be kept from the next `resize` on, and what is.
    wanted: Beside,
    held: Beside,
    pub(crate) plain: Vec<f32>,
    /// Which of the two was written last.
    pub(crate) is_plain: bool,
}

/// What is kept beside bytes and scales.
#[derive(Copy, Clone)]
struct Beside {
    sums: bool,
    remainders: bool,
}

impl Beside {
    const SUMS: Self = Self {
        sums: true,
        remainders: false,
    };
}

/// What affine weights and groups of 16 ([`Kind::needs_sums`](crate::packed::Kind::needs_sums)) need to know of a block.
#[derive(Copy, Clone, Default)]
pub(crate) struct Sums {
    /// −128 times the sum of each half.
    pub(crate) offset: [[i32; OCTET]; 2],
    /// The sum of the block, and of each half, times the scale.
    pub(crate) block: [f32; OCTET],
    pub(crate) half: [[f32; OCTET]; 2],
}

/// Activations of an octet of tokens, all `[blocks]`.
#[derive(Copy, Clone)]
pub(crate) struct OctetView<'a> {
    pub(crate) q: &'a [[[i8; BLOCK]; OCTET]],
    pub(crate) scale: &'a [[f32; OCTET]],
    pub(crate) offset: &'a [[i32; OCTET]],
    pub(crate) sums: &'a [Sums],
}

impl Default for Quantised {
    fn default() -> Self {
        Self::new()
    }
}

impl Quantised {
    /// An empty buffer, `[0, 0]`, that keeps sums.
    pub fn new() -> Self {
        Self {
            m: 0,
            k: 0,
            q: Vec::new(),
            scale: Vec::new(),
            offset: Vec::new(),
            sums: Vec::new(),
            wanted: Beside::SUMS,
            held: Beside::SUMS,
            plain: Vec::new(),
            is_plain: false,
        }
    }

    /// Whether what is quantised after the next [`resize`](Self::resize) is for weights that
    /// [need sums](crate::packed::Kind::needs_sums). To keep them takes time.
    pub fn keep_sums(&mut self, keep: bool) {
        self.wanted.sums = keep;
    }

    /// Whether what is quantised after the next [`resize`](Self::resize) is for a [`Job`](crate::Job) that is `fine`. The
    /// `reference` kernel has no remainders and needs none.
    pub fn keep_remainders(&mut self, keep: bool) {
        self.wanted.remainders = keep;
    }

    /// Whether it holds all that a linear of this kind needs, fine or not.
    pub(crate) fn suits(&self, kind: Kind, fine: bool) -> bool {
        (self.held.sums || !kind.needs_sums()) && (self.held.remainders || !fine)
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
            .checked_mul(1 + usize::from(self.wanted.remainders))
            .and_then(|rows| rows.div_ceil(OCTET).checked_mul(k / BLOCK))
            .expect("activations fit the memory");
        if blocks > self.q.len() {
            self.q.resize(blocks, [[0; BLOCK]; OCTET]);
            self.scale.resize(blocks, [0.0; OCTET]);
            self.offset.resize(blocks, [0; OCTET]);
            self.sums.resize(blocks, Sums::default());
        }
        (self.m, self.k, self.held) = (m, k, self.wanted);
    }

    /// Tokens.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Width.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Tokens, and remainders.
    fn rows(&self) -> usize {
        self.m * (1 + usize::from(self.held.remainders))
    }

    /// One token's block: its 32 bytes, its scale, the sum of the bytes. Token t's remainder is token m + t.
    pub fn block(&self, token: usize, block: usize) -> (&[i8; BLOCK], f32, i32) {
        assert!(
            token < self.rows() && block < self.k / BLOCK,
            "no block {block} of token {token}"
        );
        let (at, lane) = (token / OCTET * (self.k / BLOCK) + block, token % OCTET);
        (
            &self.q[at][lane],
            self.scale[at][lane],
            self.offset[at][lane] / -128,
        )
    }

    #[inline(always)]
    pub(crate) fn octet(&self, octet: usize) -> OctetView<'_> {
        let blocks = self.k / BLOCK;
        let range = octet * blocks..(octet + 1) * blocks;
        OctetView {
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
            has_remainders: self.held.remainders,
            blocks: self.k / BLOCK,
            q: Shareable(self.q.as_mut_ptr()),
            scale: Shareable(self.scale.as_mut_ptr()),
            offset: Shareable(self.offset.as_mut_ptr()),
            sums: self.held.sums.then_some(Shareable(self.sums.as_mut_ptr())),
        }
    }
}

/// Write access to all tokens of a [`Quantised`] for several threads, as long as it stays borrowed.
pub(crate) struct Slots {
    m: usize,
    has_remainders: bool,
    blocks: usize,
    q: Shareable<[[i8; BLOCK]; OCTET]>,
    scale: Shareable<[f32; OCTET]>,
    offset: Shareable<[i32; OCTET]>,
    sums: Option<Shareable<Sums>>,
}

/// Write access to one token, or to its remainder.
pub(crate) struct Slot<'a> {
    /// Of the token's octet, at its first block.
    q: *mut [[i8; BLOCK]; OCTET],
    scale: *mut [f32; OCTET],
    offset: *mut [i32; OCTET],
    sums: Option<*mut Sums>,
    blocks: usize,
    /// The token's place in its octet.
    lane: usize,
    slots: PhantomData<&'a Slots>,
}

impl Slots {
    /// A token, and its remainder where these are kept.
    ///
    /// # Safety
    /// The buffer that this came from is still mutably borrowed and not resized, and no other slot of the same
    /// token exists.
    pub(crate) unsafe fn token(&self, token: usize) -> (Slot<'_>, Option<Slot<'_>>) {
        assert!(token < self.m, "token {token} of {}", self.m);
        // SAFETY: the caller's promise; as many rows as there are tokens lie behind them, where these are kept.
        unsafe {
            let remainder = self.has_remainders.then(|| self.row(self.m + token));
            (self.row(token), remainder)
        }
    }

    /// # Safety
    /// As of [`token`](Self::token), and there is such a row.
    unsafe fn row(&self, row: usize) -> Slot<'_> {
        let first = row / OCTET * self.blocks;
        // SAFETY: the octet of a row that exists has its first block in each array.
        unsafe {
            Slot {
                q: self.q.at(first),
                scale: self.scale.at(first),
                offset: self.offset.at(first),
                sums: self.sums.as_ref().map(|sums| sums.at(first)),
                blocks: self.blocks,
                lane: row % OCTET,
                slots: PhantomData,
            }
        }
    }
}

impl Slot<'_> {
    /// Takes a block's bytes, its scale and the sums of its halves.
    #[inline(always)]
    pub(crate) fn put(&mut self, block: usize, q: [[i8; 16]; 2], scale: f32, halves: [i32; 2]) {
        assert!(block < self.blocks);
        let (lane, sum) = (self.lane, halves[0] + halves[1]);
        // SAFETY: the octet has this block, and `lane` is below OCTET. This token is written through this slot only,
        // element by element; no reference is made, since other tokens' elements lie between.
        unsafe {
            (&raw mut (*self.q.add(block))[lane])
                .cast::<[[i8; 16]; 2]>()
                .write(q);
            (&raw mut (*self.scale.add(block))[lane]).write(scale);
            (&raw mut (*self.offset.add(block))[lane]).write(-128 * sum);
            let Some(sums) = self.sums else {
                return;
            };
            let sums = sums.add(block);
            (&raw mut (*sums).block[lane]).write(sum as f32 * scale);
            for (half, sum) in halves.into_iter().enumerate() {
                (&raw mut (*sums).offset[half][lane]).write(-128 * sum);
                (&raw mut (*sums).half[half][lane]).write(sum as f32 * scale);
            }
        }
    }
}
