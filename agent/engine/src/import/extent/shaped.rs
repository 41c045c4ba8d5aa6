//! What operators make, by the sizes of what they read. One that isn't here is refused.

use super::value::{Extent, matmul};
use super::{Extents, flag};
use crate::onnx::{int, ints};
use std::collections::HashMap;
use tract_onnx::pb::NodeProto;
use tract_onnx::pb::tensor_proto::DataType;

impl Extents<'_> {
    /// What an operator makes, output by output; `None` where that can't be told.
    pub(super) fn shaped(&self, node: &NodeProto) -> Option<Vec<Extent>> {
        let x = |i: usize| self.input(node, i);
        let one = |extent: Extent| Some(vec![extent]);
        match node.op_type.as_str() {
            op if ELEMENTWISE.contains(&op) => one(self.elementwise(node)?),
            op if KEPT.contains(&op) => self.kept(node),
            "Identity" => one(x(0)?.clone()),
            "Einsum" => one(self.einsum(node)?),
            "Shape" => one(shape(node, x(0)?)),
            "Size" => one(size(x(0)?)),
            "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" => one(self.reshaped(node)?),
            "Transpose" => one(transposed(node, x(0)?)?),
            "Concat" => one(self.concat(node)?),
            "Split" => self.split(node),
            "Slice" => one(self.slice(node)?),
            "ConstantOfShape" => one(self.constant_of_shape(node)?),
            "Expand" => one(self.expanded(node)?),
            "Tile" => one(self.tiled(node)?),
            "Pad" => one(self.padded(node)?),
            "Range" => one(self.range(node)?),
            "OneHot" => one(self.one_hot(node)?),
            "TopK" => {
                let &[k] = x(1)?.sizes()?.as_slice() else {
                    return None;
                };
                let made = x(0)?.resized(int(node, "axis").unwrap_or(-1), k)?;
                Some(vec![made; 2])
            }
            "ArgMax" | "ArgMin" => {
                let axis = int(node, "axis").unwrap_or(0);
                one(self.without(node, &[axis])?)
            }
            "ReduceL1" | "ReduceL2" | "ReduceLogSumExp" | "ReduceMax" | "ReduceMean"
            | "ReduceMin" | "ReduceProd" | "ReduceSum" | "ReduceSumSquare" => {
                one(self.reduced(node)?)
            }
            "Gather" => one(self.gather(node)?),
            "GatherBlockQuantized" => one(gather_packed(node, x(0)?, x(1)?)?),
            "GatherND" => one(gather_nd(node, x(0)?, x(1)?)?),
            "CastLike" | "ScatterElements" | "ScatterND" => one(x(0)?.alike()),
            "GatherElements" => one(x(1)?.alike()),
            "NonZero" => {
                let rank = x(0)?.dims()?.len().max(1) as u64;
                one(Extent::flat(rank.saturating_mul(x(0)?.count)))
            }
            "MatMul" => one(matmul(x(0)?, x(1)?)),
            "MatMulInteger" => {
                let (a, b) = (x(0)?, x(1)?);
                x(2).is_none_or(|zero| a.takes(zero)).then_some(())?;
                x(3).is_none_or(|zero| b.takes(zero)).then_some(())?;
                one(matmul(a, b))
            }
            "MatMulNBits" => {
                // Each output has some weights; what is stated beyond them is refused where they are read.
                let stated = u64::try_from(int(node, "N")?).ok()?;
                one(x(0)?.resized(-1, stated.min(x(1)?.count))?)
            }
            "Gemm" => {
                let made = gemm(node, x(0)?, x(1)?)?;
                x(2).is_none_or(|added| made.takes(added)).then_some(())?;
                one(made)
            }
            "QuantizeLinear" | "DequantizeLinear" => one(self.scaled(node)?),
            "DynamicQuantizeLinear" => {
                let number = Extent::of(vec![]);
                Some(vec![x(0)?.alike(), number.clone(), number])
            }
            "RotaryEmbedding" => one(self.rotated(node)?),
            "Attention" | "GroupQueryAttention" | "MultiHeadAttention" => self.attention(node),
            _ => None,
        }
    }

    /// An operator that changes its first input's numbers and not its sizes. Gains, biases and what is added must not
    /// be larger.
    fn kept(&self, node: &NodeProto) -> Option<Vec<Extent>> {
        let x = self.input(node, 0)?;
        let mut others = (1..node.input.len()).filter_map(|i| self.input(node, i));
        others.all(|other| x.takes(other)).then_some(())?;
        // A norm's fourth is the sum that it normalises; its second and third are smaller.
        let further = Extent::flat(x.count);
        let sizes = |i: usize| {
            if i.is_multiple_of(3) {
                x.alike()
            } else {
                further.clone()
            }
        };
        Some((0..node.output.len()).map(sizes).collect())
    }

    /// The size of each letter of an `Einsum` of one or two inputs, the same wherever it stands, and its output's letters.
    pub(super) fn letters(&self, node: &NodeProto) -> Option<(HashMap<char, u64>, String)> {
        let equation = node.attribute.iter().find(|a| a.name == "equation")?;
        let equation = String::from_utf8_lossy(&equation.s).replace(' ', "");
        let (inputs, output) = equation.split_once("->")?;
        let inputs: Vec<&str> = inputs.split(',').collect();
        (inputs.len() == node.input.len() && inputs.len() <= 2).then_some(())?;
        let mut sizes = HashMap::new();
        for (index, letters) in inputs.into_iter().enumerate() {
            let dims = self.input(node, index)?.dims()?;
            (letters.len() == dims.len()).then_some(())?;
            for (letter, &n) in letters.chars().zip(dims) {
                let is_alike = *sizes.entry(letter).or_insert(n) == n;
                (is_alike && letter.is_ascii_alphabetic()).then_some(())?;
            }
        }
        Some((sizes, output.to_owned()))
    }

    /// One number for each choice of the letters behind the arrow.
    fn einsum(&self, node: &NodeProto) -> Option<Extent> {
        let (sizes, output) = self.letters(node)?;
        let dims = output.chars().map(|letter| sizes.get(&letter).copied());
        Some(Extent::of(dims.collect::<Option<_>>()?))
    }

    fn gather(&self, node: &NodeProto) -> Option<Extent> {
        let (data, ids) = (self.input(node, 0)?, self.input(node, 1)?);
        let at = data.axis(int(node, "axis").unwrap_or(0))?;
        let mut dims = data.dims.clone()?;
        dims.splice(at..=at, ids.dims.clone()?);
        let numbers = || {
            let all = data
                .numbers
                .as_ref()
                .filter(|_| data.dims.as_ref().is_some_and(|d| d.len() == 1))?;
            let number = |&id: &i64| all.get(crate::onnx::axis(id, all.len())?).copied();
            ids.numbers.as_ref()?.iter().map(number).collect()
        };
        Some(Extent::of(dims).with(numbers()))
    }

    /// Scales and zero points are one, one for each place on an axis, or one a block.
    fn scaled(&self, node: &NodeProto) -> Option<Extent> {
        let x = self.input(node, 0)?;
        let axis = int(node, "axis").unwrap_or(1);
        let fits = |scale: &Extent| match (scale.dims()?, x.dims()?) {
            ([], _) => Some(()),
            (&[n], dims) => (n == 1 && !dims.is_empty() || x.size(axis) == Some(n)).then_some(()),
            (scales, dims) => {
                let whole = |(&n, &scales): (&u64, &u64)| scales <= n;
                (scales.len() == dims.len() && dims.iter().zip(scales).all(whole)).then_some(())
            }
        };
        (1..node.input.len())
            .filter_map(|i| self.input(node, i))
            .try_for_each(fits)?;
        Some(x.alike())
    }
}

