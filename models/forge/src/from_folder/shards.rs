//! A folder's tensors: in one safetensors file, or in several that an index names. Headers are read by the
//! `safetensors` library, weights piece by piece when they are asked for. What a tensor is for is not known here.

use crate::dequant::numbers;
use crate::stored::Stored;
use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The header's length, little-endian, which every file begins with.
const LENGTH_BYTES: u64 = 8;
/// Of a header; a thousand tensors take a hundredth of it.
const HEADER_BYTES_MAX: u64 = 10_000_000;

/// Files that are open, and where in them each tensor lies.
#[derive(Debug)]
pub(super) struct Shards {
    files: Vec<(String, File)>,
    tensors: BTreeMap<String, Tensor>,
}

#[derive(Debug)]
struct Tensor {
    /// Its place in `files`.
    file: usize,
    /// Its first byte there.
    begin: u64,
    dtype: Dtype,
    shape: Vec<usize>,
}

#[derive(Deserialize)]
struct Index {
    /// The file of each tensor.
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    /// Opens all of a folder's files. Every tensor is checked to lie in its file, and to be where the index says.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let mut shards = Self {
            files: vec![],
            tensors: BTreeMap::new(),
        };
        if dir.join(WHOLE).exists() {
            shards.add(dir, WHOLE)?;
            return Ok(shards);
        }
        let index: Index = super::json(dir, INDEX)?
            .with_context(|| format!("there is neither {WHOLE} nor {INDEX}"))?;
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        for name in names {
            let plain = Path::new(name)
                .file_name()
                .is_some_and(|n| n == name.as_str());
            ensure!(
                plain,
                "{INDEX} names {name:?}, which is not a file of the folder itself"
            );
            shards.add(dir, name)?;
        }
        for (tensor, name) in &index.weight_map {
            let found = shards.tensors.get(tensor);
            ensure!(
                found.is_some_and(|found| shards.files[found.file].0 == *name),
                "{name} has no tensor {tensor:?}, though {INDEX} says so"
            );
        }
        Ok(shards)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(super) fn files(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|(name, _)| name.as_str())
    }

    /// Checks that a tensor is there, of `[rows, columns]` or a vector where there is one row, in numbers that are
    /// read here.
    pub(super) fn expect(&self, name: &str, shape: [usize; 2]) -> Result<()> {
        self.tensor(name, shape).map(|_| ())
    }

    /// Rows of a tensor of `[rows, columns]`; a vector has one row.
    pub(super) fn load(&self, name: &str, shape: [usize; 2], rows: Range<usize>) -> Result<Stored> {
        let (tensor, size) = self.tensor(name, shape)?;
        let stride = shape[1] * size;
        let mut bytes = vec![0; rows.len() * stride];
        let (path, mut file) = (&self.files[tensor.file].0, &self.files[tensor.file].1);
        file.seek(SeekFrom::Start(tensor.begin + (rows.start * stride) as u64))
            .and_then(|_| file.read_exact(&mut bytes))
            .with_context(|| format!("the tensor {name:?} can't be read from {path}"))?;
        Ok(Stored::Plain(match tensor.dtype {
            Dtype::F32 => numbers(&bytes, f32::from_le_bytes),
            Dtype::F16 => numbers(&bytes, |b| f16::from_le_bytes(b).to_f32()),
            _ => numbers(&bytes, |b| bf16::from_le_bytes(b).to_f32()),
        }))
    }

    /// A tensor and the bytes of each of its numbers.
    fn tensor(&self, name: &str, [rows, columns]: [usize; 2]) -> Result<(&Tensor, usize)> {
        let tensor = self.tensors.get(name);
        let tensor = tensor.with_context(|| format!("the folder has no tensor {name:?}"))?;
        let expected: &[usize] = if rows == 1 {
            &[columns]
        } else {
            &[rows, columns]
        };
        ensure!(
            tensor.shape == expected,
            "the tensor {name:?} is {:?} where config.json asks for {expected:?}",
            tensor.shape
        );
        let size = match tensor.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            other => bail!(
                "the tensor {name:?} is stored as {other:?}, which this forge doesn't read (it reads F32, F16 and BF16)"
            ),
        };
        Ok((tensor, size))
    }

    fn add(&mut self, dir: &Path, name: &str) -> Result<()> {
        let mut file =
            File::open(dir.join(name)).with_context(|| format!("{name} can't be opened"))?;
        let (header, start) =
            header(&mut file).with_context(|| format!("{name} is not a sound safetensors file"))?;
        for (tensor, info) in header.tensors() {
            let place = Tensor {
                file: self.files.len(),
                begin: start + info.data_offsets.0 as u64,
                dtype: info.dtype,
                shape: info.shape.clone(),
            };
            let earlier = self.tensors.insert(tensor.clone(), place);
            ensure!(
                earlier.is_none(),
                "{name} has a tensor {tensor:?} that another file has too"
            );
        }
        self.files.push((name.to_owned(), file));
        Ok(())
    }
}

/// A file's header and where its data begin. The library checks that tensors neither overlap nor leave gaps and have
/// the bytes that their shapes take; that they fill the file is checked here.
fn header(file: &mut File) -> Result<(Metadata, u64)> {
    let bytes = file.metadata()?.len();
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact(&mut length)
        .context("it ends before its header begins")?;
    let length = u64::from_le_bytes(length);
    ensure!(
        length <= HEADER_BYTES_MAX && LENGTH_BYTES + length <= bytes,
        "its header should have {length} bytes; the file has {bytes}, and a header {HEADER_BYTES_MAX} at most"
    );
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header)?;
    let header: Metadata = serde_json::from_slice(&header).context("its header")?;
    let start = LENGTH_BYTES + length;
    let end = start.checked_add(header.data_len() as u64);
    ensure!(
        end == Some(bytes),
        "its tensors take {} bytes behind a header that ends at byte {start}, but the file has {bytes}",
        header.data_len()
    );
    Ok((header, start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_cut_or_altered_file_never_panics(cut in 0usize..120, at in 0usize..120, to: u8) {
            let header = br#"{"v":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}"#;
            let mut bytes = [&(header.len() as u64).to_le_bytes()[..], header, &[63; 8]].concat();
            bytes.truncate(bytes.len().saturating_sub(cut));
            if let Some(byte) = bytes.get_mut(at) {
                *byte = to;
            }
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(WHOLE), &bytes).unwrap();
            if let Ok(shards) = Shards::open(dir.path()) {
                for name in shards.names() {
                    let _ = shards.load(name, [1, 4], 0..1);
                    let _ = shards.load(name, [2, 2], 0..2);
                }
            }
        }
    }
}
