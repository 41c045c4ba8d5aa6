//! Recognises linears and the embedding and puts our operators in their place, one for one. Joining neighbours is
//! `fuse`'s; arithmetic is nobody's here. What it doesn't know stays as it is, for tract.

use super::weight::{self, bias};
use super::{EMBED, LINEAR, nbits};
use crate::onnx::{Graph, GraphError, input, new_node, output, with_ints};
use crate::recipe::{Order, Recipe, Scaling, Scope, WeightSource};
use prost::Message;
use tract_onnx::pb::NodeProto;

/// Operators that a linear was recognised in, where they are kept: a product, a dequantisation, transpositions.
const ORIGIN_MAX: usize = 8;
/// What these take in the file at most; they are kept for each linear that reads them.
const ORIGIN_BYTES_MAX: usize = 4096;

/// A linear that was recognised, and where its result goes.
struct Linear {
    x: String,
    output: String,
    source: WeightSource,
    bias: Option<Vec<f32>>,
    /// See [`Recipe::origins`].
    origin: Option<Vec<NodeProto>>,
}

/// Replaces every recognised linear and embedding.
pub(super) fn linears(graph: &mut Graph, recipe: &mut Recipe) -> Result<(), GraphError> {
    for index in 0..graph.proto().node.len() {
        let node = graph.node(index);
        let found = match node.op_type.as_str() {
            "MatMul" => matmul(graph, node),
            "MatMulNBits" => Some(n_bits(graph, node)?),
            "MatMulInteger" => integer(graph, node),
            _ => None,
        };
        if let Some(found) = found {
            put(graph, recipe, found);
        } else if let Some((ids, table)) = embedding(graph, graph.node(index))? {
            let out = graph.node(index).output[0].clone();
            let width = table.cols;
            let weight = recipe.weight(table);
            let node = with_ints(new_node(EMBED, &[&ids], &[&out]), "weights", &[weight]);
            graph.proto_mut().node[index] = with_ints(node, "widths", &[width]);
        }
    }
    graph.sweep();
    Ok(())
}

/// Puts a linear in the place of the last node that made its result.
fn put(graph: &mut Graph, recipe: &mut Recipe, mut found: Linear) {
    if found.bias.is_none()
        && let Some((add, values)) = bias(graph, &found.output, found.source.rows)
    {
        found.output = add.output[0].clone();
        found.bias = Some(values);
    }
    let rows = found.source.rows;
    let weight = recipe.weight(found.source);
    recipe.linears.insert(weight);
    if let Some(origin) = found.origin {
        recipe.origins.insert(found.output.clone(), origin);
    }
    let node = new_node(LINEAR, &[&found.x], &[&found.output]);
    let mut node = with_ints(with_ints(node, "weights", &[weight]), "widths", &[rows]);
    if let Some(values) = found.bias {
        node = with_ints(node, "bias", &[recipe.table(values)]);
    }
    if let Some(at) = graph.place(&found.output) {
        graph.proto_mut().node[at] = node;
    }
}

/// `MatMul(x, W)`, W stored `[inputs, outputs]` or behind operators that say so.
fn matmul(graph: &Graph, node: &NodeProto) -> Option<Linear> {
    let source = weight::behind(graph, input(node, 1)?, Order::ColumnMajor)?;
    activations(graph, input(node, 0)?).then_some(())?;
    let mut linear = linear(node, source, None)?;
    linear.origin = origin(graph, node);
    Some(linear)
}

/// The product itself, and what makes its second operand: a few operators.
fn origin(graph: &Graph, product: &NodeProto) -> Option<Vec<NodeProto>> {
    let mut nodes = vec![product];
    let mut queue = vec![&product.input[1]];
    while let Some(node) = queue.pop().and_then(|name| graph.producer(name)) {
        nodes.push(node);
        if nodes.len() > ORIGIN_MAX {
            return None;
        }
        queue.extend(node.input.iter().filter(|name| !graph.is_initializer(name)));
    }
    let bytes: usize = nodes.iter().map(|node| node.encoded_len()).sum();
    (bytes <= ORIGIN_BYTES_MAX).then(|| nodes.into_iter().cloned().collect())
}

fn n_bits(graph: &Graph, node: &NodeProto) -> Result<Linear, GraphError> {
    let source = nbits::weight(graph, node)?;
    let wrong = || {
        GraphError::Shape(format!(
            "has a node {} whose bias is no stored vector of its outputs",
            node.name
        ))
    };
    let bias = match input(node, 5) {
        None => None,
        Some(name) => {
            let values = graph
                .values(name)
                .filter(|values| values.len() == source.rows);
            Some(values.ok_or_else(wrong)?)
        }
    };
    let mut linear = linear(node, source, bias).ok_or_else(|| {
        GraphError::Shape(format!("has a node {} without input or output", node.name))
    })?;
    linear.origin = (node.encoded_len() <= ORIGIN_BYTES_MAX).then(|| {
        let mut product = node.clone();
        // Up to the zero points: the bias is ours.
        product.input.truncate(4);
        vec![product]
    });
    Ok(linear)
}

