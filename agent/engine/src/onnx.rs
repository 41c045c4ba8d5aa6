//! An ONNX graph as protobuf, with the lookups that rewriting needs. Knows the format, never a model.

use crate::map::Mapped;
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto,
    attribute_proto::AttributeType, tensor_shape_proto::dimension, type_proto,
};
use tract_onnx::prelude::Framework;

/// A graph file larger than this is refused unread: weights belong in external data.
const GRAPH_BYTES_MAX: u64 = 2 << 30;

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

/// A graph and its weights' file, indexed by value name.
pub(crate) struct Graph {
    pub(crate) model: ModelProto,
    producers: HashMap<String, usize>,
    consumers: HashMap<String, Vec<usize>>,
    initializers: HashMap<String, usize>,
    external: HashMap<String, Mapped>,
}

impl Graph {
    /// Reads the graph; maps the files that its external tensors name.
    pub(crate) fn open(path: &Path) -> Result<Self, GraphError> {
        let parse = |reason: String| GraphError::Parse {
            path: path.display().to_string(),
            reason,
        };
        let bytes = path.metadata().map_err(|e| parse(e.to_string()))?.len();
        if bytes > GRAPH_BYTES_MAX {
            return Err(parse(format!(
                "{bytes} bytes; the limit is {GRAPH_BYTES_MAX}"
            )));
        }
        let model = tract_onnx::onnx()
            .proto_model_for_path(path)
            .map_err(|e| parse(format!("{e:#}")))?;
        if model.graph.is_none() {
            return Err(parse("it holds no graph".into()));
        }
        let mut graph = Self {
            model,
            producers: HashMap::new(),
            consumers: HashMap::new(),
            initializers: HashMap::new(),
            external: HashMap::new(),
        };
        graph.index();
        let folder = path.parent().unwrap_or(Path::new("."));
        let names: HashSet<String> = graph
            .proto()
            .initializer
            .iter()
            .filter_map(|t| external_entry(t, "location"))
            .collect();
        for name in names {
            if name.contains(['/', '\\']) || name == ".." {
                return Err(parse(format!(
                    "external data in {name:?}, outside the model's folder"
                )));
            }
            let map =
                Mapped::open(&folder.join(&name)).map_err(|e| parse(format!("{name}: {e}")))?;
            graph.external.insert(name, map);
        }
        for tensor in &graph.proto().initializer {
            graph.check(tensor)?;
        }
        graph.check_nodes()?;
        Ok(graph)
    }

    pub(crate) fn proto(&self) -> &GraphProto {
        self.model.graph.as_ref().expect("checked in open")
    }

    pub(crate) fn proto_mut(&mut self) -> &mut GraphProto {
        self.model.graph.as_mut().expect("checked in open")
    }

    /// Rebuilds the lookups; call after nodes changed.
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
        (self.producers, self.consumers) = (producers, consumers);
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

    /// Drops the initializers that no node reads, so that tract never loads them.
    pub(crate) fn strip(&mut self) {
        let consumers = std::mem::take(&mut self.consumers);
        self.proto_mut()
            .initializer
            .retain(|t| consumers.contains_key(&t.name));
        self.index();
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
        self.proto().output.iter().any(|o| o.name == value)
    }

    pub(crate) fn is_input(&self, value: &str) -> bool {
        !self.is_initializer(value) && self.proto().input.iter().any(|i| i.name == value)
    }

    pub(crate) fn is_initializer(&self, value: &str) -> bool {
        self.initializers.contains_key(value)
    }

    pub(crate) fn is_f32_initializer(&self, value: &str) -> bool {
        self.initializer(value)
            .is_some_and(|t| t.data_type() == DataType::Float)
    }

    pub(crate) fn initializer(&self, name: &str) -> Option<&TensorProto> {
        self.initializers
            .get(name)
            .map(|&i| &self.proto().initializer[i])
    }

