//! Recognises linears, the embedding and attention in an ONNX graph and puts our operators in their place,
//! one for one. Joining neighbours is `fuse`'s; arithmetic is nobody's here.
//!
//! The forms it knows stand in engine order: blocked `DequantizeLinear` weights (our native form) and opset-23
//! attention. What it doesn't know stays as it is, for tract.

use crate::onnx::{
    Graph, GraphError, attribute, float, input_dims, int, ints, new_node, with_float, with_ints,
};
use crate::recipe::{Geometry, Order, Recipe, WeightSource};
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{NodeProto, TensorProto};

pub(crate) const EMBED: &str = "MillwrightEmbed";
pub(crate) const LINEAR: &str = "MillwrightLinear";
pub(crate) const ATTEND: &str = "MillwrightAttend";

/// Elements of K that share a scale.
const BLOCK: usize = millwright_kernels::packed::BLOCK;

/// Replaces every recognised linear and embedding. Both plans want this: tract refuses the form.
pub(crate) fn linears(graph: &mut Graph, recipe: &mut Recipe) -> Result<(), GraphError> {
    for index in 0..graph.proto().node.len() {
        let node = graph.node(index);
        let lowered = match node.op_type.as_str() {
            "MatMul" => linear(graph, node)?.map(|source| (LINEAR, node.input[0].clone(), source)),
            "DequantizeLinear" => embedding(graph, node)?.map(|(ids, source)| (EMBED, ids, source)),
            _ => None,
        };
        if let Some((op, input, source)) = lowered {
            let output = node.output[0].clone();
            let rows = if op == EMBED {
                source.cols
            } else {
                source.rows
            };
            let weight = recipe.weight(source);
            let node = with_ints(new_node(op, &[&input], &[&output]), "weights", &[weight]);
            graph.proto_mut().node[index] = with_ints(node, "widths", &[rows]);
        }
    }
    graph.sweep();
    Ok(())
}

/// Replaces every attention block, or none: a model runs flat as a whole or not at all.
/// `Err` inside says why not.
pub(crate) fn attention(graph: &mut Graph, recipe: &mut Recipe) -> Result<(), String> {
    let found: Vec<usize> = (0..graph.proto().node.len())
        .filter(|&i| graph.node(i).op_type == "Attention")
        .collect();
    if found.is_empty() {
        return Err("no opset-23 Attention node was found".into());
    }
    let mut blocks = Vec::new();
    for &index in &found {
        let node = graph.node(index);
        blocks.push(block(graph, node).map_err(|why| format!("attention {}: {why}", node.name))?);
    }
    let first = &blocks[0];
    let geometry = Geometry {
        layers: blocks.len(),
        kv_heads: first.kv_heads,
        head_dim: first.head_dim,
    };
    if blocks
        .iter()
        .any(|b| (b.kv_heads, b.head_dim) != (geometry.kv_heads, geometry.head_dim))
    {
        return Err("its attention blocks differ in heads or head size".into());
    }
    for (layer, (index, block)) in found.into_iter().zip(blocks).enumerate() {
        let tables = [recipe.table(&block.cos), recipe.table(&block.sin)];
        let inputs = [block.q.as_str(), block.k.as_str(), block.v.as_str()];
        let node = new_node(ATTEND, &inputs, &[&block.output]);
        let shape = [layer, block.heads, block.kv_heads, block.head_dim];
        let node = with_ints(with_ints(node, "shape", &shape), "tables", &tables);
        graph.proto_mut().node[index] = with_float(node, "scale", block.scale);
        if let Some(reshape) = block.reshape {
            // Our operator makes the reshaped value itself.
            graph
                .proto_mut()
                .node
                .iter_mut()
                .filter(|n| n.name == reshape)
                .for_each(|n| n.output.clear());
        }
    }
    graph
        .proto_mut()
        .node
        .retain(|node| !node.output.is_empty());
    graph
        .proto_mut()
        .output
        .retain(|output| output.name == "logits");
    graph.sweep();
    recipe.geometry = Some(geometry);
    Ok(())
}

