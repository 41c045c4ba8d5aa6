//! Writes an ONNX file: nodes and small tensors in the graph, matrices in a data file that grows as they come, piece
//! by piece if need be, and that at the end stays beside the graph or is copied into it. Knows protobufs; never what
//! a model looks like.

use anyhow::{Context, Result, ensure};
use half::f16;
use millwright_engine::bundle::{GRAPH, WEIGHTS};
use prost::Message;
use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto,
    TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, attribute_proto::AttributeType,
    type_proto,
};

mod inline;

/// The first opset with Attention, RotaryEmbedding and RMSNormalization.
pub const OPSET: i64 = 23;
/// Of operators outside the standard.
const CONTRIB_VERSION: i64 = 1;
/// Values turned to bytes at a time.
const PIECE: usize = 1 << 14;
/// What readers of a protobuf take.
const INLINE_MAX: u64 = i32::MAX as u64;
/// Tensors in the data file begin at multiples of this: a cache line, and any vector load's alignment.
const ALIGNMENT: u64 = 64;

/// Where a model's bytes go and which version of the standard it speaks.
#[derive(Debug, Clone)]
pub struct Layout {
    pub graph: PathBuf,
    /// Beside the graph.
    pub data: PathBuf,
    /// Whether the data is copied into the graph in the end; the file that held it goes.
    pub inline: bool,
    pub opset: i64,
    /// The program that claims the file, and its version.
    pub producer: [String; 2],
}

/// An ONNX model being written.
#[derive(Debug)]
pub struct Writer {
    layout: Layout,
    graph: GraphProto,
    /// Names of all initializers.
    names: HashSet<String>,
    data: BufWriter<File>,
    /// Where the data file ends.
    offset: u64,
    /// Where it will end once the tensor begun last is whole.
    end: u64,
}

/// What a tensor is made of.
pub trait Element: Copy {
    const KIND: DataType;

    /// Appends the value, little-endian.
    fn put(self, out: &mut Vec<u8>);
}

impl Element for f32 {
    const KIND: DataType = DataType::Float;

    fn put(self, out: &mut Vec<u8>) {
        out.extend(self.to_le_bytes());
    }
}

impl Element for i8 {
    const KIND: DataType = DataType::Int8;

    fn put(self, out: &mut Vec<u8>) {
        out.push(self.cast_unsigned());
    }
}

impl Element for u8 {
    const KIND: DataType = DataType::Uint8;

    fn put(self, out: &mut Vec<u8>) {
        out.push(self);
    }
}

impl Element for i64 {
    const KIND: DataType = DataType::Int64;

    fn put(self, out: &mut Vec<u8>) {
        out.extend(self.to_le_bytes());
    }
}

impl Element for f16 {
    const KIND: DataType = DataType::Float16;

    fn put(self, out: &mut Vec<u8>) {
        out.extend(self.to_le_bytes());
    }
}

/// An axis of an input or output: a number, or a name where it varies.
#[derive(Debug, Clone, Copy)]
pub enum Axis<'a> {
    Named(&'a str),
    Fixed(usize),
}

impl Writer {
    /// Begins a model in `dir`, which exists, as [`GRAPH`] and [`WEIGHTS`] in our own opset.
    pub fn create(dir: &Path, name: &str) -> Result<Self> {
        let layout = Layout {
            graph: dir.join(GRAPH),
            data: dir.join(WEIGHTS),
            inline: false,
            opset: OPSET,
            producer: ["millwright-forge", env!("CARGO_PKG_VERSION")].map(str::to_owned),
        };
        Self::with(layout, name)
    }

    /// Begins a model in files that are named; their folder exists.
    pub fn with(layout: Layout, name: &str) -> Result<Self> {
        let data = File::create(&layout.data)
            .with_context(|| format!("{} can't be created", layout.data.display()))?;
        let graph = GraphProto {
            name: name.to_owned(),
            ..GraphProto::default()
        };
        Ok(Self {
            layout,
            graph,
            names: HashSet::new(),
            data: BufWriter::new(data),
            offset: 0,
            end: 0,
        })
    }

    /// Adds a node that is named after its first output. An operator outside the standard has its domain in
    /// front, `domain.of.many.parts.Operator`.
    pub fn node(
        &mut self,
        operator: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) {
        self.named(outputs[0], operator, inputs, outputs, attributes);
    }

