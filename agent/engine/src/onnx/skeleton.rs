//! A graph file without its weights: what a protobuf decoder then reads is small, however large the file is. Stored
//! numbers stay where they are and become external data of the file itself. Knows the wire format and the places of
//! tensors in it; nothing of operators.
//!
//! The wire format: <https://protobuf.dev/programming-guides/encoding/>; the fields' numbers: ONNX's `onnx.proto3`.

use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

/// Stored numbers of more bytes than this stay in the file.
const INLINE_BYTES_MAX: usize = 4096;
/// What a graph may take besides weights. Graphs of thirty layers take one or two MB.
const SKELETON_BYTES_MAX: usize = 32 << 20;
/// Parts (nodes, names, attributes, tensors) of a graph; each takes some hundred bytes in memory, whatever it has in
/// the file. Thirty layers have some fifty thousand; larger graphs have names and numbers too.
const PARTS_MAX: usize = 500_000;
const PARTS_MIN: usize = 100_000;
const BYTES_PER_PART: usize = 16;
/// What a graph's input or output may take: a name and a shape.
const VALUE_BYTES_MAX: usize = 4096;
/// Graphs inside nodes inside graphs.
const DEPTH_MAX: usize = 8;

/// Field numbers of the messages on the way to a tensor.
mod field {
    pub(super) const MODEL_GRAPH: u32 = 7;
    pub(super) const MODEL_TRAINING: u32 = 20;
    pub(super) const MODEL_FUNCTIONS: u32 = 25;
    pub(super) const GRAPH_NODE: u32 = 1;
    pub(super) const GRAPH_INITIALIZER: u32 = 5;
    pub(super) const GRAPH_DOC: u32 = 10;
    pub(super) const GRAPH_INPUT: u32 = 11;
    pub(super) const GRAPH_OUTPUT: u32 = 12;
    pub(super) const GRAPH_VALUE_INFO: u32 = 13;
    pub(super) const GRAPH_QUANTIZATION: u32 = 14;
    pub(super) const GRAPH_SPARSE: u32 = 15;
    pub(super) const GRAPH_METADATA: u32 = 16;
    pub(super) const NODE_ATTRIBUTE: u32 = 5;
    pub(super) const NODE_DOC: u32 = 6;
    pub(super) const NODE_METADATA: u32 = 9;
    pub(super) const ATTRIBUTE_TENSOR: u32 = 5;
    pub(super) const ATTRIBUTE_GRAPH: u32 = 6;
    pub(super) const ATTRIBUTE_TENSORS: u32 = 10;
    pub(super) const ATTRIBUTE_GRAPHS: u32 = 11;
    pub(super) const ATTRIBUTE_TYPE: u32 = 14;
    pub(super) const ATTRIBUTE_TYPES: u32 = 15;
    pub(super) const TENSOR_RAW: u32 = 9;
    pub(super) const TENSOR_EXTERNAL: u32 = 13;
    pub(super) const TENSOR_LOCATION: u32 = 14;
    pub(super) const ENTRY_KEY: u32 = 1;
    pub(super) const ENTRY_VALUE: u32 = 2;
}

/// The model in `file` with every stored tensor of more than [`INLINE_BYTES_MAX`] told to lie in the file `name`, and
/// without documentation and stated types of inner values.
pub(crate) fn skeleton(file: &[u8], name: &str) -> Result<Vec<u8>, String> {
    let mut walk = Walk {
        file,
        name,
        parts: 0,
    };
    let mut out = Vec::new();
    for part in walk.fields(file)? {
        if part.number == field::MODEL_FUNCTIONS {
            return Err("it defines functions of its own; export it with them inlined".into());
        }
        if part.number == field::MODEL_TRAINING {
            continue;
        }
        if part.number == field::MODEL_GRAPH {
            let graph = walk.graph(part.bytes(), 0)?;
            put(&mut out, field::MODEL_GRAPH, &graph)?;
        } else {
            copy(&mut out, &part)?;
        }
    }
    Ok(out)
}

struct Walk<'a> {
    file: &'a [u8],
    name: &'a str,
    parts: usize,
}

/// One field of a message: its number, its bytes with key and length, and where its content begins in them.
struct Field<'a> {
    number: u32,
    whole: &'a [u8],
    content: usize,
}

impl<'a> Field<'a> {
    fn bytes(&self) -> &'a [u8] {
        &self.whole[self.content..]
    }
}

