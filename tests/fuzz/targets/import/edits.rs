//! Changes to a graph that keep it a graph: what byte mutations hardly ever reach.

use crate::folder::{WEIGHTS, WEIGHTS_BYTES};
use millwright_fuzz::random::Random;
use prost::Message;
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto,
    ValueInfoProto, type_proto,
};

/// Operators that exports have, that the importer looks for, or that make much of little.
#[rustfmt::skip]
const OPERATORS: [&str; 96] = [
    "Abs", "Add", "And", "ArgMax", "Attention", "BiasGelu", "Cast", "CastLike", "Ceil", "Clip", "Compress", "Concat",
    "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "CumSum", "DFT", "DepthToSpace", "DequantizeLinear",
    "Div", "Dropout", "DynamicQuantizeLinear", "Einsum", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten",
    "Floor", "GRU", "Gather", "GatherBlockQuantized", "GatherElements", "GatherND", "Gelu", "Gemm", "Greater",
    "GroupQueryAttention", "HannWindow", "Identity", "If", "LSTM", "LayerNormalization", "Less", "Log", "Loop",
    "MatMul", "MatMulInteger", "MatMulNBits", "Max", "MaxPool", "MelWeightMatrix", "Min", "MillwrightLinear", "Mod",
    "Mul", "MultiHeadAttention", "Multinomial", "Neg", "NonZero", "Not", "OneHot", "Pad", "Pow", "QuantizeLinear",
    "RMSNormalization", "RandomNormal", "RandomUniformLike", "Range", "Reciprocal", "ReduceMean", "ReduceProd",
    "ReduceSum", "Reshape", "Resize", "RotaryEmbedding", "STFT", "Scan", "ScatterElements", "ScatterND", "Shape",
    "Sigmoid", "SimplifiedLayerNormalization", "Sin", "Size", "SkipSimplifiedLayerNormalization", "Slice", "Softmax",
    "Split", "Tile", "TopK", "Trilu", "Where",
];
/// Attributes that decide sizes.
const SIZES: [&str; 18] = [
    "N",
    "K",
    "axis",
    "axes",
    "bits",
    "block_size",
    "depth",
    "dilations",
    "end",
    "group",
    "hidden_size",
    "kernel_shape",
    "kv_num_heads",
    "num_heads",
    "pads",
    "sample_size",
    "shape",
    "strides",
];
/// Copies that one edit makes of a node, at most.
const COPIES_MAX: usize = 3000;

/// The model with one edit or some; `None` where it is no model.
pub(crate) fn edited(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let mut model = ModelProto::decode(bytes).ok()?;
    let edits = match random.below(8) {
        0..5 => 1,
        5..7 => 1 + random.below(4),
        _ => 1 + random.below(12),
    };
    for _ in 0..edits {
        if random.one_in(60) {
            header(&mut model, random);
        }
        let graph = model.graph.as_mut()?;
        if random.one_in(20) && inner_graphs(graph).next().is_some() {
            let at = random.below(inner_graphs(graph).count());
            inner_graphs(graph)
                .nth(at)
                .into_iter()
                .for_each(|inner| edit(inner, random));
        } else {
            edit(graph, random);
        }
    }
    Some(model.encode_to_vec())
}

fn edit(graph: &mut GraphProto, random: &mut Random) {
    match random.below(24) {
        0..2 => drop_node(graph, random),
        2 => copy_node(graph, random),
        3 => reorder(graph, random),
        4..6 => reread(graph, random),
        6 => remake(graph, random),
        7..9 => retype(graph, random),
        9..12 => attribute(graph, random),
        12 => borrow_attribute(graph, random),
        13..16 => tensor(graph, random),
        16 => external(graph, random),
        17 => ends(graph, random),
        18..20 => bomb(graph, random),
        20 => computed_bomb(graph, random),
        21 => doubling(graph, random),
        22 => long_chain(graph, random),
        _ => wrap_in_if(graph, random),
    }
}

fn header(model: &mut ModelProto, random: &mut Random) {
    match random.below(3) {
        0 => model.ir_version = random.int(),
        1 => model.opset_import.clear(),
        _ => {
            if let Some(opset) = random.of_mut(&mut model.opset_import) {
                opset.version = random.int();
            }
        }
    }
}

