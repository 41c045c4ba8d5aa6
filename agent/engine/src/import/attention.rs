//! Finds a layer's attention between its linears and the cache, and puts our operator in its place when what lies
//! there behaves like attention. How it is written does not matter: `probe` runs it.

use super::probe::{Probe, Rotation, Sizes};
use super::{ATTEND, EMBED, LINEAR, extent};
use crate::onnx::{
    Graph, dims, elements, input, input_dims, ints, new_node, reads, with_float, with_ints,
};
use crate::recipe::{Geometry, Recipe};
use prost::Message;
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use tract_onnx::pb::NodeProto;

/// No known model has larger heads.
const HEAD_MAX: usize = 256;
/// A sliding window is taken as the longest context where that leaves this much; a shorter one runs in the plain plan.
const WINDOW_MIN: usize = 1024;
/// Fewer positions hold no answer, and nothing to be tried.
const POSITIONS_MIN: usize = 16;
/// Known models have a hundred at most.
const LAYERS_MAX: usize = 256;
/// Nodes of one attention block at most, its mask and angles included.
const NODES_MAX: usize = 1024;
/// What these take in the file at most; they are copied for each layer.
const NODES_BYTES_MAX: usize = 256 << 10;
/// Blocks that are written in different ways, at most: each is tried by itself.
const WAYS_MAX: usize = 8;
/// Numbers stored for one attention block at most: tables of cosines and sines, and a mask of 8192 by 8192.
const STORED_MAX: usize = 80 << 20;

/// What lies between a layer's linears and the cache.
pub(super) struct Region {
    /// In the graph's order.
    pub(super) nodes: Vec<NodeProto>,
    /// Stored tensors that they read.
    pub(super) stored: Vec<String>,
    /// Inputs of the graph that they read.
    pub(super) inputs: Vec<String>,
    /// The linears' values, with their widths: q, k and v, or one that holds them in that order.
    pub(super) linears: Vec<(String, usize)>,
    pub(super) past: [String; 2],
    pub(super) present: [String; 2],
    /// Keys on their way into the cache: what is there with an empty past, `[1, kv_heads, tokens, head_dim]`, or before
    /// the heads are parted, `[1, tokens, kv_heads · head_dim]`.
    pub(super) new_keys: String,
    /// What the block hands to the next linear, `[1, tokens, heads · head_dim]`.
    pub(super) output: String,
    pub(super) sizes: Sizes,
}

/// Replaces every attention block, or none: a model runs flat as a whole or not at all. `longest` is the longest
/// context. `Err` says why not.
pub(super) fn attention(
    graph: &mut Graph,
    recipe: &mut Recipe,
    longest: usize,
) -> Result<(), String> {
    let effort = Cell::new(extent::effort_most(graph));
    let mut contents = HashMap::new();
    let mut known: HashMap<[u8; 32], Rotation> = HashMap::new();
    let mut blocks = Vec::new();
    let mut wanted = longest;
    for layer in 0.. {
        let name = format!("past_key_values.{layer}.key");
        if !graph.is_input(&name) {
            break;
        }
        if layer == LAYERS_MAX {
            return Err(format!("it has more than {LAYERS_MAX} layers"));
        }
        let failed = |why: String| format!("the attention of layer {layer} {why}");
        let mut region = Region::find(graph, layer).map_err(failed)?;
        let signature = region.signature(graph, &mut contents);
        let ways = known.len();
        if let Entry::Vacant(entry) = known.entry(signature) {
            if ways == WAYS_MAX {
                return Err(format!("its layers attend in more than {WAYS_MAX} ways"));
            }
            wanted = wanted.min(region.looked_up(graph));
            if wanted < POSITIONS_MIN {
                return Err(failed(format!("has tables of {wanted} positions")));
            }
            let found = Probe::new(graph, &region, &effort).recognise(wanted);
            entry.insert(found.map_err(failed)?);
        }
        // They may share many nodes.
        (region.nodes, region.stored) = (Vec::new(), Vec::new());
        blocks.push((region, signature));
    }
    let Some((first, _)) = blocks.first() else {
        return Err("it has no inputs past_key_values.N.key".into());
    };
    let Sizes {
        kv_heads, head_dim, ..
    } = first.sizes;
    let same =
        |region: &Region| (region.sizes.kv_heads, region.sizes.head_dim) == (kv_heads, head_dim);
    if !blocks.iter().all(|(region, _)| same(region)) {
        return Err("its attention blocks differ in heads or head size".into());
    }
    let positions = known
        .values()
        .map(|found| found.positions)
        .min()
        .unwrap_or(0);
    if positions < wanted {
        let seen =
            format!("its attention is causal over all tokens only up to {positions} of them");
        if positions < WINDOW_MIN {
            return Err(seen);
        }
        recipe.notes.push(format!("{seen}; contexts end there"));
    }
    let layers = blocks.len();
    for (layer, (region, signature)) in blocks.into_iter().enumerate() {
        replace(graph, recipe, layer, &region, &known[&signature]);
    }
    graph
        .proto_mut()
        .output
        .retain(|output| output.name == "logits");
    graph.sweep();
    recipe.geometry = Some(Geometry {
        layers,
        kv_heads,
        head_dim,
        positions,
    });
    Ok(())
}

