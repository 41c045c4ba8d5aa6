//! The packed file: all that running a model takes. Its graph of our operators, and its weights in the layout that this
//! CPU's kernels read, written once by streaming, then mapped at every start. It can always be made anew from the
//! model's folder. Which kind a weight is packed as depends on its numbers: they are read when it is packed, and the
//! file says it from then on.
//!
//! ```text
//! 0        magic "MWPACK03"
//! 8        u32 length of the header, little-endian
//! 12       [u8; 32] SHA-256 of the header
//! 44       header, JSON
//! aligned  weights, tables and the graph, each at a multiple of 64, the first at a multiple of 4096
//! ```

use crate::bundle::{Bundle, BundleError, hex};
use crate::import::{Goal, Imported, Target, import};
use crate::map::Mapped;
use crate::onnx::{Graph, GraphError};
use crate::recipe::{Geometry, WeightSource};
use crate::source::{Panel, Source};
use millwright_kernels::packed::{BLOCK, Kind, Layout, Packed, Shape, TILE_ROWS, pack_tile};
use prost::Message;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const MAGIC: &[u8; 8] = b"MWPACK03";
const PREFIX: usize = 8 + 4 + 32;
const HEADER_BYTES_MAX: usize = 4 << 20;
const ALIGN: usize = 64;
const PAGE: usize = 4096;
/// Rows that are read at once: a column-major source holds them side by side in a cache line.
pub(crate) const PANEL_ROWS: usize = 4 * TILE_ROWS;
/// Bytes that are written between two times that the source's pages are let go.
const FORGET_BYTES: usize = 8 << 20;
/// What a 32-bit system may be asked to map: the kernel takes a part of its 4 GB, and programs and heap need theirs.
const BYTES_MAX_32: u64 = 1_500_000_000;

/// Why weights can't be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error("the folder {folder} can't take packed weights: {source}")]
    Folder { folder: PathBuf, source: io::Error },
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
    #[error(
        "packed it takes {bytes} bytes, and a {bits}-bit system maps {BYTES_MAX_32} at most: take a smaller model, a q4 \
         bundle of it, or a 64-bit system"
    )]
    TooLarge { bytes: u64, bits: u32 },
}

/// Raised whenever importing makes something else of the same file, so that it is imported anew.
pub(crate) const IMPORT: u32 = 4;

/// What decides what a packed file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    /// The model's digest.
    source: String,
    /// `signed` or `offset`.
    layout: String,
    target: Target,
    import: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Header {
    key: Key,
    /// Of the whole file.
    bytes: usize,
    outline: Outline,
    weights: Vec<Entry>,
    /// f32 values, one a row.
    tables: Vec<Entry>,
    /// The graph as protobuf: bytes, one a row.
    graph: Entry,
}

/// What is to be known of a model without its graph.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outline {
    /// Set when all attention is ours.
    pub(crate) geometry: Option<Geometry>,
    /// Whether no operator was left to tract.
    pub(crate) is_fused: bool,
    /// Weights that linears read, in full for each token; of the others an embedding reads single rows.
    linears: BTreeSet<usize>,
    /// What was left to tract, and why.
    pub(crate) notes: Vec<String>,
}

/// A weight, `[rows, cols]`, or something else of `rows` elements.
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

/// One model, packed and mapped.
#[derive(Debug)]
pub(crate) struct Weights {
    map: Mapped,
    header: Header,
    layout: Layout,
}

impl Weights {
    /// Maps the packed file in `folder`, and makes it first where it is missing or not this model's.
    pub(crate) fn open(
        bundle: &Bundle,
        target: &Target,
        layout: Layout,
        folder: &Path,
    ) -> Result<Self, PackError> {
        let key = Key::new(bundle, target, layout);
        let path = key.path(folder);
        match Self::map(&path, &key, layout) {
            Ok(weights) => return Ok(weights),
            Err(why) if path.exists() => tracing::warn!("{} is packed anew: {why}", path.display()),
            Err(_) => tracing::info!(
                "packing the weights of {} into {}",
                bundle.manifest.name,
                path.display()
            ),
        }
        let _alone = alone(folder).map_err(|source| PackError::Folder {
            folder: folder.to_owned(),
            source,
        })?;
        if let Ok(weights) = Self::map(&path, &key, layout) {
            return Ok(weights);
        }
        remove_partial(folder);
        bundle.verify()?;
        let imported = import(&bundle.graph(), bundle.heads(), target)?;
        if let Some(name) = imported.graph.files().find(|name| !bundle.covers(name)) {
            let reason = format!("keeps weights in {name}, which the manifest doesn't name");
            return Err(GraphError::Shape(reason).into());
        }
        let graph = imported.graph.to_model()?.encode_to_vec();
        let wanted = Header::new(key.clone(), &imported, graph.len())?;
        // A name of this start's own: where locks hold nobody off, one that is disturbed fails, and passes nothing half-written.
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let partial = folder.join(format!(
            ".{}-{}-{}.partial",
            key.stem(),
            std::process::id(),
            now.as_nanos()
        ));
        let written = wanted.write(&imported, &graph, layout, &partial, &path);
        if written.is_err() {
            let _ = fs::remove_file(&partial);
        }
        written?;
        Self::map(&path, &key, layout).map_err(|why| PackError::Write {
            path: path.clone(),
            bytes: wanted.bytes as u64,
            source: io::Error::other(why),
        })
    }