/// The graphs inside nodes.
fn inner_graphs(graph: &mut GraphProto) -> impl Iterator<Item = &mut GraphProto> {
    let attributes = graph.node.iter_mut().flat_map(|node| &mut node.attribute);
    attributes.filter_map(|attribute| attribute.g.as_mut())
}

/// The name of some value.
fn value(graph: &GraphProto, random: &mut Random) -> String {
    let name = match random.below(8) {
        0 => random.of(&graph.initializer).map(|t| t.name.clone()),
        1 => random.of(&graph.input).map(|i| i.name.clone()),
        2 => random.of(&graph.output).map(|o| o.name.clone()),
        _ => random
            .of(&graph.node)
            .and_then(|node| node.output.first().cloned()),
    };
    name.unwrap_or_else(|| "nothing".into())
}

/// A name that nothing has.
fn fresh(random: &mut Random) -> String {
    format!("made{:x}", random.draw())
}

fn drop_node(graph: &mut GraphProto, random: &mut Random) {
    if graph.node.is_empty() {
        return;
    }
    let node = graph.node.remove(random.below(graph.node.len()));
    // Mostly somebody reads its input instead, so that the rest is still whole.
    let (Some(from), Some(to)) = (node.input.first(), node.output.first()) else {
        return;
    };
    if !random.one_in(4) {
        let inputs = graph.node.iter_mut().flat_map(|node| &mut node.input);
        inputs
            .filter(|input| *input == to)
            .for_each(|input| input.clone_from(from));
    }
}

fn copy_node(graph: &mut GraphProto, random: &mut Random) {
    let Some(mut node) = random.of(&graph.node).cloned() else {
        return;
    };
    if !random.one_in(4) {
        node.output = node.output.iter().map(|_| fresh(random)).collect();
        if let Some(output) = node.output.first().cloned() {
            read_instead(graph, random, output);
        }
    }
    graph.node.push(node);
}

fn reorder(graph: &mut GraphProto, random: &mut Random) {
    let count = graph.node.len();
    if count > 0 {
        graph.node.swap(random.below(count), random.below(count));
    }
}

/// Some node reads another value: one made later too, so that there are circles.
fn reread(graph: &mut GraphProto, random: &mut Random) {
    let name = value(graph, random);
    read_instead(graph, random, name);
}

fn read_instead(graph: &mut GraphProto, random: &mut Random, name: String) {
    let Some(node) = random.of_mut(&mut graph.node) else {
        return;
    };
    match random.below(10) {
        0 => node.input.push(name),
        1 => drop(node.input.pop()),
        _ => {
            if let Some(input) = random.of_mut(&mut node.input) {
                *input = name;
            }
        }
    }
}

fn remake(graph: &mut GraphProto, random: &mut Random) {
    let name = value(graph, random);
    if let Some(node) = random.of_mut(&mut graph.node) {
        match random.below(6) {
            0 => node.output.push(name),
            1 => drop(node.output.pop()),
            2 => node.name = name,
            3 => node.domain = ["", "com.microsoft", "ai.onnx.ml"][random.below(3)].into(),
            _ => {
                if let Some(output) = random.of_mut(&mut node.output) {
                    *output = name;
                }
            }
        }
    }
}

fn retype(graph: &mut GraphProto, random: &mut Random) {
    let known = random.of(&graph.node).map(|node| node.op_type.clone());
    let op = random.of(&OPERATORS).map(|op| (*op).to_owned());
    let op = if random.one_in(3) { known } else { op };
    if let (Some(node), Some(op)) = (random.of_mut(&mut graph.node), op) {
        node.op_type = op;
    }
}

