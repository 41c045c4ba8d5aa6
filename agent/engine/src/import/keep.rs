//! Leaves linears to tract whose results eight bits would change too much: a product in f32 in the place of ours.

use super::LINEAR;
use crate::onnx::{Graph, GraphError, float_tensor, ints, new_node};
use crate::recipe::{Recipe, WeightSource};
use crate::source::Source;
use std::collections::BTreeSet;
use tract_onnx::pb::NodeProto;

/// Of a model's weights at most one in so many stays in f32: they take four to eight times the room.
const SHARE: usize = 3;

/// What the f32 matrix is called of a linear with this output that is kept.
pub(crate) fn kept_matrix(linear: &str) -> String {
    format!("{linear}/matrix")
}

/// Replaces the linears on these weights, named by their initializers.
pub(super) fn keep(
    graph: &mut Graph,
    recipe: &mut Recipe,
    kept: &BTreeSet<String>,
) -> Result<(), GraphError> {
    let of = |node: &NodeProto| &recipe.weights[ints(node, "weights")[0] as usize];
    let is_linear = |node: &&NodeProto| node.op_type == LINEAR;
    let linears = graph.proto().node.iter().filter(is_linear).map(of);
    let numbers = |of: &WeightSource| of.rows * of.cols;
    let all: usize = linears.clone().map(numbers).sum();
    let found = linears.filter(|of| kept.contains(&of.values));
    let share: usize = found.clone().map(numbers).sum();
    if share > all / SHARE {
        let reason = format!("would keep {share} of {all} weights in f32, which is too many");
        return Err(GraphError::Shape(reason));
    }
    let found: BTreeSet<&String> = found.map(|of| &of.values).collect();
    if let Some(name) = kept.iter().find(|name| !found.contains(name)) {
        let reason = format!("has no linear on {name}, which was to stay in f32; import it again");
        return Err(GraphError::Shape(reason));
    }
    let is_kept = |node: &NodeProto| node.op_type == LINEAR && kept.contains(&of(node).values);
    let (linears, mut nodes): (Vec<_>, Vec<_>) =
        graph.proto().node.iter().cloned().partition(is_kept);
    for linear in &linears {
        nodes.extend(product(graph, recipe, linear)?);
    }
    let notes = kept
        .iter()
        .map(|name| format!("the linear on {name} stays in f32"));
    recipe.notes.extend(notes);
    graph.proto_mut().node = nodes;
    graph.sweep();
    Ok(())
}

/// `Add(MatMul(x, Transpose(W)), bias)` for a linear of ours.
fn product(
    graph: &mut Graph,
    recipe: &mut Recipe,
    linear: &NodeProto,
) -> Result<Vec<NodeProto>, GraphError> {
    let weight = ints(linear, "weights")[0] as usize;
    recipe.linears.remove(&weight);
    let of = &recipe.weights[weight];
    let (rows, cols) = (of.rows, of.cols);
    let source = Source::open(graph, of)
        .map_err(|e| GraphError::Shape(format!("has a linear that can't be kept: {e}")))?;
    let mut values = Vec::new();
    source.values(0..rows, &mut values);
    let (x, out) = (&linear.input[0], &linear.output[0]);
    let matrix = kept_matrix(out);
    let [turned, made, bias] = ["turned", "product", "bias"].map(|part| format!("{out}/{part}"));
    let mut stored = vec![float_tensor(&matrix, &[rows, cols], &values)];
    let made = match ints(linear, "bias") {
        [] => out,
        _ => &made,
    };
    let mut nodes = vec![
        new_node("Transpose", &[&matrix], &[&turned]),
        new_node("MatMul", &[x, &turned], &[made]),
    ];
    if let [table] = ints(linear, "bias") {
        stored.push(float_tensor(
            &bias,
            &[rows],
            &recipe.tables[*table as usize],
        ));
        nodes.push(new_node("Add", &[made, &bias], &[out]));
    }
    graph.proto_mut().initializer.extend(stored);
    Ok(nodes)
}
