//! Reads a GGUF file (version 3, little-endian) that is already in memory: its metadata and where its tensors
//! lie. Every length is checked against the file before it is believed. What the keys mean is for others.
//!
//! The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use crate::dequant::{Kind, decode};
use crate::stored::Stored;
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::collections::BTreeMap;
use std::ops::Range;

const MAGIC: &[u8] = b"GGUF";
const VERSION: u32 = 3;
const KEYS_MAX: u64 = 4096;
const TENSORS_MAX: u64 = 65_536;
const DIMENSIONS_MAX: u32 = 4;
const ALIGNMENT: u64 = 32;

/// A parsed file. Tensors stay where they are until loaded.
#[derive(Debug)]
pub struct Gguf<'a> {
    bytes: &'a [u8],
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Tensor>,
}

/// A metadata value; integers and floats are widened.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Integer(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    List(Vec<Value>),
}

#[derive(Debug)]
struct Tensor {
    kind: Kind,
    /// Innermost first, as the file has them.
    dimensions: Vec<u64>,
    place: Range<usize>,
}

impl<'a> Gguf<'a> {
    /// Reads the header. Anything that doesn't fit the file is an error that says at which byte.
    pub fn parse(bytes: &'a [u8]) -> Result<Self> {
        let mut reader = Reader { bytes, at: 0 };
        Self::read(&mut reader)
            .with_context(|| format!("not a sound GGUF file, at byte {}", reader.at))
    }

    fn read(reader: &mut Reader<'a>) -> Result<Self> {
        ensure!(reader.take(4)? == MAGIC, "it doesn't begin with \"GGUF\"");
        let version = reader.u32()?;
        ensure!(
            version == VERSION,
            "version {version} is not {VERSION}, the one this forge reads"
        );
        let (tensor_count, key_count) = (reader.u64()?, reader.u64()?);
        ensure!(
            key_count <= KEYS_MAX,
            "{key_count} metadata keys are more than {KEYS_MAX}"
        );
        ensure!(
            tensor_count <= TENSORS_MAX,
            "{tensor_count} tensors are more than {TENSORS_MAX}"
        );
        let mut metadata = BTreeMap::new();
        for _ in 0..key_count {
            let key = reader.text()?;
            let kind = reader.u32()?;
            let value = reader
                .value(kind)
                .with_context(|| format!("the value of {key:?}"))?;
            ensure!(
                metadata.insert(key.clone(), value).is_none(),
                "{key:?} is there twice"
            );
        }
        let mut headers = Vec::new();
        for _ in 0..tensor_count {
            headers.push((reader.text()?, reader.tensor_header()?));
        }
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(Value::Integer(n)) if *n > 0 && (*n as u64).is_power_of_two() => *n as u64,
            Some(other) => bail!("general.alignment is {other:?}"),
        };
        let start = (reader.at as u64)
            .checked_next_multiple_of(alignment)
            .context("the alignment overflows")?;
        let mut tensors = BTreeMap::new();
        for (name, header) in headers {
            let place = place(&header, start, reader.bytes.len())
                .with_context(|| format!("the tensor {name:?}"))?;
            let tensor = Tensor {
                kind: header.kind,
                dimensions: header.dimensions,
                place,
            };
            ensure!(
                tensors.insert(name.clone(), tensor).is_none(),
                "the tensor {name:?} is there twice"
            );
        }
        Ok(Self {
            bytes: reader.bytes,
            metadata,
            tensors,
        })
    }

    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Rows of a tensor of `[rows, columns]` (a vector has one row), in the order in which they are asked for.
    ///
    /// # Panics
    /// If a row is asked for that `rows` doesn't count.
    pub fn load(
        &self,
        name: &str,
        shape: [usize; 2],
        wanted: impl Iterator<Item = usize>,
    ) -> Result<Stored> {
        let tensor = self.tensor(name, shape)?;
        let all = &self.bytes[tensor.place.clone()];
        let stride = all.len() / shape[0];
        let mut bytes = Vec::new();
        wanted.for_each(|row| bytes.extend_from_slice(&all[row * stride..(row + 1) * stride]));
        decode(tensor.kind, &bytes).with_context(|| format!("the tensor {name:?}"))
    }

    /// Checks that a tensor is there, of `[rows, columns]`, or a vector where there is one row.
    pub fn expect(&self, name: &str, shape: [usize; 2]) -> Result<()> {
        self.tensor(name, shape).map(|_| ())
    }

    fn tensor(&self, name: &str, [rows, columns]: [usize; 2]) -> Result<&Tensor> {
        let tensor = self
            .tensors
            .get(name)
            .with_context(|| format!("the file has no tensor {name:?}"))?;
        let expected: &[u64] = if rows == 1 {
            &[columns as u64]
        } else {
            &[columns as u64, rows as u64]
        };
        ensure!(
            tensor.dimensions == expected,
            "the tensor {name:?} is {:?} where the model's sizes ask for {expected:?}",
            tensor.dimensions
        );
        Ok(tensor)
    }

    /// A value, if it is there.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    pub fn text(&self, key: &str) -> Result<&str> {
        match self.needed(key)? {
            Value::Text(text) => Ok(text),
            other => Err(wrong(key, "a text", other)),
        }
    }

    /// A size: an integer from 1 to 2^31.
    pub fn size(&self, key: &str) -> Result<usize> {
        match self.needed(key)? {
            Value::Integer(n) if (1..=1 << 31).contains(n) => Ok(*n as usize),
            other => Err(wrong(key, "a size", other)),
        }
    }

    pub fn float(&self, key: &str) -> Result<f32> {
        match self.needed(key)? {
            Value::Float(x) => Ok(*x as f32),
            other => Err(wrong(key, "a number", other)),
        }
    }

    pub fn list(&self, key: &str) -> Result<&[Value]> {
        match self.needed(key)? {
            Value::List(values) => Ok(values),
            other => Err(wrong(key, "a list", other)),
        }
    }

    pub fn texts(&self, key: &str) -> Result<Vec<String>> {
        let text = |value: &Value| match value {
            Value::Text(text) => Ok(text.clone()),
            other => Err(wrong(key, "a list of texts", other)),
        };
        self.list(key)?.iter().map(text).collect()
    }

    fn needed(&self, key: &str) -> Result<&Value> {
        self.metadata
            .get(key)
            .with_context(|| format!("the file has no {key:?}"))
    }
}

