//! Operators that take number by number: what they do where sizes are made with them.

use super::Extents;
use super::value::{COMPUTED_MAX, Extent, broadcast};
use crate::onnx::int;
use tract_onnx::pb::NodeProto;
use tract_onnx::pb::tensor_proto::DataType;

/// Sizes are made of no larger numbers; beyond them they may have wrapped around.
const NUMBER_MAX: u64 = i32::MAX as u64;
/// Inputs of an operator that sizes are made with.
const OPERANDS_MAX: usize = 3;

/// `None` where there is no such number, or where ONNX and tract may not agree on it.
type Operator = fn([i64; OPERANDS_MAX]) -> Option<i64>;

/// Operators that sizes are made with, and the operands they have.
fn arithmetic(op: &str) -> Option<(usize, Operator)> {
    fn both(a: i64, b: i64) -> Option<[bool; 2]> {
        let truth = |n: i64| (n == 0 || n == 1).then_some(n == 1);
        Some([truth(a)?, truth(b)?])
    }
    Some(match op {
        "Add" => (2, |[a, b, _]| a.checked_add(b)),
        "Sub" => (2, |[a, b, _]| a.checked_sub(b)),
        "Mul" => (2, |[a, b, _]| a.checked_mul(b)),
        // Below zero, some round up and some down.
        "Div" => (2, |[a, b, _]| (a >= 0 && b > 0).then(|| a / b)),
        "Mod" => (2, |[a, b, _]| (a >= 0 && b > 0).then(|| a % b)),
        "Min" => (2, |[a, b, _]| Some(a.min(b))),
        "Max" => (2, |[a, b, _]| Some(a.max(b))),
        "Equal" => (2, |[a, b, _]| Some(i64::from(a == b))),
        "Less" => (2, |[a, b, _]| Some(i64::from(a < b))),
        "LessOrEqual" => (2, |[a, b, _]| Some(i64::from(a <= b))),
        "Greater" => (2, |[a, b, _]| Some(i64::from(a > b))),
        "GreaterOrEqual" => (2, |[a, b, _]| Some(i64::from(a >= b))),
        "And" => (2, |[a, b, _]| both(a, b).map(|[a, b]| i64::from(a && b))),
        "Or" => (2, |[a, b, _]| both(a, b).map(|[a, b]| i64::from(a || b))),
        "Not" => (1, |[a, ..]| both(a, a).map(|[a, _]| i64::from(!a))),
        "Where" => (3, |[which, a, b]| {
            both(which, which).map(|[w, _]| if w { a } else { b })
        }),
        "Neg" => (1, |[a, ..]| a.checked_neg()),
        "Abs" => (1, |[a, ..]| a.checked_abs()),
        "Cast" => (1, |[a, ..]| Some(a)),
        _ => return None,
    })
}

/// A computed number, if it is one that sizes are made of.
pub(super) fn fitting(number: i64) -> Option<i64> {
    (number.unsigned_abs() <= NUMBER_MAX).then_some(number)
}

impl Extents<'_> {
    /// Operators that take number by number.
    pub(super) fn elementwise(&self, node: &NodeProto) -> Option<Extent> {
        let inputs = self.inputs(node)?;
        let made = broadcast(&inputs);
        let numbers = computed(node, &inputs, &made);
        Some(made.with(numbers))
    }
}

fn computed(node: &NodeProto, inputs: &[&Extent], made: &Extent) -> Option<Vec<i64>> {
    let (operands, operator) = arithmetic(&node.op_type)?;
    if inputs.len() != operands || made.dims.is_none() || made.count > COMPUTED_MAX {
        return None;
    }
    let columns = inputs.iter().map(|x| spread(x, made));
    let columns: Vec<_> = columns.collect::<Option<_>>()?;
    let to_truth = int(node, "to") == Some(DataType::Bool as i64);
    let at = |i: usize| {
        let mut row = [0; OPERANDS_MAX];
        for (number, column) in row.iter_mut().zip(&columns) {
            *number = column[if column.len() == 1 { 0 } else { i }];
        }
        let made = operator(row)?;
        fitting(if to_truth { i64::from(made != 0) } else { made })
    };
    (0..made.count as usize).map(at).collect()
}

/// A value's numbers: one, or one for each of those that they are broadcast to.
pub(super) fn spread<'a>(x: &'a Extent, to: &Extent) -> Option<&'a [i64]> {
    let numbers = x.numbers.as_deref()?;
    (numbers.len() == 1 || numbers.len() as u64 == to.count).then_some(numbers)
}