/// `MatMul(x, DequantizeLinear(q, scale, axis 0))`, or with q and scale behind `Transpose` (a tied head).
fn linear(graph: &Graph, node: &NodeProto) -> Result<Option<WeightSource>, GraphError> {
    let [_, weight] = node.input.as_slice() else {
        return Ok(None);
    };
    let Some(dequantise) = graph.made_by(weight, "DequantizeLinear") else {
        return Ok(None);
    };
    if int(dequantise, "axis").unwrap_or(1) != 0 || !blocked(dequantise) {
        return Ok(None);
    }
    let behind = |value: &str| match graph.made_by(value, "Transpose") {
        Some(transpose) if matches!(ints(transpose, "perm"), [1, 0] | []) => {
            (transpose.input[0].clone(), Order::RowMajor)
        }
        _ => (value.to_owned(), Order::ColumnMajor),
    };
    let (values, order) = behind(&dequantise.input[0]);
    let (scales, scales_order) = behind(&dequantise.input[1]);
    if order != scales_order {
        return Ok(None);
    }
    source(graph, &values, &scales, order)
}

/// `DequantizeLinear(Gather(q, ids), Gather(scale, ids), axis 2)`.
fn embedding(
    graph: &Graph,
    node: &NodeProto,
) -> Result<Option<(String, WeightSource)>, GraphError> {
    if !blocked(node) || !matches!(int(node, "axis").unwrap_or(1), 2 | -1) {
        return Ok(None);
    }
    let gathers = [&node.input[0], &node.input[1]].map(|value| graph.made_by(value, "Gather"));
    let [Some(values), Some(scales)] = gathers else {
        return Ok(None);
    };
    let by_row = [values, scales]
        .iter()
        .all(|g| int(g, "axis").unwrap_or(0) == 0);
    if !by_row || values.input[1] != scales.input[1] {
        return Ok(None);
    }
    let source = source(graph, &values.input[0], &scales.input[0], Order::RowMajor)?;
    Ok(source.map(|source| (values.input[1].clone(), source)))
}

/// A DequantizeLinear in blocks of 32 without a zero point.
fn blocked(node: &NodeProto) -> bool {
    let symmetric = node.input.get(2).is_none_or(String::is_empty);
    symmetric && node.input.len() >= 2 && int(node, "block_size") == Some(BLOCK as i64)
}

fn source(
    graph: &Graph,
    values: &str,
    scales: &str,
    order: Order,
) -> Result<Option<WeightSource>, GraphError> {
    let (Some(q), Some(s)) = (graph.initializer(values), graph.initializer(scales)) else {
        return Ok(None);
    };
    if q.data_type() != DataType::Int8 || s.data_type() != DataType::Float {
        return Ok(None);
    }
    let shape = |tensor: &TensorProto| match (tensor.dims.as_slice(), order) {
        (&[rows, cols], Order::RowMajor) | (&[cols, rows], Order::ColumnMajor) => {
            Some((usize::try_from(rows).ok()?, usize::try_from(cols).ok()?))
        }
        _ => None,
    };
    let (Some((rows, cols)), Some((scale_rows, blocks))) = (shape(q), shape(s)) else {
        return Ok(None);
    };
    if cols % BLOCK != 0 || scale_rows != rows || blocks != cols / BLOCK || rows == 0 || cols == 0 {
        let reason = format!(
            "shape {:?} and its scales' {:?} are not int8 in blocks of {BLOCK}",
            q.dims, s.dims
        );
        return Err(GraphError::Tensor {
            tensor: values.into(),
            reason,
        });
    }
    Ok(Some(WeightSource {
        values: values.into(),
        scales: scales.into(),
        rows,
        cols,
        order,
    }))
}

/// One recognised attention block.
struct Block {
    q: String,
    k: String,
    v: String,
    output: String,
    /// The node that brought the output back to `[batch, sequence, width]`, where one was needed.
    reshape: Option<String>,
    cos: String,
    sin: String,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
}

