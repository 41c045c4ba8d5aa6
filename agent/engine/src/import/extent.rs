//! How many numbers each value of a graph holds, worked out from sizes alone. A graph of a kilobyte may ask for a
//! terabyte, and tract makes what is constant before it looks at its size; so nothing is planned or tried before this
//! was asked.
//!
//! Sizes are followed for given numbers of tokens. They are exact or not known at all, and then there is but a bound
//! on how many numbers there are. The few whole numbers that sizes are made of are computed on the way, from exact
//! sizes alone. What asks for a size that can't be told is an error: nobody could bound it. The numbers of tokens are
//! samples: what planning makes hangs on none, but a run of others may make more.

mod attention;
mod cut;
mod numbers;
mod shaped;
mod sized;
mod value;

use super::types;
use crate::onnx::{Graph, GraphError, elements, graphs, input, input_dims, input_type, int};
use std::collections::{HashMap, HashSet};
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{GraphProto, NodeProto, TensorProto};
use value::Extent;

/// Numbers that any graph may make of what is stored, or in one value when it runs.
const NUMBERS_MIN: u64 = 1 << 22;
/// As many more for each byte of its files: a byte holds two numbers of four bits, which go through some operators.
const NUMBERS_PER_BYTE: u64 = 8;
/// What a run, or trying blocks, may make and add up, for each number that one value may hold: a chunk takes each
/// weight once a token.
const EFFORT_PER_NUMBER: u64 = 64;
/// Numbers computed to find sizes, at most.
const COMPUTED_ALL_MAX: usize = 1 << 20;
/// Numbers stored together of which sizes may be made, at most.
const STORED_MAX: u64 = 256;
/// No tensor of a language model has more axes.
const RANK_MAX: usize = 16;
/// Inputs, and outputs, of one operator at most.
const ENDS_MAX: usize = 256;

/// How many tokens there are, and how many before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lengths {
    pub(super) tokens: usize,
    pub(super) past: usize,
}

/// What a run makes of so few tokens holds, among little else, all that planning makes: what hangs on no tokens is
/// always as large.
const FEW: Lengths = Lengths { tokens: 2, past: 3 };

/// What is tried: besides, a chunk of a prompt, and a few tokens behind many. No size is one by chance, and none is
/// beyond the tables of a small context.
const LENGTHS: [Lengths; 3] = [
    FEW,
    Lengths {
        tokens: 61,
        past: 67,
    },
    Lengths {
        tokens: 2,
        past: 237,
    },
];

/// Refuses graphs that make tensors out of proportion to their files.
pub(super) fn bounded(graph: &Graph) -> Result<(), GraphError> {
    let proto = graph.proto();
    for lengths in LENGTHS {
        let mut extents = Extents::new(graph, effort_most(graph));
        let followed = proto.input.iter().try_for_each(|input| {
            let of = input_type(input);
            extents.feed(&input.name, &input_dims(input), of, lengths)
        });
        followed
            .and_then(|()| extents.follow(&proto.node, &proto.initializer))
            .map_err(|what| GraphError::Shape(format!("has {what}")))?;
        if lengths == FEW && extents.made > extents.most {
            let what = too_many("has values of", extents.made);
            return Err(GraphError::Shape(what));
        }
    }
    Ok(())
}

/// Numbers that may be made and added up to try what blocks do.
pub(super) fn effort_most(graph: &Graph) -> u64 {
    most(graph).saturating_mul(EFFORT_PER_NUMBER)
}

/// Numbers that one value may hold, for the size of the graph's files.
fn most(graph: &Graph) -> u64 {
    NUMBERS_PER_BYTE
        .saturating_mul(graph.file_bytes())
        .saturating_add(NUMBERS_MIN)
}

/// The values of a graph, or of a part of it, as far as they were followed.
pub(super) struct Extents<'a> {
    graph: &'a Graph,
    known: HashMap<String, Extent>,
    most: u64,
    /// Numbers that were made.
    made: u64,
    /// Numbers that were made, each sum counted by what is added.
    effort: u64,
    effort_most: u64,
    computed: usize,
}

impl<'a> Extents<'a> {
    /// Nothing is followed whose making takes more than `effort_most`.
    pub(super) fn new(graph: &'a Graph, effort_most: u64) -> Self {
        Self {
            graph,
            known: HashMap::new(),
            most: most(graph),
            made: 0,
            effort: 0,
            effort_most,
            computed: 0,
        }
    }

    /// Numbers that were made, each sum counted by what is added.
    pub(super) fn effort(&self) -> u64 {
        self.effort
    }

    /// States the sizes of a value of floats.
    pub(super) fn put(&mut self, name: &str, dims: &[usize]) -> Result<(), String> {
        let dims = dims.iter().map(|&n| n as u64).collect();
        self.state(name, Extent::of(dims))
    }

