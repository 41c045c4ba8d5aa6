//! A node's attributes and inputs, and nodes in the making.

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{
    AttributeProto, GraphProto, NodeProto, TensorProto, attribute_proto::AttributeType,
};

fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|a| a.name == name)
}

pub(crate) fn int(node: &NodeProto, name: &str) -> Option<i64> {
    attribute(node, name).map(|a| a.i)
}

pub(crate) fn float(node: &NodeProto, name: &str) -> Option<f32> {
    attribute(node, name).map(|a| a.f)
}

/// Whether a float attribute has this value, or is absent where this is its default.
pub(crate) fn is_or_absent(node: &NodeProto, name: &str, value: f32) -> bool {
    float(node, name).is_none_or(|stated| stated.to_bits() == value.to_bits())
}

pub(crate) fn ints<'a>(node: &'a NodeProto, name: &str) -> &'a [i64] {
    attribute(node, name).map_or(&[], |a| &a.ints)
}

/// The graphs inside a node: branches and bodies.
pub(crate) fn graphs(node: &NodeProto) -> impl Iterator<Item = &GraphProto> {
    node.attribute
        .iter()
        .flat_map(|a| a.g.iter().chain(&a.graphs))
}

/// Where an axis is among `rank` ones, counted from the end if it is negative.
pub(crate) fn axis(axis: i64, rank: usize) -> Option<usize> {
    let from = if axis < 0 { rank as i64 } else { 0 };
    let at = usize::try_from(axis.checked_add(from)?).ok()?;
    (at < rank).then_some(at)
}

/// A node to be added to a graph.
pub(crate) fn new_node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto {
        op_type: op.into(),
        name: outputs
            .first()
            .map(|name| format!("{op}/{name}"))
            .unwrap_or_default(),
        input: inputs.iter().map(ToString::to_string).collect(),
        output: outputs.iter().map(ToString::to_string).collect(),
        ..NodeProto::default()
    }
}

/// The same node with an attribute of whole numbers.
pub(crate) fn with_ints(mut node: NodeProto, name: &str, values: &[usize]) -> NodeProto {
    node.attribute.push(AttributeProto {
        name: name.into(),
        r#type: AttributeType::Ints as i32,
        ints: values.iter().map(|&v| v as i64).collect(),
        ..AttributeProto::default()
    });
    node
}

/// An attribute of one whole number.
pub(crate) fn int_attribute(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        r#type: AttributeType::Int as i32,
        i: value,
        ..AttributeProto::default()
    }
}

/// The same node with a float attribute.
pub(crate) fn with_float(mut node: NodeProto, name: &str, value: f32) -> NodeProto {
    node.attribute.push(AttributeProto {
        name: name.into(),
        r#type: AttributeType::Float as i32,
        f: value,
        ..AttributeProto::default()
    });
    node
}

/// A stored vector of whole numbers, to be added to a graph.
pub(crate) fn int_vector(name: &str, values: Vec<i64>) -> TensorProto {
    TensorProto {
        name: name.into(),
        data_type: DataType::Int64 as i32,
        dims: vec![values.len() as i64],
        int64_data: values,
        ..TensorProto::default()
    }
}

/// Stored f32 numbers, to be added to a graph.
pub(crate) fn float_tensor(name: &str, dims: &[usize], values: &[f32]) -> TensorProto {
    TensorProto {
        name: name.into(),
        data_type: DataType::Float as i32,
        dims: dims.iter().map(|&dim| dim as i64).collect(),
        raw_data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        ..TensorProto::default()
    }
}

/// A node's input, if it has this one.
pub(crate) fn input(node: &NodeProto, index: usize) -> Option<&str> {
    let name = node.input.get(index).map(String::as_str);
    name.filter(|name| !name.is_empty())
}

/// A node's output, if anybody may read this one.
pub(crate) fn output(node: &NodeProto, index: usize) -> Option<&str> {
    let name = node.output.get(index).map(String::as_str);
    name.filter(|name| !name.is_empty())
}
