//! How many numbers each value of a graph holds, worked out from sizes alone. A graph of a kilobyte may ask for a
//! terabyte, and tract makes what is constant before it looks at its size; so nothing is planned or tried before this
//! was asked.
//!
//! Sizes are followed for given numbers of tokens, and the few numbers that sizes are made of are computed on the way.
//! A size that can't be told is an error: nobody could bound it.

mod cut;
mod numbers;
mod shaped;
mod sized;
mod value;

use super::tidy::{is_float, types};
use crate::onnx::{Graph, GraphError, elements, input, input_dims, reads};
use std::collections::HashMap;
use tract_onnx::pb::{GraphProto, NodeProto, TensorProto};
use value::{COMPUTED_MAX, Extent};

/// Numbers that any graph may make of what is stored, or in one value when it runs.
const NUMBERS_MIN: u64 = 1 << 22;
/// As many more for each byte of its files: a byte holds two numbers of four bits, which go through some operators.
const NUMBERS_PER_BYTE: u64 = 8;
/// What trying blocks may make and add up, for each number that one value may hold: a chunk takes each weight once a
/// token.
const EFFORT_PER_NUMBER: u64 = 64;
/// Numbers computed to find sizes, at most.
const COMPUTED_ALL_MAX: usize = 1 << 20;

/// More floats than this are no sizes.
const FLOATS_MAX: usize = 64;

/// How many tokens there are, and how many before them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lengths {
    pub(super) tokens: usize,
    pub(super) past: usize,
}

/// What is tried: a chunk of a prompt, and one token late in an answer.
const LENGTHS: [Lengths; 2] = [
    Lengths {
        tokens: 61,
        past: 67,
    },
    Lengths {
        tokens: 1,
        past: 1023,
    },
];

