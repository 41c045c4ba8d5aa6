//! Makes exports alike before anything is recognised in them: one branch, no constant nodes, one float type, no
//! nodes that do nothing. What a graph computes stays the same, but for floats that become wider.

use super::{branch, extent};
use crate::folder::Heads;
use crate::onnx::{Graph, GraphError, Numbers, elements, input, input_type, int, output, set_dim};
use std::collections::HashMap;
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{AttributeProto, NodeProto, TensorProto, ValueInfoProto, type_proto};

/// Numbers that are added or multiplied while importing, at most.
const FOLDED_MAX: usize = 1 << 16;

pub(crate) fn tidy(graph: &mut Graph) -> Result<(), GraphError> {
    branch::branches(graph)?;
    constants(graph);
    graph.admit()?;
    extent::bounded(graph)?;
    widen(graph);
    skip_idle(graph);
    fold(graph);
    // Readers of the graph find the logits in front.
    graph
        .proto_mut()
        .output
        .sort_by_key(|output| output.name != "logits");
    Ok(())
}

/// Writes into the cache's inputs what they leave open.
pub(super) fn state_heads(graph: &mut Graph, heads: Heads) {
    for input in &mut graph.proto_mut().input {
        if input.name.starts_with("past_key_values.") {
            for (axis, size) in [(1, heads.kv_heads), (3, heads.head_dim)] {
                if let Some(size) = size {
                    set_dim(input, axis, size);
                }
            }
        }
    }
}

/// `Constant` nodes become initializers.
fn constants(graph: &mut Graph) {
    let proto = graph.proto_mut();
    let nodes = std::mem::take(&mut proto.node);
    for mut node in nodes {
        let value = (node.op_type == "Constant")
            .then(|| constant(&mut node))
            .flatten();
        match value {
            Some(tensor) => proto.initializer.push(tensor),
            None => proto.node.push(node),
        }
    }
    graph.index();
}

fn constant(node: &mut NodeProto) -> Option<TensorProto> {
    let name = output(node, 0)?.to_owned();
    let attribute = node.attribute.first_mut()?;
    let ints = |ints: Vec<i64>, dims: Vec<i64>| TensorProto {
        data_type: DataType::Int64 as i32,
        int64_data: ints,
        dims,
        ..TensorProto::default()
    };
    let floats = |floats: Vec<f32>, dims: Vec<i64>| TensorProto {
        data_type: DataType::Float as i32,
        float_data: floats,
        dims,
        ..TensorProto::default()
    };
    let tensor = match attribute.name.as_str() {
        "value" => attribute.t.take()?,
        "value_int" => ints(vec![attribute.i], vec![]),
        "value_ints" => {
            let dims = vec![attribute.ints.len() as i64];
            ints(std::mem::take(&mut attribute.ints), dims)
        }
        "value_float" => floats(vec![attribute.f], vec![]),
        "value_floats" => {
            let dims = vec![attribute.floats.len() as i64];
            floats(std::mem::take(&mut attribute.floats), dims)
        }
        _ => return None,
    };
    Some(TensorProto { name, ..tensor })
}

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

/// All floats are f32 from here on: casts between them do nothing, and stored ones are read as f32 whatever they are.
fn widen(graph: &mut Graph) {
    let wide = DataType::Float as i64;
    let proto = graph.proto_mut();
    proto
        .input
        .iter_mut()
        .chain(&mut proto.output)
        .for_each(widen_info);
    for node in &mut graph.proto_mut().node {
        for attribute in &mut node.attribute {
            match (node.op_type.as_str(), attribute.name.as_str()) {
                ("Cast", "to") | ("DequantizeLinear", "output_dtype")
                    if is_float(attribute.i as i32) =>
                {
                    attribute.i = wide;
                }
                ("ConstantOfShape", "value") => widen_value(attribute),
                _ => {}
            }
        }
    }
}

/// A graph's input or output in f32, if it is some float.
fn widen_info(info: &mut ValueInfoProto) {
    let value = info.r#type.as_mut().and_then(|of| of.value.as_mut());
    if let Some(type_proto::Value::TensorType(tensor)) = value
        && is_float(tensor.elem_type)
    {
        tensor.elem_type = DataType::Float as i32;
    }
}

/// A one-element tensor attribute in f32.
fn widen_value(attribute: &mut AttributeProto) {
    let Some(tensor) = attribute.t.as_mut().filter(|t| is_float(t.data_type)) else {
        return;
    };
    if let Some(value) = Numbers::inline(tensor).map(|numbers| numbers.at(0)) {
        *tensor = TensorProto {
            data_type: DataType::Float as i32,
            float_data: vec![value],
            dims: tensor.dims.clone(),
            ..TensorProto::default()
        };
    }
    attribute.r#type = AttributeType::Tensor as i32;
}

