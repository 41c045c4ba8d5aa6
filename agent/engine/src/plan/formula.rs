//! Sizes and whole numbers that hang on how many tokens there are, as tract has them before that is known: formulas
//! (`TDim`). A graph can make one that doubles with each operator. So types are given node by node, and a formula is
//! looked at before others are made of it.

use std::collections::HashMap;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::translator::Translate;
#[allow(clippy::wildcard_imports)] // tract's macros expect all of it
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_hir::infer::{Factoid, InferenceOp};
use tract_onnx::tract_hir::internal::InferenceNode;

/// Places of symbols in the formulas of one value, at most. Of 1,581 graphs from real exporters none has more than 9;
/// what tract takes to put minima and maxima in order doubles with each further one or two.
const SYMBOLS_MAX: usize = 12;

/// The model with the type of each value.
pub(super) fn typed(mut model: InferenceModel) -> TractResult<TypedModel> {
    for node in model.eval_order()? {
        let made = inferred(&mut model, node);
        made.with_context(|| format!("in {}", model.node(node).name))?;
    }
    // What is told by operators behind.
    model.analyse(false)?;
    Typing.translate_model(&model.incorporate()?)
}

/// Infers what a node makes from what it reads.
fn inferred(model: &mut InferenceModel, id: usize) -> TractResult<()> {
    let node = model.node(id);
    let observed = node.op.observe_outlets(model, node)?;
    let facts = |outlets: &[OutletId]| -> TractResult<TVec<InferenceFact>> {
        let fact = |&outlet: &OutletId| Ok(model.outlet_fact(outlet)?.clone());
        outlets.iter().map(fact).collect()
    };
    let outputs: TVec<_> = (0..node.outputs.len())
        .map(|slot| OutletId::new(id, slot))
        .collect();
    let (read, before, observed) = (facts(&node.inputs)?, facts(&outputs)?, facts(&observed)?);
    let op = &mut model.node_mut(id).op;
    let (_, made, _) = op.infer(
        read.iter().collect(),
        before.iter().collect(),
        observed.iter().collect(),
    )?;
    for ((outlet, before), made) in outputs.into_iter().zip(before).zip(made) {
        let fact = before.unify(&made)?;
        let sizes = fact.shape.dims().filter_map(Factoid::concretize);
        let numbers = fact.value.concretize();
        few(sizes.map(|size| symbols(&size)).sum::<usize>()
            + numbers.map_or(0, |numbers| symbols_in(&numbers)))?;
        model.set_outlet_fact(outlet, fact)?;
    }
    Ok(())
}

/// Types each node by those before it.
#[derive(Debug)]
struct Typing;

impl Translate<InferenceFact, Box<dyn InferenceOp>, TypedFact, Box<dyn TypedOp>> for Typing {
    fn translate_node(
        &self,
        source: &InferenceModel,
        node: &InferenceNode,
        target: &mut TypedModel,
        mapping: &HashMap<OutletId, OutletId>,
    ) -> TractResult<TVec<OutletId>> {
        let numbers = node.outputs.iter().map(|o| o.fact.value.concretize());
        let known = numbers.collect::<Option<Vec<_>>>();
        let is_input = source.input_outlets()?.iter().any(|at| at.node == node.id);
        let is_lasting = node.op.state(&EvalContext::out_of_plan())?.is_some();
        let outlets = match known {
            Some(numbers) if !is_input && !is_lasting => {
                let constant = |(index, numbers)| {
                    let name = format!("{}.{index}", node.name);
                    target.add_const(name, numbers)
                };
                numbers.into_iter().enumerate().map(constant).collect()
            }
            _ => node.op.to_typed(source, node, target, mapping),
        }?;
        for &outlet in &outlets {
            let fact = target.outlet_fact(outlet)?;
            fact.consistent()?;
            let sizes = fact.shape.iter().chain(&fact.uniform_tdim);
            let numbers = fact.konst.as_ref().map_or(0, |numbers| symbols_in(numbers));
            few(sizes.map(symbols).sum::<usize>() + numbers)?;
        }
        Ok(outlets)
    }
}

fn few(symbols: usize) -> TractResult<()> {
    ensure!(
        symbols <= SYMBOLS_MAX,
        "a formula of {symbols} terms, where {SYMBOLS_MAX} are the most"
    );
    Ok(())
}

/// Of all numbers of a tensor.
fn symbols_in(numbers: &Tensor) -> usize {
    let numbers = numbers.try_as_plain_ram().ok();
    let numbers = numbers.as_ref().and_then(|all| all.as_slice::<TDim>().ok());
    numbers.map_or(0, |all| all.iter().map(symbols).sum())
}

/// Places of symbols in a formula.
fn symbols(formula: &TDim) -> usize {
    match formula {
        TDim::Val(_) => 0,
        TDim::Sym(_) => 1,
        TDim::Add(all)
        | TDim::Mul(all)
        | TDim::Broadcast(all)
        | TDim::Min(all)
        | TDim::Max(all) => all.iter().map(symbols).sum(),
        TDim::MulInt(_, of) | TDim::Div(of, _) => symbols(of),
        TDim::Ge(a, b) | TDim::Eq(a, b) => symbols(a) + symbols(b),
    }
}
