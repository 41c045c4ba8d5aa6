//! Operators whose outputs' sizes follow from their inputs'.

use super::Extents;
use super::numbers::arithmetic;
use super::value::{Extent, matmul};
use crate::onnx::{int, ints};
use std::collections::HashMap;
use tract_onnx::pb::NodeProto;

impl Extents<'_> {
    /// Operators whose outputs' sizes follow from their inputs'; `None` for unknown ones.
    pub(super) fn shaped(&self, node: &NodeProto) -> Option<Vec<Extent>> {
        let x = |i: usize| self.input(node, i);
        let one = |extent: Extent| Some(vec![extent]);
        let axis = |default: i64| int(node, "axis").unwrap_or(default);
        let op = node.op_type.as_str();
        if let Some(operator) = arithmetic(op) {
            return one(self.elementwise(node, operator)?);
        }
        match op {
            "Shape" => {
                let dims = x(0)?.dims.as_ref()?;
                let place = |name: &str, default: i64| {
                    let at = int(node, name).unwrap_or(default);
                    let at = if at < 0 {
                        at.saturating_add(dims.len() as i64)
                    } else {
                        at
                    };
                    at.clamp(0, dims.len() as i64) as usize
                };
                let (start, end) = (place("start", 0), place("end", dims.len() as i64));
                let asked = dims.get(start..end.max(start))?;
                let numbers = asked.iter().map(|&n| n as f64).collect();
                one(Extent::of(vec![asked.len() as u64]).with(Some(numbers)))
            }
            "Size" => one(Extent::of(vec![]).with(Some(vec![x(0)?.count as f64]))),
            "Identity" | "Dropout" | "CastLike" => one(Extent {
                is_fixed: false,
                ..x(0)?.clone()
            }),
            "Squeeze" | "Unsqueeze" | "Flatten" | "Reshape" => {
                let made = self.reshaped(node).unwrap_or_else(|| Extent::flat(0));
                let count = x(0)?.count;
                // The numbers stay what they were.
                one(Extent { count, ..made }.with(x(0)?.numbers.clone()))
            }
            "Transpose" => {
                let dims = x(0)?.dims.as_ref()?;
                let moved = match ints(node, "perm") {
                    [] => dims.iter().rev().copied().collect(),
                    perm => perm
                        .iter()
                        .map(|&from| dims.get(usize::try_from(from).ok()?).copied())
                        .collect::<Option<Vec<_>>>()?,
                };
                let numbers = x(0)?.numbers.clone().filter(|_| dims.len() < 2);
                one(Extent::of(moved).with(numbers))
            }
            "Concat" => {
                let all = (0..node.input.len()).map(x).collect::<Option<Vec<_>>>()?;
                let (first, axis) = (all.first()?, axis(0));
                let mut sum = 0u64;
                for part in &all {
                    let size = part.dims.as_ref()?.get(first.axis(axis)?)?;
                    sum = sum.saturating_add(*size);
                }
                let numbers = all.iter().map(|part| part.numbers.clone());
                let numbers: Option<Vec<_>> = numbers.collect();
                let numbers = numbers
                    .filter(|_| first.rank() == 1)
                    .map(|all| all.concat());
                one(first.resized(axis, sum)?.with(numbers))
            }
            "Split" => Some(self.split(node)?),
            "Slice" => one(self.slice(node)?),
            "Gather" | "GatherBlockQuantized" => {
                let is_packed = op != "Gather" && int(node, "bits").unwrap_or(4) == 4;
                let at = int(
                    node,
                    if op == "Gather" {
                        "axis"
                    } else {
                        "gather_axis"
                    },
                );
                let (data, ids) = (x(0)?, x(1)?);
                let at = data.axis(at.unwrap_or(0))?;
                let mut dims = data.dims.clone()?;
                dims.splice(at..=at, ids.dims.clone()?);
                if let Some(last) = dims.last_mut().filter(|_| is_packed) {
                    *last = last.saturating_mul(2);
                }
                let numbers = data.numbers.as_ref().zip(ids.ints());
                let numbers = numbers.filter(|_| data.rank() == 1).and_then(|(all, ids)| {
                    let index = |id: i64| if id < 0 { id + all.len() as i64 } else { id };
                    let number = |id: &i64| all.get(usize::try_from(index(*id)).ok()?).copied();
                    ids.iter().map(number).collect()
                });
                one(Extent::of(dims).with(numbers))
            }
            "GatherElements" => one(x(1)?.alike()),
            "GatherND" => {
                let (data, ids) = (x(0)?.dims.as_ref()?, x(1)?.dims.as_ref()?);
                let (depth, shared) = ids.split_last()?;
                let batch = int(node, "batch_dims").unwrap_or(0).max(0) as u64;
                let from = usize::try_from(depth.saturating_add(batch)).ok()?;
                let rest = data.get(from..)?;
                one(Extent::of([shared, rest].concat()))
            }
            "NonZero" => one(Extent::of(vec![x(0)?.rank().max(1) as u64, x(0)?.count])),
            "MatMul" | "MatMulInteger" => one(matmul(x(0)?, x(1)?)?),
            "QLinearMatMul" => one(matmul(x(0)?, x(3)?)?),
            "Gemm" => {
                let side = |i: usize, flag: &str| {
                    let dims = x(i)?.dims.as_ref()?;
                    let flipped = int(node, flag).unwrap_or(0) != 0;
                    dims.get(usize::from((i == 1) != flipped)).copied()
                };
                one(Extent::of(vec![side(0, "transA")?, side(1, "transB")?]))
            }
            "MatMulNBits" => {
                // Each output has some weights; what is stated beyond them is refused where they are read.
                let stated = u64::try_from(int(node, "N").unwrap_or(0)).unwrap_or(0);
                let width = stated.min(x(1)?.count);
                one(x(0)?.resized(-1, width)?)
            }
            "Conv" | "ConvInteger" => {
                let (data, kernel) = (x(0)?.dims.as_ref()?, x(1)?.dims.as_ref()?);
                let pads = ints(node, "pads").iter();
                let pads = pads.fold(0, |all: u64, &n| all.saturating_add(n.max(0) as u64));
                let padded = data.iter().skip(2).map(|n| n.saturating_add(pads));
                let fronts = [*data.first()?, *kernel.first()?];
                one(Extent::of(fronts.into_iter().chain(padded).collect()))
            }
            "Einsum" => one(self.einsum(node)?),
            "GroupQueryAttention" | "MultiHeadAttention" | "Attention" => self.attention(node),
            "ArgMax" | "ArgMin" => one(x(0)?
                .resized(axis(0), 1)
                .unwrap_or_else(|| x(0).map(Extent::alike).unwrap_or_default())),
            _ if op.starts_with("Reduce") => one(self.reduced(node)?),
            "DynamicQuantizeLinear" => {
                let number = || Extent::of(vec![]);
                Some(vec![x(0)?.alike(), number(), number()])
            }
            // All outputs: a norm's fourth is the sum that it normalises.
            _ if ALIKE.contains(&op) => Some(vec![x(0)?.alike(); node.output.len()]),
            _ => None,
        }
    }

    /// One number for each choice of the letters behind the arrow.
    fn einsum(&self, node: &NodeProto) -> Option<Extent> {
        let equation = node.attribute.iter().find(|a| a.name == "equation")?;
        let equation = String::from_utf8_lossy(&equation.s).replace(' ', "");
        let (inputs, output) = equation.split_once("->")?;
        let mut sizes: HashMap<char, u64> = HashMap::new();
        for (index, letters) in inputs.split(',').enumerate() {
            let dims = self.input(node, index)?.dims.as_ref()?;
            if letters.chars().count() != dims.len() {
                return None;
            }
            for (letter, &n) in letters.chars().zip(dims) {
                let size = sizes.entry(letter).or_insert(n);
                *size = n.max(*size);
            }
        }
        let dims = output.chars().map(|letter| sizes.get(&letter).copied());
        Some(Extent::of(dims.collect::<Option<_>>()?))
    }

    /// The result, keys, values, and what `Attention` has of products on the way.
    fn attention(&self, node: &NodeProto) -> Option<Vec<Extent>> {
        let query = self.input(node, 0)?;
        let (past, new) = match node.op_type.as_str() {
            "Attention" => ([4, 5], [1, 2]),
            "GroupQueryAttention" => ([3, 4], [1, 2]),
            _ => ([6, 7], [1, 2]),
        };
        let tokens = |x: &Extent| {
            let dims = x.dims.as_ref()?;
            dims.get(dims.len().checked_sub(2)?).copied()
        };
        let heads = ["q_num_heads", "num_heads"]
            .iter()
            .find_map(|name| int(node, name));
        let heads = heads.map_or_else(
            || query.dims.as_ref()?.get(1).copied(),
            |n| u64::try_from(n).ok(),
        )?;
        let all = past
            .map(|i| self.input(node, i))
            .into_iter()
            .flatten()
            .filter_map(tokens)
            .max();
        let all = all.unwrap_or(0).saturating_add(
            new.iter()
                .filter_map(|&i| tokens(self.input(node, i)?))
                .max()
                .unwrap_or(tokens(query)?),
        );
        let products = Extent::of(vec![heads, tokens(query)?, all]);
        let cached = |i: usize| {
            let past = self.input(node, past[i])?;
            past.resized(-2, all)
        };
        // What is handed on is as wide as the queries, or the products where those are more.
        let result = Extent {
            count: query.count.max(products.count),
            ..query.alike()
        };
        let [keys, values] = [0, 1].map(|i| {
            cached(i).unwrap_or_else(|| {
                self.input(node, new[i])
                    .map(Extent::alike)
                    .unwrap_or_default()
            })
        });
        Some(vec![result, keys, values, products])
    }
}

/// Operators whose outputs are as large as their first input.
const ALIKE: &[&str] = &[
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BatchNormalization",
    "BiasGelu",
    "BitwiseNot",
    "Celu",
    "Clip",
    "Compress",
    "Cos",
    "Cosh",
    "CumSum",
    "DepthToSpace",
    "DequantizeLinear",
    "Elu",
    "Erf",
    "EyeLike",
    "FastGelu",
    "Gelu",
    "GroupNormalization",
    "HardSigmoid",
    "HardSwish",
    "Hardmax",
    "InstanceNormalization",
    "IsInf",
    "IsNaN",
    "LRN",
    "LayerNormalization",
    "LeakyRelu",
    "LogSoftmax",
    "LpNormalization",
    "MeanVarianceNormalization",
    "Mish",
    "QuantizeLinear",
    "QuickGelu",
    "RMSNormalization",
    "RandomNormalLike",
    "RandomUniformLike",
    "RotaryEmbedding",
    "Scatter",
    "ScatterElements",
    "ScatterND",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "SimplifiedLayerNormalization",
    "Sin",
    "Sinh",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "Softmax",
    "Softplus",
    "SpaceToDepth",
    "Swish",
    "Tan",
    "Tanh",
    "Trilu",
];