    fn state(&mut self, name: &str, extent: Extent) -> Result<(), String> {
        let known = self.know(name, extent);
        known.map_err(|what| format!("a value {name} {what}"))
    }

    /// States what an input of the graph is; of a cache what was stated of it.
    pub(super) fn feed(
        &mut self,
        name: &str,
        stated: &[Option<usize>],
        of: Option<i32>,
        lengths: Lengths,
    ) -> Result<(), String> {
        let Lengths { tokens, past } = lengths;
        let row = |numbers: Vec<i64>| Extent {
            of,
            ..Extent::of(vec![1, numbers.len() as u64]).with(Some(numbers))
        };
        let input = match name {
            "input_ids" => Extent::of(vec![1, tokens as u64]),
            "position_ids" => row((past..past + tokens).map(|at| at as i64).collect()),
            "attention_mask" => row(vec![1; past + tokens]),
            _ => {
                let open = |axis| if axis == 2 { past } else { 1 };
                let dims = stated.iter().enumerate();
                let dims: Vec<usize> = dims.map(|(axis, n)| n.unwrap_or(open(axis))).collect();
                return self.put(name, &dims);
            }
        };
        self.state(name, input)
    }

    /// Follows nodes, which stand in an order in which each finds what it reads. `Err` names one that is too large.
    pub(super) fn follow<'b>(
        &mut self,
        nodes: impl IntoIterator<Item = &'b NodeProto>,
        stored: impl IntoIterator<Item = &'b TensorProto>,
    ) -> Result<(), String> {
        for tensor in stored {
            let stored = self.stored(tensor);
            self.state(&tensor.name, stored)?;
        }
        for node in nodes {
            self.step(node)
                .map_err(|what| format!("a node {} ({}) {what}", node.name, node.op_type))?;
        }
        Ok(())
    }

    fn step(&mut self, node: &NodeProto) -> Result<(), String> {
        if node.input.len().max(node.output.len()) > ENDS_MAX {
            return Err(format!("of more than {ENDS_MAX} inputs or outputs"));
        }
        let mut inputs = node.input.iter().filter(|name| !name.is_empty());
        if let Some(name) = inputs.find(|name| !self.known.contains_key(*name)) {
            return Err(format!("that reads {name} before it is made"));
        }
        let of = |index: usize| self.input(node, index)?.of;
        let types = types::made(node, of);
        let made = self.made(node)?;
        let counts = made.iter().map(Extent::most);
        if let Some(large) = counts.clone().find(|&count| count > self.most) {
            return Err(too_many("that makes", large));
        }
        let first = made.first().map_or(0, Extent::most);
        let count = counts.fold(0, u64::saturating_add);
        // What is made besides is only moved.
        let effort = count.saturating_add(first.saturating_mul(self.summed(node, &made)));
        if !VIEWS.contains(&node.op_type.as_str()) {
            self.made = self.made.saturating_add(count);
        }
        self.effort = self.effort.saturating_add(effort);
        if self.effort > self.effort_most {
            return Err(too_many("up to which are made or added up", self.effort));
        }
        for ((name, mut extent), of) in node.output.iter().zip(made).zip(types) {
            extent.of = extent.of.or(of);
            if !name.is_empty() {
                self.know(name, extent)?;
            }
        }
        Ok(())
    }

    /// Takes a value down, with its numbers if those are of a type that sizes have.
    fn know(&mut self, name: &str, mut extent: Extent) -> Result<(), String> {
        if extent.dims().is_some_and(|dims| dims.len() > RANK_MAX) {
            return Err(format!("of more than {RANK_MAX} axes"));
        }
        let most = extent.most();
        if most > self.most {
            return Err(too_many("that holds", most));
        }
        let of = extent.of.and_then(|of| DataType::try_from(of).ok());
        let is_size = |numbers: &Vec<i64>| match of {
            Some(DataType::Int64 | DataType::Int32) => true,
            Some(DataType::Bool) => numbers.iter().all(|n| (0..=1).contains(n)),
            _ => false,
        };
        let left = COMPUTED_ALL_MAX - self.computed;
        let numbers = extent.numbers.filter(is_size);
        extent.numbers = numbers.filter(|numbers| numbers.len() <= left);
        self.computed += extent.numbers.as_ref().map_or(0, Vec::len);
        self.known.insert(name.to_owned(), extent);
        Ok(())
    }

    fn stored(&self, tensor: &TensorProto) -> Extent {
        let count = elements(tensor).map_or(u64::MAX, |n| n as u64);
        let dims = crate::onnx::dims(tensor);
        let numbers = (count <= STORED_MAX).then(|| self.graph.whole_numbers(tensor));
        Extent {
            of: Some(tensor.data_type),
            ..Extent::of(dims.iter().map(|&n| n as u64).collect()).with(numbers.flatten())
        }
    }

    fn input(&self, node: &NodeProto, index: usize) -> Option<&Extent> {
        self.known.get(input(node, index)?)
    }

    /// All inputs, if none is left out.
    fn inputs(&self, node: &NodeProto) -> Option<Vec<&Extent>> {
        (0..node.input.len()).map(|i| self.input(node, i)).collect()
    }

    /// Numbers that are added up for each one made.
    fn summed(&self, node: &NodeProto, made: &[Extent]) -> u64 {
        let summed = match node.op_type.as_str() {
            "Gemm" | "MatMul" | "MatMulInteger" | "MatMulNBits" => {
                let is_flipped = int(node, "transA").unwrap_or(0) != 0;
                let x = self.input(node, 0);
                x.map(|x| x.size(if is_flipped { 0 } else { -1 }).unwrap_or(x.count))
            }
            // For each number of the result, all keys.
            "Attention" | "GroupQueryAttention" | "MultiHeadAttention" => {
                made.get(1).and_then(|keys| keys.size(-2))
            }
            "Einsum" => self.letters(node).map(|(sizes, output)| {
                let gone = sizes
                    .iter()
                    .filter(|(letter, _)| !output.contains(**letter));
                gone.fold(1, |all: u64, (_, &n)| all.saturating_mul(n))
            }),
            _ => None,
        };
        summed.unwrap_or(1).max(1)
    }

    /// What a node makes, output by output.
    fn made(&mut self, node: &NodeProto) -> Result<Vec<Extent>, String> {
        if graphs(node).next().is_some() {
            return self.branches(node);
        }
        let made = self
            .shaped(node)
            .filter(|made| made.len() >= node.output.len());
        made.ok_or_else(|| "whose size this version can't tell".into())
    }

    /// What an `If`'s branches make. Sizes that they don't share are not known.
    fn branches(&mut self, node: &NodeProto) -> Result<Vec<Extent>, String> {
        if node.op_type != "If" {
            return Err("whose size this version can't tell".into());
        }
        let mut all: Vec<Vec<Extent>> = Vec::new();
        for graph in graphs(node) {
            if graph.output.len() != node.output.len() {
                return Err("whose branches have other outputs".into());
            }
            all.push(self.branch(graph)?);
        }
        let output = |index: usize| {
            let mut made = all.iter().map(|outputs| outputs.get(index).cloned());
            let first = made.next()??;
            made.try_fold(first, |a, b| {
                let b = b?;
                let of = a.of.filter(|of| b.of == Some(*of));
                let same = a.dims == b.dims;
                let either = Extent::flat(a.count.max(b.count));
                Some(Extent {
                    of,
                    ..if same { a.alike() } else { either }
                })
            })
        };
        let made = (0..node.output.len()).map(output).collect::<Option<_>>();
        made.ok_or_else(|| "without a branch for its outputs".into())
    }

    /// What one branch makes. Its values are its own; none may pass for one from around it.
    fn branch(&mut self, graph: &GraphProto) -> Result<Vec<Extent>, String> {
        let stored = graph.initializer.iter().map(|tensor| &tensor.name);
        let made = graph.node.iter().flat_map(|node| &node.output);
        let mut own = HashSet::new();
        for name in stored.chain(made).filter(|name| !name.is_empty()) {
            if self.known.contains_key(name) || !own.insert(name) {
                return Err(format!("that makes {name} a second time"));
            }
        }
        self.follow(&graph.node, &graph.initializer)?;
        // Without numbers: which branch it is, is not looked into.
        let output = |name: &String| {
            let made = self.known.get(name)?;
            Some(Extent {
                of: made.of,
                ..made.alike()
            })
        };
        let made: Option<_> = graph.output.iter().map(|o| output(&o.name)).collect();
        for name in own {
            self.known.remove(name);
        }
        made.ok_or_else(|| "with an output that nothing makes".into())
    }
}

/// Operators that make no new numbers of a constant: tract has the old ones under other sizes.
const VIEWS: [&str; 5] = ["Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"];

fn too_many(what: &str, count: u64) -> String {
    format!("{what} {count} numbers: too many for the model's files")
}

/// An attribute that says yes or no; `None` where it is neither, for tract and ONNX may differ.
fn flag(node: &NodeProto, name: &str, usual: bool) -> Option<bool> {
    match int(node, name) {
        None => Some(usual),
        Some(stated @ (0 | 1)) => Some(stated == 1),
        Some(_) => None,
    }
}