    /// A tensor's raw little-endian bytes, wherever they are stored.
    pub(crate) fn bytes<'a>(
        &'a self,
        tensor: &'a TensorProto,
    ) -> Result<Cow<'a, [u8]>, GraphError> {
        let wrong = |reason: &str| GraphError::Tensor {
            tensor: tensor.name.clone(),
            reason: reason.into(),
        };
        if tensor.data_location() == DataLocation::External {
            let number = |key, default| match external_entry(tensor, key) {
                None => Ok(default),
                Some(text) => text
                    .parse::<usize>()
                    .map_err(|_| wrong("a bad external offset or length")),
            };
            let location =
                external_entry(tensor, "location").ok_or_else(|| wrong("no location"))?;
            let data = self
                .external
                .get(&location)
                .ok_or_else(|| wrong("no external file"))?
                .bytes();
            let offset = number("offset", 0)?;
            let length = number("length", data.len().saturating_sub(offset))?;
            let end = offset
                .checked_add(length)
                .ok_or_else(|| wrong("a bad external range"))?;
            let range = data.get(offset..end);
            return range
                .map(Cow::Borrowed)
                .ok_or_else(|| wrong("lies beyond the end of its file"));
        }
        if !tensor.raw_data.is_empty() {
            return Ok(Cow::Borrowed(&tensor.raw_data));
        }
        Ok(Cow::Owned(match tensor.data_type() {
            DataType::Float => tensor
                .float_data
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect(),
            DataType::Int64 => tensor
                .int64_data
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect(),
            DataType::Int32 => tensor
                .int32_data
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect(),
            DataType::Int8 | DataType::Uint8 | DataType::Bool => {
                tensor.int32_data.iter().map(|&v| v as u8).collect()
            }
            other => {
                return Err(wrong(&format!(
                    "{other:?} values in typed fields are not read"
                )));
            }
        }))
    }

    /// Checks what the rewriting relies on: every value is made once and before it is read, operators have the
    /// inputs that they can't be without, and none claims to be ours.
    fn check_nodes(&self) -> Result<(), GraphError> {
        let mut made: HashSet<&str> = self.initializers.keys().map(String::as_str).collect();
        made.extend(self.proto().input.iter().map(|input| input.name.as_str()));
        for node in &self.proto().node {
            let wrong = |what: &str| {
                GraphError::Shape(format!(
                    "has a node {} ({}) {what}",
                    node.name, node.op_type
                ))
            };
            if node.op_type.starts_with("Millwright") {
                return Err(wrong("of a type that is reserved"));
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
                return Err(wrong("without all its inputs or its output"));
            }
            if let Some(name) = node
                .input
                .iter()
                .find(|name| !name.is_empty() && !made.contains(name.as_str()))
            {
                return Err(wrong(&format!(
                    "that reads {name}, which nothing made before it"
                )));
            }
            if node
                .output
                .iter()
                .any(|name| !name.is_empty() && !made.insert(name))
            {
                return Err(wrong("that makes a value a second time"));
            }
        }
        match self
            .proto()
            .output
            .iter()
            .find(|output| !made.contains(output.name.as_str()))
        {
            Some(output) => Err(GraphError::Shape(format!(
                "has an output {} that nothing makes",
                output.name
            ))),
            None if self.is_output("logits") => Ok(()),
            None => Err(GraphError::Shape("has no output named logits".into())),
        }
    }

    /// Lets go of the memory of what was read from the files beside the graph; read again, it comes back.
    pub(crate) fn forget(&self) {
        self.external.values().for_each(Mapped::forget);
    }

    /// Names of the files beside the graph that hold its weights.
    pub(crate) fn external_files(&self) -> impl Iterator<Item = &str> {
        self.external.keys().map(String::as_str)
    }

    /// Checks that a tensor's stated shape is what its bytes hold.
    fn check(&self, tensor: &TensorProto) -> Result<(), GraphError> {
        let wrong = |reason| GraphError::Tensor {
            tensor: tensor.name.clone(),
            reason,
        };
        let width = match tensor.data_type() {
            DataType::Float | DataType::Int32 | DataType::Uint32 => 4,
            DataType::Int64 | DataType::Double | DataType::Uint64 => 8,
            DataType::Float16 | DataType::Bfloat16 | DataType::Int16 | DataType::Uint16 => 2,
            DataType::Int8 | DataType::Uint8 | DataType::Bool => 1,
            _ => return Ok(()),
        };
        let count = tensor.dims.iter().try_fold(1usize, |all, &dim| {
            usize::try_from(dim)
                .ok()
                .and_then(|dim| all.checked_mul(dim))
        });
        let expected = count.and_then(|count| count.checked_mul(width));
        let typed = tensor.raw_data.is_empty() && tensor.data_location() != DataLocation::External;
        let found = if typed && width == 2 {
            return Ok(());
        } else {
            self.bytes(tensor)?.len()
        };
        if expected != Some(found) {
            return Err(wrong(format!(
                "shape {:?} does not fit its {found} bytes",
                tensor.dims
            )));
        }
        Ok(())
    }
}

/// All values that a node reads: its inputs, and what its branches or bodies take from around them.
fn reads(node: &NodeProto) -> Box<dyn Iterator<Item = &str> + '_> {
    let graphs = node
        .attribute
        .iter()
        .flat_map(|a| a.g.iter().chain(&a.graphs));
    let inner = graphs.flat_map(|g| {
        g.node
            .iter()
            .flat_map(reads)
            .chain(g.output.iter().map(|o| o.name.as_str()))
    });
    Box::new(node.input.iter().map(String::as_str).chain(inner))
}

fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|a| a.name == name)
}

pub(crate) fn int(node: &NodeProto, name: &str) -> Option<i64> {
    attribute(node, name).map(|a| a.i)
}

pub(crate) fn float(node: &NodeProto, name: &str) -> Option<f32> {
    attribute(node, name).map(|a| a.f)
}

pub(crate) fn ints<'a>(node: &'a NodeProto, name: &str) -> &'a [i64] {
    attribute(node, name).map_or(&[], |a| &a.ints)
}

/// A node to be added to a graph.
pub(crate) fn new_node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto {
        op_type: op.into(),
        name: outputs
            .first()
            .map(|name| format!("{op}/{name}"))
            .unwrap_or_default(),
        input: inputs.iter().map(ToString::to_string).collect(),
        output: outputs.iter().map(ToString::to_string).collect(),
        ..NodeProto::default()
    }
}

/// The same node with an attribute of whole numbers.
pub(crate) fn with_ints(mut node: NodeProto, name: &str, values: &[usize]) -> NodeProto {
    node.attribute.push(AttributeProto {
        name: name.into(),
        r#type: AttributeType::Ints as i32,
        ints: values.iter().map(|&v| v as i64).collect(),
        ..AttributeProto::default()
    });
    node
}

/// The same node with a float attribute.
pub(crate) fn with_float(mut node: NodeProto, name: &str, value: f32) -> NodeProto {
    node.attribute.push(AttributeProto {
        name: name.into(),
        r#type: AttributeType::Float as i32,
        f: value,
        ..AttributeProto::default()
    });
    node
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

fn external_entry(tensor: &TensorProto, key: &str) -> Option<String> {
    tensor
        .external_data
        .iter()
        .find(|e| e.key == key)
        .map(|e| e.value.clone())
}