fn wrong(key: &str, wanted: &str, found: &Value) -> anyhow::Error {
    let mut found = format!("{found:?}");
    if let Some((cut, _)) = found.char_indices().nth(80) {
        found.truncate(cut);
    }
    anyhow!("{key:?} is not {wanted} but {found}")
}

struct Header {
    kind: Kind,
    dimensions: Vec<u64>,
    offset: u64,
}

/// Where a tensor's bytes are, if they are all in the file.
fn place(header: &Header, start: u64, file: usize) -> Result<Range<usize>> {
    let count = header
        .dimensions
        .iter()
        .try_fold(1u64, |product, &n| product.checked_mul(n));
    let count = count.context("its size overflows")?;
    let row = header.dimensions.first().copied().unwrap_or(1);
    let length = header.kind.bytes(count, row)?;
    let begin = start
        .checked_add(header.offset)
        .context("its offset overflows")?;
    let end = begin.checked_add(length).context("its offset overflows")?;
    ensure!(
        end <= file as u64,
        "it should end at byte {end}, but the file has {file}"
    );
    Ok(begin as usize..end as usize)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let taken = usize::try_from(n).ok().and_then(|n| rest.get(..n));
        let taken =
            taken.with_context(|| format!("{n} bytes are wanted where {} are left", rest.len()))?;
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N as u64)?.try_into()?)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String> {
        let length = self.u64()?;
        let bytes = self.take(length)?;
        Ok(std::str::from_utf8(bytes)
            .context("a text is not UTF-8")?
            .to_owned())
    }

    fn value(&mut self, kind: u32) -> Result<Value> {
        if kind != 9 {
            return self.scalar(kind);
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        // Grown as it is read, not reserved: each element takes at least a byte of the file.
        let mut values = Vec::new();
        for _ in 0..count {
            values.push(self.scalar(kind)?);
        }
        Ok(Value::List(values))
    }

    fn scalar(&mut self, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::Integer(self.array::<1>()?[0].into()),
            1 => Value::Integer(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            10 => Value::Integer(i64::try_from(self.u64()?).context("an integer is beyond 2^63")?),
            11 => Value::Integer(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            9 => bail!("lists in lists are not read"),
            other => bail!("{other} is no type of value"),
        })
    }

    fn tensor_header(&mut self) -> Result<Header> {
        let count = self.u32()?;
        ensure!(
            (1..=DIMENSIONS_MAX).contains(&count),
            "a tensor has {count} dimensions"
        );
        let dimensions = (0..count)
            .map(|_| self.u64())
            .collect::<Result<Vec<u64>>>()?;
        ensure!(!dimensions.contains(&0), "a tensor has an empty dimension");
        Ok(Header {
            dimensions,
            kind: Kind::of(self.u32()?),
            offset: self.u64()?,
        })
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Writes small GGUF files for tests.

    pub(crate) fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    pub(crate) fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
        [&text(key), &kind.to_le_bytes()[..], value].concat()
    }

    /// A list of texts.
    pub(crate) fn texts(key: &str, values: &[&str]) -> Vec<u8> {
        let mut list = [
            &8u32.to_le_bytes()[..],
            &(values.len() as u64).to_le_bytes(),
        ]
        .concat();
        for value in values {
            list.extend(text(value));
        }
        entry(key, 9, &list)
    }

    /// `tensors` are (name, dimensions, kind, bytes).
    pub(crate) fn file(entries: &[Vec<u8>], tensors: &[(&str, &[u64], u32, &[u8])]) -> Vec<u8> {
        let mut out = [&b"GGUF"[..], &3u32.to_le_bytes()].concat();
        out.extend((tensors.len() as u64).to_le_bytes());
        out.extend((entries.len() as u64).to_le_bytes());
        for entry in entries {
            out.extend(entry);
        }
        let mut data: Vec<u8> = Vec::new();
        for (name, dimensions, kind, bytes) in tensors {
            out.extend(text(name));
            out.extend((dimensions.len() as u32).to_le_bytes());
            for n in *dimensions {
                out.extend(n.to_le_bytes());
            }
            out.extend(kind.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(*bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let weights: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        testing::file(
            &[
                testing::entry("llama.block_count", 4, &30u32.to_le_bytes()),
                testing::entry("general.name", 8, &testing::text("a")),
                testing::texts("tokens", &["b", "c"]),
            ],
            &[
                ("w", &[3, 2], 0, &weights),
                ("v", &[6], 0, &weights),
                ("k", &[256], 11, &[]),
            ],
        )
    }

    #[test]
    fn a_sound_file_reads_back() {
        let bytes = sample();
        let gguf = Gguf::parse(&bytes).unwrap();
        assert_eq!(gguf.size("llama.block_count").unwrap(), 30);
        assert_eq!(gguf.text("general.name").unwrap(), "a");
        assert_eq!(gguf.texts("tokens").unwrap(), ["b", "c"]);
        let load = |name, shape, rows: &[usize]| {
            let stored = gguf.load(name, shape, rows.iter().copied()).unwrap();
            stored.into_values()
        };
        assert_eq!(load("w", [2, 3], &[0, 1]), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(load("w", [2, 3], &[1, 0]), [4.0, 5.0, 6.0, 1.0, 2.0, 3.0]);
        assert_eq!(load("v", [1, 6], &[0]).len(), 6);
    }

    #[test]
    fn what_is_missing_or_of_another_shape_is_named() {
        let bytes = sample();
        let gguf = Gguf::parse(&bytes).unwrap();
        let says = |name, shape, part: &str| {
            let error = format!("{:#}", gguf.load(name, shape, 0..1).unwrap_err());
            assert!(error.contains(part), "{error}");
        };
        says("x", [1, 1], "no tensor \"x\"");
        says(
            "w",
            [3, 2],
            "is [3, 2] where the model's sizes ask for [2, 3]",
        );
        says("k", [1, 256], "type 11");
        assert!(
            gguf.size("general.name")
                .unwrap_err()
                .to_string()
                .contains("is not a size")
        );
    }

    #[test]
    fn a_tensor_beyond_the_file_is_refused() {
        let bytes = sample();
        let error = format!("{:#}", Gguf::parse(&bytes[..bytes.len() - 32]).unwrap_err());
        assert!(error.contains("it should end at byte"), "{error}");
    }

    proptest! {
        #[test]
        fn a_cut_or_altered_file_never_panics(cut in 0usize..400, at in 0usize..400, to: u8) {
            let mut bytes = sample();
            bytes.truncate(bytes.len().saturating_sub(cut));
            if let Some(byte) = bytes.get_mut(at) {
                *byte = to;
            }
            if let Ok(gguf) = Gguf::parse(&bytes) {
                for name in gguf.tensor_names() {
                    let _ = gguf.load(name, [2, 3], 0..2);
                }
            }
        }

        #[test]
        fn garbage_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..300), counts: (u8, u8)) {
            let _ = Gguf::parse(&bytes);
            let header = [&b"GGUF\x03\0\0\0"[..], &u64::from(counts.0).to_le_bytes(), &u64::from(counts.1).to_le_bytes()];
            bytes.splice(..0, header.concat());
            let _ = Gguf::parse(&bytes);
        }
    }
}