fn attribute(graph: &mut GraphProto, random: &mut Random) {
    let attributes = graph.node.iter_mut().flat_map(|node| &mut node.attribute);
    let mut attributes: Vec<_> = attributes.collect();
    let at = random.below(attributes.len());
    let Some(attribute) = attributes.get_mut(at) else {
        return;
    };
    match random.below(12) {
        0 => {
            attribute.name = random
                .of(&SIZES)
                .map_or(String::new(), |name| (*name).to_owned())
        }
        1 => {
            attribute.f =
                [0.0, -1.0, f32::NAN, f32::INFINITY, f32::MIN_POSITIVE, 1e38][random.below(6)]
        }
        2 => attribute.s = vec![b'a'; random.below(40)],
        3 => attribute.ints = vec![random.int(); random.below(9)],
        4 => attribute.ints.push(random.int()),
        5..7 => {
            if let Some(tensor) = &mut attribute.t {
                edit_tensor(tensor, random);
            }
        }
        _ if !attribute.ints.is_empty() => {
            if let Some(int) = random.of_mut(&mut attribute.ints) {
                *int = random.int();
            }
        }
        _ => attribute.i = random.int(),
    }
}

fn borrow_attribute(graph: &mut GraphProto, random: &mut Random) {
    let donor = random
        .of(&graph.node)
        .and_then(|node| random.of(&node.attribute).cloned());
    let new = ints_attribute(
        SIZES[random.below(SIZES.len())],
        vec![random.int(); 1 + random.below(4)],
    );
    if let Some(node) = random.of_mut(&mut graph.node) {
        match random.below(4) {
            0 => node.attribute.clear(),
            1 => node.attribute.push(new),
            _ => node.attribute.extend(donor),
        }
    }
}

fn ints_attribute(name: &str, ints: Vec<i64>) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        i: ints.first().copied().unwrap_or_default(),
        r#type: if ints.len() == 1 {
            AttributeType::Int
        } else {
            AttributeType::Ints
        } as i32,
        ints,
        ..AttributeProto::default()
    }
}

fn tensor(graph: &mut GraphProto, random: &mut Random) {
    match random.below(12) {
        0 => {
            let copy = random.of(&graph.initializer).cloned();
            graph.initializer.extend(copy);
        }
        1 => {
            let at = random.below(graph.initializer.len());
            if at < graph.initializer.len() {
                graph.initializer.remove(at);
            }
        }
        _ => {
            if let Some(tensor) = random.of_mut(&mut graph.initializer) {
                edit_tensor(tensor, random);
            }
        }
    }
}

fn edit_tensor(tensor: &mut TensorProto, random: &mut Random) {
    match random.below(10) {
        0 => {
            if let Some(dim) = random.of_mut(&mut tensor.dims) {
                *dim = random.int();
            }
        }
        1 => tensor.dims.push([0, 1, 2][random.below(3)]),
        2 => drop(tensor.dims.pop()),
        3 => tensor.dims.reverse(),
        4 => tensor.data_type = random.below(28) as i32,
        5 => tensor
            .raw_data
            .truncate(random.below(tensor.raw_data.len() + 1)),
        6 => tensor.raw_data.push(random.draw() as u8),
        7 => *tensor = ints_tensor(&tensor.name, vec![random.int(); random.below(5)]),
        8 if tensor.int64_data.is_empty() && tensor.raw_data.len() >= 8 => {
            let at = random.below(tensor.raw_data.len() / 8) * 8;
            tensor.raw_data[at..at + 8].copy_from_slice(&random.int().to_le_bytes());
        }
        _ => {
            if let Some(value) = random.of_mut(&mut tensor.int64_data) {
                *value = random.int();
            } else if let Some(byte) = random.of_mut(&mut tensor.raw_data) {
                *byte = random.draw() as u8;
            }
        }
    }
}

fn ints_tensor(name: &str, values: Vec<i64>) -> TensorProto {
    TensorProto {
        name: name.into(),
        dims: vec![values.len() as i64],
        data_type: DataType::Int64 as i32,
        int64_data: values,
        ..TensorProto::default()
    }
}

