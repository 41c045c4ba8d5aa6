//! ONNX Runtime's own attention operators become the standard's, which say the same for one sequence without padding.
//!
//! The operators: <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>

use super::types::types;
use crate::onnx::{
    Graph, float, input, int, int_attribute, int_vector, is_or_absent, new_node, output,
    value_info, with_float,
};
use std::collections::{HashMap, HashSet};
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{NodeProto, TensorProto};

const POSITIONS: &str = "position_ids";

pub(super) fn standardise(graph: &mut Graph) {
    // A copy, since what stands behind a node is looked up meanwhile.
    let nodes = graph.proto().node.clone();
    let types = types(graph);
    let mut made = Made::default();
    for node in nodes {
        let parts = match node.op_type.as_str() {
            "GroupQueryAttention" => grouped(graph, &mut made, &node),
            // The standard's has another order of inputs.
            "RotaryEmbedding" if node.domain == "com.microsoft" => rotary(graph, &node),
            "Attention" => masked(&types, &mut made, &node),
            _ => None,
        };
        made.nodes.extend(parts.unwrap_or_else(|| vec![node]));
    }
    let proto = graph.proto_mut();
    proto.node = made.nodes;
    proto.initializer.extend(made.stored);
    if made.needs_positions && !proto.input.iter().any(|input| input.name == POSITIONS) {
        proto
            .input
            .push(value_info(POSITIONS, DataType::Int64 as i32));
    }
    graph.sweep();
}

#[derive(Default)]
struct Made {
    nodes: Vec<NodeProto>,
    stored: Vec<TensorProto>,
    /// Masks of numbers that were made of masks of truths.
    masks: HashSet<String>,
    /// Rotation inside the operator counts from the cache's length; outside, somebody must say where tokens stand.
    needs_positions: bool,
}

/// `GroupQueryAttention(q, k, v, past key, past value, seqlens_k, total, cos, sin, positions)`, q perhaps with k and v
/// behind it. How long each sequence is follows from the cache, there being no padding. `None` for what the
/// standard's operators don't do.
fn grouped(graph: &Graph, made: &mut Made, node: &NodeProto) -> Option<Vec<NodeProto>> {
    let heads = usize::try_from(int(node, "num_heads")?).ok()?;
    let kv_heads = usize::try_from(int(node, "kv_num_heads")?).ok()?;
    let [past_key, past_value] = [input(node, 3)?, input(node, 4)?];
    let past = graph
        .proto()
        .input
        .iter()
        .find(|i| i.name == past_key)
        .map(crate::onnx::input_dims)?;
    let &[_, _, _, Some(dim)] = past.as_slice() else {
        return None;
    };
    let plain = |name: &str| int(node, name).unwrap_or(0) == 0;
    let more_inputs = (10..node.input.len()).any(|i| input(node, i).is_some());
    let more_outputs = (3..node.output.len()).any(|i| output(node, i).is_some());
    let windowed = int(node, "local_window_size").is_some_and(|size| size > 0);
    let known =
        plain("smooth_softmax") && plain("qk_output") && !more_inputs && !more_outputs && !windowed;
    let quantised = node
        .attribute
        .iter()
        .any(|a| a.name.ends_with("_quant_type") && a.s != b"NONE" && !a.s.is_empty());
    if !known || quantised || heads == 0 || kv_heads == 0 {
        return None;
    }
    let out = output(node, 0)?;
    let mut nodes = Vec::new();
    let (mut q, mut k, v) = match (input(node, 1), input(node, 2)) {
        (Some(k), Some(v)) => (input(node, 0)?.to_owned(), k.to_owned(), v.to_owned()),
        (None, None) => {
            let [q, k, v] = ["q", "k", "v"].map(|part| format!("{out}/{part}"));
            let sizes = format!("{out}/sizes");
            let width = |heads: usize| i64::try_from(heads.checked_mul(dim)?).ok();
            let widths = vec![width(heads)?, width(kv_heads)?, width(kv_heads)?];
            made.stored.push(int_vector(&sizes, widths));
            let mut split = new_node("Split", &[input(node, 0)?, &sizes], &[&q, &k, &v]);
            split.attribute.push(int_attribute("axis", -1));
            nodes.push(split);
            (q, k, v)
        }
        _ => return None,
    };
    if int(node, "do_rotary").unwrap_or(0) == 1 {
        let positions = input(node, 9).unwrap_or(POSITIONS);
        made.needs_positions |= positions == POSITIONS;
        for (value, heads) in [(&mut q, heads), (&mut k, kv_heads)] {
            let rotated = format!("{value}/rotated");
            let inputs = [value, input(node, 7)?, input(node, 8)?, positions];
            let mut rotate = new_node("RotaryEmbedding", &inputs, &[&rotated]);
            rotate
                .attribute
                .push(int_attribute("num_heads", heads as i64));
            rotate.attribute.push(int_attribute(
                "interleaved",
                int(node, "rotary_interleaved").unwrap_or(0),
            ));
            let width = graph
                .initializer(input(node, 7)?)
                .and_then(|t| t.dims.last()?.checked_mul(2))?;
            if width != dim as i64 {
                rotate
                    .attribute
                    .push(int_attribute("rotary_embedding_dim", width));
            }
            nodes.push(rotate);
            *value = rotated;
        }
    }
    let outputs: Vec<&str> = (0..3).map(|i| output(node, i).unwrap_or("")).collect();
    let mut attention = new_node(
        "Attention",
        &[&q, &k, &v, "", past_key, past_value],
        &outputs,
    );
    attention.attribute.push(int_attribute("is_causal", 1));
    attention
        .attribute
        .push(int_attribute("q_num_heads", heads as i64));
    attention
        .attribute
        .push(int_attribute("kv_num_heads", kv_heads as i64));
    // Zero stands for the usual one.
    let scale = float(node, "scale").filter(|&scale| scale != 0.0);
    attention = with_float(
        attention,
        "scale",
        scale.unwrap_or(1.0 / (dim as f32).sqrt()),
    );
    if let Some(softcap) = float(node, "softcap").filter(|&cap| cap != 0.0) {
        attention = with_float(attention, "softcap", softcap);
    }
    nodes.push(attention);
    Some(nodes)
}

