//! Operators that take number by number: what they do where sizes are made with them.

use super::Extents;
use super::value::{Extent, broadcast, fitting, spread};
use tract_onnx::pb::NodeProto;

pub(super) type Operator = fn(&[f64]) -> Option<f64>;

/// Operators that take number by number, and what they do where sizes are made with them.
pub(super) fn arithmetic(op: &str) -> Option<Operator> {
    fn truth(value: bool) -> f64 {
        f64::from(u8::from(value))
    }
    Some(match op {
        "Add" | "Sum" => |x| Some(x.iter().sum()),
        "Sub" => |x| Some(x.first()? - x.get(1)?),
        "Mul" => |x| Some(x.iter().product()),
        "Div" => |x| Some(x.first()? / x.get(1)?),
        "Mod" => |x| Some(x.first()?.rem_euclid(*x.get(1)?)),
        "Pow" => |x| Some(x.first()?.powf(*x.get(1)?)),
        "Min" => |x| x.iter().copied().reduce(f64::min),
        "Max" => |x| x.iter().copied().reduce(f64::max),
        "Equal" => |x| Some(truth(x.first()? - x.get(1)? == 0.0)),
        "Less" => |x| Some(truth(x.first()? < x.get(1)?)),
        "LessOrEqual" => |x| Some(truth(x.first()? <= x.get(1)?)),
        "Greater" => |x| Some(truth(x.first()? > x.get(1)?)),
        "GreaterOrEqual" => |x| Some(truth(x.first()? >= x.get(1)?)),
        "And" => |x| Some(truth(x.iter().all(|&x| x != 0.0))),
        "Or" => |x| Some(truth(x.iter().any(|&x| x != 0.0))),
        "Not" => |x| Some(truth(*x.first()? == 0.0)),
        "Where" => |x| x.get(if *x.first()? == 0.0 { 2 } else { 1 }).copied(),
        "Neg" => |x| Some(-*x.first()?),
        "Abs" => |x| Some(x.first()?.abs()),
        "Floor" => |x| Some(x.first()?.floor()),
        "Ceil" => |x| Some(x.first()?.ceil()),
        "Round" => |x| Some(x.first()?.round_ties_even()),
        "Sqrt" => |x| Some(x.first()?.sqrt()),
        "Exp" => |x| Some(x.first()?.exp()),
        "Log" => |x| Some(x.first()?.ln()),
        "Reciprocal" => |x| Some(1.0 / x.first()?),
        "Relu" => |x| Some(x.first()?.max(0.0)),
        "Cast" => |x| x.first().copied(),
        "Xor" | "BitShift" | "BitwiseAnd" | "BitwiseOr" | "BitwiseXor" | "PRelu" | "Mean" => {
            |_| None
        }
        _ => return None,
    })
}

impl Extents<'_> {
    /// Operators that take number by number.
    pub(super) fn elementwise(&self, node: &NodeProto, operator: Operator) -> Option<Extent> {
        let inputs = (0..node.input.len()).map(|i| self.input(node, i));
        let inputs = inputs.collect::<Option<Vec<_>>>()?;
        let made = broadcast(&inputs);
        let of = node
            .output
            .first()
            .and_then(|out| self.types.get(out))
            .copied();
        let columns = inputs.iter().map(|x| spread(x, &made));
        let columns: Option<Vec<Vec<f64>>> = columns.collect();
        let numbers = columns.and_then(|columns| {
            let at = |i: usize| -> Option<f64> {
                let row: Vec<f64> = columns.iter().map(|column| column[i]).collect();
                fitting(operator(&row)?, of)
            };
            (0..made.count as usize).map(at).collect()
        });
        Some(made.with(numbers))
    }
}