/// Sends a tensor elsewhere, also consistently: so many numbers of the file as its new shape says.
fn external(graph: &mut GraphProto, random: &mut Random) {
    const PLACES: [&str; 9] = [
        WEIGHTS,
        "../weights",
        "/etc/hostname",
        "/dev/zero",
        ".",
        "",
        "model.onnx",
        "config.json",
        "a/../weights",
    ];
    let Some(tensor) = random.of_mut(&mut graph.initializer) else {
        return;
    };
    tensor.data_location = Some(DataLocation::External as i32);
    let place = if random.one_in(2) {
        WEIGHTS
    } else {
        PLACES[random.below(PLACES.len())]
    };
    let entry = |key: &str, value: String| StringStringEntryProto {
        key: key.into(),
        value,
    };
    let (offset, length) = if random.one_in(2) {
        let columns = 1 << random.below(10);
        let rows = 1 + random.below(WEIGHTS_BYTES / 4 / columns);
        tensor.data_type = DataType::Float as i32;
        tensor.dims = vec![rows as i64, columns as i64];
        (0, (rows * columns * 4) as i64)
    } else {
        (random.int(), random.int())
    };
    tensor.external_data = vec![
        entry("location", place.into()),
        entry("offset", offset.to_string()),
        entry("length", length.to_string()),
    ];
}

/// Inputs and outputs of the graph.
fn ends(graph: &mut GraphProto, random: &mut Random) {
    if random.one_in(6) {
        std::mem::swap(&mut graph.input, &mut graph.output);
        return;
    }
    let name = value(graph, random);
    let all = if random.one_in(2) {
        &mut graph.input
    } else {
        &mut graph.output
    };
    let at = random.below(all.len());
    if all.is_empty() {
        return;
    }
    match random.below(8) {
        0 => drop(all.remove(at)),
        1 => all.push(all[at].clone()),
        2 => all[at].name = name,
        3 => all[at].r#type = None,
        _ => edit_shape(&mut all[at], random),
    }
}

fn edit_shape(info: &mut ValueInfoProto, random: &mut Random) {
    let value = info.r#type.as_mut().and_then(|of| of.value.as_mut());
    let Some(type_proto::Value::TensorType(tensor)) = value else {
        return;
    };
    let dims = tensor.shape.as_mut().map(|shape| &mut shape.dim);
    let Some(dims) = dims.filter(|_| !random.one_in(4)) else {
        tensor.elem_type = random.below(28) as i32;
        return;
    };
    let stated = Dimension {
        value: Some(dimension::Value::DimValue(random.int())),
        ..Dimension::default()
    };
    match random.below(4) {
        0 => dims.push(stated),
        1 => drop(dims.pop()),
        _ => {
            if let Some(dim) = random.of_mut(dims) {
                *dim = stated;
            }
        }
    }
}

fn node(op: &str, inputs: &[&str], output: &str, attribute: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        op_type: op.into(),
        name: output.into(),
        input: inputs.iter().map(ToString::to_string).collect(),
        output: vec![output.into()],
        attribute,
        ..NodeProto::default()
    }
}

/// A node in front that makes as many numbers as `sizes` says, and somebody who reads them.
fn expanded(graph: &mut GraphProto, random: &mut Random, sizes: &str) {
    let (out, some, one) = (fresh(random), value(graph, random), fresh(random));
    graph.initializer.push(TensorProto {
        name: one.clone(),
        data_type: DataType::Int64 as i32,
        int64_data: vec![1],
        ..TensorProto::default()
    });
    let data = if random.one_in(2) { some } else { one.clone() };
    let made = match random.below(9) {
        0 | 1 => node("ConstantOfShape", &[sizes], &out, vec![]),
        2 | 3 => node("Expand", &[&data, sizes], &out, vec![]),
        4 => node("Tile", &[&data, sizes], &out, vec![]),
        5 => node("Reshape", &[&data, sizes], &out, vec![]),
        6 => node("Pad", &[&data, sizes], &out, vec![]),
        7 => {
            let last = fresh(random);
            let product = node(
                "ReduceProd",
                &[sizes],
                &last,
                vec![ints_attribute("keepdims", vec![0])],
            );
            graph.node.insert(0, product);
            node("Range", &[&one, &last, &one], &out, vec![])
        }
        _ => node("OneHot", &[&data, sizes, &one], &out, vec![]),
    };
    // Behind what it reads, where that is found.
    let reads = |node: &NodeProto| made.input.iter().any(|name| node.output.contains(name));
    let at = graph.node.iter().rposition(reads).map_or(0, |at| at + 1);
    graph.node.insert(at, made);
    read_instead(graph, random, out);
}

