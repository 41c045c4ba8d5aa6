//! Leaves linears to tract whose results eight bits would change too much: a product in f32 in the place of ours.

use super::LINEAR;
use crate::onnx::{Graph, GraphError, ints, new_node};
use crate::recipe::Recipe;
use crate::source::Source;
use std::collections::BTreeSet;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{NodeProto, TensorProto};

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
    let [matrix, turned, made, bias] =
        ["matrix", "turned", "product", "bias"].map(|part| format!("{out}/{part}"));
    store(graph, &matrix, &[rows, cols], &values);
    let made = match ints(linear, "bias") {
        [] => out,
        _ => &made,
    };
    let mut nodes = vec![
        new_node("Transpose", &[&matrix], &[&turned]),
        new_node("MatMul", &[x, &turned], &[made]),
    ];
    if let [table] = ints(linear, "bias") {
        store(graph, &bias, &[rows], &recipe.tables[*table as usize]);
        nodes.push(new_node("Add", &[made, &bias], &[out]));
    }
    Ok(nodes)
}

fn store(graph: &mut Graph, name: &str, dims: &[usize], values: &[f32]) {
    graph.proto_mut().initializer.push(TensorProto {
        name: name.to_owned(),
        dims: dims.iter().map(|&dim| dim as i64).collect(),
        data_type: DataType::Float as i32,
        raw_data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        ..TensorProto::default()
    });
}
