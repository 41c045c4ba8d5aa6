//! Joins our operators with their neighbours: a norm or SwiGLU in front, the residual behind.
//! Changes how many operators there are, never what they compute.

use super::{ATTEND, LINEAR};
use crate::onnx::{Graph, float, input, int, ints, new_node, with_float, with_ints};
use crate::recipe::Recipe;
use std::collections::HashSet;
use tract_onnx::pb::NodeProto;

pub(crate) const PROJECT: &str = "MillwrightProject";
/// Steps back to a stored tensor, at most.
const STEPS_MAX: usize = 16;

/// Whether the operators that were left work on each token alone, so that they may run on a flat batch.
pub(super) fn position_wise(graph: &Graph) -> Result<(), String> {
    const UNARY: [&str; 11] = [
        "Sigmoid",
        "Tanh",
        "Erf",
        "Cast",
        "Identity",
        "Sqrt",
        "Relu",
        "Gelu",
        "FastGelu",
        "QuickGelu",
        "Neg",
    ];
    const BINARY: [&str; 5] = ["Add", "Mul", "Sub", "Div", "Pow"];
    for node in &graph.proto().node {
        let constant = |i: usize| {
            node.input.get(i).is_some_and(|name| {
                let transposed = graph.made_by(name, "Transpose");
                graph.is_initializer(transposed.map_or(name, |node| &node.input[0]))
            })
        };
        let scalar_or_row = |i: usize| {
            let tensor = node.input.get(i).and_then(|name| graph.initializer(name));
            tensor.is_none_or(|t| t.dims.len() <= 1)
        };
        let fine = match node.op_type.as_str() {
            op if op.starts_with("Millwright") => true,
            op if UNARY.contains(&op) => true,
            op if BINARY.contains(&op) => scalar_or_row(0) && scalar_or_row(1),
            "RMSNormalization" | "LayerNormalization" => int(node, "axis").unwrap_or(-1) == -1,
            "MatMul" => constant(1),
            "Transpose" => constant(0),
            "Gather" => constant(0) && int(node, "axis").unwrap_or(0) == 0,
            _ => false,
        };
        if !fine {
            return Err(format!(
                "{} ({}) may mix positions",
                node.op_type, node.name
            ));
        }
    }
    let foreign = graph.proto().input.iter().find(|i| i.name != "input_ids");
    foreign.map_or(Ok(()), |input| {
        Err(format!("it still reads {}", input.name))
    })
}

/// Joins what can be joined. Every [`LINEAR`] becomes part of a [`PROJECT`].
pub(super) fn fuse(graph: &mut Graph, recipe: &mut Recipe) {
    let mut made = Vec::new();
    let mut gone = HashSet::new();
    for node in graph
        .proto()
        .node
        .iter()
        .filter(|node| node.op_type == LINEAR)
    {
        if gone.contains(&node.output[0]) {
            continue;
        }
        let project = Project::around(graph, recipe, node, &gone);
        gone.extend(
            project
                .linears
                .iter()
                .map(|linear| linear.output[0].clone()),
        );
        gone.extend(project.outputs.iter().cloned());
        made.push(project.into_node(recipe));
    }
    let nodes = &mut graph.proto_mut().node;
    nodes.retain(|node| !node.output.iter().any(|output| gone.contains(output)));
    nodes.extend(made);
    graph.sweep();
}

/// One operator in the making.
struct Project<'a> {
    input: Input<'a>,
    linears: Vec<&'a NodeProto>,
    /// Whether each takes the activations' remainders too. Where it matters most for what it costs: in the head, which
    /// sampled tokens alone go through, and for values, which are few and go straight into the sum of a layer.
    fine: Vec<bool>,
    residual: Option<String>,
    outputs: Vec<String>,
}

