//! An ONNX graph as protobuf, with the lookups that rewriting needs. Knows the format, never a model.

mod node;
mod skeleton;
mod tensors;

pub(crate) use node::{
    axis, float, float_tensor, graphs, input, int, int_attribute, int_vector, ints, is_or_absent,
    new_node, output, with_float, with_ints,
};
pub(crate) use tensors::{Numbers, dims, elements};

use crate::map::Mapped;
use prost::Message;
use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::path::Path;
use tensors::Files;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{
    GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto,
    tensor_shape_proto::dimension, type_proto,
};

/// Tensors that may lie in the same bytes, on average: two where the embedding is the head.
const SHARED_MAX: u64 = 8;

/// Why a graph can't be read.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    #[error("{path} can't be read as ONNX: {reason}")]
    Parse { path: String, reason: String },
    #[error("the graph's tensor {tensor}: {reason}")]
    Tensor { tensor: String, reason: String },
    #[error(
        "the graph's input {0} is not one this version knows (it knows input_ids, attention_mask, position_ids and past_key_values.N.key|value)"
    )]
    Input(String),
    #[error("the graph {0}")]
    Shape(String),
}

/// A graph and the files of its weights, indexed by value name.
pub(crate) struct Graph {
    pub(crate) model: ModelProto,
    producers: HashMap<String, usize>,
    consumers: HashMap<String, Vec<usize>>,
    initializers: HashMap<String, usize>,
    inputs: HashSet<String>,
    outputs: HashSet<String>,
    files: Files,
}