    /// Adds a node with a name of its own.
    pub fn named(
        &mut self,
        name: &str,
        operator: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let (domain, operator) = operator.rsplit_once('.').unwrap_or(("", operator));
        self.graph.node.push(NodeProto {
            domain: domain.to_owned(),
            op_type: operator.to_owned(),
            name: name.to_owned(),
            input: owned(inputs),
            output: owned(outputs),
            attribute: attributes,
            ..NodeProto::default()
        });
    }

    /// Takes all nodes out, as a branch for an `If`: a graph without inputs whose outputs are the model's.
    pub fn branch(&mut self, name: &str) -> GraphProto {
        GraphProto {
            name: name.to_owned(),
            node: std::mem::take(&mut self.graph.node),
            output: self.graph.output.clone(),
            ..GraphProto::default()
        }
    }

    /// The names of all outputs.
    pub fn outputs(&self) -> Vec<String> {
        let outputs = self.graph.output.iter();
        outputs.map(|output| output.name.clone()).collect()
    }

    /// Whether there is an initializer of this name.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    pub fn input(&mut self, name: &str, kind: DataType, shape: &[Axis<'_>]) {
        self.graph.input.push(value(name, kind, shape));
    }

    pub fn output(&mut self, name: &str, kind: DataType, shape: &[Axis<'_>]) {
        self.graph.output.push(value(name, kind, shape));
    }

    /// Adds an f32 vector, stored in the graph itself.
    pub fn vector(&mut self, name: &str, values: &[f32]) {
        self.initializer(raw(name, &[values.len()], values));
    }

    /// Adds a tensor as it is; meant for small ones.
    pub fn initializer(&mut self, tensor: TensorProto) {
        self.names.insert(tensor.name.clone());
        self.graph.initializer.push(tensor);
    }

    /// Adds a matrix or more, stored in the data file.
    pub fn matrix<T: Element>(&mut self, name: &str, shape: &[usize], values: &[T]) -> Result<()> {
        self.begin::<T>(name, shape)?;
        self.append(values)
    }

    /// Adds a tensor to the data file whose values follow by [`append`](Writer::append), before any other's.
    ///
    /// # Panics
    /// If the tensor begun before is not whole.
    pub fn begin<T: Element>(&mut self, name: &str, shape: &[usize]) -> Result<()> {
        self.begin_as(name, T::KIND, size_of::<T>(), shape)
    }

    /// The same of a type that is known by its elements' size in bytes only.
    ///
    /// # Panics
    /// If the tensor begun before is not whole.
    pub fn begin_as(
        &mut self,
        name: &str,
        kind: DataType,
        size: usize,
        shape: &[usize],
    ) -> Result<()> {
        assert_eq!(
            self.offset, self.end,
            "the tensor before {name} is not whole"
        );
        let padding = self.offset.next_multiple_of(ALIGNMENT) - self.offset;
        self.put(&[0; ALIGNMENT as usize][..padding as usize])?;
        let length = (shape.iter().product::<usize>() * size) as u64;
        let entry = |key: &str, value: String| StringStringEntryProto {
            key: key.to_owned(),
            value,
        };
        let mut tensor = tensor(name, kind, shape);
        tensor.data_location = Some(DataLocation::External as i32);
        tensor.external_data = vec![
            entry("location", file_name(&self.layout.data)),
            entry("offset", self.offset.to_string()),
            entry("length", length.to_string()),
        ];
        self.end = self.offset + length;
        self.initializer(tensor);
        Ok(())
    }

    /// The next values of the tensor begun last.
    pub fn append<T: Element>(&mut self, values: &[T]) -> Result<()> {
        let mut bytes = Vec::with_capacity(PIECE.min(values.len()) * size_of::<T>());
        for piece in values.chunks(PIECE) {
            bytes.clear();
            for value in piece {
                value.put(&mut bytes);
            }
            self.put(&bytes)?;
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.data.write_all(bytes);
        self.offset += bytes.len() as u64;
        written.with_context(|| format!("{} can't be written", self.layout.data.display()))
    }

    /// Writes the graph and brings all to disk.
    ///
    /// # Panics
    /// If the tensor begun last is not whole.
    pub fn finish(self) -> Result<()> {
        assert_eq!(self.offset, self.end, "the last tensor is not whole");
        let mut domains = BTreeSet::from([""]);
        domains_of(&self.graph, &mut domains);
        let opset = |domain: &str| OperatorSetIdProto {
            domain: domain.to_owned(),
            version: if domain.is_empty() {
                self.layout.opset
            } else {
                CONTRIB_VERSION
            },
        };
        let [producer_name, producer_version] = self.layout.producer.clone();
        let model = ModelProto {
            ir_version: ir_version(self.layout.opset),
            producer_name,
            producer_version,
            opset_import: domains.into_iter().map(opset).collect(),
            graph: Some(self.graph),
            ..ModelProto::default()
        };
        let data = self
            .data
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error);
        data.and_then(|file| file.sync_all())
            .with_context(|| format!("{} can't be written", self.layout.data.display()))?;
        if self.layout.inline {
            ensure!(
                self.offset < INLINE_MAX,
                "the weights take {} MB, and a graph with weights inside can't be read from {} MB on; choose a form with external data",
                self.offset / 1_000_000,
                INLINE_MAX / 1_000_000
            );
            return inline::write(&self.layout.graph, model, &self.layout.data);
        }
        crate::cache::write_synced(&self.layout.graph, &model.encode_to_vec())
    }
}

