//! From an ONNX export to a graph of our operators and what they work on. Reads files; runs nothing but attention
//! blocks, to see what they are.
//!
//! Linears, the embedding and norms are recognised by how they are written, attention by what it does. What isn't
//! recognised stays for tract.

mod angles;
mod attention;
mod branch;
mod extent;
mod fuse;
mod grouped;
mod keep;
mod linear;
mod nbits;
mod norm;
mod probe;
mod shapes;
mod tidy;
mod types;
mod weight;

pub(crate) use fuse::PROJECT;
pub(crate) use keep::kept_matrix;

use crate::folder::Heads;
use crate::onnx::{Graph, GraphError, graphs, ints};
use crate::recipe::Recipe;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use tract_onnx::pb::{GraphProto, NodeProto};

/// Operators that tract plans within a second or two; forty layers in the plain plan have some five thousand.
const OPERATORS_MAX: usize = 8192;

pub(crate) const EMBED: &str = "MillwrightEmbed";
pub(crate) const LINEAR: &str = "MillwrightLinear";
pub(crate) const ATTEND: &str = "MillwrightAttend";

/// A graph of our operators, and of tract's where there is none of ours.
pub(crate) struct Imported {
    pub(crate) graph: Graph,
    pub(crate) recipe: Recipe,
    /// Whether no operator was left to tract.
    pub(crate) is_fused: bool,
}

/// Which form a graph is to be taken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Goal {
    /// The flat one if all attention is recognised, for contexts of this many tokens.
    Flat { positions: usize },
    /// Linears and the embedding are ours, attention stays tract's.
    Plain,
    /// The same, each linear by itself, for arithmetic on the file's own numbers.
    Exact,
}

/// What importing is to make of a graph.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Target {
    pub(crate) goal: Goal,
    /// Weights, by their initializers, whose linears stay with tract, in f32.
    pub(crate) kept: BTreeSet<String>,
}

impl Target {
    /// With nothing kept.
    pub(crate) fn new(goal: Goal) -> Self {
        Self {
            goal,
            kept: BTreeSet::new(),
        }
    }
}

/// Reads the graph and takes it as near to the target as it goes. The recipe's notes say what was in the way.
///
/// `heads` is what is known of the cache beside the graph.
pub(crate) fn import(path: &Path, heads: Heads, target: &Target) -> Result<Imported, GraphError> {
    let goal = target.goal;
    let mut graph = Graph::open(path)?;
    tidy::state_heads(&mut graph, heads);
    let mut recipe = Recipe::default();
    tidy::tidy(&mut graph)?;
    grouped::standardise(&mut graph);
    norm::norms(&mut graph);
    linear::unquantise(&mut graph);
    linear::linears(&mut graph, &mut recipe)?;
    shapes::shapes(&mut graph);
    let flat = match goal {
        Goal::Plain | Goal::Exact => Err("the plain plan was asked for".to_owned()),
        Goal::Flat { positions } => flatten(&mut graph, &mut recipe, positions),
    };
    if !target.kept.is_empty() {
        keep::keep(&mut graph, &mut recipe, &target.kept)?;
    }
    if goal != Goal::Exact {
        fuse::fuse(&mut graph, &mut recipe);
    }
    prune(&mut graph, &mut recipe);
    let nodes = operators(graph.proto());
    if nodes > OPERATORS_MAX {
        let what = format!("has {nodes} operators; this version plans {OPERATORS_MAX} at most");
        return Err(GraphError::Shape(what));
    }
    let foreign = graph
        .proto()
        .node
        .iter()
        .filter(|node| !node.op_type.starts_with("Millwright"));
    let foreign = foreign.count();
    match &flat {
        Err(why) => recipe.notes.push(format!("one sequence at a time: {why}")),
        Ok(()) if foreign > 0 => {
            recipe
                .notes
                .push(format!("{foreign} operators were left to tract"));
        }
        Ok(()) => {}
    }
    Ok(Imported {
        is_fused: flat.is_ok() && foreign == 0,
        graph,
        recipe,
    })
}

/// Operators of a graph and of those inside its nodes.
fn operators(graph: &GraphProto) -> usize {
    let inner = graph.node.iter().flat_map(graphs);
    graph.node.len() + inner.map(operators).sum::<usize>()
}

/// Takes the graph to its flat form, or leaves it as it was and says why not.
fn flatten(graph: &mut Graph, recipe: &mut Recipe, positions: usize) -> Result<(), String> {
    let proto = graph.proto();
    let before = (
        proto.node.clone(),
        proto.input.clone(),
        proto.output.clone(),
    );
    let notes = recipe.notes.len();
    let (weights, linears, tables) = (
        recipe.weights.len(),
        recipe.linears.clone(),
        recipe.tables.len(),
    );
    let done =
        attention::attention(graph, recipe, positions).and_then(|()| fuse::position_wise(graph));
    if done.is_err() {
        let proto = graph.proto_mut();
        (proto.node, proto.input, proto.output) = before;
        graph.index();
        recipe.geometry = None;
        recipe.weights.truncate(weights);
        recipe.tables.truncate(tables);
        recipe.linears = linears;
        recipe.notes.truncate(notes);
    }
    done
}

/// Forgets weights that no operator names any more: a linear that was cut into its q, k and v.
fn prune(graph: &mut Graph, recipe: &mut Recipe) {
    let ours = |node: &NodeProto| node.op_type.starts_with("Millwright");
    let named = graph.proto().node.iter().filter(|node| ours(node));
    let named = named.flat_map(|node| ints(node, "weights"));
    let used: BTreeSet<usize> = named.map(|&index| index as usize).collect();
    let places: HashMap<usize, usize> = used
        .iter()
        .enumerate()
        .map(|(new, &old)| (old, new))
        .collect();
    for node in graph.proto_mut().node.iter_mut().filter(|node| ours(node)) {
        let weights = node.attribute.iter_mut().filter(|a| a.name == "weights");
        for index in weights.flat_map(|a| &mut a.ints) {
            *index = places[&(*index as usize)] as i64;
        }
    }
    let mut index = 0..;
    recipe
        .weights
        .retain(|_| used.contains(&index.next().unwrap_or_default()));
    let linears = recipe
        .linears
        .iter()
        .filter_map(|old| places.get(old).copied());
    recipe.linears = linears.collect();
}