impl Graph {
    /// Reads the graph without its weights; maps its file and those that its external tensors name.
    pub(crate) fn open(path: &Path) -> Result<Self, GraphError> {
        let parse = |reason: String| GraphError::Parse {
            path: path.display().to_string(),
            reason,
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let map = Mapped::open(path).map_err(|e| parse(e.to_string()))?;
        let bytes = skeleton::skeleton(map.bytes(), &name).map_err(parse)?;
        let model = ModelProto::decode(&*bytes).map_err(|e| parse(e.to_string()))?;
        if model.graph.is_none() {
            return Err(parse("it holds no graph".into()));
        }
        let mut files = Files::of(path.parent().unwrap_or(Path::new(".")));
        files.add(&name, map);
        let mut graph = Self {
            model,
            producers: HashMap::new(),
            consumers: HashMap::new(),
            initializers: HashMap::new(),
            inputs: HashSet::new(),
            outputs: HashSet::new(),
            files,
        };
        graph.admit()?;
        Ok(graph)
    }

    /// Checks what came from outside: stored tensors, and how nodes hang together.
    pub(crate) fn admit(&mut self) -> Result<(), GraphError> {
        self.index();
        let graph = self.model.graph.as_ref().expect("checked in open");
        let mut bytes = 0;
        for tensor in initializers(graph) {
            self.files.open(tensor)?;
            bytes += self.files.check(tensor)? as u64;
        }
        let file_bytes = self.file_bytes();
        if bytes > file_bytes.saturating_mul(SHARED_MAX) {
            let what = format!("stores {bytes} bytes of numbers in {file_bytes} bytes of files");
            return Err(GraphError::Shape(what));
        }
        self.check_nodes()
    }

    pub(crate) fn proto(&self) -> &GraphProto {
        self.model.graph.as_ref().expect("checked in open")
    }

    pub(crate) fn proto_mut(&mut self) -> &mut GraphProto {
        self.model.graph.as_mut().expect("checked in open")
    }

    /// Rebuilds the lookups; call after nodes, inputs or outputs changed.
    pub(crate) fn index(&mut self) {
        let (mut producers, mut consumers) = (HashMap::new(), HashMap::<String, Vec<usize>>::new());
        for (i, node) in self.proto().node.iter().enumerate() {
            for output in node.output.iter().filter(|name| !name.is_empty()) {
                producers.insert(output.clone(), i);
            }
            for input in reads(node).filter(|name| !name.is_empty()) {
                consumers.entry(input.to_owned()).or_default().push(i);
            }
        }
        let names = self.proto().initializer.iter().enumerate();
        self.initializers = names.map(|(i, t)| (t.name.clone(), i)).collect();
        let ends = |ends: &[ValueInfoProto]| ends.iter().map(|end| end.name.clone()).collect();
        (self.inputs, self.outputs) = (ends(&self.proto().input), ends(&self.proto().output));
        (self.producers, self.consumers) = (producers, consumers);
    }

    /// Adds a stored tensor.
    pub(crate) fn store(&mut self, tensor: TensorProto) {
        let index = self.proto().initializer.len();
        self.initializers.insert(tensor.name.clone(), index);
        self.proto_mut().initializer.push(tensor);
    }

    /// Drops nodes and inputs that no output needs. Initializers stay, for packing, until [`Graph::strip`].
    pub(crate) fn sweep(&mut self) {
        self.index();
        let mut alive = HashSet::new();
        let mut names = HashSet::new();
        let mut queue: Vec<String> = self.proto().output.iter().map(|o| o.name.clone()).collect();
        while let Some(name) = queue.pop() {
            if let Some(&node) = self.producers.get(&name)
                && alive.insert(node)
            {
                queue.extend(reads(&self.proto().node[node]).map(str::to_owned));
            }
            names.insert(name);
        }
        let mut index = 0..;
        let proto = self.proto_mut();
        proto
            .node
            .retain(|_| alive.contains(&index.next().unwrap_or_default()));
        proto.input.retain(|i| names.contains(&i.name));
        self.index();
    }

    /// The model as tract is to read it: with the stored tensors that nodes read, and no others, inside.
    pub(crate) fn to_model(&self) -> Result<ModelProto, GraphError> {
        let proto = self.proto();
        let read = proto
            .initializer
            .iter()
            .filter(|t| self.consumers.contains_key(&t.name));
        Ok(ModelProto {
            ir_version: self.model.ir_version,
            opset_import: self.model.opset_import.clone(),
            graph: Some(GraphProto {
                node: self.settled(&proto.node)?,
                input: proto.input.clone(),
                output: proto.output.clone(),
                initializer: read.map(|t| self.resident(t)).collect::<Result<_, _>>()?,
                ..GraphProto::default()
            }),
            ..ModelProto::default()
        })
    }

    /// Nodes with what their branches store inside.
    pub(crate) fn settled<'a>(
        &self,
        nodes: impl IntoIterator<Item = &'a NodeProto>,
    ) -> Result<Vec<NodeProto>, GraphError> {
        let mut nodes: Vec<NodeProto> = nodes.into_iter().cloned().collect();
        let attributes = nodes.iter_mut().flat_map(|node| &mut node.attribute);
        for graph in attributes.flat_map(|a| a.g.iter_mut().chain(&mut a.graphs)) {
            graph.node = self.settled(&graph.node)?;
            for tensor in &mut graph.initializer {
                *tensor = self.resident(tensor)?;
            }
        }
        Ok(nodes)
    }

    /// A stored tensor with its numbers inside, floats as f32.
    pub(crate) fn resident(&self, tensor: &TensorProto) -> Result<TensorProto, GraphError> {
        let narrow = [DataType::Float16, DataType::Bfloat16, DataType::Double];
        let (data_type, raw_data) = if narrow.contains(&tensor.data_type()) {
            let numbers = Numbers::new(self.bytes(tensor)?, tensor.data_type());
            let values = (0..elements(tensor).unwrap_or(0)).map(|i| numbers.at(i));
            (
                DataType::Float as i32,
                values.flat_map(f32::to_le_bytes).collect(),
            )
        } else {
            let mut bytes = self.bytes(tensor)?.into_owned();
            if tensor.data_type() == DataType::Bool {
                // tract takes them for its own truths, which are nothing but 0 and 1.
                for byte in &mut bytes {
                    *byte = u8::from(*byte != 0);
                }
            }
            (tensor.data_type, bytes)
        };
        Ok(TensorProto {
            name: tensor.name.clone(),
            dims: tensor.dims.clone(),
            data_type,
            raw_data,
            ..TensorProto::default()
        })
    }