/// Rows of four bits: two share a byte where the type doesn't say that there are half as many.
fn gather_packed(node: &NodeProto, data: &Extent, ids: &Extent) -> Option<Extent> {
    let &[_, width] = data.dims()? else {
        return None;
    };
    let is_four = int(node, "bits").is_none_or(|bits| bits == 4);
    let is_packed = is_four && data.of == Some(DataType::Uint8 as i32);
    let is_by_row = int(node, "gather_axis").is_none_or(|axis| axis == 0);
    let width = width.saturating_mul(if is_packed { 2 } else { 1 });
    let dims = [ids.dims()?, &[width]].concat();
    is_by_row.then(|| Extent::of(dims))
}

fn gather_nd(node: &NodeProto, data: &Extent, ids: &Extent) -> Option<Extent> {
    let (&depth, shared) = ids.dims()?.split_last()?;
    let batch = u64::try_from(int(node, "batch_dims").unwrap_or(0)).ok()?;
    let from = usize::try_from(depth.checked_add(batch)?).ok()?;
    let rest = data.dims()?.get(from..)?;
    Some(Extent::of([shared, rest].concat()))
}

fn gemm(node: &NodeProto, a: &Extent, b: &Extent) -> Option<Extent> {
    let (&[rows, columns], &[b_rows, b_columns]) = (a.dims()?, b.dims()?) else {
        return None;
    };
    let row = if flag(node, "transA", false)? {
        columns
    } else {
        rows
    };
    let column = if flag(node, "transB", false)? {
        b_rows
    } else {
        b_columns
    };
    Some(Extent::of(vec![row, column]))
}

