//! Where our operators write: tensors that are lent to tract and come back when it drops them, so that a step
//! allocates nothing once steps of its size were seen. Knows shapes, not meanings.

use std::sync::Arc;
use tract_onnx::prelude::*;

/// Tensors that lie here unused at most. More than a layer has alive at once; a graph that holds on to more
/// allocates them.
pub(crate) const KEPT_MAX: usize = 16;
/// Their bytes together at most: a long prompt's or a large vocabulary's tensors are not kept for long.
pub(crate) const KEPT_BYTES_MAX: usize = 16 << 20;

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
        let room = KEPT_BYTES_MAX.checked_sub(bytes(&tensor));
        if let Some(room) = room {
            while self.all.len() >= KEPT_MAX || self.all.iter().map(bytes).sum::<usize>() > room {
                // Of another size, most likely, from a step that was larger or smaller.
                self.all.remove(0);
            }
            self.all.push(Arc::clone(&tensor));
        }
        TValue::from_const(tensor)
    }
}

fn bytes(tensor: &Arc<Tensor>) -> usize {
    tensor.len() * size_of::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded_by_count_and_by_bytes() {
        let mut buffers = Buffers::default();
        let mut lend = |width| {
            let tensor = buffers.take(1, width).unwrap();
            buffers.lend(tensor);
            (
                buffers.all.len(),
                buffers.all.iter().map(bytes).sum::<usize>(),
            )
        };
        for width in 1..=2 * KEPT_MAX {
            let (count, _) = lend(width);
            assert_eq!(count, width.min(KEPT_MAX));
        }
        let quarter = KEPT_BYTES_MAX / 4 / size_of::<f32>();
        for more in 0..8 {
            let (_, bytes) = lend(quarter + more);
            assert!(bytes <= KEPT_BYTES_MAX, "{bytes}");
        }
        let kept = lend(quarter);
        assert_eq!(kept.0, 3);
        // One that is too large alone pushes out none.
        assert_eq!(lend(4 * quarter + 1), kept);
    }
}