    /// Where the node that makes a value stands.
    pub(crate) fn place(&self, value: &str) -> Option<usize> {
        self.producers.get(value).copied()
    }

    pub(crate) fn node(&self, index: usize) -> &NodeProto {
        &self.proto().node[index]
    }

    /// The node that makes this value.
    pub(crate) fn producer(&self, value: &str) -> Option<&NodeProto> {
        self.producers.get(value).map(|&i| self.node(i))
    }

    /// The producer, if it is of this operator type.
    pub(crate) fn made_by(&self, value: &str, op: &str) -> Option<&NodeProto> {
        self.producer(value).filter(|node| node.op_type == op)
    }

    pub(crate) fn consumers(&self, value: &str) -> impl Iterator<Item = &NodeProto> {
        self.consumers
            .get(value)
            .into_iter()
            .flatten()
            .map(|&i| self.node(i))
    }

    /// The one consumer of a value that is no output of the graph.
    pub(crate) fn sole_consumer(&self, value: &str) -> Option<&NodeProto> {
        let mut all = self.consumers(value);
        let first = all.next()?;
        (all.next().is_none() && !self.is_output(value)).then_some(first)
    }

    pub(crate) fn is_output(&self, value: &str) -> bool {
        self.outputs.contains(value)
    }

    pub(crate) fn is_input(&self, value: &str) -> bool {
        self.inputs.contains(value) && !self.is_initializer(value)
    }

    pub(crate) fn is_initializer(&self, value: &str) -> bool {
        self.initializers.contains_key(value)
    }

    /// Whether a value is a stored vector of floats.
    pub(crate) fn is_vector(&self, value: &str) -> bool {
        let floats = [DataType::Float, DataType::Float16, DataType::Bfloat16];
        self.initializer(value)
            .is_some_and(|t| t.dims.len() == 1 && floats.contains(&t.data_type()))
    }

    pub(crate) fn initializer(&self, name: &str) -> Option<&TensorProto> {
        self.initializers
            .get(name)
            .map(|&i| &self.proto().initializer[i])
    }

