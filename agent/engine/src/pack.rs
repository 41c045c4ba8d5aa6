//! The packed file: a model's weights in the layout that this CPU's kernels read, written once by streaming, then
//! mapped at every start. It can always be made anew from the bundle.
//!
//! ```text
//! 0        magic "MWPACK01"
//! 8        u32 length of the header, little-endian
//! 12       [u8; 32] SHA-256 of the header
//! 44       header, JSON
//! aligned  weights and tables, each at a multiple of 64, the first at a multiple of 4096
//! ```

use crate::bundle::{Bundle, BundleError, hex};
use crate::map::Mapped;
use crate::onnx::{Graph, GraphError};
use crate::recipe::{Order, Recipe, WeightSource};
use half::f16;
use millwright_kernels::packed::{BLOCK, Kind, Layout, Packed, Shape, TILE_ROWS, pack_tile};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const MAGIC: &[u8; 8] = b"MWPACK01";
const PREFIX: usize = 8 + 4 + 32;
const HEADER_BYTES_MAX: usize = 4 << 20;
const ALIGN: usize = 64;
const PAGE: usize = 4096;
/// No packing takes this long.
const STALE: Duration = Duration::from_hours(1);

/// Why weights can't be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(
        "the packed weights can't be written to {path}: {source}; {bytes} bytes are needed there"
    )]
    Write {
        path: PathBuf,
        bytes: u64,
        source: io::Error,
    },
    #[error("the weight {name} can't be packed: {reason}")]
    Weight { name: String, reason: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    /// The bundle's digest.
    source: String,
    /// `signed` or `offset`.
    layout: String,
    /// The kinds used: so far `i8`.
    kind: String,
    /// Of the whole file.
    bytes: usize,
    weights: Vec<Entry>,
    tables: Vec<Entry>,
}

/// A weight, `[rows, cols]`, or a table of `rows` f32 values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    name: String,
    rows: usize,
    cols: usize,
    offset: usize,
}

/// The mapped weights and tables of one model, by the indices of its [`Recipe`].
#[derive(Debug)]
pub(crate) struct Weights {
    map: Mapped,
    header: Header,
    layout: Layout,
}

impl Weights {
    /// Maps the packed file in `folder`, and makes it first where it is missing or not this bundle's.
    pub(crate) fn open(
        bundle: &Bundle,
        graph: &Graph,
        recipe: &Recipe,
        layout: Layout,
        folder: &Path,
    ) -> Result<Self, PackError> {
        let wanted = Header::plan(bundle, graph, recipe, layout)?;
        let stem = wanted.stem();
        let path = folder.join(format!("{stem}.mwpk"));
        match Self::map(&path, &wanted, layout) {
            Ok(weights) => return Ok(weights),
            Err(why) if path.exists() => tracing::warn!("{} is packed anew: {why}", path.display()),
            Err(_) => tracing::info!(
                "packing the weights of {} into {}",
                bundle.manifest.name,
                path.display()
            ),
        }
        bundle.verify()?;
        let write = |source| PackError::Write {
            path: path.clone(),
            bytes: wanted.bytes as u64,
            source,
        };
        fs::create_dir_all(folder).map_err(write)?;
        remove_stale(folder);
        // A name of this start's own, so that two at once don't write into each other; the last rename wins.
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let partial = folder.join(format!(
            ".{stem}-{}-{}.partial",
            std::process::id(),
            now.as_nanos()
        ));
        let written = wanted.write(graph, recipe, layout, &partial, &path);
        if written.is_err() {
            let _ = fs::remove_file(&partial);
        }
        written?;
        Self::map(&path, &wanted, layout).map_err(|why| write(io::Error::other(why)))
    }

    fn map(path: &Path, wanted: &Header, layout: Layout) -> Result<Self, String> {
        let map = Mapped::open(path).map_err(|e| e.to_string())?;
        let bytes = map.bytes();
        let prefix = bytes.get(..PREFIX).ok_or("it is too short")?;
        if &prefix[..8] != MAGIC {
            return Err("it is no packed file of this version".into());
        }
        let length = u32::from_le_bytes(prefix[8..12].try_into().unwrap_or_default()) as usize;
        let header = bytes
            .get(PREFIX..PREFIX + length.min(HEADER_BYTES_MAX))
            .ok_or("its header is cut off")?;
        if Sha256::digest(header).as_slice() != &prefix[12..PREFIX] {
            return Err("its header was altered".into());
        }
        let header: Header = serde_json::from_slice(header).map_err(|e| e.to_string())?;
        if header != *wanted {
            return Err("it was packed from another model or for another CPU".into());
        }
        if bytes.len() != header.bytes {
            return Err(format!(
                "it has {} bytes where {} belong",
                bytes.len(),
                header.bytes
            ));
        }
        Ok(Self {
            map,
            header,
            layout,
        })
    }