impl<'a> Walk<'a> {
    /// The fields of a message.
    fn fields(&mut self, message: &'a [u8]) -> Result<Vec<Field<'a>>, String> {
        let mut fields = Vec::new();
        let mut rest = message;
        while !rest.is_empty() {
            let begin = rest;
            let (number, wire) = decode_key(&mut rest).map_err(|e| e.to_string())?;
            let length = match wire {
                WireType::Varint => {
                    decode_varint(&mut rest).map_err(|e| e.to_string())?;
                    0
                }
                WireType::SixtyFourBit => 8,
                WireType::ThirtyTwoBit => 4,
                WireType::LengthDelimited => decode_varint(&mut rest).map_err(|e| e.to_string())?,
                WireType::StartGroup | WireType::EndGroup => {
                    return Err("it has a group, which ONNX never has".into());
                }
            };
            let length = usize::try_from(length).ok().filter(|n| *n <= rest.len());
            let length = length.ok_or("it is cut off")?;
            let content = begin.len() - rest.len();
            rest = &rest[length..];
            self.parts += 1;
            let most = (PARTS_MIN + self.file.len() / BYTES_PER_PART).min(PARTS_MAX);
            if self.parts > most {
                return Err(format!("it has more than {most} parts"));
            }
            fields.push(Field {
                number,
                whole: &begin[..content + length],
                content,
            });
        }
        Ok(fields)
    }

    fn graph(&mut self, message: &'a [u8], depth: usize) -> Result<Vec<u8>, String> {
        if depth > DEPTH_MAX {
            return Err(format!("its graphs are nested more than {DEPTH_MAX} deep"));
        }
        let mut out = Vec::new();
        for part in self.fields(message)? {
            match part.number {
                field::GRAPH_DOC
                | field::GRAPH_VALUE_INFO
                | field::GRAPH_QUANTIZATION
                | field::GRAPH_SPARSE
                | field::GRAPH_METADATA => {}
                field::GRAPH_INITIALIZER => {
                    let tensor = self.tensor(part.bytes())?;
                    put(&mut out, part.number, &tensor)?;
                }
                field::GRAPH_NODE => {
                    let node = self.node(part.bytes(), depth)?;
                    put(&mut out, part.number, &node)?;
                }
                field::GRAPH_INPUT | field::GRAPH_OUTPUT
                    if part.bytes().len() > VALUE_BYTES_MAX =>
                {
                    return Err(format!(
                        "an input or output takes {} bytes",
                        part.bytes().len()
                    ));
                }
                _ => copy(&mut out, &part)?,
            }
        }
        Ok(out)
    }

    fn node(&mut self, message: &'a [u8], depth: usize) -> Result<Vec<u8>, String> {
        let mut out = Vec::new();
        for part in self.fields(message)? {
            match part.number {
                field::NODE_DOC | field::NODE_METADATA => {}
                field::NODE_ATTRIBUTE => {
                    let mut attribute = Vec::new();
                    for part in self.fields(part.bytes())? {
                        let inner = match part.number {
                            field::ATTRIBUTE_GRAPH | field::ATTRIBUTE_GRAPHS => {
                                self.graph(part.bytes(), depth + 1)?
                            }
                            field::ATTRIBUTE_TENSOR | field::ATTRIBUTE_TENSORS => {
                                self.tensor(part.bytes())?
                            }
                            field::ATTRIBUTE_TYPE | field::ATTRIBUTE_TYPES => continue,
                            _ => {
                                copy(&mut attribute, &part)?;
                                continue;
                            }
                        };
                        put(&mut attribute, part.number, &inner)?;
                    }
                    put(&mut out, part.number, &attribute)?;
                }
                _ => copy(&mut out, &part)?,
            }
        }
        Ok(out)
    }

    fn tensor(&mut self, message: &'a [u8]) -> Result<Vec<u8>, String> {
        let fields = self.fields(message)?;
        let is_large = |part: &&Field| {
            part.number == field::TENSOR_RAW && part.bytes().len() > INLINE_BYTES_MAX
        };
        let large = fields.iter().find(is_large).map(Field::bytes);
        let mut out = Vec::new();
        for part in &fields {
            let is_place = matches!(
                part.number,
                field::TENSOR_RAW | field::TENSOR_EXTERNAL | field::TENSOR_LOCATION
            );
            if large.is_none() || !is_place {
                copy(&mut out, part)?;
            }
        }
        if let Some(numbers) = large {
            let offset = numbers.as_ptr() as usize - self.file.as_ptr() as usize;
            for (key, value) in [
                ("location", self.name.to_owned()),
                ("offset", offset.to_string()),
                ("length", numbers.len().to_string()),
            ] {
                let mut entry = Vec::new();
                put(&mut entry, field::ENTRY_KEY, key.as_bytes())?;
                put(&mut entry, field::ENTRY_VALUE, value.as_bytes())?;
                put(&mut out, field::TENSOR_EXTERNAL, &entry)?;
            }
            encode_key(field::TENSOR_LOCATION, WireType::Varint, &mut out);
            encode_varint(1, &mut out);
        }
        Ok(out)
    }
}

/// Appends a field that has a length.
fn put(out: &mut Vec<u8>, number: u32, bytes: &[u8]) -> Result<(), String> {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(bytes.len() as u64, out);
    bounded(out, bytes)
}

fn copy(out: &mut Vec<u8>, part: &Field) -> Result<(), String> {
    bounded(out, part.whole)
}

fn bounded(out: &mut Vec<u8>, bytes: &[u8]) -> Result<(), String> {
    if out.len() + bytes.len() > SKELETON_BYTES_MAX {
        return Err(format!(
            "its graph takes more than {} MiB besides the weights",
            SKELETON_BYTES_MAX >> 20
        ));
    }
    out.extend_from_slice(bytes);
    Ok(())
}
