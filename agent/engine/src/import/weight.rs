//! What stored matrix stands behind a value, over the operators that only say how its numbers are to be read.

use crate::onnx::{Graph, dims, input, int, ints, output};
use crate::recipe::{Form, Order, Scaling, Scope, WeightSource};
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{NodeProto, TensorProto};

/// Columns that a weight is a multiple of, as packed.
pub(super) const BLOCK: usize = millwright_kernels::packed::BLOCK;
/// Columns that may share a scale are a multiple of this.
pub(super) const GROUP_MIN: usize = 16;
/// Transpositions behind each other that are looked through; no exporter writes more than two.
const TRANSPOSES_MAX: usize = 4;

/// The matrix that a value holds. `order` says how `[rows, cols]` lie in it: a `MatMul`'s second operand is
/// column-major.
pub(super) fn behind(graph: &Graph, value: &str, order: Order) -> Option<WeightSource> {
    let (value, order) = transposed(graph, value, order);
    if let Some(tensor) = graph.initializer(value) {
        return floats(tensor, order);
    }
    let dequantise = graph.made_by(value, "DequantizeLinear")?;
    dequantised(graph, dequantise, order)
}

/// A value's source over transpositions, and the order there.
pub(super) fn transposed<'a>(
    graph: &'a Graph,
    mut value: &'a str,
    mut order: Order,
) -> (&'a str, Order) {
    for _ in 0..TRANSPOSES_MAX {
        let node = graph.made_by(value, "Transpose");
        let node = node.filter(|node| matches!(ints(node, "perm"), [1, 0] | []));
        let Some(source) = node.and_then(|node| input(node, 0)) else {
            break;
        };
        order = match order {
            Order::RowMajor => Order::ColumnMajor,
            Order::ColumnMajor => Order::RowMajor,
        };
        value = source;
    }
    (value, order)
}

/// Plain numbers.
fn floats(tensor: &TensorProto, order: Order) -> Option<WeightSource> {
    let floats = [DataType::Float, DataType::Float16, DataType::Bfloat16];
    if !floats.contains(&tensor.data_type()) {
        return None;
    }
    sized(tensor, order, Form::Floats(order))
}

/// `DequantizeLinear(q, scale, zero point)`, per tensor, per output or in blocks along the inputs, with q and what
/// belongs to it perhaps behind a `Transpose` each.
fn dequantised(graph: &Graph, node: &NodeProto, outer: Order) -> Option<WeightSource> {
    let (values, order) = transposed(graph, input(node, 0)?, outer);
    let beside = |index: usize| input(node, index).map(|value| transposed(graph, value, outer));
    let (scales, scales_order) = beside(1)?;
    let zero_points = beside(2);
    let axis = int(node, "axis").unwrap_or(1).rem_euclid(2);
    // The axis of the outputs, where the operator stands.
    let outputs = match outer {
        Order::RowMajor => 0,
        Order::ColumnMajor => 1,
    };
    let block = usize::try_from(int(node, "block_size").unwrap_or(0)).ok()?;
    let scope = match dims(graph.initializer(scales)?).as_slice() {
        [] | [1] => Scope::Matrix,
        [_] if axis == outputs => Scope::Row,
        [_, _] if axis != outputs && block > 0 => Scope::Block(block),
        _ => return None,
    };
    let alike = |of: Order| !matches!(scope, Scope::Block(_)) || of == order;
    if !alike(scales_order) || !zero_points.is_none_or(|(_, of)| alike(of)) {
        return None;
    }
    let scaling = Scaling {
        scope,
        scales: scales.to_owned(),
        zero_points: zero_points.map(|(name, _)| name.to_owned()),
    };
    whole(graph, values, order, &scaling)
}

