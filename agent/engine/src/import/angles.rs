//! Cosines and sines of rotary angles that a graph computes, rounded once: tract's own differ between CPUs, and what is
//! read off them decides every later token.

use tract_onnx::prelude::*;
#[allow(clippy::wildcard_imports)] // tract's macros expect all of it
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::EvalOp;
use tract_onnx::tract_hir::infer::{InferenceResult, Solver, TensorProxy};
use tract_onnx::tract_hir::internal::{Expansion, expand};

/// An ONNX reader whose `Cos` and `Sin` of f32 are computed in f64.
pub(super) fn reader() -> tract_onnx::Onnx {
    let mut onnx = tract_onnx::onnx().with_ignore_value_info(true);
    onnx.op_register
        .insert("Cos", |_, _| Ok((expand(Lifted(Angle::Cos)), vec![])));
    onnx.op_register
        .insert("Sin", |_, _| Ok((expand(Lifted(Angle::Sin)), vec![])));
    onnx
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Angle {
    Cos,
    Sin,
}

impl Op for Angle {
    fn name(&self) -> StaticName {
        match self {
            Self::Cos => "MillwrightCos".into(),
            Self::Sin => "MillwrightSin".into(),
        }
    }

    op_as_typed_op!();
}

impl EvalOp for Angle {
    not_out_of_plan!();

    fn eval(&self, _ctx: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let angles = inputs[0].try_as_plain_ram()?.as_slice::<f32>()?;
        let rounded = angles.iter().map(|&angle| {
            let angle = f64::from(angle);
            match self {
                Self::Cos => angle.cos() as f32,
                Self::Sin => angle.sin() as f32,
            }
        });
        let rounded: Vec<f32> = rounded.collect();
        Ok(tvec![
            Tensor::from_shape(inputs[0].shape(), &rounded)?.into_tvalue()
        ])
    }
}

impl TypedOp for Angle {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec![f32::fact(&*inputs[0].shape)])
    }
}

/// As tract's parser wants it.
#[derive(Debug, Clone)]
struct Lifted(Angle);

impl Expansion for Lifted {
    fn name(&self) -> StaticName {
        self.0.name()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        solver.equals(&inputs[0].datum_type, f32::datum_type())?;
        solver.equals(&outputs[0].datum_type, f32::datum_type())?;
        solver.equals(&inputs[0].rank, &outputs[0].rank)?;
        solver.equals(&inputs[0].shape, &outputs[0].shape)
    }

    fn wire(
        &self,
        prefix: &str,
        model: &mut TypedModel,
        inputs: &[OutletId],
    ) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, self.0.clone(), inputs)
    }
}
