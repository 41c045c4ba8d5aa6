//! Root-mean-square norms, however an exporter writes them, become `RMSNormalization`.

use crate::onnx::{Graph, float, input, int, new_node, output, with_float};
use tract_onnx::pb::NodeProto;

/// The standard's operator; its axis is the last by default.
const NORM: &str = "RMSNormalization";

pub(crate) fn norms(graph: &mut Graph) {
    split_contrib(graph);
    join_primitives(graph);
    graph.sweep();
}

/// `SimplifiedLayerNormalization(x, gain)`, and `SkipSimplifiedLayerNormalization(x, skip, gain, bias)`, whose fourth
/// output is the sum that it normalises.
///
/// The operators: <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>
fn split_contrib(graph: &mut Graph) {
    let nodes = std::mem::take(&mut graph.proto_mut().node);
    let mut made = Vec::with_capacity(nodes.len());
    for node in nodes {
        match node.op_type.as_str() {
            "SimplifiedLayerNormalization" if is_last_axis(&node) => made.extend(simplified(&node)),
            "SkipSimplifiedLayerNormalization" => made.extend(with_skip(&node)),
            _ => made.push(node),
        }
    }
    graph.proto_mut().node = made;
    graph.index();
}

fn is_last_axis(node: &NodeProto) -> bool {
    int(node, "axis").unwrap_or(-1) == -1 && output(node, 1).is_none()
}

fn simplified(node: &NodeProto) -> Vec<NodeProto> {
    match (input(node, 0), input(node, 1), output(node, 0)) {
        (Some(x), Some(gain), Some(out)) => vec![norm(x, gain, epsilon(node), out)],
        _ => vec![node.clone()],
    }
}

fn with_skip(node: &NodeProto) -> Vec<NodeProto> {
    let parts = (
        input(node, 0),
        input(node, 1),
        input(node, 2),
        output(node, 0),
    );
    let (Some(x), Some(skip), Some(gain), Some(out)) = parts else {
        return vec![node.clone()];
    };
    let sum = output(node, 3).map_or_else(|| format!("{out}/sum"), str::to_owned);
    let mut made = Vec::new();
    let mut skip = skip.to_owned();
    if let Some(bias) = input(node, 3) {
        let biased = format!("{out}/biased");
        made.push(new_node("Add", &[&skip, bias], &[&biased]));
        skip = biased;
    }
    made.push(new_node("Add", &[x, &skip], &[&sum]));
    made.push(norm(&sum, gain, epsilon(node), out));
    made
}

/// The attribute; the two operators differ in its default.
fn epsilon(node: &NodeProto) -> f32 {
    let default = if node.op_type.starts_with("Skip") {
        1e-12
    } else {
        1e-5
    };
    float(node, "epsilon").unwrap_or(default)
}

fn norm(x: &str, gain: &str, epsilon: f32, out: &str) -> NodeProto {
    with_float(new_node(NORM, &[x, gain], &[out]), "epsilon", epsilon)
}

/// `x · 1/√(mean(x²) + ε) · gain`, found from the mean.
fn join_primitives(graph: &mut Graph) {
    for index in 0..graph.proto().node.len() {
        if graph.node(index).op_type != "ReduceMean" {
            continue;
        }
        if let Some((place, node)) = primitive(graph, graph.node(index))
            && let Some(at) = graph.place(&place)
        {
            graph.proto_mut().node[at] = node;
        }
    }
    graph.index();
}

/// The value that a norm around this mean makes, and the operator that makes it.
fn primitive(graph: &Graph, mean: &NodeProto) -> Option<(String, NodeProto)> {
    let square = graph.producer(input(mean, 0)?)?;
    let x = input(square, 0)?;
    let squared = match square.op_type.as_str() {
        "Pow" => graph.scalar(input(square, 1)?) == Some(2.0),
        "Mul" => input(square, 1) == Some(x),
        _ => false,
    };
    let axes = match input(mean, 1) {
        Some(axes) => vec![graph.scalar(axes)? as i64],
        None => crate::onnx::ints(mean, "axes").to_vec(),
    };
    if !squared || axes != [-1] || int(mean, "keepdims").unwrap_or(1) != 1 {
        return None;
    }
    let sum = graph
        .sole_consumer(output(mean, 0)?)
        .filter(|n| n.op_type == "Add")?;
    let epsilon = sum.input.iter().find_map(|name| graph.scalar(name))?;
    let root = graph
        .sole_consumer(output(sum, 0)?)
        .filter(|n| n.op_type == "Sqrt")?;
    let root = output(root, 0)?;
    let divided = graph.sole_consumer(root)?;
    let scaled = match divided.op_type.as_str() {
        "Div" if input(divided, 0) == Some(x) && input(divided, 1) == Some(root) => divided,
        "Div" if graph.scalar(input(divided, 0)?) == Some(1.0) => {
            times(graph, output(divided, 0)?, x)?
        }
        "Reciprocal" => times(graph, output(divided, 0)?, x)?,
        _ => return None,
    };
    let scaled = output(scaled, 0)?;
    let gained = graph.sole_consumer(scaled).filter(|n| n.op_type == "Mul")?;
    let gain = other(gained, scaled).filter(|gain| graph.is_vector(gain))?;
    let out = output(gained, 0)?;
    Some((out.to_owned(), norm(x, gain, epsilon, out)))
}

/// The product of a value, which nobody else reads, and x.
fn times<'a>(graph: &'a Graph, value: &str, x: &str) -> Option<&'a NodeProto> {
    let product = graph.sole_consumer(value).filter(|n| n.op_type == "Mul")?;
    (other(product, value) == Some(x)).then_some(product)
}

/// The input of a binary operator that isn't this one.
pub(super) fn other<'a>(node: &'a NodeProto, value: &str) -> Option<&'a str> {
    let [a, b] = node.input.as_slice() else {
        return None;
    };
    if a == value {
        Some(b)
    } else {
        (b == value).then_some(a.as_str())
    }
}