/// Whole numbers of 4 or 8 bits with these scales, if all of it fits together.
pub(super) fn whole(
    graph: &Graph,
    values: &str,
    order: Order,
    scaling: &Scaling,
) -> Option<WeightSource> {
    let tensor = graph.initializer(values)?;
    let types = [
        DataType::Int8,
        DataType::Uint8,
        DataType::Int4,
        DataType::Uint4,
    ];
    if !types.contains(&tensor.data_type()) {
        return None;
    }
    let form = Form::Whole {
        order,
        scaling: scaling.clone(),
    };
    let source = sized(tensor, order, form)?;
    let wanted = match scaling.scope {
        Scope::Matrix => 1,
        Scope::Row => source.rows,
        Scope::Block(block) => {
            if !block.is_multiple_of(GROUP_MIN) || !source.cols.is_multiple_of(block) {
                return None;
            }
            source.rows * (source.cols / block)
        }
    };
    let scales = graph.initializer(&scaling.scales)?;
    let numbers = [DataType::Float, DataType::Float16, DataType::Bfloat16];
    let counts = |tensor: &TensorProto| crate::onnx::elements(tensor) == Some(wanted);
    let in_line = |tensor: &TensorProto| match (scaling.scope, order) {
        (Scope::Block(_), Order::RowMajor) => tensor.dims.first() == Some(&(source.rows as i64)),
        (Scope::Block(_), Order::ColumnMajor) => tensor.dims.last() == Some(&(source.rows as i64)),
        _ => true,
    };
    let scales_fit = numbers.contains(&scales.data_type()) && counts(scales) && in_line(scales);
    let zeros_fit = match &scaling.zero_points {
        None => true,
        Some(name) => graph.initializer(name).is_some_and(|zeros| {
            zeros.data_type() == tensor.data_type() && counts(zeros) && in_line(zeros)
        }),
    };
    (scales_fit && zeros_fit).then_some(source)
}

/// A weight of the tensor's sizes, if linears can have them.
fn sized(tensor: &TensorProto, order: Order, form: Form) -> Option<WeightSource> {
    let &[first, second] = dims(tensor).as_slice() else {
        return None;
    };
    let (rows, cols) = match order {
        Order::RowMajor => (first, second),
        Order::ColumnMajor => (second, first),
    };
    if rows == 0 || cols == 0 || !cols.is_multiple_of(BLOCK) {
        return None;
    }
    Some(WeightSource {
        values: tensor.name.clone(),
        form,
        stored: rows,
        first: 0,
        rows,
        cols,
    })
}

/// An embedding: the ids, the value that holds their rows, and the table.
pub(super) fn embedding(graph: &Graph, node: &NodeProto) -> Option<(String, WeightSource)> {
    match node.op_type.as_str() {
        // Of the whole table, dequantised or plain.
        "Gather" => {
            let table = behind(graph, input(node, 0)?, Order::RowMajor)?;
            let of_ids = int(node, "axis").unwrap_or(0) == 0;
            of_ids.then_some((input(node, 1)?.to_owned(), table))
        }
        "DequantizeLinear" => gathered(graph, node),
        _ => None,
    }
}

/// `DequantizeLinear(Gather(q, ids), scale, zero point)`, the latter two for the whole table or gathered as well.
fn gathered(graph: &Graph, node: &NodeProto) -> Option<(String, WeightSource)> {
    let rows_of = |value: &str| {
        let gather = graph
            .made_by(value, "Gather")
            .filter(|g| int(g, "axis").unwrap_or(0) == 0)?;
        Some((input(gather, 0)?.to_owned(), input(gather, 1)?.to_owned()))
    };
    let (values, ids) = rows_of(input(node, 0)?)?;
    let beside = |value: &str| match rows_of(value) {
        Some((table, of)) => (of == ids).then_some((table, true)),
        None => Some((value.to_owned(), false)),
    };
    let (scales, by_row) = beside(input(node, 1)?)?;
    let zero_points = match input(node, 2) {
        None => None,
        Some(value) => Some(beside(value).filter(|(_, also)| *also == by_row)?.0),
    };
    let block = usize::try_from(int(node, "block_size").unwrap_or(0)).ok()?;
    let scope = match (by_row, block) {
        (false, _) => Scope::Matrix,
        (true, 0) => return None,
        (true, block) if matches!(int(node, "axis").unwrap_or(1), 2 | -1) => Scope::Block(block),
        _ => return None,
    };
    let scaling = Scaling {
        scope,
        scales,
        zero_points,
    };
    Some((ids, whole(graph, &values, Order::RowMajor, &scaling)?))
}

/// The number of outputs a bias belongs to: a stored vector added to a value that nobody else reads.
pub(super) fn bias<'a>(
    graph: &'a Graph,
    value: &str,
    rows: usize,
) -> Option<(&'a NodeProto, Vec<f32>)> {
    let add = graph
        .sole_consumer(value)
        .filter(|node| node.op_type == "Add")?;
    let vector = super::norm::other(add, value).filter(|name| graph.is_vector(name))?;
    output(add, 0)?;
    let values = graph.values(vector)?;
    (values.len() == rows).then_some((add, values))
}