fn replace(
    graph: &mut Graph,
    recipe: &mut Recipe,
    layer: usize,
    region: &Region,
    found: &Rotation,
) {
    let Sizes {
        heads,
        kv_heads,
        head_dim,
    } = region.sizes;
    let names = if let [(whole, _)] = &region.linears[..] {
        let widths = [heads, kv_heads, kv_heads].map(|heads| heads * head_dim);
        split(graph, recipe, whole, &widths)
    } else {
        region
            .linears
            .iter()
            .map(|(name, _)| name.clone())
            .collect()
    };
    let tables = [
        recipe.table(found.cos.clone()),
        recipe.table(found.sin.clone()),
    ];
    let inputs: Vec<&str> = names.iter().map(String::as_str).collect();
    let node = new_node(ATTEND, &inputs, &[&region.output]);
    let shape = [layer, heads, kv_heads, head_dim, found.dims];
    let node = with_ints(with_ints(node, "shape", &shape), "tables", &tables);
    let node = with_float(node, "scale", found.scale);
    if let Some(at) = graph.place(&region.output) {
        graph.proto_mut().node[at] = node;
    }
}

/// Cuts one linear into several of these widths.
fn split(graph: &mut Graph, recipe: &mut Recipe, whole: &str, widths: &[usize]) -> Vec<String> {
    let Some(at) = graph.place(whole) else {
        return Vec::new();
    };
    let linear = graph.node(at).clone();
    let source = recipe.weights[ints(&linear, "weights")[0] as usize].clone();
    let bias = ints(&linear, "bias")
        .first()
        .map(|&table| recipe.tables[table as usize].clone());
    let mut first = 0;
    let mut names = Vec::new();
    for (index, &width) in widths.iter().enumerate() {
        let mut part = source.clone();
        (part.first, part.rows) = (source.first + first, width);
        let weight = recipe.weight(part);
        recipe.linears.insert(weight);
        let name = format!("{whole}/{index}");
        let node = new_node(LINEAR, &[&linear.input[0]], &[&name]);
        let mut node = with_ints(with_ints(node, "weights", &[weight]), "widths", &[width]);
        if let Some(bias) = &bias {
            node = with_ints(
                node,
                "bias",
                &[recipe.table(bias[first..first + width].to_vec())],
            );
        }
        graph.proto_mut().node.push(node);
        names.push(name);
        first += width;
    }
    names
}