fn block(graph: &Graph, node: &NodeProto) -> Result<Block, String> {
    let input = |i: usize| {
        node.input
            .get(i)
            .map(String::as_str)
            .filter(|name| !name.is_empty())
    };
    let [Some(q), Some(k), Some(v)] = [input(0), input(1), input(2)] else {
        return Err("q, k or v is missing".into());
    };
    let [Some(past_key), Some(past_value)] = [input(4), input(5)] else {
        return Err("it has no past".into());
    };
    if !graph.is_input(past_key) || !graph.is_input(past_value) {
        return Err("its past is computed, not an input".into());
    }
    if float(node, "softcap").unwrap_or(0.0) != 0.0
        || int(node, "qk_matmul_output_mode").unwrap_or(0) != 0
    {
        return Err("softcap and qk output are not supported".into());
    }
    causal(graph, node)?;
    let past = graph
        .proto()
        .input
        .iter()
        .find(|i| i.name == past_key)
        .map(input_dims);
    let Some(&[_, Some(kv_heads), _, Some(head_dim)]) = past.as_deref() else {
        return Err(format!("{past_key} does not state its heads and head size"));
    };
    if kv_heads == 0 || head_dim == 0 || head_dim % 2 != 0 || head_dim > 256 {
        return Err(format!(
            "{kv_heads} KV heads of {head_dim} are out of range"
        ));
    }
    let (q, cos, sin) = rotated(graph, q)?;
    let (k, k_cos, k_sin) = rotated(graph, k)?;
    if (&cos, &sin) != (&k_cos, &k_sin) {
        return Err("q and k use different rotary tables".into());
    }
    let half = head_dim / 2;
    for table in [&cos, &sin] {
        let dims = graph
            .initializer(table)
            .map(|t| (t.data_type(), t.dims.clone()));
        if !matches!(dims, Some((DataType::Float, d)) if d.len() == 2 && d[1] == half as i64) {
            return Err(format!(
                "rotary table {table} is not f32 [positions, {half}]"
            ));
        }
    }
    let v = behind_heads(graph, v).to_owned();
    let width = linear_width(graph, &q).ok_or("q does not come from a linear")?;
    let kv_width = linear_width(graph, &k).ok_or("k does not come from a linear")?;
    let heads = width / head_dim;
    let whole =
        width == heads * head_dim && kv_width == kv_heads * head_dim && heads % kv_heads == 0;
    if !whole || linear_width(graph, &v) != Some(kv_width) {
        return Err("its widths are not whole heads".into());
    }
    let (output, reshape) = output(graph, node)?;
    let scale = float(node, "scale").unwrap_or_else(|| 1.0 / (head_dim as f32).sqrt());
    Ok(Block {
        q,
        k,
        v,
        output,
        reshape,
        cos,
        sin,
        heads,
        kv_heads,
        head_dim,
        scale,
    })
}

/// The attended value as `[batch, sequence, width]`: Attention's own output, or what Transpose and Reshape
/// make of its four-dimensional one.
fn output(graph: &Graph, node: &NodeProto) -> Result<(String, Option<String>), String> {
    let direct = node.output[0].clone();
    if attribute(node, "q_num_heads").is_some() {
        return Ok((direct, None));
    }
    let transpose = graph
        .sole_consumer(&direct)
        .filter(|n| n.op_type == "Transpose");
    let reshape = transpose
        .filter(|n| ints(n, "perm") == [0, 2, 1, 3])
        .and_then(|n| graph.sole_consumer(&n.output[0]))
        .filter(|n| n.op_type == "Reshape");
    let reshape = reshape.ok_or("its output is not brought back by Transpose and Reshape")?;
    Ok((reshape.output[0].clone(), Some(reshape.name.clone())))
}