    fn map(path: &Path, key: &Key, layout: Layout) -> Result<Self, String> {
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
        if header.key != *key || !header.is_placed() {
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

    /// The graph, as protobuf.
    pub(crate) fn graph(&self) -> &[u8] {
        let entry = &self.header.graph;
        &self.map.bytes()[entry.offset..entry.offset + entry.rows]
    }

    pub(crate) fn outline(&self) -> &Outline {
        &self.header.outline
    }

    /// The whole file's size.
    pub(crate) fn bytes(&self) -> usize {
        self.header.bytes
    }

    pub(crate) fn bytes_per_token(&self) -> usize {
        self.header.bytes_per_token()
    }
}

/// What a model takes, or would take once it is written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sizes {
    pub(crate) packed: usize,
    pub(crate) bytes_per_token: usize,
    /// Of the recipe's weights.
    pub(crate) kinds: Vec<Kind>,
    pub(crate) geometry: Option<Geometry>,
    /// The rows of the largest weight: the vocabulary.
    pub(crate) vocab: usize,
    /// Of the others that linears read, the most numbers that one gives or takes for a token.
    pub(crate) widest: usize,
}

impl Sizes {
    /// Reads the weights' scales, which decide their kinds.
    pub(crate) fn of(imported: &Imported) -> Result<Self, PackError> {
        let key = Key {
            source: String::new(),
            layout: String::new(),
            target: Target::new(Goal::Plain),
            import: IMPORT,
        };
        let graph = imported.graph.to_model()?.encoded_len();
        Ok(Header::new(key, imported, graph)?.sizes())
    }

    /// Of the packed file in `folder`, or where it is not there, of what importing says that it will be.
    pub(crate) fn known(
        bundle: &Bundle,
        target: &Target,
        layout: Layout,
        folder: &Path,
    ) -> Result<Self, PackError> {
        let key = Key::new(bundle, target, layout);
        match Weights::map(&key.path(folder), &key, layout) {
            Ok(weights) => Ok(weights.header.sizes()),
            Err(_) => Self::of(&import(&bundle.graph(), bundle.heads(), target)?),
        }
    }
}

/// Whether a packed file of so many bytes can be mapped where addresses have so many bits.
fn mappable(bytes: u64, bits: u32) -> Result<(), PackError> {
    if bits <= 32 && bytes > BYTES_MAX_32 {
        return Err(PackError::TooLarge { bytes, bits });
    }
    Ok(())
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

    /// A weight's bytes; those of something else, whose elements have this many.
    fn bytes(&self, element: usize) -> Option<usize> {
        match self.packed() {
            Some((shape, kind)) => Some(shape.bytes(kind)),
            None => self.rows.checked_mul(self.cols)?.checked_mul(element),
        }
    }
}

/// Makes the folder if need be, and waits until nobody else packs into it. Held until the file is dropped, or the process ends in whatever way.
fn alone(folder: &Path) -> io::Result<File> {
    fs::create_dir_all(folder)?;
    let locked = File::open(folder)?;
    match locked.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            tracing::info!(
                "waiting for another process that packs into {}",
                folder.display()
            );
            locked.lock()?;
        }
        // Some file systems have no locks: two at once then disturb each other, and one of them fails.
        Err(TryLockError::Error(e)) => tracing::warn!("{} can't be locked: {e}", folder.display()),
    }
    Ok(locked)
}