impl Region {
    fn find(graph: &Graph, layer: usize) -> Result<Self, String> {
        let past = ["key", "value"].map(|kind| format!("past_key_values.{layer}.{kind}"));
        let present = ["key", "value"].map(|kind| format!("present.{layer}.{kind}"));
        if !present.iter().all(|name| graph.is_output(name)) {
            return Err(format!("has no output {}", present[0]));
        }
        let output = handed_on(graph, &past)?;
        let [keys, values] = &present;
        let whole = Closure::of(graph, &[&output, keys, values])?;
        let [new_keys, new_values] =
            [(keys, 1), (values, 2)].map(|(present, at)| entering(graph, present, at));
        let of_keys = Closure::of(graph, &[&new_keys])?.linears;
        let of_values = Closure::of(graph, &[&new_values])?.linears;
        let linears: Vec<String> = match (whole.linears.len(), of_keys.len(), of_values.len()) {
            (1, _, _) => whole.linears.iter().cloned().collect(),
            (3, 1, 1) if of_keys != of_values => {
                let query = whole
                    .linears
                    .iter()
                    .filter(|v| !of_keys.contains(*v) && !of_values.contains(*v));
                query.chain(&of_keys).chain(&of_values).cloned().collect()
            }
            (count, ..) => {
                return Err(format!(
                    "is fed by {count} linears that are not its q, k and v"
                ));
            }
        };
        let stated = graph
            .proto()
            .input
            .iter()
            .find(|i| i.name == past[0])
            .map(input_dims);
        let Some(&[_, Some(kv_heads), _, Some(head_dim)]) = stated.as_deref() else {
            return Err(format!(
                "has a past whose heads and head size {} does not state",
                past[0]
            ));
        };
        let width = |value: &String| {
            let node = graph.producer(value);
            node.and_then(|node| ints(node, "widths").first())
                .map_or(0, |&width| width as usize)
        };
        let linears: Vec<(String, usize)> = linears
            .into_iter()
            .map(|v| {
                let w = width(&v);
                (v, w)
            })
            .collect();
        let sizes = Sizes::of(&linears, kv_heads, head_dim)?;
        let nodes = whole
            .nodes
            .iter()
            .map(|&index| graph.node(index).clone())
            .collect();
        Ok(Self {
            nodes,
            stored: whole.stored,
            inputs: whole.inputs,
            linears,
            past,
            present,
            new_keys,
            output,
            sizes,
        })
    }

    /// All values that one of the block's is made of, itself included.
    pub(super) fn behind<'a>(&'a self, value: &'a str) -> HashSet<&'a str> {
        let mut needed = HashSet::from([value]);
        for node in self.nodes.iter().rev() {
            if node
                .output
                .iter()
                .any(|name| needed.contains(name.as_str()))
            {
                needed.extend(reads(node));
            }
        }
        needed
    }

    /// Positions that its tables have: rows of what is looked up by position.
    fn looked_up(&self, graph: &Graph) -> usize {
        let rows = |node: &NodeProto| {
            let at = match node.op_type.as_str() {
                "Gather" => 0,
                "RotaryEmbedding" => 1,
                _ => return None,
            };
            match dims(graph.initializer(input(node, at)?)?)[..] {
                [rows, width] if (1..=HEAD_MAX).contains(&width) => Some(rows),
                _ => None,
            }
        };
        self.nodes
            .iter()
            .filter_map(rows)
            .min()
            .unwrap_or(usize::MAX)
    }

    /// A digest of all that decides how the block behaves, the same for layers that are written alike. `contents` are
    /// digests of stored tensors that layers may share.
    fn signature(&self, graph: &Graph, contents: &mut HashMap<String, String>) -> [u8; 32] {
        let mut hash = Sha256::new();
        let mut names: HashMap<&str, String> = HashMap::new();
        for (index, (linear, width)) in self.linears.iter().enumerate() {
            names.insert(linear, format!("linear {index} {width}"));
        }
        for (name, role) in self.past.iter().zip(["past key", "past value"]) {
            names.insert(name, role.into());
        }
        for name in &self.stored {
            let Some(tensor) = graph.initializer(name) else {
                continue;
            };
            let content = contents.entry(name.clone()).or_insert_with(|| {
                let content = Sha256::digest(graph.bytes(tensor).unwrap_or_default());
                crate::bundle::hex(&content)
            });
            names.insert(
                name,
                format!("{} {:?} {content}", tensor.data_type, dims(tensor)),
            );
        }
        for name in &self.inputs {
            names.entry(name).or_insert_with(|| format!("input {name}"));
        }
        for node in &self.nodes {
            hash.update(format!(
                "{} {:?} {:?}",
                node.op_type, node.domain, node.attribute
            ));
            for name in &node.input {
                hash.update(names.get(name.as_str()).map_or("", String::as_str));
                hash.update("|");
            }
            for output in &node.output {
                let known = names.len();
                names.insert(output, format!("value {known}"));
            }
        }
        for end in self.present.iter().chain([&self.output]) {
            hash.update(names.get(end.as_str()).map_or("", String::as_str));
        }
        hash.update(format!("{:?}", self.sizes));
        hash.finalize().into()
    }
}

