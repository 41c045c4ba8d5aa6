//! Recognises `com.microsoft.MatMulNBits`: linears with weights of four bits. Its arithmetic is the kernels'.
//!
//! The operator: <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits>

use crate::onnx::{Graph, GraphError, int};
use crate::recipe::{Form, WeightSource, ZeroPoints};
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{NodeProto, TensorProto};

/// Columns that a weight is a multiple of, as packed.
const BLOCK: usize = millwright_kernels::packed::BLOCK;
/// Numbers along a matrix, as everywhere in ONNX files that fit a gateway.
const SIZE_MAX: i64 = 1 << 24;

/// The weight of a `MatMulNBits`. What can't be read is an error that says so: no one else reads it either.
pub(crate) fn weight(graph: &Graph, node: &NodeProto) -> Result<WeightSource, GraphError> {
    read(graph, node).map_err(|reason| {
        GraphError::Shape(format!("has a node {} (MatMulNBits) {reason}", node.name))
    })
}

fn read(graph: &Graph, node: &NodeProto) -> Result<WeightSource, String> {
    let size = |name: &str| {
        let value = int(node, name).unwrap_or(0);
        let fits = (1..=SIZE_MAX).contains(&value).then_some(value as usize);
        fits.ok_or_else(|| format!("whose {name} is {value}"))
    };
    let (rows, cols, block) = (size("N")?, size("K")?, size("block_size")?);
    let bits = int(node, "bits").unwrap_or(4);
    if bits != 4 {
        return Err(format!("of {bits} bits; this version reads 4"));
    }
    if !block.is_power_of_two() || block < 16 {
        return Err(format!(
            "in blocks of {block}; this version reads 16, 32 and further powers of two"
        ));
    }
    if !cols.is_multiple_of(BLOCK) {
        return Err(format!("of {cols} inputs, which is no multiple of {BLOCK}"));
    }
    let input = |i: usize| node.input.get(i).filter(|name| !name.is_empty());
    if input(4).is_some() || input(5).is_some() {
        return Err("with g_idx or a bias, which this version doesn't read".into());
    }
    let groups = cols.div_ceil(block);
    let tensor = |i: usize, what: &str| {
        let name = input(i).ok_or_else(|| format!("without {what}"))?;
        let found = graph.initializer(name);
        found.ok_or_else(|| format!("whose {what} {name} is no stored tensor"))
    };
    let (values, scales) = (tensor(1, "weights")?, tensor(2, "scales")?);
    expect(values, &[DataType::Uint8], &[rows, groups, block / 2])?;
    let floats = [DataType::Float, DataType::Float16];
    expect(scales, &floats, &[rows, groups])?;
    let zero_points = match input(3) {
        None => ZeroPoints::Absent,
        Some(_) => zero_points(tensor(3, "zero points")?, rows, groups)?,
    };
    Ok(WeightSource {
        values: values.name.clone(),
        scales: scales.name.clone(),
        rows,
        cols,
        form: Form::Four { block, zero_points },
    })
}

fn zero_points(tensor: &TensorProto, rows: usize, groups: usize) -> Result<ZeroPoints, String> {
    let name = tensor.name.clone();
    if tensor.data_type() == DataType::Uint8 {
        expect(tensor, &[DataType::Uint8], &[rows, groups.div_ceil(2)])?;
        return Ok(ZeroPoints::Packed(name));
    }
    let types = [DataType::Float, DataType::Float16];
    expect(tensor, &types, &[rows, groups])?;
    Ok(ZeroPoints::Floats(name))
}

/// Checks type and shape; older exports write all but the weights as one dimension.
fn expect(tensor: &TensorProto, types: &[DataType], shape: &[usize]) -> Result<(), String> {
    let dims: Vec<Option<usize>> = tensor
        .dims
        .iter()
        .map(|&n| usize::try_from(n).ok())
        .collect();
    let whole = dims.iter().copied().eq(shape.iter().map(|&n| Some(n)));
    let flat = shape.len() == 2 && dims == [Some(shape[0] * shape[1])];
    if types.contains(&tensor.data_type()) && (whole || flat) {
        return Ok(());
    }
    Err(format!(
        "whose {} is {:?} of {:?}; {types:?} of {shape:?} belongs there",
        tensor.name,
        tensor.data_type(),
        tensor.dims
    ))
}
