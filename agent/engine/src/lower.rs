//! Recognises linears, the embedding and attention in an ONNX graph and puts our operators in their place,
//! one for one. Joining neighbours is `fuse`'s; arithmetic is nobody's here.
//!
//! The forms it knows stand in engine order: blocked `DequantizeLinear` weights (our native form), `MatMulNBits`
//! (`nbits`) and opset-23 attention. What it doesn't know stays as it is, for tract.

use crate::nbits;
use crate::onnx::{
    Graph, GraphError, float, input_dims, int, ints, new_node, with_float, with_ints,
};
use crate::recipe::{Form, Geometry, Order, Recipe, WeightSource};
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{NodeProto, TensorProto};

pub(crate) const EMBED: &str = "MillwrightEmbed";
pub(crate) const LINEAR: &str = "MillwrightLinear";
pub(crate) const ATTEND: &str = "MillwrightAttend";

/// Elements of K that share a scale.
const BLOCK: usize = millwright_kernels::packed::BLOCK;
/// No known model has larger heads.
const HEAD_MAX: usize = 256;

/// Replaces every recognised linear and embedding. Both plans want this: tract refuses the form.
pub(crate) fn linears(graph: &mut Graph, recipe: &mut Recipe) -> Result<(), GraphError> {
    for index in 0..graph.proto().node.len() {
        let node = graph.node(index);
        let lowered = match node.op_type.as_str() {
            "MatMul" => linear(graph, node)?.map(|source| (LINEAR, node.input[0].clone(), source)),
            "MatMulNBits" => Some((LINEAR, node.input[0].clone(), nbits::weight(graph, node)?)),
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
            if op == LINEAR {
                recipe.linears.insert(weight);
            }
            let node = with_ints(new_node(op, &[&input], &[&output]), "weights", &[weight]);
            graph.proto_mut().node[index] = with_ints(node, "widths", &[rows]);
        }
    }
    graph.sweep();
    Ok(())
}

/// Replaces every attention block, or none: a model runs flat as a whole or not at all.
/// `Err` says why not.
pub(crate) fn attention(graph: &mut Graph, recipe: &mut Recipe) -> Result<(), String> {
    if !graph.is_output("logits") {
        return Err("it has no output named logits".into());
    }
    let mut blocks = Vec::new();
    for (index, node) in graph.proto().node.iter().enumerate() {
        if node.op_type == "Attention" {
            let block =
                block(graph, node).map_err(|why| format!("attention {}: {why}", node.name))?;
            blocks.push((index, block));
        }
    }
    let Some((_, first)) = blocks.first() else {
        return Err("no opset-23 Attention node was found".into());
    };
    let geometry = Geometry {
        layers: blocks.len(),
        kv_heads: first.kv_heads,
        head_dim: first.head_dim,
        positions: blocks.iter().map(|(_, b)| b.positions).min().unwrap_or(0),
    };
    let same = |b: &Block| (b.kv_heads, b.head_dim) == (geometry.kv_heads, geometry.head_dim);
    if !blocks.iter().all(|(_, b)| same(b)) {
        return Err("its attention blocks differ in heads or head size".into());
    }
    for (layer, (index, block)) in blocks.into_iter().enumerate() {
        let tables = [recipe.table(&block.cos), recipe.table(&block.sin)];
        let inputs = [block.q.as_str(), block.k.as_str(), block.v.as_str()];
        let node = new_node(ATTEND, &inputs, &[&block.output]);
        let shape = [layer, block.heads, block.kv_heads, block.head_dim];
        let node = with_ints(with_ints(node, "shape", &shape), "tables", &tables);
        graph.proto_mut().node[index] = with_float(node, "scale", block.scale);
    }
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
        form: Form::Eight(order),
    }))
}

/// One recognised attention block.
struct Block {
    /// Before rotation.
    q: String,
    k: String,
    v: String,
    output: String,
    cos: String,
    sin: String,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
    /// Rows of the rotary tables.
    positions: usize,
}

