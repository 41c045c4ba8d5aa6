//! Writes an ONNX file: nodes and small tensors in the graph, matrices in an external data file that grows
//! as they come, so that one matrix at a time is in memory. Knows protobufs; never what a model looks like.

use anyhow::{Context, Result};
use millwright_engine::bundle::{GRAPH, WEIGHTS};
use prost::Message;
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
/// Tensors in the data file begin at multiples of this: a cache line, and any vector load's alignment.
const ALIGNMENT: u64 = 64;

/// An ONNX model being written into a folder as [`GRAPH`] and [`WEIGHTS`].
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    graph: GraphProto,
    data: BufWriter<File>,
    offset: u64,
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
        })
    }

    /// Adds a node that is named after its first output.
    pub fn node(
        &mut self,
        operator: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        self.graph.node.push(NodeProto {
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

    /// Adds an f32 matrix, stored in the data file.
    pub fn matrix_f32(&mut self, name: &str, shape: [usize; 2], values: &[f32]) -> Result<()> {
        assert_eq!(shape[0] * shape[1], values.len(), "{name}");
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.external(tensor(name, DataType::Float, &shape), &bytes)
    }

    /// Adds an int8 matrix, stored in the data file.
    pub fn matrix_i8(&mut self, name: &str, shape: [usize; 2], values: &[i8]) -> Result<()> {
        assert_eq!(shape[0] * shape[1], values.len(), "{name}");
        let bytes: Vec<u8> = values.iter().map(|v| v.cast_unsigned()).collect();
        self.external(tensor(name, DataType::Int8, &shape), &bytes)
    }

    fn external(&mut self, mut tensor: TensorProto, bytes: &[u8]) -> Result<()> {
        let padding = self.offset.next_multiple_of(ALIGNMENT) - self.offset;
        let zeros = [0; ALIGNMENT as usize];
        self.data
            .write_all(&zeros[..padding as usize])
            .and_then(|()| self.data.write_all(bytes))
            .with_context(|| format!("{} can't be written", self.dir.join(WEIGHTS).display()))?;
        self.offset += padding;
        let entry = |key: &str, value: String| StringStringEntryProto {
            key: key.to_owned(),
            value,
        };
        tensor.data_location = Some(DataLocation::External as i32);
        tensor.external_data = vec![
            entry("location", WEIGHTS.to_owned()),
            entry("offset", self.offset.to_string()),
            entry("length", bytes.len().to_string()),
        ];
        self.offset += bytes.len() as u64;
        self.graph.initializer.push(tensor);
        Ok(())
    }

    /// Writes the graph and brings both files to disk.
    pub fn finish(self) -> Result<()> {
        let model = ModelProto {
            ir_version: IR_VERSION,
            producer_name: "millwright-forge".to_owned(),
            producer_version: env!("CARGO_PKG_VERSION").to_owned(),
            opset_import: vec![OperatorSetIdProto {
                domain: String::new(),
                version: OPSET,
            }],
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