impl Sizes {
    fn of(linears: &[(String, usize)], kv_heads: usize, head_dim: usize) -> Result<Self, String> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > HEAD_MAX || kv_heads == 0 {
            return Err(format!("has {kv_heads} heads of {head_dim}"));
        }
        let kv_width = kv_heads
            .checked_mul(head_dim)
            .ok_or("has too large heads")?;
        let query = match linears {
            [(_, whole)] => whole.checked_sub(kv_width.saturating_mul(2)),
            [(_, query), (_, key), (_, value)] if [*key, *value] == [kv_width; 2] => Some(*query),
            _ => None,
        };
        let heads = query
            .filter(|width| width.is_multiple_of(head_dim))
            .map(|width| width / head_dim);
        let heads = heads.filter(|&heads| heads > 0 && heads.is_multiple_of(kv_heads));
        let heads = heads.ok_or("has q, k and v that are not linears of whole heads")?;
        Ok(Self {
            heads,
            kv_heads,
            head_dim,
        })
    }
}

/// What a present is made of besides the past: the input of one operator that does all, or the present itself.
fn entering(graph: &Graph, present: &str, at: usize) -> String {
    let whole = ["Attention", "MultiHeadAttention", "GroupQueryAttention"];
    let node = graph
        .producer(present)
        .filter(|node| whole.contains(&node.op_type.as_str()));
    node.and_then(|node| input(node, at))
        .unwrap_or(present)
        .to_owned()
}

/// The value that carries what was read from the cache into the next linear.
fn handed_on(graph: &Graph, past: &[String; 2]) -> Result<String, String> {
    let mut reached = BTreeSet::new();
    let mut seen: HashSet<&str> = HashSet::new();
    let mut queue: Vec<&str> = past.iter().map(String::as_str).collect();
    while let Some(value) = queue.pop() {
        if !seen.insert(value) {
            continue;
        }
        if seen.len() > NODES_MAX {
            return Err("is not separated from the next layer by a linear".into());
        }
        for node in graph.consumers(value) {
            match node.op_type.as_str() {
                "Shape" | "Size" => {}
                LINEAR => drop(reached.insert(value)),
                _ => queue.extend(
                    node.output
                        .iter()
                        .map(String::as_str)
                        .filter(|name| !name.is_empty()),
                ),
            }
        }
    }
    match reached.into_iter().collect::<Vec<_>>()[..] {
        [output] => Ok(output.to_owned()),
        [] => Err("does not end in a linear".into()),
        _ => Err("ends in several linears".into()),
    }
}

/// All that some values are made of, back to linears, inputs and stored tensors.
#[derive(Default)]
struct Closure {
    nodes: BTreeSet<usize>,
    linears: BTreeSet<String>,
    inputs: Vec<String>,
    stored: Vec<String>,
}

impl Closure {
    fn of(graph: &Graph, ends: &[&String]) -> Result<Self, String> {
        let mut all = Self::default();
        let (mut stored, mut bytes) = (0, 0);
        let mut seen: HashSet<&str> = HashSet::new();
        let mut queue: Vec<&str> = ends.iter().map(|end| end.as_str()).collect();
        while let Some(value) = queue.pop() {
            if value.is_empty() || !seen.insert(value) {
                continue;
            }
            if let Some(index) = graph.place(value) {
                let node = graph.node(index);
                match node.op_type.as_str() {
                    LINEAR => drop(all.linears.insert(value.to_owned())),
                    EMBED => return Err("reads embeddings".into()),
                    _ => {
                        all.nodes.insert(index);
                        bytes += node.encoded_len();
                        queue.extend(reads(node));
                    }
                }
            } else if let Some(tensor) = graph.initializer(value) {
                stored += elements(tensor).unwrap_or(usize::MAX).min(STORED_MAX + 1);
                all.stored.push(value.to_owned());
            } else {
                all.inputs.push(value.to_owned());
            }
            let is_large = bytes > NODES_BYTES_MAX || stored > STORED_MAX;
            if all.nodes.len() > NODES_MAX || is_large {
                return Err("hangs on too much of the graph".into());
            }
        }
        all.inputs.sort_unstable();
        Ok(all)
    }
}
