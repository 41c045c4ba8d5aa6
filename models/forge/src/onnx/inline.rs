//! Writes a model as one file with its weights inside, without ever holding them: the sizes of a protobuf's parts
//! follow from the tensors' lengths, so that the bytes stream from the data file to their place.

use anyhow::{Context, Result};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;
use tract_onnx::pb::{GraphProto, ModelProto, TensorProto};

/// Field numbers of onnx.proto.
const GRAPH_OF_MODEL: u32 = 7;
const INITIALIZER_OF_GRAPH: u32 = 5;
const RAW_DATA_OF_TENSOR: u32 = 9;

/// Writes `model`, with the tensors that lie in the file `data` put into it, and removes that file.
pub(super) fn write(path: &Path, mut model: ModelProto, data: &Path) -> Result<()> {
    let graph = model.graph.take().unwrap_or_default();
    let written = File::open(data).and_then(|mut data| {
        let mut out = BufWriter::new(File::create(path)?);
        out.write_all(&model.encode_to_vec())?;
        put_graph(&mut out, graph, &mut data)?;
        out.into_inner()?.sync_all()
    });
    written.with_context(|| format!("{} can't be written", path.display()))?;
    fs::remove_file(data).with_context(|| format!("{} can't be removed", data.display()))
}

fn put_graph(out: &mut impl Write, mut graph: GraphProto, data: &mut File) -> io::Result<()> {
    let tensors: Vec<Placed> = std::mem::take(&mut graph.initializer)
        .into_iter()
        .map(Placed::of)
        .collect();
    let rest = graph.encode_to_vec();
    let length: u64 = tensors
        .iter()
        .map(|t| field(INITIALIZER_OF_GRAPH, t.length()))
        .sum();
    put_header(out, GRAPH_OF_MODEL, length + rest.len() as u64)?;
    out.write_all(&rest)?;
    for tensor in tensors {
        put_header(out, INITIALIZER_OF_GRAPH, tensor.length())?;
        out.write_all(&tensor.rest)?;
        if let Some((offset, length)) = tensor.data {
            put_header(out, RAW_DATA_OF_TENSOR, length)?;
            data.seek(SeekFrom::Start(offset))?;
            let copied = io::copy(&mut data.take(length), out)?;
            if copied != length {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
    Ok(())
}

/// A tensor encoded but for the values that lie in the data file.
struct Placed {
    rest: Vec<u8>,
    /// Offset and length there.
    data: Option<(u64, u64)>,
}

impl Placed {
    fn of(mut tensor: TensorProto) -> Self {
        let entries = std::mem::take(&mut tensor.external_data);
        tensor.data_location = None;
        let number = |key: &str| {
            let entry = entries.iter().find(|entry| entry.key == key)?;
            entry.value.parse().ok()
        };
        Self {
            rest: tensor.encode_to_vec(),
            data: number("offset").zip(number("length")),
        }
    }

    fn length(&self) -> u64 {
        let data = self
            .data
            .map_or(0, |(_, length)| field(RAW_DATA_OF_TENSOR, length));
        self.rest.len() as u64 + data
    }
}

/// The bytes of a field of this length, with its header.
fn field(tag: u32, length: u64) -> u64 {
    (key_len(tag) + encoded_len_varint(length)) as u64 + length
}

fn put_header(out: &mut impl Write, tag: u32, length: u64) -> io::Result<()> {
    let mut header = Vec::new();
    encode_key(tag, WireType::LengthDelimited, &mut header);
    encode_varint(length, &mut header);
    out.write_all(&header)
}