/// Behind a RotaryEmbedding by `position_ids`: the linear's value and the two tables.
fn rotated(graph: &Graph, value: &str) -> Result<(String, String, String), String> {
    let value = behind_heads(graph, value);
    let node = graph
        .made_by(value, "RotaryEmbedding")
        .ok_or("q or k is not rotated by RotaryEmbedding")?;
    let [x, cos, sin, positions] = node.input.as_slice() else {
        return Err("RotaryEmbedding without position_ids".into());
    };
    if positions != "position_ids"
        || int(node, "interleaved").unwrap_or(0) != 0
        || int(node, "rotary_embedding_dim").unwrap_or(0) != 0
    {
        return Err("RotaryEmbedding is interleaved, partial, or not by position_ids".into());
    }
    Ok((behind_heads(graph, x).to_owned(), cos.clone(), sin.clone()))
}

/// Walks back over the Reshape and Transpose that split a width into heads.
fn behind_heads<'a>(graph: &'a Graph, mut value: &'a str) -> &'a str {
    while let Some(node) = graph.producer(value) {
        let splits = match node.op_type.as_str() {
            "Transpose" => ints(node, "perm") == [0, 2, 1, 3],
            "Reshape" => graph
                .i64s(&node.input[1])
                .is_some_and(|shape| shape.len() >= 3 && shape[1] <= 0),
            _ => false,
        };
        if !splits {
            break;
        }
        value = &node.input[0];
    }
    value
}

/// The outputs of the linear that makes this value, over bias additions.
fn linear_width(graph: &Graph, value: &str) -> Option<usize> {
    let node = graph.producer(value)?;
    match node.op_type.as_str() {
        LINEAR => ints(node, "widths").first().map(|&w| w as usize),
        "MatMul" => usize::try_from(*graph.initializer(&node.input[1])?.dims.last()?).ok(),
        "Add" => node
            .input
            .iter()
            .find_map(|input| linear_width(graph, input)),
        _ => None,
    }
}

/// Whether a block attends to all earlier positions and itself, and to nothing else: by its flag, or by a mask
/// that compares positions once and otherwise only reads the attention mask.
fn causal(graph: &Graph, node: &NodeProto) -> Result<(), String> {
    const SHAPING: [&str; 13] = [
        "And",
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Gather",
        "Identity",
        "Range",
        "Reshape",
        "Shape",
        "Slice",
        "Squeeze",
        "Unsqueeze",
    ];
    let Some(mask) = node.input.get(3).filter(|name| !name.is_empty()) else {
        let flag = int(node, "is_causal").unwrap_or(0) == 1;
        return if flag {
            Ok(())
        } else {
            Err("it has neither a mask nor is_causal".into())
        };
    };
    let mut queue = vec![mask.as_str()];
    let mut seen = std::collections::HashSet::new();
    let mut comparisons = 0;
    while let Some(value) = queue.pop() {
        if !seen.insert(value) || graph.is_initializer(value) {
            continue;
        }
        let Some(node) = graph.producer(value) else {
            if matches!(value, "attention_mask" | "position_ids" | "input_ids" | "")
                || graph.is_input(value)
            {
                continue;
            }
            return Err(format!("its mask needs {value}, which nothing makes"));
        };
        match node.op_type.as_str() {
            "LessOrEqual" if reads(graph, &node.input[1], "position_ids") => comparisons += 1,
            "GreaterOrEqual" if reads(graph, &node.input[0], "position_ids") => comparisons += 1,
            op if SHAPING.contains(&op) => {}
            op => {
                return Err(format!(
                    "its mask is made with {op}, which is not plain causality"
                ));
            }
        }
        queue.extend(node.input.iter().map(String::as_str));
    }
    if comparisons == 1 {
        Ok(())
    } else {
        Err("its mask does not compare positions once".into())
    }
}

/// Whether this value is the named input, reshaped.
fn reads<'a>(graph: &'a Graph, mut value: &'a str, input: &str) -> bool {
    while let Some(node) = graph.producer(value) {
        if !matches!(
            node.op_type.as_str(),
            "Unsqueeze" | "Reshape" | "Cast" | "Identity"
        ) {
            return false;
        }
        value = &node.input[0];
    }
    value == input
}
