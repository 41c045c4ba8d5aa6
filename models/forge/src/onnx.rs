//! Writes an ONNX file: nodes and small tensors in the graph, matrices in an external data file that grows
//! as they come, piece by piece if need be. Knows protobufs; never what a model looks like.

use anyhow::{Context, Result};
use millwright_engine::bundle::{GRAPH, WEIGHTS};
use prost::Message;
use std::collections::BTreeSet;
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

/// The first opset with Attention, RotaryEmbedding and RMSNormalization.
const OPSET: i64 = 23;
/// The file format that belongs to that opset.
const IR_VERSION: i64 = 11;
/// Of operators outside the standard.
const CONTRIB_VERSION: i64 = 1;
/// Values turned to bytes at a time.
const PIECE: usize = 1 << 14;
/// Tensors in the data file begin at multiples of this: a cache line, and any vector load's alignment.
const ALIGNMENT: u64 = 64;

/// An ONNX model being written into a folder as [`GRAPH`] and [`WEIGHTS`].
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    graph: GraphProto,
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

/// An axis of an input or output: a number, or a name where it varies.
#[derive(Debug, Clone, Copy)]
pub enum Axis<'a> {
    Named(&'a str),
    Fixed(usize),
}

impl Writer {
    /// Begins a model in `dir`, which exists.
    pub fn create(dir: &Path, name: &str) -> Result<Self> {
        let path = dir.join(WEIGHTS);
        let data =
            File::create(&path).with_context(|| format!("{} can't be created", path.display()))?;
        let graph = GraphProto {
            name: name.to_owned(),
            ..GraphProto::default()
        };
        Ok(Self {
            dir: dir.to_owned(),
            graph,
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
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let (domain, operator) = operator.rsplit_once('.').unwrap_or(("", operator));
        self.graph.node.push(NodeProto {
            domain: domain.to_owned(),
            op_type: operator.to_owned(),
            name: outputs[0].to_owned(),
            input: owned(inputs),
            output: owned(outputs),
            attribute: attributes,
            ..NodeProto::default()
        });
    }

    pub fn input(&mut self, name: &str, kind: DataType, shape: &[Axis<'_>]) {
        self.graph.input.push(value(name, kind, shape));
    }

    pub fn output(&mut self, name: &str, kind: DataType, shape: &[Axis<'_>]) {
        self.graph.output.push(value(name, kind, shape));
    }

    /// Adds an f32 vector, stored in the graph itself.
    pub fn vector(&mut self, name: &str, values: &[f32]) {
        let mut tensor = tensor(name, DataType::Float, &[values.len()]);
        tensor.raw_data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
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
        assert_eq!(
            self.offset, self.end,
            "the tensor before {name} is not whole"
        );
        let padding = self.offset.next_multiple_of(ALIGNMENT) - self.offset;
        self.put(&[0; ALIGNMENT as usize][..padding as usize])?;
        let length = (shape.iter().product::<usize>() * size_of::<T>()) as u64;
        let entry = |key: &str, value: String| StringStringEntryProto {
            key: key.to_owned(),
            value,
        };
        let mut tensor = tensor(name, T::KIND, shape);
        tensor.data_location = Some(DataLocation::External as i32);
        tensor.external_data = vec![
            entry("location", WEIGHTS.to_owned()),
            entry("offset", self.offset.to_string()),
            entry("length", length.to_string()),
        ];
        self.end = self.offset + length;
        self.graph.initializer.push(tensor);
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
        written.with_context(|| format!("{} can't be written", self.dir.join(WEIGHTS).display()))
    }

    /// Writes the graph and brings both files to disk.
    ///
    /// # Panics
    /// If the tensor begun last is not whole.
    pub fn finish(self) -> Result<()> {
        assert_eq!(self.offset, self.end, "the last tensor is not whole");
        let domains: BTreeSet<&str> = self.graph.node.iter().map(|n| n.domain.as_str()).collect();
        let opset = |domain: &str| OperatorSetIdProto {
            domain: domain.to_owned(),
            version: if domain.is_empty() {
                OPSET
            } else {
                CONTRIB_VERSION
            },
        };
        let model = ModelProto {
            ir_version: IR_VERSION,
            producer_name: "millwright-forge".to_owned(),
            producer_version: env!("CARGO_PKG_VERSION").to_owned(),
            opset_import: domains.into_iter().map(opset).collect(),
            graph: Some(self.graph),
            ..ModelProto::default()
        };
        let data = self
            .data
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error);
        data.and_then(|file| file.sync_all())
            .with_context(|| format!("{} can't be written", self.dir.join(WEIGHTS).display()))?;
        crate::cache::write_synced(&self.dir.join(GRAPH), &model.encode_to_vec())
    }
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

fn attribute(name: &str, kind: AttributeType) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: kind as i32,
        ..AttributeProto::default()
    }
}

fn tensor(name: &str, kind: DataType, shape: &[usize]) -> TensorProto {
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
