//! The types of values, as far as they follow from what makes them.

use crate::onnx::{Graph, graphs, input, input_type, int};
use std::collections::HashMap;
use tract_onnx::pb::NodeProto;
use tract_onnx::pb::tensor_proto::DataType;

/// Whether a number's type is a float of any width.
pub(super) fn is_float(of: i32) -> bool {
    let floats = [
        DataType::Float,
        DataType::Float16,
        DataType::Bfloat16,
        DataType::Double,
    ];
    floats.iter().any(|float| *float as i32 == of)
}

/// The types of a graph's values, without those in branches.
pub(super) fn types(graph: &Graph) -> HashMap<String, i32> {
    let mut types: HashMap<String, i32> = HashMap::new();
    for tensor in &graph.proto().initializer {
        types.insert(tensor.name.clone(), tensor.data_type);
    }
    for input in &graph.proto().input {
        if let Some(of) = input_type(input) {
            types.insert(input.name.clone(), of);
        }
    }
    for node in &graph.proto().node {
        let of = |index: usize| input(node, index).and_then(|name| types.get(name)).copied();
        let made = made(node, of);
        for (name, made) in node.output.iter().zip(made) {
            types.extend(made.map(|made| (name.clone(), made)));
        }
    }
    types
}

/// The types of a node's outputs, from those of its inputs. What an `If` makes, its branches say.
pub(super) fn made(node: &NodeProto, of: impl Fn(usize) -> Option<i32>) -> Vec<Option<i32>> {
    let (int64, bool, float) = (DataType::Int64, DataType::Bool, DataType::Float);
    let (int64, bool, float) = (int64 as i32, bool as i32, float as i32);
    let first = match node.op_type.as_str() {
        _ if graphs(node).next().is_some() => None,
        "Shape" | "Size" | "ArgMax" | "ArgMin" | "NonZero" => Some(int64),
        "Cast" => int(node, "to").map(|to| to as i32),
        "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "And" | "Or" | "Not"
        | "Xor" | "IsNaN" | "IsInf" => Some(bool),
        "Where" => of(1).or(of(2)),
        "ConstantOfShape" => {
            let value = node.attribute.iter().find(|a| a.name == "value");
            Some(
                value
                    .and_then(|a| a.t.as_ref())
                    .map_or(float, |t| t.data_type),
            )
        }
        "OneHot" => of(2),
        "MatMulInteger" => Some(DataType::Int32 as i32),
        "DynamicQuantizeLinear" => Some(DataType::Uint8 as i32),
        "DequantizeLinear" | "GatherBlockQuantized" => Some(float),
        "QuantizeLinear" => of(2).or(Some(DataType::Uint8 as i32)),
        op if KEEPS_TYPE.contains(&op) => of(0),
        _ => None,
    };
    let mut made = vec![first; node.output.len()];
    match (node.op_type.as_str(), made.get_mut(1)) {
        ("DynamicQuantizeLinear", Some(scale)) => *scale = Some(float),
        ("Dropout", Some(kept)) => *kept = Some(bool),
        ("TopK", Some(places)) => *places = Some(int64),
        _ => {}
    }
    made
}

/// Operators whose outputs are of their first input's type.
const KEEPS_TYPE: [&str; 71] = [
    "Abs",
    "Add",
    "Attention",
    "BiasGelu",
    "Ceil",
    "Clip",
    "Concat",
    "Cos",
    "CumSum",
    "Div",
    "Dropout",
    "Erf",
    "Exp",
    "Expand",
    "FastGelu",
    "Flatten",
    "Floor",
    "Gather",
    "GatherElements",
    "GatherND",
    "Gelu",
    "Gemm",
    "GroupQueryAttention",
    "Identity",
    "LayerNormalization",
    "Log",
    "MatMul",
    "MatMulNBits",
    "Max",
    "Min",
    "Mod",
    "Mul",
    "MultiHeadAttention",
    "Neg",
    "Pad",
    "Pow",
    "QuickGelu",
    "RMSNormalization",
    "Range",
    "Reciprocal",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "Relu",
    "Reshape",
    "RotaryEmbedding",
    "Round",
    "ScatterElements",
    "ScatterND",
    "Sigmoid",
    "Sign",
    "SimplifiedLayerNormalization",
    "Sin",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "Slice",
    "Softmax",
    "Softplus",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Sum",
    "Tanh",
    "Tile",
    "TopK",
    "Transpose",
    "Trilu",
    "Unsqueeze",
];