/// Refuses graphs that make tensors out of proportion to their files.
pub(super) fn bounded(graph: &Graph) -> Result<(), GraphError> {
    let (proto, types) = (graph.proto(), types(graph));
    for lengths in LENGTHS {
        let mut extents = Extents::new(graph, &types);
        for input in &proto.input {
            extents.feed(&input.name, &input_dims(input), lengths);
        }
        let followed = extents.follow(&proto.node, &proto.initializer);
        followed.map_err(|what| GraphError::Shape(format!("has {what}")))?;
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
    types: &'a HashMap<String, i32>,
    known: HashMap<String, Extent>,
    most: u64,
    /// What planning makes: all that hangs on stored tensors alone.
    fixed: u64,
    /// What a run makes.
    effort: u64,
    computed: usize,
}

impl<'a> Extents<'a> {
    pub(super) fn new(graph: &'a Graph, types: &'a HashMap<String, i32>) -> Self {
        Self {
            graph,
            types,
            known: HashMap::new(),
            most: most(graph),
            fixed: 0,
            effort: 0,
            computed: 0,
        }
    }

    /// Numbers that were made, each sum counted by what is added.
    pub(super) fn effort(&self) -> u64 {
        self.effort
    }

    /// States the sizes of a value.
    pub(super) fn put(&mut self, name: &str, dims: &[usize]) {
        let dims = dims.iter().map(|&n| n as u64).collect();
        self.known.insert(name.to_owned(), Extent::of(dims));
    }

    /// States what an input of the graph is; of a cache what was stated of it.
    pub(super) fn feed(&mut self, name: &str, stated: &[Option<usize>], lengths: Lengths) {
        let Lengths { tokens, past } = lengths;
        let row = |numbers: Vec<f64>| Extent::of(vec![1, numbers.len() as u64]).with(Some(numbers));
        let input = match name {
            "input_ids" => return self.put(name, &[1, tokens]),
            "position_ids" => row((past..past + tokens).map(|at| at as f64).collect()),
            "attention_mask" => row(vec![1.0; past + tokens]),
            _ => {
                let open = |axis| if axis == 2 { past } else { 1 };
                let dims = stated.iter().enumerate();
                let dims: Vec<usize> = dims.map(|(axis, n)| n.unwrap_or(open(axis))).collect();
                return self.put(name, &dims);
            }
        };
        self.known.insert(name.to_owned(), input);
    }

    /// Follows nodes, which stand in an order in which each finds what it reads. `Err` names one that is too large.
    pub(super) fn follow<'b>(
        &mut self,
        nodes: impl IntoIterator<Item = &'b NodeProto>,
        stored: impl IntoIterator<Item = &'b TensorProto>,
    ) -> Result<(), String> {
        for tensor in stored {
            let stored = self.stored(tensor);
            self.known.insert(tensor.name.clone(), stored);
        }
        for node in nodes {
            let wrong = |what: &str| format!("a node {} ({}) {what}", node.name, node.op_type);
            let made = self.made(node).map_err(|what| wrong(&what))?;
            let fixed = self.is_fixed(node);
            for (name, mut extent) in node.output.iter().zip(made) {
                let effort = extent.count.saturating_mul(self.summed(node));
                self.effort = self.effort.saturating_add(effort);
                if fixed {
                    self.fixed = self.fixed.saturating_add(effort);
                }
                if extent.count > self.most || self.fixed > self.most {
                    let count = extent.count;
                    let what =
                        format!("that makes {count} numbers: too many for the model's files");
                    return Err(wrong(&what));
                }
                extent.is_fixed = fixed;
                let of = self.types.get(name).copied();
                extent.numbers = extent.numbers.filter(|numbers| is_worth(numbers.len(), of));
                self.computed += extent.numbers.as_ref().map_or(0, Vec::len);
                if self.computed > COMPUTED_ALL_MAX {
                    extent.numbers = None;
                }
                self.known.insert(name.clone(), extent);
            }
        }
        Ok(())
    }

    fn stored(&self, tensor: &TensorProto) -> Extent {
        let count = elements(tensor).map_or(u64::MAX, |n| n as u64);
        let dims = crate::onnx::dims(tensor);
        let is_few = count <= COMPUTED_MAX && is_worth(count as usize, Some(tensor.data_type));
        let numbers = is_few.then(|| self.graph.checked_numbers(tensor)).flatten();
        let mut extent = Extent::of(dims.iter().map(|&n| n as u64).collect()).with(numbers);
        extent.is_fixed = true;
        extent
    }

    fn is_fixed(&self, node: &NodeProto) -> bool {
        let known = |name: &str| self.known.get(name).is_some_and(|extent| extent.is_fixed);
        reads(node).filter(|name| !name.is_empty()).all(known)
    }

    /// Numbers that are added up for each one made.
    fn summed(&self, node: &NodeProto) -> u64 {
        let is_product = node.op_type.starts_with("MatMul");
        let dims = self.input(node, 0).and_then(|x| x.dims.as_ref());
        let row = dims.filter(|_| is_product).and_then(|dims| dims.last());
        row.map_or(1, |&row| row.max(1))
    }

    fn input(&self, node: &NodeProto, index: usize) -> Option<&Extent> {
        self.known.get(input(node, index)?)
    }

    /// What a node makes, output by output.
    fn made(&mut self, node: &NodeProto) -> Result<Vec<Extent>, String> {
        if let Some(branches) = self.branches(node)? {
            return Ok(branches);
        }
        if UNBOUNDED.contains(&node.op_type.as_str()) {
            return Err("whose size this version can't tell".into());
        }
        if let Some(sized) = self.sized(node) {
            return Ok(vec![sized?]);
        }
        let made = self.shaped(node);
        let mut made = match made {
            Some(made) => made,
            None => vec![
                self.product(node)
                    .ok_or("whose size this version can't tell")?,
            ],
        };
        // Further outputs have the first's size at most.
        let rest = made.first().map_or(0, |first| first.count);
        made.resize(made.len().max(node.output.len()), Extent::flat(rest));
        Ok(made)
    }

    /// Of an operator that is not known here: it pairs each number with each at most. `None` where that is too much.
    fn product(&self, node: &NodeProto) -> Option<Extent> {
        let inputs = (0..node.input.len()).filter_map(|i| self.input(node, i));
        let count = inputs.fold(1, |all: u64, x| all.saturating_mul(x.count.max(1)));
        (count <= self.most).then(|| Extent::flat(count))
    }

    /// What an `If`'s branches make: the larger one of each output.
    fn branches(&mut self, node: &NodeProto) -> Result<Option<Vec<Extent>>, String> {
        let graphs = node
            .attribute
            .iter()
            .flat_map(|a| a.g.iter().chain(&a.graphs));
        let graphs: Vec<&GraphProto> = graphs.collect();
        if graphs.is_empty() {
            return Ok(None);
        }
        if node.op_type != "If" {
            return Err("whose size this version can't tell".into());
        }
        let mut made = vec![Extent::default(); node.output.len()];
        for graph in graphs {
            self.follow(&graph.node, &graph.initializer)?;
            for (made, output) in made.iter_mut().zip(&graph.output) {
                let extent = self.known.get(&output.name);
                let extent = extent.map(Extent::alike).unwrap_or_default();
                if extent.count >= made.count {
                    *made = extent;
                }
            }
        }
        Ok(Some(made))
    }
}

/// Whether so many numbers of a type may be what sizes are made of: gains and scales are not, and there are many.
fn is_worth(count: usize, of: Option<i32>) -> bool {
    count <= FLOATS_MAX || !of.is_some_and(is_float)
}

/// Operators that are as large as they say themselves, or run graphs: none that language models have.
const UNBOUNDED: &[&str] = &[
    "BlackmanWindow",
    "ConstantLike",
    "ConvTranspose",
    "DFT",
    "GridSample",
    "HammingWindow",
    "HannWindow",
    "Loop",
    "MelWeightMatrix",
    "Multinomial",
    "NonMaxSuppression",
    "RandomNormal",
    "RandomUniform",
    "Resize",
    "STFT",
    "Scan",
    "SequenceMap",
    "TreeEnsembleClassifier",
    "Upsample",
    "CategoryMapper",
];