/// `MatMul(a, b)` for what `MatMulInteger` computes of two values that were quantised on the way: attention's products
/// in exports that quantise all they can. The rounding is theirs, not the model's.
pub(super) fn unquantise(graph: &mut Graph) {
    for index in 0..graph.proto().node.len() {
        if let Some((node, out)) = product(graph, graph.node(index))
            && let Some(at) = graph.place(&out)
        {
            graph.proto_mut().node[at] = node;
        }
    }
    graph.sweep();
}

fn product(graph: &Graph, node: &NodeProto) -> Option<(NodeProto, String)> {
    if node.op_type != "MatMulInteger" {
        return None;
    }
    let quantised = |at: usize, zero: usize| {
        let by = graph.made_by(input(node, at)?, "DynamicQuantizeLinear")?;
        (input(node, zero) == output(by, 2)).then_some(by)
    };
    let (a, b) = (quantised(0, 2)?, quantised(1, 3)?);
    let scaled = scaled(graph, node)?;
    let factors = [input(scaled.factors, 0)?, input(scaled.factors, 1)?];
    let scales = [output(a, 1)?, output(b, 1)?];
    if factors != scales && factors != [scales[1], scales[0]] {
        return None;
    }
    let product = new_node("MatMul", &[input(a, 0)?, input(b, 0)?], &[scaled.output]);
    Some((product, scaled.output.to_owned()))
}

/// What stands behind a `MatMulInteger`: `Mul(Cast(·), Mul(scale, scale))`, the factors in any order.
struct Scaled<'a> {
    factors: &'a NodeProto,
    output: &'a str,
}

fn scaled<'a>(graph: &'a Graph, node: &NodeProto) -> Option<Scaled<'a>> {
    let cast = graph
        .sole_consumer(output(node, 0)?)
        .filter(|n| n.op_type == "Cast")?;
    let cast = output(cast, 0)?;
    let product = graph.sole_consumer(cast).filter(|n| n.op_type == "Mul")?;
    let factors = graph.made_by(super::norm::other(product, cast)?, "Mul")?;
    let output = output(product, 0)?;
    Some(Scaled { factors, output })
}

/// `Mul(Cast(MatMulInteger(x_q, W, x_zero, W_zero)), Mul(x_scale, W_scale))` with x_q, x_scale and x_zero from
/// `DynamicQuantizeLinear(x)`: what ONNX Runtime's dynamic quantisation makes of a `MatMul`. Its activations are
/// quantised per tensor; ours per token and block, so that x itself is what is taken.
fn integer(graph: &Graph, node: &NodeProto) -> Option<Linear> {
    let quantise = graph.made_by(input(node, 0)?, "DynamicQuantizeLinear")?;
    if input(node, 2) != output(quantise, 2) {
        return None;
    }
    let Scaled {
        factors,
        output: out,
    } = scaled(graph, node)?;
    let scales = super::norm::other(factors, output(quantise, 1)?)?;
    let scope = match graph.initializer(scales)?.dims.as_slice() {
        [] | [1] => Scope::Matrix,
        _ => Scope::Row,
    };
    let scaling = Scaling {
        scope,
        scales: scales.to_owned(),
        zero_points: input(node, 3).map(str::to_owned),
    };
    let (values, order) = weight::transposed(graph, input(node, 1)?, Order::ColumnMajor);
    let source = weight::whole(graph, values, order, &scaling)?;
    Some(Linear {
        x: input(quantise, 0)?.to_owned(),
        output: out.to_owned(),
        source,
        bias: None,
        origin: None,
    })
}

fn linear(node: &NodeProto, source: WeightSource, bias: Option<Vec<f32>>) -> Option<Linear> {
    Some(Linear {
        x: input(node, 0)?.to_owned(),
        output: output(node, 0)?.to_owned(),
        source,
        bias,
        origin: None,
    })
}

/// Whether a value could be activations: what is stored, or counted from positions, is not.
fn activations(graph: &Graph, value: &str) -> bool {
    !graph.is_initializer(value) && !graph.is_input(value)
}

fn embedding(
    graph: &Graph,
    node: &NodeProto,
) -> Result<Option<(String, WeightSource)>, GraphError> {
    // What is dequantised afterwards is part of a table.
    let read_by =
        |op: &str| output(node, 0).is_some_and(|out| graph.consumers(out).any(|n| n.op_type == op));
    if node.op_type == "Gather" && read_by("DequantizeLinear") {
        return Ok(None);
    }
    let found = if node.op_type == "GatherBlockQuantized" {
        let ids = input(node, 1).map(str::to_owned);
        Some(nbits::table(graph, node)?).and_then(|table| Some((ids?, table)))
    } else {
        weight::embedding(graph, node)
    };
    // Other tables, of positions or angles, are looked up exactly.
    Ok(found.filter(|(ids, _)| ids == "input_ids" && output(node, 0).is_some()))
}