    /// A weight, `[rows, cols]`.
    pub(crate) fn weight(&self, index: usize) -> Packed<'_> {
        let entry = &self.header.weights[index];
        let shape = Shape::new(entry.rows, entry.cols).expect("planned from a valid shape");
        let bytes = &self.map.bytes()[entry.offset..entry.offset + shape.bytes(Kind::I8)];
        Packed::new(Kind::I8, shape, self.layout, bytes).expect("the length is the shape's")
    }

    /// A table of f32 values.
    pub(crate) fn table(&self, index: usize) -> &[f32] {
        let entry = &self.header.tables[index];
        self.map
            .f32s(entry.offset, entry.rows * entry.cols)
            .expect("planned inside the file, aligned")
    }

    /// The whole file's size.
    pub(crate) fn bytes(&self) -> usize {
        self.header.bytes
    }

    /// Bytes of all packed weights that one token's forward pass reads: each weight once, the embedding's
    /// other use being a single row of it.
    pub(crate) fn bytes_per_token(&self) -> usize {
        let shapes = self
            .header
            .weights
            .iter()
            .filter_map(|e| Shape::new(e.rows, e.cols));
        shapes.map(|shape| shape.bytes(Kind::I8)).sum()
    }
}

/// Removes what starts that were cut off an hour ago or earlier left behind.
fn remove_stale(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let partial = entry.path().extension().is_some_and(|e| e == "partial");
        let age = entry
            .metadata()
            .and_then(|m| m.modified())
            .ok()
            .and_then(|at| at.elapsed().ok());
        if partial && age.is_some_and(|age| age > STALE) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

impl Header {
    /// Names a packed file after the model, the layout and what is inside.
    fn stem(&self) -> String {
        let inside = serde_json::to_vec(self).unwrap_or_default();
        let digest = hex(&Sha256::digest(&inside)[..4]);
        format!("{}-{}-{digest}", &self.source[..16], self.layout)
    }

    fn plan(
        bundle: &Bundle,
        graph: &Graph,
        recipe: &Recipe,
        layout: Layout,
    ) -> Result<Self, PackError> {
        let mut header = Self {
            source: bundle.digest(),
            layout: match layout {
                Layout::Signed => "signed".into(),
                Layout::Offset => "offset".into(),
            },
            kind: "i8".into(),
            bytes: 0,
            weights: Vec::new(),
            tables: Vec::new(),
        };
        let mut sizes = Vec::new();
        for source in &recipe.weights {
            let shape = Shape::new(source.rows, source.cols).ok_or_else(|| PackError::Weight {
                name: source.values.clone(),
                reason: format!("[{}, {}] is out of range", source.rows, source.cols),
            })?;
            sizes.push(shape.bytes(Kind::I8));
            let name = source.values.clone();
            header.weights.push(Entry {
                name,
                rows: source.rows,
                cols: source.cols,
                offset: 0,
            });
        }
        for name in &recipe.tables {
            let values = graph.f32s(name).ok_or_else(|| PackError::Weight {
                name: name.clone(),
                reason: "it is no f32 tensor".into(),
            })??;
            sizes.push(values.len() * 4);
            header.tables.push(Entry {
                name: name.clone(),
                rows: values.len(),
                cols: 1,
                offset: 0,
            });
        }
        // The header is written before the data; its own length is bounded by this many digits more.
        let room =
            PREFIX + serde_json::to_vec(&header).unwrap_or_default().len() + (sizes.len() + 1) * 20;
        let mut offset = room.next_multiple_of(PAGE);
        for (entry, size) in header
            .weights
            .iter_mut()
            .chain(&mut header.tables)
            .zip(sizes)
        {
            entry.offset = offset;
            offset = (offset + size).next_multiple_of(ALIGN);
        }
        header.bytes = offset;
        Ok(header)
    }

    /// Writes the file under a partial name and renames it when all of it is on disk.
    fn write(
        &self,
        graph: &Graph,
        recipe: &Recipe,
        layout: Layout,
        partial: &Path,
        path: &Path,
    ) -> Result<(), PackError> {
        let failed = |source| PackError::Write {
            path: path.to_owned(),
            bytes: self.bytes as u64,
            source,
        };
        let file = File::create_new(partial).map_err(failed)?;
        let mut out = Counted {
            inner: BufWriter::with_capacity(1 << 20, file),
            written: 0,
        };
        let header = serde_json::to_vec(self).map_err(|e| failed(e.into()))?;
        out.write_all(MAGIC).map_err(failed)?;
        out.write_all(&(header.len() as u32).to_le_bytes())
            .map_err(failed)?;
        out.write_all(&Sha256::digest(&header)).map_err(failed)?;
        out.write_all(&header).map_err(failed)?;
        for (entry, source) in self.weights.iter().zip(&recipe.weights) {
            out.pad_to(entry.offset).map_err(failed)?;
            write_weight(graph, source, layout, &mut out, &failed)?;
        }
        for entry in &self.tables {
            out.pad_to(entry.offset).map_err(failed)?;
            let tensor = graph
                .initializer(&entry.name)
                .ok_or_else(|| PackError::Weight {
                    name: entry.name.clone(),
                    reason: "it is missing".into(),
                })?;
            out.write_all(&graph.bytes(tensor)?).map_err(failed)?;
        }
        out.pad_to(self.bytes).map_err(failed)?;
        let file = out.inner.into_inner().map_err(|e| failed(e.into_error()))?;
        file.sync_all().map_err(failed)?;
        fs::rename(partial, path).map_err(failed)
    }
}

/// Streams one weight out, tile by tile.
fn write_weight(
    graph: &Graph,
    source: &WeightSource,
    layout: Layout,
    out: &mut impl Write,
    failed: &dyn Fn(io::Error) -> PackError,
) -> Result<(), PackError> {
    let missing = || PackError::Weight {
        name: source.values.clone(),
        reason: "it is missing".into(),
    };
    let values = graph.bytes(graph.initializer(&source.values).ok_or_else(missing)?)?;
    let scales = graph.bytes(graph.initializer(&source.scales).ok_or_else(missing)?)?;
    let (rows, cols, blocks) = (source.rows, source.cols, source.cols / BLOCK);
    let scale = |row: usize, block: usize| {
        let at = 4 * match source.order {
            Order::RowMajor => row * blocks + block,
            Order::ColumnMajor => block * rows + row,
        };
        f32::from_le_bytes([scales[at], scales[at + 1], scales[at + 2], scales[at + 3]])
    };
    let exact = |row, block| {
        f16::from_f32(scale(row, block)).to_f32().to_bits() == scale(row, block).to_bits()
    };
    if let Some((row, block)) = (0..rows)
        .flat_map(|r| (0..blocks).map(move |b| (r, b)))
        .find(|&(r, b)| !exact(r, b))
    {
        let reason = format!(
            "the scale {} of row {row}, block {block} is no f16",
            scale(row, block)
        );
        return Err(PackError::Weight {
            name: source.scales.clone(),
            reason,
        });
    }
    let mut tile = vec![0; TILE_ROWS * cols + TILE_ROWS * blocks * 2];
    for first in (0..rows).step_by(TILE_ROWS) {
        let weight = |row: usize, col: usize| match source.order {
            Order::RowMajor => values[(first + row) * cols + col] as i8,
            Order::ColumnMajor => values[col * rows + first + row] as i8,
        };
        let valid = TILE_ROWS.min(rows - first);
        pack_tile(
            Kind::I8,
            layout,
            cols,
            valid,
            weight,
            |r, b| scale(first + r, b),
            |_, _| 0.0,
            &mut tile,
        );
        out.write_all(&tile).map_err(failed)?;
    }
    Ok(())
}

/// A writer that knows where it is.
struct Counted<W> {
    inner: W,
    written: usize,
}

impl<W: Write> Counted<W> {
    fn pad_to(&mut self, offset: usize) -> io::Result<()> {
        let gap = offset
            .checked_sub(self.written)
            .ok_or_else(|| io::Error::other("offsets overlap"))?;
        io::copy(&mut io::Read::take(io::repeat(0), gap as u64), self).map(drop)
    }
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.written += n;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