/// What is quantised for the linears.
enum Input<'a> {
    Plain(&'a str),
    /// x, gain and epsilon.
    Normed(&'a str, Vec<f32>, f32),
    /// silu(gate) · up.
    Gated(&'a str, &'a str),
}

impl<'a> Project<'a> {
    fn around(
        graph: &'a Graph,
        recipe: &Recipe,
        first: &'a NodeProto,
        gone: &HashSet<String>,
    ) -> Self {
        let x = first.input[0].as_str();
        let linears: Vec<_> = graph
            .consumers(x)
            .filter(|node| node.op_type == LINEAR)
            .collect();
        let cols = ints(first, "weights")
            .first()
            .map_or(0, |&w| recipe.weights[w as usize].cols);
        let mut project = Self {
            input: normed(graph, x, cols)
                .or_else(|| gated(graph, x))
                .unwrap_or(Input::Plain(x)),
            outputs: linears.iter().map(|node| node.output[0].clone()).collect(),
            fine: linears
                .iter()
                .map(|linear| is_fine(graph, &linear.output[0]))
                .collect(),
            linears,
            residual: None,
        };
        project.join_residual(graph, gone);
        project
    }

    /// `Add(x, linear(x'))`, where x is another activation and not joined to somebody else already.
    fn join_residual(&mut self, graph: &Graph, gone: &HashSet<String>) {
        let [output] = self.outputs.as_slice() else {
            return;
        };
        let Some(add) = graph.sole_consumer(output).filter(|n| n.op_type == "Add") else {
            return;
        };
        let Some(other) = add.input.iter().find(|input| *input != output) else {
            return;
        };
        let head = add.output[0] == "logits";
        if !head && !gone.contains(&add.output[0]) && !is_constant(graph, other) {
            self.residual = Some(other.clone());
            self.outputs = vec![add.output[0].clone()];
        }
    }

    fn into_node(self, recipe: &mut Recipe) -> NodeProto {
        let (mut inputs, gated, norm) = match self.input {
            Input::Plain(x) => (vec![x], false, None),
            Input::Normed(x, gain, epsilon) => {
                (vec![x], false, Some((recipe.table(gain), epsilon)))
            }
            Input::Gated(gate, up) => (vec![gate, up], true, None),
        };
        inputs.extend(self.residual.as_deref());
        let outputs: Vec<&str> = self.outputs.iter().map(String::as_str).collect();
        let all = |name| -> Vec<usize> {
            self.linears
                .iter()
                .flat_map(|n| ints(n, name))
                .map(|&v| v as usize)
                .collect()
        };
        let mut node = new_node(PROJECT, &inputs, &outputs);
        node = with_ints(node, "weights", &all("weights"));
        node = with_ints(node, "widths", &all("widths"));
        let bias = |node: &&NodeProto| {
            ints(node, "bias")
                .first()
                .map_or(0, |&table| table as usize + 1)
        };
        let biases: Vec<usize> = self.linears.iter().map(bias).collect();
        node = with_ints(node, "biases", &biases);
        let fine: Vec<usize> = self.fine.iter().map(|&fine| usize::from(fine)).collect();
        node = with_ints(node, "fine", &fine);
        node = with_ints(node, "gated", &[usize::from(gated)]);
        node = with_ints(node, "head", &[usize::from(outputs == ["logits"])]);
        if let Some((gain, epsilon)) = norm {
            node = with_float(with_ints(node, "norm", &[gain]), "epsilon", epsilon);
        }
        node
    }
}

/// Whether a linear's output is logits or an attention's values.
fn is_fine(graph: &Graph, output: &str) -> bool {
    let are_values = |node: &NodeProto| node.op_type == ATTEND && input(node, 2) == Some(output);
    output == "logits" || graph.consumers(output).any(are_values)
}

/// `RMSNormalization(x, gain)` over the last axis.
fn normed<'a>(graph: &'a Graph, value: &str, cols: usize) -> Option<Input<'a>> {
    let norm = graph.made_by(value, "RMSNormalization")?;
    let gain = graph
        .values(&norm.input[1])
        .filter(|gain| gain.len() == cols)?;
    let known = int(norm, "axis").unwrap_or(-1) == -1;
    let epsilon = float(norm, "epsilon").unwrap_or(1e-5);
    known.then(|| Input::Normed(&norm.input[0], gain, epsilon))
}

/// Whether a value is made of nothing but constants.
fn is_constant<'a>(graph: &'a Graph, mut value: &'a str) -> bool {
    for _ in 0..STEPS_MAX {
        if graph.is_initializer(value) {
            return true;
        }
        match graph.producer(value) {
            Some(node)
                if matches!(
                    node.op_type.as_str(),
                    "Identity" | "Cast" | "Transpose" | "Reshape" | "Unsqueeze"
                ) =>
            {
                value = &node.input[0];
            }
            _ => return false,
        }
    }
    false
}

/// `Mul(Mul(gate, Sigmoid(gate)), up)` of two linears of one width, the factors in either order.
fn gated<'a>(graph: &'a Graph, value: &str) -> Option<Input<'a>> {
    let both = graph.made_by(value, "Mul")?;
    let silu_of = |value: &str| -> Option<&'a str> {
        let silu = graph.made_by(value, "Mul")?;
        let gate_of = |gate: &'a String, sigmoid: &str| {
            let sigmoid = graph.made_by(sigmoid, "Sigmoid")?;
            (sigmoid.input[0] == *gate).then_some(gate.as_str())
        };
        gate_of(&silu.input[0], &silu.input[1]).or_else(|| gate_of(&silu.input[1], &silu.input[0]))
    };
    let width = |value: &str| {
        graph
            .made_by(value, LINEAR)
            .map(|node| ints(node, "widths"))
    };
    let [a, b] = both.input.as_slice() else {
        return None;
    };
    let gate_first = silu_of(a).map(|gate| (gate, b.as_str()));
    let (gate, up) = gate_first.or_else(|| silu_of(b).map(|gate| (gate, a.as_str())))?;
    (width(gate).is_some() && width(gate) == width(up)).then_some(Input::Gated(gate, up))
}