/// `Attention(q, k, v, mask)` with a mask of truths gets one of numbers: tract takes truths for numbers.
fn masked(
    types: &HashMap<String, i32>,
    made: &mut Made,
    node: &NodeProto,
) -> Option<Vec<NodeProto>> {
    let mask = input(node, 3).filter(|mask| types.get(*mask) == Some(&(DataType::Bool as i32)))?;
    let [seen, hidden, numbers] =
        ["seen", "hidden", "numbers"].map(|part| format!("{mask}/{part}"));
    if made.masks.insert(numbers.clone()) {
        for (name, value) in [(&seen, 0.0), (&hidden, f32::MIN)] {
            made.stored.push(TensorProto {
                name: name.clone(),
                data_type: DataType::Float as i32,
                float_data: vec![value],
                ..TensorProto::default()
            });
        }
        made.nodes
            .push(new_node("Where", &[mask, &seen, &hidden], &[&numbers]));
    }
    let mut numbered = node.clone();
    numbered.input[3] = numbers;
    Some(vec![numbered])
}

/// `RotaryEmbedding(x, positions, cos, sin)`, whose heads may be known only to the attention behind it.
fn rotary(graph: &Graph, node: &NodeProto) -> Option<Vec<NodeProto>> {
    let plain =
        is_or_absent(node, "scale", 1.0) && int(node, "is_packed_batching").unwrap_or(0) == 0;
    let out = output(node, 0)?;
    let inputs = [
        input(node, 0)?,
        input(node, 2)?,
        input(node, 3)?,
        input(node, 1)?,
    ];
    let mut standard = new_node("RotaryEmbedding", &inputs, &[out]);
    for name in ["interleaved", "rotary_embedding_dim"] {
        let value = int(node, name).unwrap_or(0);
        standard.attribute.push(int_attribute(name, value));
    }
    let stated = int(node, "num_heads").filter(|&heads| heads > 0);
    let reader = || {
        graph
            .consumers(out)
            .find(|n| n.op_type == "GroupQueryAttention")
    };
    let asked = || {
        let is_query = input(reader()?, 0) == Some(out);
        int(
            reader()?,
            if is_query {
                "num_heads"
            } else {
                "kv_num_heads"
            },
        )
    };
    if let Some(heads) = stated.or_else(asked) {
        standard.attribute.push(int_attribute("num_heads", heads));
    }
    plain.then(|| vec![standard])
}