/// Removes what processes left behind that were killed while they packed. Only for who is [`alone`].
fn remove_partial(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        if name.starts_with(b".") && name.ends_with(b".partial") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

impl Outline {
    pub(crate) fn of(imported: &Imported) -> Self {
        let recipe = &imported.recipe;
        Self {
            geometry: recipe.geometry,
            is_fused: imported.is_fused,
            linears: recipe.linears.clone(),
            notes: recipe.notes.clone(),
        }
    }
}

impl Key {
    fn new(bundle: &Bundle, target: &Target, layout: Layout) -> Self {
        Self {
            source: bundle.digest(),
            layout: match layout {
                Layout::Signed => "signed".into(),
                Layout::Offset => "offset".into(),
            },
            target: target.clone(),
            import: IMPORT,
        }
    }

    fn path(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.mwpk", self.stem()))
    }

    /// Names a packed file after the model, the layout and what else decides.
    fn stem(&self) -> String {
        let all = serde_json::to_vec(self).unwrap_or_default();
        let digest = hex(&Sha256::digest(&all)[..4]);
        let source: String = self.source.chars().take(16).collect();
        format!("{source}-{}-{digest}", self.layout)
    }
}

impl Header {
    /// The header of a file that is to be written: reads the weights' scales, which decide their kinds.
    fn new(key: Key, imported: &Imported, graph: usize) -> Result<Self, PackError> {
        let Imported {
            graph: source,
            recipe,
            ..
        } = imported;
        let weight = |of: &WeightSource| {
            let mut entry = Entry::new(&of.values, of.rows, of.cols);
            Shape::new(of.rows, of.cols).ok_or_else(|| PackError::Weight {
                name: of.values.clone(),
                reason: format!("[{}, {}] is out of range", of.rows, of.cols),
            })?;
            entry.kind = Some(Source::open(source, of)?.kind()?.code());
            source.forget();
            Ok(entry)
        };
        let table = |(index, values): (usize, &Vec<f32>)| {
            Entry::new(&format!("table {index}"), values.len(), 1)
        };
        let weights = recipe.weights.iter().map(weight);
        let mut header = Self {
            key,
            bytes: 0,
            outline: Outline::of(imported),
            weights: weights.collect::<Result<_, PackError>>()?,
            tables: recipe.tables.iter().enumerate().map(table).collect(),
            graph: Entry::new("graph", graph, 1),
        };
        // What this system can't even count is beyond what it can map.
        let placed = header.place().map(|()| header.bytes as u64);
        mappable(placed.unwrap_or(u64::MAX), usize::BITS)?;
        Ok(header)
    }

    fn sizes(&self) -> Sizes {
        let vocab = self.weights.iter().map(|entry| entry.rows).max();
        let vocab = vocab.unwrap_or(0);
        let linears = self.outline.linears.iter();
        let linears = linears.map(|&index| &self.weights[index]);
        let inner = linears.filter(|entry| entry.rows < vocab);
        let widest = inner.map(|entry| entry.rows.max(entry.cols)).max();
        let kinds = self.weights.iter().filter_map(Entry::packed);
        Sizes {
            packed: self.bytes,
            bytes_per_token: self.bytes_per_token(),
            kinds: kinds.map(|(_, kind)| kind).collect(),
            geometry: self.outline.geometry,
            vocab,
            widest: widest.unwrap_or(0),
        }
    }

    /// Bytes of the packed weights that one token's forward pass reads: those of its linears, each once. The
    /// embedding's single row is not counted.
    fn bytes_per_token(&self) -> usize {
        let linears = self
            .outline
            .linears
            .iter()
            .map(|&index| &self.weights[index]);
        let weights = linears.filter_map(Entry::packed);
        weights.map(|(shape, kind)| shape.bytes(kind)).sum()
    }

    /// Gives everything its offset; `None` where sizes overflow.
    fn place(&mut self) -> Option<()> {
        let entries = self.weights.len() + self.tables.len() + 2;
        self.each(|entry, _| {
            entry.offset = 0;
            Some(())
        })?;
        self.bytes = 0;
        // The header is written before the data; its own length is bounded by this many digits more.
        let room = PREFIX + serde_json::to_vec(self).unwrap_or_default().len() + entries * 20;
        let mut offset = room.next_multiple_of(PAGE);
        self.each(|entry, element| {
            entry.offset = offset;
            offset = offset
                .checked_add(entry.bytes(element)?)?
                .checked_next_multiple_of(ALIGN)?;
            Some(())
        })?;
        self.bytes = offset;
        Some(())
    }

    /// Whether all of it lies where [`Header::place`] puts it.
    fn is_placed(&self) -> bool {
        let mut again = self.clone();
        let known = self.weights.iter().all(|entry| entry.packed().is_some())
            && self
                .tables
                .iter()
                .chain([&self.graph])
                .all(|entry| entry.kind.is_none())
            && self
                .outline
                .linears
                .iter()
                .all(|&index| index < self.weights.len());
        known && again.place().is_some() && again == *self
    }

    /// Calls `take` with each entry in the file's order, and the bytes of its elements where it is no weight.
    fn each(&mut self, mut take: impl FnMut(&mut Entry, usize) -> Option<()>) -> Option<()> {
        self.weights
            .iter_mut()
            .try_for_each(|entry| take(entry, 0))?;
        self.tables
            .iter_mut()
            .try_for_each(|entry| take(entry, size_of::<f32>()))?;
        take(&mut self.graph, 1)
    }

    /// Writes the file under a partial name and renames it when all of it is on disk.
    fn write(
        &self,
        imported: &Imported,
        graph: &[u8],
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
        // A disk that is too full says so now, not when it is full. Not every file system can.
        let room = fallocate(&file, FallocateFlags::empty(), 0, self.bytes as u64);
        if let Err(e @ (Errno::NOSPC | Errno::DQUOT)) = room {
            return Err(failed(e.into()));
        }
        let mut out = Counted::new(BufWriter::with_capacity(1 << 20, file));
        let header = serde_json::to_vec(self).map_err(|e| failed(e.into()))?;
        out.write_all(MAGIC).map_err(failed)?;
        out.write_all(&(header.len() as u32).to_le_bytes())
            .map_err(failed)?;
        out.write_all(&Sha256::digest(&header)).map_err(failed)?;
        out.write_all(&header).map_err(failed)?;
        let Imported {
            graph: source,
            recipe,
            ..
        } = imported;
        for (entry, weight) in self.weights.iter().zip(&recipe.weights) {
            out.pad_to(entry.offset).map_err(failed)?;
            let (_, kind) = entry.packed().expect("a weight has its kind");
            write_weight(source, weight, kind, layout, &mut out, &failed)?;
        }
        for (entry, values) in self.tables.iter().zip(&recipe.tables) {
            out.pad_to(entry.offset).map_err(failed)?;
            for value in values {
                out.write_all(&value.to_le_bytes()).map_err(failed)?;
            }
        }
        out.pad_to(self.graph.offset).map_err(failed)?;
        out.write_all(graph).map_err(failed)?;
        out.pad_to(self.bytes).map_err(failed)?;
        let file = out.inner.into_inner().map_err(|e| failed(e.into_error()))?;
        file.sync_all().map_err(failed)?;
        fs::rename(partial, path).map_err(failed)
    }
}

/// Streams one weight out.
fn write_weight(
    graph: &Graph,
    source: &WeightSource,
    kind: Kind,
    layout: Layout,
    out: &mut impl Write,
    failed: &dyn Fn(io::Error) -> PackError,
) -> Result<(), PackError> {
    let numbers = Source::open(graph, source)?;
    let mut since = 0;
    let written = each_tile(&numbers, kind, layout, 0..source.rows, |tile| {
        since += tile.len();
        if since >= FORGET_BYTES {
            graph.forget();
            since = 0;
        }
        out.write_all(tile)
    });
    graph.forget();
    written.map_err(failed)
}

/// Packs these rows of a weight and hands them over tile by tile.
pub(crate) fn each_tile<E>(
    numbers: &Source,
    kind: Kind,
    layout: Layout,
    rows: Range<usize>,
    mut take: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let cols = numbers.cols();
    let mut panel = Panel::default();
    let mut tile = vec![0; cols / BLOCK * kind.block_bytes()];
    let groups = cols / kind.group();
    for first in rows.clone().step_by(PANEL_ROWS) {
        let last = rows.end.min(first + PANEL_ROWS);
        numbers.panel(first..last, &mut panel);
        for from in (0..last - first).step_by(TILE_ROWS) {
            pack_tile(
                kind,
                layout,
                cols,
                TILE_ROWS.min(last - first - from),
                |row, col| panel.weights[(from + row) * cols + col],
                |row, group| panel.scales[(from + row) * groups + group],
                |row, group| panel.minimums[(from + row) * groups + group],
                &mut tile,
            );
            take(&tile)?;
        }
    }
    Ok(())
}

/// A writer that knows where it is.
pub(crate) struct Counted<W> {
    inner: W,
    written: usize,
}

impl<W: Write> Counted<W> {
    pub(crate) fn new(inner: W) -> Self {
        Self { inner, written: 0 }
    }

    /// Goes on to the next multiple, and says where that is.
    pub(crate) fn align(&mut self, to: usize) -> io::Result<usize> {
        self.pad_to(self.written.next_multiple_of(to))?;
        Ok(self.written)
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_32_bit_system_refuses_what_it_can_not_map_and_says_what_would_do() {
        assert!(mappable(BYTES_MAX_32, 32).is_ok());
        assert!(mappable(u64::MAX, 64).is_ok());
        let refused = mappable(BYTES_MAX_32 + 1, 32).unwrap_err().to_string();
        for words in ["1500000001 bytes", "32-bit", "1500000000 at most", "q4"] {
            assert!(refused.contains(words), "{refused}");
        }
    }
}
