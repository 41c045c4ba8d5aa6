//! What our operators share in a run: the weights, the KV arena, the threads, the kernel, and the batch of this
//! step. Handed to them through tract's `TurnShared`.

use crate::arena::Arena;
use crate::buffers::Buffers;
use crate::observer::{Observer, Part};
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
    /// `None` where the weights are read from the source.
    pub(crate) weights: Option<Arc<Weights>>,
    pub(crate) kernel: Kernel,
    pub(crate) pool: Pool,
    /// `None` in the plain plan, whose cache is tract tensors.
    pub(crate) arena: RefCell<Option<Arena>>,
    pub(crate) batch: RefCell<Batch>,
    pub(crate) scratch: RefCell<Scratch>,
    pub(crate) buffers: RefCell<Buffers>,
    /// The cores that the thread which steps keeps to meanwhile.
    pub(crate) kept_to: Option<Vec<usize>>,
    pub(crate) observer: RefCell<Option<Box<dyn Observer>>>,
}

impl Turn {
    /// Makes a batch this turn's, with its threads.
    pub(crate) fn install(&self, batch: &Batch, threads: usize) {
        let mine = &mut *self.batch.borrow_mut();
        // Field by field: a derived `clone_from` would allocate.
        mine.rows.clone_from(&batch.rows);
        mine.sample.clone_from(&batch.sample);
        self.pool.limit(threads);
    }

    /// The packed weights, which all operators but the reference's work on.
    pub(crate) fn weights(&self) -> &Weights {
        self.weights
            .as_deref()
            .expect("a plan of packed operators has them")
    }

    /// Tells the observer, if there is one, that a part begins.
    pub(crate) fn begin(&self, part: Part) {
        if let Some(observer) = &mut *self.observer.borrow_mut() {
            observer.begin(part);
        }
    }

    /// Tells the observer that a part ends.
    pub(crate) fn end(&self, part: Part) {
        if let Some(observer) = &mut *self.observer.borrow_mut() {
            observer.end(part);
        }
    }

    /// Begins a part that ends when this is dropped.
    pub(crate) fn part(&self, part: Part) -> Watched<'_> {
        self.begin(part);
        Watched { turn: self, part }
    }
}

/// A part in progress.
pub(crate) struct Watched<'a> {
    turn: &'a Turn,
    part: Part,
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.turn.end(self.part);
    }
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
