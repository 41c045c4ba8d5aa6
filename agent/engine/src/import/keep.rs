//! Leaves linears to tract whose results eight bits would change too much: a product in f32 in the place of ours.

use super::LINEAR;
use crate::onnx::{Graph, GraphError, float_tensor, ints, new_node};
use crate::recipe::Recipe;
use crate::source::Source;
use std::collections::BTreeSet;
use tract_onnx::pb::NodeProto;

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
    let is_kept = |node: &NodeProto| {
        let weight = |&index: &i64| &recipe.weights[index as usize].values;
        node.op_type == LINEAR
            && ints(node, "weights")
                .iter()
                .any(|i| kept.contains(weight(i)))
    };
    let (linears, mut nodes): (Vec<_>, Vec<_>) = std::mem::take(&mut graph.proto_mut().node)
        .into_iter()
        .partition(is_kept);
    for name in kept {
        recipe
            .notes
            .push(format!("the linear on {name} stays in f32"));
    }
    for linear in &linears {
        nodes.extend(product(graph, recipe, linear)?);
    }
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
