//! The numbers of a graph's stored tensors, wherever they lie: in the graph, in its file, or in a file beside it.

use super::GraphError;
use crate::map::Mapped;
use half::{bf16, f16};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tract_onnx::pb::TensorProto;
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};

/// The graph's file and those that its tensors name, mapped.
pub(crate) struct Files {
    folder: PathBuf,
    maps: HashMap<String, Mapped>,
}

impl Files {
    /// Nothing yet of this folder.
    pub(super) fn of(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            maps: HashMap::new(),
        }
    }

    pub(super) fn add(&mut self, name: &str, map: Mapped) {
        self.maps.insert(name.to_owned(), map);
    }

    /// Maps the file that a tensor names, unless it is mapped already. It must lie in the folder itself.
    pub(super) fn open(&mut self, tensor: &TensorProto) -> Result<(), GraphError> {
        self.map(tensor).map_err(|reason| GraphError::Parse {
            path: self.folder.display().to_string(),
            reason,
        })
    }

    fn map(&mut self, tensor: &TensorProto) -> Result<(), String> {
        let Some(name) = external_entry(tensor, "location") else {
            return Ok(());
        };
        if self.maps.contains_key(&name) {
            return Ok(());
        }
        let outside = || format!("external data in {name:?}, outside the model's folder");
        if name.contains(['/', '\\', '\0']) || matches!(name.as_str(), "" | "." | "..") {
            return Err(outside());
        }
        let path = self.folder.join(&name);
        let failed = |e: std::io::Error| format!("{name}: {e}");
        let home = self.folder.canonicalize().map_err(failed)?;
        if path.canonicalize().map_err(failed)?.parent() != Some(&home) {
            return Err(format!("{} (a link); copy it there", outside()));
        }
        let map = Mapped::open(&path).map_err(failed)?;
        self.maps.insert(name, map);
        Ok(())
    }

    /// Names of the files.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.maps.keys().map(String::as_str)
    }

    /// Their sizes together.
    pub(super) fn total_bytes(&self) -> u64 {
        self.maps.values().map(|map| map.bytes().len() as u64).sum()
    }

    /// Lets go of the memory of what was read from them; read again, it comes back.
    pub(super) fn forget(&self) {
        self.maps.values().for_each(Mapped::forget);
    }

    /// A tensor's little-endian bytes.
    pub(super) fn bytes<'a>(
        &'a self,
        tensor: &'a TensorProto,
    ) -> Result<Cow<'a, [u8]>, GraphError> {
        let wrong = |reason: &str| GraphError::Tensor {
            tensor: tensor.name.clone(),
            reason: reason.into(),
        };
        if tensor.data_location() == DataLocation::External {
            return self.external(tensor).map(Cow::Borrowed).map_err(wrong);
        }
        if !tensor.raw_data.is_empty() {
            return Ok(Cow::Borrowed(&tensor.raw_data));
        }
        let ints = tensor.int32_data.iter();
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
            DataType::Int32 => ints.flat_map(|v| v.to_le_bytes()).collect(),
            DataType::Float16 | DataType::Bfloat16 | DataType::Int16 | DataType::Uint16 => {
                ints.flat_map(|&v| (v as u16).to_le_bytes()).collect()
            }
            DataType::Int8 | DataType::Uint8 | DataType::Bool => ints.map(|&v| v as u8).collect(),
            other => {
                return Err(wrong(&format!(
                    "{other:?} values in typed fields are not read"
                )));
            }
        }))
    }

    fn external(&self, tensor: &TensorProto) -> Result<&[u8], &'static str> {
        let number = |key, default| match external_entry(tensor, key) {
            None => Ok(default),
            Some(text) => text
                .parse::<usize>()
                .map_err(|_| "a bad external offset or length"),
        };
        let location = external_entry(tensor, "location").ok_or("no location")?;
        let data = self.maps.get(&location).ok_or("no external file")?.bytes();
        let offset = number("offset", 0)?;
        let length = number("length", data.len().saturating_sub(offset))?;
        let end = offset.checked_add(length).ok_or("a bad external range")?;
        data.get(offset..end)
            .ok_or("lies beyond the end of its file")
    }

    /// Checks that a tensor's stated shape is what its bytes hold, and says how many those are.
    pub(super) fn check(&self, tensor: &TensorProto) -> Result<usize, GraphError> {
        let wrong = |reason| GraphError::Tensor {
            tensor: tensor.name.clone(),
            reason,
        };
        let Some(bits) = bits(tensor.data_type()) else {
            return Err(wrong(format!(
                "type {} is not one that models for this agent have",
                tensor.data_type
            )));
        };
        let count = elements(tensor);
        let expected = count.and_then(|count| Some(count.checked_mul(bits)?.div_ceil(8)));
        let found = self.bytes(tensor)?.len();
        if expected != Some(found) {
            let reason = format!("shape {:?} does not fit its {found} bytes", tensor.dims);
            return Err(wrong(reason));
        }
        Ok(found)
    }
}

