//! Makes exports alike before anything is recognised in them: one branch, no constant nodes, one float type, no
//! nodes that do nothing. What a graph computes stays the same, but for floats that become wider.

use super::types::{is_float, types};
use super::{branch, extent};
use crate::folder::Heads;
use crate::onnx::{Graph, GraphError, Numbers, elements, input, int, output, set_dim};
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{
    AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, type_proto,
};

/// Numbers that are added or multiplied while importing, at most.
const FOLDED_MAX: usize = 1 << 16;

pub(crate) fn tidy(graph: &mut Graph) -> Result<(), GraphError> {
    branch::branches(graph)?;
    constants(graph.proto_mut());
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

/// `Constant` nodes become initializers, in branches too.
fn constants(graph: &mut GraphProto) {
    let nodes = std::mem::take(&mut graph.node);
    for mut node in nodes {
        let value = (node.op_type == "Constant")
            .then(|| constant(&mut node))
            .flatten();
        if let Some(tensor) = value {
            graph.initializer.push(tensor);
            continue;
        }
        let inner = node.attribute.iter_mut();
        inner
            .flat_map(|a| a.g.iter_mut().chain(&mut a.graphs))
            .for_each(constants);
        graph.node.push(node);
    }
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