/// A stored shape.
fn bomb(graph: &mut GraphProto, random: &mut Random) {
    let sizes = fresh(random);
    let rank = 1 + random.below(6);
    let size = |random: &mut Random| {
        if random.one_in(3) {
            random.int()
        } else {
            1 << random.below(24)
        }
    };
    let values = (0..rank).map(|_| size(random)).collect();
    graph.initializer.push(ints_tensor(&sizes, values));
    expanded(graph, random, &sizes);
}

/// A shape that must be worked out: from numbers, or from another value's shape.
fn computed_bomb(graph: &mut GraphProto, random: &mut Random) {
    let [first, last] = [fresh(random), fresh(random)];
    if random.one_in(2) {
        let values = vec![1 << random.below(12); 1 + random.below(3)];
        graph.initializer.push(ints_tensor(&first, values));
    } else {
        let of = value(graph, random);
        graph.node.push(node("Shape", &[&of], &first, vec![]));
    }
    let mut from = first;
    for step in 0..random.below(6) {
        let to = format!("{last}{step}");
        let op = ["Mul", "Add", "Concat", "Mul", "Pow", "Cast"][random.below(6)];
        let attributes = match op {
            "Concat" => vec![ints_attribute("axis", vec![0])],
            "Cast" => vec![ints_attribute("to", vec![[1, 6, 7][random.below(3)]])],
            _ => vec![],
        };
        let inputs: &[&str] = if op == "Cast" {
            &[&from]
        } else {
            &[&from, &from]
        };
        graph.node.push(node(op, inputs, &to, attributes));
        from = to;
    }
    expanded(graph, random, &from);
}

/// Twice as much at each step.
fn doubling(graph: &mut GraphProto, random: &mut Random) {
    let mut from = value(graph, random);
    let op = ["Concat", "Add", "Mul", "MatMul", "Unsqueeze"][random.below(5)];
    let mut made = Vec::new();
    for _ in 0..random.below(60) {
        let to = fresh(random);
        let attribute = ints_attribute("axis", vec![random.below(3) as i64 - 1]);
        made.push(node(op, &[&from, &from], &to, vec![attribute]));
        from = to;
    }
    graph.node.extend(made);
    read_instead(graph, random, from);
}

/// Many nodes that do nothing, or the same.
fn long_chain(graph: &mut GraphProto, random: &mut Random) {
    let Some(step) = random.of(&graph.node).cloned() else {
        return;
    };
    let mut from = value(graph, random);
    let op = ["Identity", "Neg", "Cast", "Add", "Transpose", "Shape", ""][random.below(7)];
    for _ in 0..random.below(COPIES_MAX) >> random.below(8) {
        let to = fresh(random);
        let mut copy = match op {
            "" => step.clone(),
            "Add" => node(op, &[&from, &from], &to, vec![]),
            op => node(op, &[&from], &to, vec![]),
        };
        if let (Some(input), Some(output)) = (copy.input.first_mut(), copy.output.first_mut()) {
            (*input, *output) = (from, to.clone());
        }
        graph.node.push(copy);
        from = to;
    }
    read_instead(graph, random, from);
}

/// A node, or all, inside the branches of an `If`; again and again, so deep.
fn wrap_in_if(graph: &mut GraphProto, random: &mut Random) {
    if graph.node.is_empty() {
        return;
    }
    let at = random.below(graph.node.len());
    for level in 0..(1 + random.below(12)) >> random.below(4) {
        let inner = graph.node[at].clone();
        let outputs = inner.output.iter().map(|name| ValueInfoProto {
            name: name.clone(),
            ..ValueInfoProto::default()
        });
        let branch = GraphProto {
            output: outputs.collect(),
            node: vec![inner.clone()],
            ..GraphProto::default()
        };
        let graph_attribute = |name: &str| AttributeProto {
            name: name.into(),
            r#type: AttributeType::Graph as i32,
            g: Some(branch.clone()),
            ..AttributeProto::default()
        };
        let condition = if random.one_in(2) {
            "use_cache_branch".into()
        } else {
            value(graph, random)
        };
        let mut node = node("If", &[&condition], "", vec![]);
        node.output = inner.output;
        node.attribute.push(graph_attribute("then_branch"));
        // Both only once, since each holds all that is inside.
        if level == 0 {
            node.attribute.push(graph_attribute("else_branch"));
        }
        graph.node[at] = node;
    }
}
