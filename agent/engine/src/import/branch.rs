//! Merged decoders, which hold the model twice, become the one that can have a past.

use crate::onnx::{Graph, GraphError, input};
use std::collections::HashMap;
use tract_onnx::pb::{GraphProto, NodeProto, TensorProto};

/// The input of merged decoders that says whether there is a past.
const USE_CACHE: &str = "use_cache_branch";

/// Puts the branch with a past in the place of `If(use_cache_branch)`: with an empty past it does what the other does.
pub(super) fn branches(graph: &mut Graph) -> Result<(), GraphError> {
    let chosen = |node: &NodeProto| node.op_type == "If" && input(node, 0) == Some(USE_CACHE);
    let proto = graph.proto_mut();
    // Those still to be looked at, the next one last: a branch may hold further ones.
    let mut nodes: Vec<NodeProto> = std::mem::take(&mut proto.node);
    nodes.reverse();
    while let Some(node) = nodes.pop() {
        if !chosen(&node) {
            proto.node.push(node);
            continue;
        }
        let branch = node
            .attribute
            .into_iter()
            .find(|a| a.name == "then_branch")
            .and_then(|a| a.g);
        let branch = branch.filter(|branch| branch.output.len() == node.output.len());
        let Some(branch) = branch else {
            let what = "has an If without a branch for its outputs";
            return Err(GraphError::Shape(what.into()));
        };
        let (inner, stored) = inlined(branch, &node.output);
        nodes.extend(inner.into_iter().rev());
        proto.initializer.extend(stored);
    }
    graph.index();
    Ok(())
}

/// A branch's nodes, whose outputs take these names, and its stored tensors.
fn inlined(branch: GraphProto, outputs: &[String]) -> (Vec<NodeProto>, Vec<TensorProto>) {
    let renamed: HashMap<&str, &String> = branch
        .output
        .iter()
        .map(|o| o.name.as_str())
        .zip(outputs)
        .collect();
    let rename = |name: &mut String| {
        if let Some(&new) = renamed.get(name.as_str()) {
            name.clone_from(new);
        }
    };
    let mut nodes = branch.node;
    for node in &mut nodes {
        node.input.iter_mut().for_each(rename);
        node.output.iter_mut().for_each(rename);
    }
    (nodes, branch.initializer)
}