    /// A stored tensor's little-endian bytes.
    pub(crate) fn bytes<'a>(
        &'a self,
        tensor: &'a TensorProto,
    ) -> Result<Cow<'a, [u8]>, GraphError> {
        self.files.bytes(tensor)
    }

    /// A stored tensor's numbers, to be read one by one.
    pub(crate) fn numbers(&self, name: &str) -> Option<Numbers<'_>> {
        let tensor = self.initializer(name)?;
        let bytes = self.files.bytes(tensor).ok()?;
        Some(Numbers::new(bytes, tensor.data_type()))
    }

    /// All numbers of a stored tensor.
    pub(crate) fn values(&self, name: &str) -> Option<Vec<f32>> {
        let count = elements(self.initializer(name)?)?;
        let numbers = self.numbers(name)?;
        Some((0..count).map(|i| numbers.at(i)).collect())
    }

    /// All numbers of a tensor of whole ones or truths that may be a branch's, if its shape is what its bytes hold.
    pub(crate) fn whole_numbers(&self, tensor: &TensorProto) -> Option<Vec<i64>> {
        self.files.check(tensor).ok()?;
        tensors::whole(&self.files.bytes(tensor).ok()?, tensor.data_type())
    }

    /// The version of ONNX's operators that tract takes it to be written in.
    pub(crate) fn opset(&self) -> i64 {
        let sets = self.model.opset_import.iter();
        let mut of = sets.filter(|set| set.domain.is_empty() || set.domain == "ai.onnx");
        of.next().map_or(0, |set| set.version)
    }

    /// Bytes of the files that hold the graph and its weights.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.files.total_bytes()
    }

    /// The number in a stored tensor that has one.
    pub(crate) fn scalar(&self, name: &str) -> Option<f32> {
        let one = elements(self.initializer(name)?)? == 1;
        self.numbers(name)
            .filter(|_| one)
            .map(|numbers| numbers.at(0))
    }

    /// Checks what the rewriting relies on: every value is made once, operators have the inputs that they can't be
    /// without, and none claims to be ours. Puts nodes behind those whose values they read.
    fn check_nodes(&mut self) -> Result<(), GraphError> {
        let proto = self.proto();
        let mut made: HashSet<&str> = self.initializers.keys().map(String::as_str).collect();
        made.extend(proto.input.iter().map(|input| input.name.as_str()));
        for node in &proto.node {
            if is_reserved(node) {
                return Err(wrong(node, "of a type that is reserved"));
            }
            let least = match node.op_type.as_str() {
                "Attention" | "RotaryEmbedding" | "MatMulNBits" => 3,
                "MatMul" | "DequantizeLinear" | "Gather" | "Add" | "Mul" | "RMSNormalization"
                | "Reshape" => 2,
                "Sigmoid" | "Transpose" | "Identity" | "Cast" | "Unsqueeze" => 1,
                _ => 0,
            };
            let required = node.input.get(..least);
            if required.is_none_or(|names| names.iter().any(String::is_empty))
                || node.output.first().is_none_or(String::is_empty)
            {
                return Err(wrong(node, "without all its inputs or its output"));
            }
            let mut outputs = node.output.iter().filter(|name| !name.is_empty());
            if !outputs.all(|name| made.insert(name)) {
                return Err(wrong(node, "that makes a value a second time"));
            }
        }
        for node in &proto.node {
            let mut inputs = node.input.iter().filter(|name| !name.is_empty());
            if let Some(name) = inputs.find(|name| !made.contains(name.as_str())) {
                return Err(wrong(
                    node,
                    &format!("that reads {name}, which nothing makes"),
                ));
            }
        }
        let missing = proto
            .output
            .iter()
            .find(|o| !made.contains(o.name.as_str()));
        if let Some(output) = missing {
            let reason = format!("has an output {} that nothing makes", output.name);
            return Err(GraphError::Shape(reason));
        }
        if !self.is_output("logits") {
            return Err(GraphError::Shape("has no output named logits".into()));
        }
        self.sort()
    }

    /// Nodes in an order in which each finds its values made; some exporters' last passes don't keep to one. Else they
    /// stay as they are.
    fn sort(&mut self) -> Result<(), GraphError> {
        let nodes = &self.proto().node;
        let needs = |node: &NodeProto| {
            let makers = reads(node).filter_map(|name| self.place(name));
            makers.collect::<HashSet<usize>>()
        };
        let mut waits: Vec<usize> = nodes.iter().map(|node| needs(node).len()).collect();
        let mut readers: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
        for (index, node) in nodes.iter().enumerate() {
            for maker in needs(node) {
                readers[maker].push(index);
            }
        }
        let free = (0..nodes.len()).filter(|&index| waits[index] == 0);
        let mut ready: BinaryHeap<Reverse<usize>> = free.map(Reverse).collect();
        let mut order = Vec::with_capacity(nodes.len());
        while let Some(Reverse(index)) = ready.pop() {
            order.push(index);
            for &reader in &readers[index] {
                waits[reader] -= 1;
                if waits[reader] == 0 {
                    ready.push(Reverse(reader));
                }
            }
        }
        if let Some(stuck) = waits.iter().position(|&wait| wait > 0) {
            return Err(wrong(
                &nodes[stuck],
                "that reads, in a circle, what it makes",
            ));
        }
        let mut nodes: Vec<_> = std::mem::take(&mut self.proto_mut().node)
            .into_iter()
            .map(Some)
            .collect();
        let sorted = order.into_iter().filter_map(|index| nodes[index].take());
        self.proto_mut().node = sorted.collect();
        self.index();
        Ok(())
    }

    /// Lets go of the memory of what was read from the files; read again, it comes back.
    pub(crate) fn forget(&self) {
        self.files.forget();
    }

    /// Names of the files that hold the graph and its weights.
    pub(crate) fn files(&self) -> impl Iterator<Item = &str> {
        self.files.names()
    }

    /// Gives a value another name, where it is made and wherever it is read.
    pub(crate) fn rename(&mut self, old: &str, new: &str) {
        if let Some(&maker) = self.producers.get(old) {
            for output in &mut self.proto_mut().node[maker].output {
                if output == old {
                    new.clone_into(output);
                }
            }
            self.producers.remove(old);
            self.producers.insert(new.to_owned(), maker);
        }
        self.replace_uses(old, new);
    }

    /// Has all who read one value read another instead. Call [`Graph::index`] when all is replaced.
    pub(crate) fn replace_uses(&mut self, old: &str, new: &str) {
        let readers = self.consumers.remove(old).unwrap_or_default();
        for &reader in &readers {
            for input in &mut self.proto_mut().node[reader].input {
                if input == old {
                    new.clone_into(input);
                }
            }
        }
        self.consumers
            .entry(new.to_owned())
            .or_default()
            .extend(readers);
    }
}

