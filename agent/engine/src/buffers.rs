//! Where our operators write: tensors that are lent to tract and come back when it drops them, so that a step
//! allocates nothing once steps of its size were seen. Knows shapes, not meanings.

use std::sync::Arc;
use tract_onnx::prelude::*;

/// Tensors that lie here unused at most. More than a layer has alive at once; a graph that holds on to more
/// allocates them.
const KEPT_MAX: usize = 16;

/// The tensors lent and those that came back.
#[derive(Default)]
pub(crate) struct Buffers {
    all: Vec<Arc<Tensor>>,
}

impl Buffers {
    /// A tensor `[1, rows, width]` of f32 that nobody else holds. What is in it is left from its last use: the
    /// caller writes every value.
    pub(crate) fn take(&mut self, rows: usize, width: usize) -> TractResult<Arc<Tensor>> {
        let shape = [1, rows, width];
        let free = |tensor: &Arc<Tensor>| Arc::strong_count(tensor) == 1;
        let fits = |tensor: &&Arc<Tensor>| tensor.shape() == shape && free(tensor);
        if let Some(index) = self.all.iter().position(|tensor| fits(&tensor)) {
            return Ok(self.all.swap_remove(index));
        }
        Ok(Arc::new(Tensor::zero::<f32>(&shape)?))
    }

    /// Hands a tensor out, to come back once tract has dropped it.
    pub(crate) fn lend(&mut self, tensor: Arc<Tensor>) -> TValue {
        if self.all.len() == KEPT_MAX {
            // Of another size, most likely, from a step that was larger or smaller.
            self.all.remove(0);
        }
        self.all.push(Arc::clone(&tensor));
        TValue::from_const(tensor)
    }
}
