//! The packed file: a model's weights in the layout that this CPU's kernels read, written once by streaming, then
//! mapped at every start. It can always be made anew from the bundle. Which kind a weight is packed as depends on
//! its numbers: they are read when it is packed, and the file says it from then on.
//!
//! ```text
//! 0        magic "MWPACK02"
//! 8        u32 length of the header, little-endian
//! 12       [u8; 32] SHA-256 of the header
//! 44       header, JSON
//! aligned  weights and tables, each at a multiple of 64, the first at a multiple of 4096
//! ```

use crate::bundle::{Bundle, BundleError, hex};
use crate::map::Mapped;
use crate::onnx::{Graph, GraphError};
use crate::recipe::{Recipe, WeightSource};
use crate::source::{Source, kind_of};
use millwright_kernels::packed::{BLOCK, Kind, Layout, Packed, Shape, TILE_ROWS, pack_tile};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const MAGIC: &[u8; 8] = b"MWPACK02";
const PREFIX: usize = 8 + 4 + 32;
const HEADER_BYTES_MAX: usize = 4 << 20;
const ALIGN: usize = 64;
const PAGE: usize = 4096;
/// Rows that are read at once: a column-major source holds them side by side in a cache line.
const PANEL_ROWS: usize = 4 * TILE_ROWS;
/// Bytes that are written between two times that the source's pages are let go.
const FORGET_BYTES: usize = 8 << 20;
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
    /// A weight's, by [`Kind::code`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kind: Option<u8>,
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
        let outline = Header::outline(bundle, graph, recipe, layout)?;
        let stem = outline.stem();
        let path = folder.join(format!("{stem}.mwpk"));
        match Self::map(&path, &outline, recipe, layout) {
            Ok(weights) => return Ok(weights),
            Err(why) if path.exists() => tracing::warn!("{} is packed anew: {why}", path.display()),
            Err(_) => tracing::info!(
                "packing the weights of {} into {}",
                bundle.manifest.name,
                path.display()
            ),
        }
        bundle.verify()?;
        let wanted = outline.clone().placed(&kinds(graph, recipe)?);
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
        Self::map(&path, &outline, recipe, layout).map_err(|why| write(io::Error::other(why)))
    }

    fn map(path: &Path, outline: &Header, recipe: &Recipe, layout: Layout) -> Result<Self, String> {
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
        let kinds = header.kinds(recipe);
        if kinds.is_none_or(|kinds| header != outline.clone().placed(&kinds)) {
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
        let (shape, kind) = entry.packed().expect("planned from a valid shape");
        let bytes = &self.map.bytes()[entry.offset..entry.offset + shape.bytes(kind)];
        Packed::new(kind, shape, self.layout, bytes).expect("the length is the shape's")
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

    /// Bytes of the packed weights that one token's forward pass reads: those of its linears, each once. The
    /// embedding's single row is not counted.
    pub(crate) fn bytes_per_token(&self, recipe: &Recipe) -> usize {
        let linears = recipe
            .linears
            .iter()
            .map(|&index| &self.header.weights[index]);
        let weights = linears.filter_map(Entry::packed);
        weights.map(|(shape, kind)| shape.bytes(kind)).sum()
    }
}

/// The kind of each weight, by its numbers.
fn kinds(graph: &Graph, recipe: &Recipe) -> Result<Vec<Kind>, PackError> {
    let kind = |source| {
        let kind = Source::open(graph, source)?.kind();
        graph.forget();
        kind
    };
    recipe.weights.iter().map(kind).collect()
}

impl Entry {
    fn new(name: &str, rows: usize, cols: usize) -> Self {
        Self {
            name: name.to_owned(),
            rows,
            cols,
            kind: None,
            offset: 0,
        }
    }

    /// How a weight is packed, once that is known; a table isn't.
    fn packed(&self) -> Option<(Shape, Kind)> {
        Shape::new(self.rows, self.cols).zip(Kind::from_code(self.kind?))
    }

    fn bytes(&self) -> usize {
        match self.packed() {
            Some((shape, kind)) => shape.bytes(kind),
            None => self.rows * self.cols * size_of::<f32>(),
        }
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

    /// Everything but the kinds, and what follows from them.
    fn outline(
        bundle: &Bundle,
        graph: &Graph,
        recipe: &Recipe,
        layout: Layout,
    ) -> Result<Self, PackError> {
        let weight = |source: &WeightSource| {
            let entry = Entry::new(&source.values, source.rows, source.cols);
            let shape = Shape::new(source.rows, source.cols);
            shape.map(|_| entry).ok_or_else(|| PackError::Weight {
                name: source.values.clone(),
                reason: format!("[{}, {}] is out of range", source.rows, source.cols),
            })
        };
        let table = |name: &String| {
            let values = graph
                .initializer(name)
                .filter(|_| graph.is_f32_initializer(name));
            let count = values.and_then(|tensor| {
                let mut dims = tensor.dims.iter();
                dims.try_fold(1usize, |all, &n| all.checked_mul(usize::try_from(n).ok()?))
            });
            let entry = count.map(|count| Entry::new(name, count, 1));
            entry.ok_or_else(|| PackError::Weight {
                name: name.clone(),
                reason: "it is no f32 tensor".into(),
            })
        };
        Ok(Self {
            source: bundle.digest(),
            layout: match layout {
                Layout::Signed => "signed".into(),
                Layout::Offset => "offset".into(),
            },
            bytes: 0,
            weights: recipe
                .weights
                .iter()
                .map(weight)
                .collect::<Result<_, _>>()?,
            tables: recipe.tables.iter().map(table).collect::<Result<_, _>>()?,
        })
    }

    /// The kinds that a file states, if they are as many as the recipe's weights and could be theirs.
    fn kinds(&self, recipe: &Recipe) -> Option<Vec<Kind>> {
        let stated = self.weights.iter().zip(&recipe.weights).map(|(entry, of)| {
            let kind = Kind::from_code(entry.kind?)?;
            (kind == kind_of(of, kind.scales())).then_some(kind)
        });
        let kinds: Option<Vec<Kind>> = stated.collect();
        kinds.filter(|kinds| kinds.len() == recipe.weights.len())
    }

    /// The whole header of a file with weights of these kinds.
    fn placed(mut self, kinds: &[Kind]) -> Self {
        for (entry, kind) in self.weights.iter_mut().zip(kinds) {
            entry.kind = Some(kind.code());
        }
        // The header is written before the data; its own length is bounded by this many digits more.
        let entries = self.weights.len() + self.tables.len();
        let room =
            PREFIX + serde_json::to_vec(&self).unwrap_or_default().len() + (entries + 1) * 20;
        let mut offset = room.next_multiple_of(PAGE);
        for entry in self.weights.iter_mut().chain(&mut self.tables) {
            entry.offset = offset;
            offset = (offset + entry.bytes()).next_multiple_of(ALIGN);
        }
        self.bytes = offset;
        self
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
            let (_, kind) = entry.packed().expect("placed with its kind");
            write_weight(graph, source, kind, layout, &mut out, &failed)?;
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
    kind: Kind,
    layout: Layout,
    out: &mut impl Write,
    failed: &dyn Fn(io::Error) -> PackError,
) -> Result<(), PackError> {
    let numbers = Source::open(graph, source)?;
    let (rows, cols) = (source.rows, source.cols);
    let mut panel = Vec::new();
    let mut tile = vec![0; cols / BLOCK * kind.block_bytes()];
    let mut since = 0;
    for first in (0..rows).step_by(PANEL_ROWS) {
        let last = rows.min(first + PANEL_ROWS);
        numbers.rows(first..last, &mut panel);
        for (at, panel) in panel.chunks(TILE_ROWS * cols).enumerate() {
            let first = first + at * TILE_ROWS;
            pack_tile(
                kind,
                layout,
                cols,
                panel.len() / cols,
                |row, col| panel[row * cols + col],
                |row, group| numbers.scale(first + row, group),
                |row, group| numbers.minimum(first + row, group),
                &mut tile,
            );
            out.write_all(&tile).map_err(failed)?;
            since += tile.len();
        }
        if since >= FORGET_BYTES || last == rows {
            graph.forget();
            since = 0;
        }
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
