//! ONNX Runtime's weights of four or eight bits: `MatMulNBits` and `GatherBlockQuantized`.
//!
//! The operators: <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>

use super::weight::{BLOCK, GROUP_MIN, whole};
use crate::onnx::{Graph, GraphError, dims, elements, input, int};
use crate::recipe::{Form, Order, Scaling, Scope, WeightSource};
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{NodeProto, TensorProto};

/// Numbers along a matrix, as everywhere in ONNX files that fit a gateway.
const SIZE_MAX: i64 = 1 << 24;

/// The weight of a `MatMulNBits`. What can't be read is an error that says so: no one else reads it either.
pub(super) fn weight(graph: &Graph, node: &NodeProto) -> Result<WeightSource, GraphError> {
    matmul(graph, node).map_err(|reason| {
        GraphError::Shape(format!("has a node {} (MatMulNBits) {reason}", node.name))
    })
}

fn matmul(graph: &Graph, node: &NodeProto) -> Result<WeightSource, String> {
    let (rows, cols) = (size(node, "N")?, size(node, "K")?);
    if input(node, 4).is_some() {
        return Err("with g_idx, which this version doesn't read".into());
    }
    let zero_points = input(node, 3);
    read(
        graph,
        node,
        [rows, cols],
        [1, 2],
        zero_points,
        size(node, "block_size")?,
    )
}

/// The table of a `GatherBlockQuantized`, `[rows, cols]` in blocks along the columns.
pub(super) fn table(graph: &Graph, node: &NodeProto) -> Result<WeightSource, GraphError> {
    gather(graph, node).map_err(|reason| {
        GraphError::Shape(format!(
            "has a node {} (GatherBlockQuantized) {reason}",
            node.name
        ))
    })
}

fn gather(graph: &Graph, node: &NodeProto) -> Result<WeightSource, String> {
    let axes = (
        int(node, "gather_axis").unwrap_or(0),
        int(node, "quantize_axis").unwrap_or(1),
    );
    if !matches!(axes, (0, 1 | -1)) {
        return Err("that does not gather rows in blocks along them".into());
    }
    let block = int(node, "block_size").map_or(Ok(128), |_| size(node, "block_size"))?;
    let scales = input(node, 2)
        .and_then(|name| graph.initializer(name))
        .map(dims);
    let Some(&[rows, groups]) = scales.as_deref() else {
        return Err("whose scales are no stored matrix".into());
    };
    let cols = groups
        .checked_mul(block)
        .filter(|cols| *cols as i64 <= SIZE_MAX);
    let cols = cols.ok_or("of too many columns")?;
    let values = input(node, 0).and_then(|name| graph.initializer(name));
    if let Some(values) =
        values.filter(|t| matches!(t.data_type(), DataType::Int4 | DataType::Uint4))
    {
        let scaling = Scaling {
            scope: Scope::Block(block),
            scales: input(node, 2).unwrap_or_default().to_owned(),
            zero_points: input(node, 3).map(str::to_owned),
        };
        let table = whole(graph, &values.name, Order::RowMajor, &scaling);
        return table.ok_or_else(|| "whose parts do not fit together".into());
    }
    read(graph, node, [rows, cols], [0, 2], input(node, 3), block)
}

fn size(node: &NodeProto, name: &str) -> Result<usize, String> {
    let value = int(node, name).unwrap_or(0);
    let fits = (1..=SIZE_MAX).contains(&value).then_some(value as usize);
    fits.ok_or_else(|| format!("whose {name} is {value}"))
}

/// Checks what both operators store in the same way; `at` says which inputs the weights and the scales are.
fn read(
    graph: &Graph,
    node: &NodeProto,
    [rows, cols]: [usize; 2],
    at: [usize; 2],
    zero_points: Option<&str>,
    block: usize,
) -> Result<WeightSource, String> {
    let bits = match int(node, "bits").unwrap_or(4) {
        bits @ (4 | 8) => bits as u8,
        other => return Err(format!("of {other} bits; this version reads 4 and 8")),
    };
    if !block.is_power_of_two() || block < GROUP_MIN {
        return Err(format!(
            "in blocks of {block}; this version reads 16, 32 and further powers of two"
        ));
    }
    if cols == 0 || !cols.is_multiple_of(BLOCK) {
        return Err(format!("of {cols} inputs, which is no multiple of {BLOCK}"));
    }
    let groups = cols.div_ceil(block);
    let tensor = |name: Option<&str>, what: &str| {
        let name = name.ok_or_else(|| format!("without {what}"))?;
        // The embedding may be the head's weight under another shape.
        let name = match graph.made_by(name, "Reshape") {
            Some(reshape) => input(reshape, 0).unwrap_or(name),
            None => name,
        };
        let found = graph.initializer(name);
        found.ok_or_else(|| format!("whose {what} {name} is no stored tensor"))
    };
    let (values, scales) = (
        tensor(input(node, at[0]), "weights")?,
        tensor(input(node, at[1]), "scales")?,
    );
    // Sizes are below 2²⁴, so that a row's product fits 32 bits, if not a matrix's.
    let all = |row: usize| rows.checked_mul(row).ok_or("of too many weights");
    let row = groups * block / 8 * usize::from(bits);
    expect(values, &[DataType::Uint8], all(row)?)?;
    expect(scales, &FLOATS, all(groups)?)?;
    let zero_points = match zero_points {
        None => None,
        name => {
            let zeros = tensor(name, "zero points")?;
            if zeros.data_type() == DataType::Uint8 {
                let row = (groups * usize::from(bits)).div_ceil(8);
                expect(zeros, &[DataType::Uint8], all(row)?)?;
            } else {
                expect(zeros, &FLOATS, all(groups)?)?;
            }
            Some(zeros.name.clone())
        }
    };
    let scaling = Scaling {
        scope: Scope::Block(block),
        scales: scales.name.clone(),
        zero_points,
    };
    Ok(WeightSource {
        values: values.name.clone(),
        form: Form::Bits { bits, scaling },
        stored: rows,
        first: 0,
        rows,
        cols,
    })
}

const FLOATS: [DataType; 3] = [DataType::Float, DataType::Float16, DataType::Bfloat16];

/// Checks type and size; exporters shape all of it as they like, the numbers lie the same.
fn expect(tensor: &TensorProto, types: &[DataType], count: usize) -> Result<(), String> {
    if types.contains(&tensor.data_type()) && elements(tensor) == Some(count) {
        return Ok(());
    }
    Err(format!(
        "whose {} is {:?} of {:?}; {types:?} with {count} numbers belong there",
        tensor.name,
        tensor.data_type(),
        tensor.dims
    ))
}