fn wrong(node: &NodeProto, what: &str) -> GraphError {
    GraphError::Shape(format!(
        "has a node {} ({}) {what}",
        node.name, node.op_type
    ))
}

/// The stored tensors of a graph and of those inside its nodes.
fn initializers(graph: &GraphProto) -> Box<dyn Iterator<Item = &TensorProto> + '_> {
    let inner = graph.node.iter().flat_map(graphs).flat_map(initializers);
    Box::new(graph.initializer.iter().chain(inner))
}

/// Whether a node, or one inside it, claims to be ours.
fn is_reserved(node: &NodeProto) -> bool {
    node.op_type.starts_with("Millwright") || graphs(node).flat_map(|g| &g.node).any(is_reserved)
}

/// All values that a node reads: its inputs, and what its branches or bodies take from around them.
pub(crate) fn reads(node: &NodeProto) -> Box<dyn Iterator<Item = &str> + '_> {
    let inner = graphs(node).flat_map(|g| {
        let made: HashSet<&str> = g
            .node
            .iter()
            .flat_map(|node| node.output.iter().map(String::as_str))
            .collect();
        let read = g
            .node
            .iter()
            .flat_map(reads)
            .chain(g.output.iter().map(|o| o.name.as_str()));
        read.filter(move |name| !made.contains(name))
    });
    Box::new(node.input.iter().map(String::as_str).chain(inner))
}

/// A graph's input or output of which only the type is said.
pub(crate) fn value_info(name: &str, elem_type: i32) -> ValueInfoProto {
    let tensor = type_proto::Tensor {
        elem_type,
        shape: None,
    };
    ValueInfoProto {
        name: name.into(),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(tensor)),
            ..TypeProto::default()
        }),
        ..ValueInfoProto::default()
    }
}

/// The type of a graph input's numbers, where it is stated.
pub(crate) fn input_type(input: &ValueInfoProto) -> Option<i32> {
    let type_proto::Value::TensorType(tensor) = input.r#type.as_ref()?.value.as_ref()?;
    Some(tensor.elem_type)
}

/// States a size of a graph input that is symbolic.
pub(crate) fn set_dim(input: &mut ValueInfoProto, axis: usize, size: usize) {
    let value = input.r#type.as_mut().and_then(|of| of.value.as_mut());
    let Some(type_proto::Value::TensorType(tensor)) = value else {
        return;
    };
    let dims = tensor.shape.as_mut().map(|shape| &mut shape.dim);
    if let Some(dim) = dims.and_then(|dims| dims.get_mut(axis))
        && !matches!(dim.value, Some(dimension::Value::DimValue(stated)) if stated > 0)
    {
        dim.value = Some(dimension::Value::DimValue(size as i64));
    }
}

/// The stated sizes of a graph input; `None` where one is symbolic.
pub(crate) fn input_dims(input: &ValueInfoProto) -> Vec<Option<usize>> {
    let Some(type_proto::Value::TensorType(tensor)) =
        input.r#type.as_ref().and_then(|t| t.value.as_ref())
    else {
        return Vec::new();
    };
    let dims = tensor.shape.as_ref().map_or(&[][..], |shape| &shape.dim);
    dims.iter()
        .map(|dim| match dim.value {
            Some(dimension::Value::DimValue(size)) => usize::try_from(size).ok(),
            _ => None,
        })
        .collect()
}