/// How many numbers a tensor has by its shape; `None` if that is no number.
pub(crate) fn elements(tensor: &TensorProto) -> Option<usize> {
    let mut dims = tensor.dims.iter();
    dims.try_fold(1usize, |all, &n| all.checked_mul(usize::try_from(n).ok()?))
}

/// The sizes of a tensor; those of a checked one are in range.
pub(crate) fn dims(tensor: &TensorProto) -> Vec<usize> {
    let size = |&n: &i64| usize::try_from(n).unwrap_or(usize::MAX);
    tensor.dims.iter().map(size).collect()
}

/// The whole numbers or truths that these bytes hold; `None` for other types.
pub(super) fn whole(bytes: &[u8], of: DataType) -> Option<Vec<i64>> {
    Some(match of {
        DataType::Int64 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b))
            .collect(),
        DataType::Int32 => {
            let numbers = bytes.as_chunks().0.iter();
            numbers.map(|b| i64::from(i32::from_le_bytes(*b))).collect()
        }
        DataType::Bool => bytes.iter().map(|&b| i64::from(b != 0)).collect(),
        _ => return None,
    })
}

fn bits(of: DataType) -> Option<usize> {
    Some(match of {
        DataType::Float | DataType::Int32 | DataType::Uint32 => 32,
        DataType::Int64 | DataType::Double | DataType::Uint64 => 64,
        DataType::Float16 | DataType::Bfloat16 | DataType::Int16 | DataType::Uint16 => 16,
        DataType::Int8 | DataType::Uint8 | DataType::Bool => 8,
        DataType::Int4 | DataType::Uint4 => 4,
        _ => return None,
    })
}

pub(super) fn external_entry(tensor: &TensorProto, key: &str) -> Option<String> {
    let entry = tensor.external_data.iter().find(|e| e.key == key);
    entry.map(|e| e.value.clone())
}

/// A tensor of numbers, read one by one.
pub(crate) struct Numbers<'a> {
    bytes: Cow<'a, [u8]>,
    of: DataType,
}

impl<'a> Numbers<'a> {
    pub(super) fn new(bytes: Cow<'a, [u8]>, of: DataType) -> Self {
        Self { bytes, of }
    }

    /// The one number that a small tensor in the graph itself holds.
    pub(crate) fn inline(tensor: &'a TensorProto) -> Option<Self> {
        let one = elements(tensor)? == 1 && tensor.data_location() != DataLocation::External;
        let none = Files::of(Path::new(""));
        let bytes = none.bytes(tensor).ok().filter(|_| one)?.into_owned();
        let fits = bits(tensor.data_type())? == bytes.len() * 8;
        fits.then(|| Self::new(Cow::Owned(bytes), tensor.data_type()))
    }

    /// Number `index`; zero where the type is none that weights have.
    #[inline]
    pub(crate) fn at(&self, index: usize) -> f32 {
        match self.of {
            DataType::Float => f32::from_le_bytes(self.bytes.as_chunks().0[index]),
            DataType::Float16 => f16::from_le_bytes(self.bytes.as_chunks().0[index]).to_f32(),
            DataType::Bfloat16 => bf16::from_le_bytes(self.bytes.as_chunks().0[index]).to_f32(),
            DataType::Double => f64::from_le_bytes(self.bytes.as_chunks().0[index]) as f32,
            DataType::Int64 => i64::from_le_bytes(self.bytes.as_chunks().0[index]) as f32,
            DataType::Int32 => i32::from_le_bytes(self.bytes.as_chunks().0[index]) as f32,
            DataType::Int8 => f32::from(self.bytes[index].cast_signed()),
            DataType::Uint8 | DataType::Bool => f32::from(self.bytes[index]),
            DataType::Uint4 => f32::from(self.nibble(index)),
            DataType::Int4 => f32::from((self.nibble(index) << 4).cast_signed() >> 4),
            _ => 0.0,
        }
    }

    fn nibble(&self, index: usize) -> u8 {
        self.bytes[index / 2] >> (4 * (index % 2)) & 15
    }

    /// The bytes as they are stored.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn of(&self) -> DataType {
        self.of
    }
}