/// `Attention(RotaryEmbedding(q), RotaryEmbedding(k), v, –, past key, past value)`, causal by its flag, on
/// `[batch, sequence, width]`.
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
    if node
        .output
        .iter()
        .skip(1)
        .any(|present| graph.consumers(present).next().is_some())
    {
        return Err("its present is read inside the graph".into());
    }
    if input(3).is_some() || int(node, "is_causal").unwrap_or(0) != 1 {
        return Err("it has a mask instead of is_causal".into());
    }
    if float(node, "softcap").unwrap_or(0.0) != 0.0
        || int(node, "qk_matmul_output_mode").unwrap_or(0) != 0
    {
        return Err("softcap and qk output are not supported".into());
    }
    let size = |name| int(node, name).and_then(|size| usize::try_from(size).ok());
    let (Some(heads), Some(kv_heads)) = (size("q_num_heads"), size("kv_num_heads")) else {
        return Err("its q, k and v are split into heads outside".into());
    };
    let past = graph
        .proto()
        .input
        .iter()
        .find(|i| i.name == past_key)
        .map(input_dims);
    let Some(&[_, Some(past_heads), _, Some(head_dim)]) = past.as_deref() else {
        return Err(format!("{past_key} does not state its heads and head size"));
    };
    if kv_heads == 0 || kv_heads != past_heads || !heads.is_multiple_of(kv_heads) {
        return Err(format!(
            "{heads} heads can't share {kv_heads} of the past's {past_heads}"
        ));
    }
    if head_dim == 0 || head_dim % 2 != 0 || head_dim > HEAD_MAX {
        return Err(format!("heads of {head_dim} are out of range"));
    }
    let (q, cos, sin) = rotated(graph, q)?;
    let (k, k_cos, k_sin) = rotated(graph, k)?;
    if (cos, sin) != (k_cos, k_sin) {
        return Err("q and k use different rotary tables".into());
    }
    let half = (head_dim / 2) as i64;
    let rows = |table: &str| match graph
        .initializer(table)
        .map(|t| (t.data_type(), &t.dims[..]))
    {
        Some((DataType::Float, &[rows, width])) if width == half => usize::try_from(rows).ok(),
        _ => None,
    };
    let positions = rows(cos).filter(|_| rows(cos) == rows(sin));
    let positions = positions.ok_or("its rotary tables are not f32 [positions, head size / 2]")?;
    let widths = [q, k, v].map(|value| linear_width(graph, value));
    if widths != [heads, kv_heads, kv_heads].map(|heads| Some(heads * head_dim)) {
        return Err(format!(
            "its q, k and v are not linears of whole heads: {widths:?}"
        ));
    }
    let scale = float(node, "scale").unwrap_or_else(|| 1.0 / (head_dim as f32).sqrt());
    let [q, k, v, cos, sin, output] = [q, k, v, cos, sin, &node.output[0]].map(str::to_owned);
    Ok(Block {
        q,
        k,
        v,
        output,
        cos,
        sin,
        heads,
        kv_heads,
        head_dim,
        scale,
        positions,
    })
}

/// Behind a RotaryEmbedding by `position_ids`: the linear's value and the two tables.
fn rotated<'a>(graph: &'a Graph, value: &str) -> Result<(&'a str, &'a str, &'a str), String> {
    let node = graph
        .made_by(value, "RotaryEmbedding")
        .ok_or("q or k is not rotated by RotaryEmbedding")?;
    let [x, cos, sin, positions] = node.input.as_slice() else {
        return Err("RotaryEmbedding without position_ids".into());
    };
    let by_position = positions == "position_ids" && graph.is_input(positions);
    let whole = int(node, "interleaved").unwrap_or(0) == 0
        && int(node, "rotary_embedding_dim").unwrap_or(0) == 0;
    if !by_position || !whole {
        return Err("RotaryEmbedding is interleaved, partial, or not by position_ids".into());
    }
    Ok((x, cos, sin))
}

/// The outputs of the linear that makes this value, over one addition of a bias.
fn linear_width(graph: &Graph, value: &str) -> Option<usize> {
    let node = graph.producer(value)?;
    match node.op_type.as_str() {
        LINEAR => ints(node, "widths").first().map(|&w| w as usize),
        "MatMul" => usize::try_from(*graph.initializer(&node.input[1])?.dims.last()?).ok(),
        "Add" => node.input.iter().find_map(|input| {
            graph.producer(input).filter(|node| node.op_type != "Add")?;
            linear_width(graph, input)
        }),
        _ => None,
    }
}
