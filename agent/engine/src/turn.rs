//! What our operators share in a run: the weights, the KV arena, the threads, the kernel, and the batch of this
//! step. Handed to them through tract's `TurnShared`.

use crate::arena::Arena;
use crate::pack::Weights;
use millwright_kernels::{Kernel, Pool, Quantised, Token};
use std::cell::RefCell;
use std::sync::Arc;

/// One token of a flat batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) token: u32,
    /// Whose cache it belongs to.
    pub(crate) slot: usize,
    /// Its place in that slot's text; all earlier ones are in the cache or in this batch.
    pub(crate) position: usize,
}

/// A step's work: tokens of any slots, each slot's in rising order of position.
#[derive(Debug, Default, Clone)]
pub(crate) struct Batch {
    pub(crate) rows: Vec<Row>,
    /// Which rows' logits are wanted, rising.
    pub(crate) sample: Vec<usize>,
}

/// See the module.
pub(crate) struct Turn {
    pub(crate) weights: Arc<Weights>,
    pub(crate) kernel: Kernel,
    pub(crate) pool: Pool,
    /// `None` in the plain plan, whose cache is tract tensors.
    pub(crate) arena: RefCell<Option<Arena>>,
    pub(crate) batch: RefCell<Batch>,
    pub(crate) scratch: RefCell<Scratch>,
}

/// Buffers that grow to the largest batch seen and stay.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) quantised: Quantised,
    /// The rows that the head works on.
    pub(crate) sampled: Vec<f32>,
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    /// The batch as attention sees it.
    pub(crate) tokens: Vec<Token>,
}