/// The file format that belongs to an opset.
fn ir_version(opset: i64) -> i64 {
    match opset {
        ..=14 => 7,
        15..=18 => 8,
        19..=20 => 9,
        21..=22 => 10,
        _ => 11,
    }
}

/// Adds the domains of all operators, those in branches too.
fn domains_of<'a>(graph: &'a GraphProto, domains: &mut BTreeSet<&'a str>) {
    for node in &graph.node {
        domains.insert(&node.domain);
        for branch in node.attribute.iter().filter_map(|a| a.g.as_ref()) {
            domains_of(branch, domains);
        }
    }
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// An integer attribute.
pub fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        i: value,
        ..attribute(name, AttributeType::Int)
    }
}

/// A float attribute.
pub fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto {
        f: value,
        ..attribute(name, AttributeType::Float)
    }
}

/// An attribute that is a list of integers.
pub fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        ints: values.to_vec(),
        ..attribute(name, AttributeType::Ints)
    }
}

/// An attribute that is a tensor.
pub fn tensor_value(name: &str, value: TensorProto) -> AttributeProto {
    AttributeProto {
        t: Some(value),
        ..attribute(name, AttributeType::Tensor)
    }
}

/// An attribute that is a graph.
pub fn graph_value(name: &str, value: GraphProto) -> AttributeProto {
    AttributeProto {
        g: Some(value),
        ..attribute(name, AttributeType::Graph)
    }
}

/// A tensor that holds its values as bytes.
pub fn raw<T: Element>(name: &str, shape: &[usize], values: &[T]) -> TensorProto {
    let mut tensor = tensor(name, T::KIND, shape);
    for value in values {
        value.put(&mut tensor.raw_data);
    }
    tensor
}

fn attribute(name: &str, kind: AttributeType) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: kind as i32,
        ..AttributeProto::default()
    }
}

/// A tensor without values yet.
pub fn tensor(name: &str, kind: DataType, shape: &[usize]) -> TensorProto {
    TensorProto {
        name: name.to_owned(),
        data_type: kind as i32,
        dims: shape.iter().map(|&n| n as i64).collect(),
        ..TensorProto::default()
    }
}

fn value(name: &str, kind: DataType, shape: &[Axis<'_>]) -> ValueInfoProto {
    let dimension = |axis: &Axis<'_>| Dimension {
        value: Some(match *axis {
            Axis::Named(name) => dimension::Value::DimParam(name.to_owned()),
            Axis::Fixed(n) => dimension::Value::DimValue(n as i64),
        }),
        ..Dimension::default()
    };
    let tensor = type_proto::Tensor {
        elem_type: kind as i32,
        shape: Some(TensorShapeProto {
            dim: shape.iter().map(dimension).collect(),
        }),
    };
    ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(tensor)),
            ..TypeProto::default()
        }),
        ..ValueInfoProto::default()
    }
}
