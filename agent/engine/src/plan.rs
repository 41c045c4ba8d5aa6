//! tract's planning and running, for graphs from outside: what tract takes on trust is checked first, and where it
//! panics that is an error.

mod formula;

use std::panic::{AssertUnwindSafe, catch_unwind};
use tract_onnx::prelude::*;
#[allow(clippy::wildcard_imports)] // tract's macros expect all of it
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::einsum::EinSum;

/// Optimises a graph whose products are of sizes that agree, and whose sizes are formulas of few terms.
pub(crate) fn optimised(model: InferenceModel) -> TractResult<TypedModel> {
    let model = formula::typed(model)?.into_decluttered()?;
    for node in &model.nodes {
        if let Some(product) = node.op_as::<EinSum>() {
            let facts = model.node_input_facts(node.id)?;
            agree(product, &facts).with_context(|| format!("in {}", node.name))?;
        }
    }
    model.into_optimized()
}

/// Runs what may panic.
pub(crate) fn caught<T>(run: impl FnOnce() -> TractResult<T>) -> TractResult<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| bail!("tract panicked"))
}

/// Whether all inputs of a product have one size along what is summed. tract's kernels read as far as one of them says,
/// beyond the others' ends.
fn agree(product: &EinSum, inputs: &[&TypedFact]) -> TractResult<()> {
    let summed = product.axes.iter_all_axes();
    for axis in summed.filter(|axis| axis.outputs.iter().all(TVec::is_empty)) {
        let places = axis.inputs.iter().zip(inputs);
        let mut sizes = places.flat_map(|(places, fact)| places.iter().map(|&at| &fact.shape[at]));
        let is_same = |a: &TDim, b: &TDim| a == b || (a.clone() - b).simplify().as_i64() == Some(0);
        if let Some(first) = sizes.next()
            && let Some(other) = sizes.find(|size| !is_same(first, size))
        {
            bail!("a product of {first} and {other} numbers that may differ");
        }
    }
    Ok(())
}