fn size(x: &Extent) -> Extent {
    let count = x.dims().and_then(|_| i64::try_from(x.count).ok());
    Extent::of(vec![]).with(count.map(|n| vec![n]))
}

fn shape(node: &NodeProto, x: &Extent) -> Extent {
    let Some(dims) = x.dims() else {
        return Extent::flat(super::RANK_MAX as u64);
    };
    let rank = dims.len() as i64;
    let place = |name: &str, default: i64| {
        let at = int(node, name).unwrap_or(default);
        let at = if at < 0 { at.saturating_add(rank) } else { at };
        at.clamp(0, rank) as usize
    };
    let (start, end) = (place("start", 0), place("end", rank));
    let asked = &dims[start..end.max(start)];
    let numbers = asked.iter().map(|&n| i64::try_from(n).ok()).collect();
    Extent::of(vec![asked.len() as u64]).with(numbers)
}

fn transposed(node: &NodeProto, x: &Extent) -> Option<Extent> {
    let dims = x.dims()?;
    let moved: Vec<u64> = match ints(node, "perm") {
        [] => dims.iter().rev().copied().collect(),
        perm => {
            let mut sorted = perm.to_vec();
            sorted.sort_unstable();
            sorted
                .iter()
                .copied()
                .eq(0..dims.len() as i64)
                .then_some(())?;
            perm.iter().map(|&from| dims[from as usize]).collect()
        }
    };
    let numbers = x.numbers.clone().filter(|_| dims.len() < 2);
    Some(Extent::of(moved).with(numbers))
}

/// Operators that take number by number: as large as all inputs together.
const ELEMENTWISE: &[&str] = &[
    "Abs",
    "Add",
    "And",
    "BiasGelu",
    "BitShift",
    "BitwiseAnd",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseXor",
    "Cast",
    "Ceil",
    "Cos",
    "Div",
    "Elu",
    "Equal",
    "Erf",
    "Exp",
    "FastGelu",
    "Floor",
    "Gelu",
    "Greater",
    "GreaterOrEqual",
    "HardSigmoid",
    "HardSwish",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Less",
    "LessOrEqual",
    "Log",
    "Max",
    "Mean",
    "Min",
    "Mish",
    "Mod",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "PRelu",
    "Pow",
    "QuickGelu",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softplus",
    "Sqrt",
    "Sub",
    "Sum",
    "Swish",
    "Tan",
    "Tanh",
    "Where",
    "Xor",
];

/// Operators whose first input's size is their output's: see [`Extents::kept`].
const KEPT: &[&str] = &[
    "CumSum",
    "Clip",
    "Dropout",
    "LayerNormalization",
    "LogSoftmax",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "Softmax",
    "Trilu",
];
