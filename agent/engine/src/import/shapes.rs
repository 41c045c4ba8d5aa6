//! Sizes of activations, asked for in the graph, become sizes of the token ids: what an attention block computes from
//! them no longer hangs on the layers before it.

use super::{EMBED, LINEAR};
use crate::onnx::{Graph, input, int, int_attribute, int_vector, ints, new_node, output};

/// Operators that leave the shape of their first input that is no stored tensor.
const SHAPELESS: [&str; 14] = [
    "RMSNormalization",
    "LayerNormalization",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Sigmoid",
    "Tanh",
    "Erf",
    "Gelu",
    "Relu",
    "Cast",
    "Identity",
];
/// Steps back to a linear or the embedding, at most.
const STEPS_MAX: usize = 64;

pub(super) fn shapes(graph: &mut Graph) {
    let mut made = Vec::new();
    for index in 0..graph.proto().node.len() {
        let node = graph.node(index);
        let asked = (node.op_type == "Shape")
            .then(|| input(node, 0).zip(output(node, 0)))
            .flatten();
        let Some((of, out)) = asked else { continue };
        let Some(width) = width(graph, of) else {
            continue;
        };
        let (first, last) = (int(node, "start").unwrap_or(0), int(node, "end"));
        if first == 0 && last.is_none() {
            let (out, ids, size) = (out.to_owned(), format!("{out}/ids"), format!("{out}/width"));
            let tensor = int_vector(&size, vec![width as i64]);
            let mut join = new_node("Concat", &[&ids, &size], &[&out]);
            join.attribute.push(int_attribute("axis", 0));
            graph.proto_mut().node[index] = join;
            graph.proto_mut().initializer.push(tensor);
            made.push(new_node("Shape", &["input_ids"], &[&ids]));
        } else if (0..2).contains(&first) && last.is_some_and(|last| (1..=2).contains(&last)) {
            graph.proto_mut().node[index].input[0] = "input_ids".into();
        }
    }
    graph.proto_mut().node.splice(0..0, made);
    graph.index();
}

/// The width of a value that is activations, `[1, tokens, width]`, as far as a short way back shows.
fn width(graph: &Graph, value: &str) -> Option<usize> {
    let mut value = value;
    for _ in 0..STEPS_MAX {
        let node = graph.producer(value)?;
        match node.op_type.as_str() {
            LINEAR | EMBED => return Some(*ints(node, "widths").first()? as usize),
            op if SHAPELESS.contains(&op) => {
                let made = node
                    .input
                    .iter()
                    .filter(|name| graph.producer(name).is_some());
                if made.count() > 1 && !matches!(op, "Add" | "Sub") {
                    // One factor may be narrower than the other.
                    return None;
                }
                let mut inputs = node.input.iter().map(String::as_str);
                value = inputs.find(|name| graph.producer(name).is_some())?;
            }
            _ => return None,
        }
    }
    None
}