/// Drops `Identity`, `Dropout` and casts from float to float.
fn skip_idle(graph: &mut Graph) {
    let types = types(graph);
    for index in 0..graph.proto().node.len() {
        let node = graph.node(index);
        let idle = match node.op_type.as_str() {
            "Identity" => true,
            "Dropout" => output(node, 1).is_none(),
            "Cast" => {
                let from = input(node, 0).and_then(|name| types.get(name)).copied();
                int(node, "to").is_some_and(|to| {
                    from.is_some_and(|from| {
                        from == to as i32 || is_float(from) && is_float(to as i32)
                    })
                })
            }
            _ => false,
        };
        let (Some(from), Some(to)) = (input(node, 0), output(node, 0)) else {
            continue;
        };
        if !idle {
            continue;
        }
        let (from, to) = (from.to_owned(), to.to_owned());
        if !graph.is_output(&to) {
            graph.replace_uses(&to, &from);
        } else if graph.producer(&from).is_some() && !graph.is_output(&from) {
            // Its maker takes the output's name over.
            graph.proto_mut().node[index].output.clear();
            graph.rename(&from, &to);
        }
    }
    graph.sweep();
}

/// Sums and products of small stored vectors and numbers, such as the gain `1 + w`.
fn fold(graph: &mut Graph) {
    for index in 0..graph.proto().node.len() {
        if let Some(tensor) = folded(graph, graph.node(index)) {
            graph.proto_mut().node[index].output.clear();
            graph.store(tensor);
        }
    }
    graph.sweep();
}

fn folded(graph: &Graph, node: &NodeProto) -> Option<TensorProto> {
    let operator: fn(f32, f32) -> f32 = match node.op_type.as_str() {
        "Add" => |a, b| a + b,
        "Mul" => |a, b| a * b,
        _ => return None,
    };
    let [a, b] = [
        graph.initializer(input(node, 0)?)?,
        graph.initializer(input(node, 1)?)?,
    ];
    let small = |t: &TensorProto| elements(t).is_some_and(|n| n <= FOLDED_MAX);
    let fit = is_float(a.data_type)
        && is_float(b.data_type)
        && small(a)
        && small(b)
        && a.dims.len() <= 1
        && b.dims.len() <= 1;
    if !fit {
        return None;
    }
    let is_number = a.dims.is_empty() && b.dims.is_empty();
    let [a, b] = [graph.values(&a.name)?, graph.values(&b.name)?];
    let values: Vec<f32> = match (a.as_slice(), b.as_slice()) {
        (&[a], b) => b.iter().map(|&b| operator(a, b)).collect(),
        (a, &[b]) => a.iter().map(|&a| operator(a, b)).collect(),
        (a, b) if a.len() == b.len() => a.iter().zip(b).map(|(&a, &b)| operator(a, b)).collect(),
        _ => return None,
    };
    let dims = if is_number {
        vec![]
    } else {
        vec![values.len() as i64]
    };
    Some(TensorProto {
        name: output(node, 0)?.to_owned(),
        data_type: DataType::Float as i32,
        dims,
        float_data: values,
        ..TensorProto::default()
    })
}

/// Operators whose outputs are of their first input's type.
const KEEPS_TYPE: [&str; 56] = [
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
    "Erf",
    "Exp",
    "Expand",
    "FastGelu",
    "Floor",
    "Gather",
    "GatherElements",
    "GatherND",
    "Gelu",
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
    "Neg",
    "Pow",
    "QuickGelu",
    "RMSNormalization",
    "Range",
    "Reciprocal",
    "ReduceMean",
    "ReduceSum",
    "Relu",
    "Reshape",
    "RotaryEmbedding",
    "ScatterND",
    "Sigmoid",
    "SimplifiedLayerNormalization",
    "Sin",
    "SkipSimplifiedLayerNormalization",
    "Slice",
    "Softmax",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Tanh",
    "Tile",
    "Transpose",
    "Trilu",
    "Unsqueeze",
];

/// The types of values, as far as they follow from what makes them.
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
        let made = match node.op_type.as_str() {
            "Shape" | "Size" | "ArgMax" | "NonZero" => Some(DataType::Int64 as i32),
            "Cast" => int(node, "to").map(|to| to as i32),
            "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "And" | "Or"
            | "Not" | "Xor" | "IsNaN" | "IsInf" => Some(DataType::Bool as i32),
            "Where" => of(1).or(of(2)),
            "ConstantOfShape" => {
                let value = node.attribute.iter().find(|a| a.name == "value");
                Some(
                    value
                        .and_then(|a| a.t.as_ref())
                        .map_or(DataType::Float as i32, |t| t.data_type),
                )
            }
            "MatMulInteger" => Some(DataType::Int32 as i32),
            "DynamicQuantizeLinear" => Some(DataType::Uint8 as i32),
            "DequantizeLinear" | "GatherBlockQuantized" => Some(DataType::Float as i32),
            "QuantizeLinear" => of(2).or(Some(DataType::Uint8 as i32)),
            // An If, a Loop or a Scan makes what its graphs make.
            _ if node.attribute.iter().any(|a| a.g.is_some()) => None,
            op if KEEPS_TYPE.contains(&op) => of(0),
            _ => None,
        };
        let Some(made) = made else { continue };
        for (index, name) in node.output.iter().enumerate() {
            let is_scale = node.op_type == "DynamicQuantizeLinear" && index == 1;
            let of = if is_scale {
                DataType::Float as i32
            } else {
                made
            };
            types.insert(name.clone(), of);
        }
    }
    types
}
