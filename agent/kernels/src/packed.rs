//! Packed weights: the layout, and what can be done with it without knowing the CPU.
//! Not a file format (the engine has a header for that) and not arithmetic.
//!
//! A weight `[rows, cols]` is cut into tiles of 16 rows. A tile holds its blocks of 32 columns in ascending
//! order, so it is one contiguous stream. A block holds, all little endian:
//!
//! 1. scales `[group][row: 16]`, f16 or f32;
//! 2. in affine kinds, minimums of the same shape;
//! 3. the weights: of 8 bits `[k4: 8][row: 16][4]`; of 4 bits bytes `[k4: 4][row: 16][4]`, whose low halves are the
//!    block's first 16 columns and whose high halves are the last 16.
//!
//! Rows beyond the last are zeros.

pub use crate::kind::{Bits, Group, Kind, Scales};
use crate::math::{f16_to_f32, f32_to_f16};
use std::ops::Range;

/// Columns of a block; a column count is a multiple of it.
pub const BLOCK: usize = 32;
/// Rows that are interleaved.
pub const TILE_ROWS: usize = 16;

/// How a byte holds an 8-bit weight; which one is wanted depends on the kernel. 4-bit weights are the same in both.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Two's complement.
    Signed,
    /// The weight plus 128, unsigned.
    Offset,
}

impl Layout {
    /// What a byte of a signed weight is XORed with to be in this layout.
    fn flip(self) -> u8 {
        match self {
            Layout::Signed => 0,
            Layout::Offset => 0x80,
        }
    }
}

/// The shape of a weight, `rows` outputs by `cols` inputs.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    rows: usize,
    cols: usize,
}

/// The largest block of any kind: 8 bits, affine, groups of 16, f32 scales.
const BLOCK_BYTES_MAX: usize = 768;

impl Shape {
    /// `None` unless both are positive, `cols` is a multiple of 32 and the packed size of every kind fits `isize`.
    pub fn new(rows: usize, cols: usize) -> Option<Self> {
        if rows == 0 || cols == 0 || !cols.is_multiple_of(BLOCK) {
            return None;
        }
        let bytes = (cols / BLOCK)
            .checked_mul(BLOCK_BYTES_MAX)?
            .checked_mul(rows.div_ceil(TILE_ROWS))?;
        isize::try_from(bytes).ok()?;
        Some(Self { rows, cols })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Blocks along a row.
    pub fn blocks(&self) -> usize {
        self.cols / BLOCK
    }

    /// Tiles of 16 rows, the last one possibly in part.
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Bytes of one tile.
    pub fn tile_bytes(&self, kind: Kind) -> usize {
        self.blocks() * kind.block_bytes()
    }

    /// Bytes of the whole weight.
    pub fn bytes(&self, kind: Kind) -> usize {
        self.tiles() * self.tile_bytes(kind)
    }
}

/// A packed weight in memory that somebody else owns (a mapped file, mostly).
#[derive(Copy, Clone)]
pub struct Packed<'a> {
    kind: Kind,
    shape: Shape,
    layout: Layout,
    bytes: &'a [u8],
}

impl<'a> Packed<'a> {
    /// `None` unless `bytes` has exactly `shape.bytes(kind)` bytes. No alignment is asked for; 64 is fastest.
    pub fn new(kind: Kind, shape: Shape, layout: Layout, bytes: &'a [u8]) -> Option<Self> {
        (bytes.len() == shape.bytes(kind)).then_some(Self {
            kind,
            shape,
            layout,
            bytes,
        })
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The bytes of one tile.
    pub(crate) fn tile(&self, tile: usize) -> &'a [u8] {
        self.tiles(tile..tile + 1)
    }

    /// The bytes of several; none if the range ends before it starts.
    pub(crate) fn tiles(&self, tiles: Range<usize>) -> &'a [u8] {
        let bytes = self.shape.tile_bytes(self.kind);
        &self.bytes[tiles.start * bytes..tiles.end.max(tiles.start) * bytes]
    }

    /// One block of one tile, to be read number by number.
    pub(crate) fn block(&self, tile: usize, block: usize) -> BlockView<'a> {
        let bytes = self.kind.block_bytes();
        BlockView {
            kind: self.kind,
            flip: self.layout.flip(),
            bytes: &self.tile(tile)[block * bytes..][..bytes],
        }
    }
}

/// Reads the numbers of one block one by one: slow, and what the layout means.
#[derive(Copy, Clone)]
pub(crate) struct BlockView<'a> {
    kind: Kind,
    flip: u8,
    bytes: &'a [u8],
}

impl BlockView<'_> {
    pub(crate) fn scale(&self, row: usize, group: usize) -> f32 {
        self.number(group * TILE_ROWS + row)
    }

    /// Zero in kinds without one.
    pub(crate) fn minimum(&self, row: usize, group: usize) -> f32 {
        if !self.kind.is_affine() {
            return 0.0;
        }
        self.number((self.kind.groups() + group) * TILE_ROWS + row)
    }

    fn number(&self, index: usize) -> f32 {
        match self.kind.scales() {
            Scales::F16 => f16_to_f32(u16::from_le_bytes(self.bytes.as_chunks().0[index])),
            Scales::F32 => f32::from_le_bytes(self.bytes.as_chunks().0[index]),
        }
    }

    /// The weight of column `k` (0 to 31) as an integer.
    pub(crate) fn weight(&self, row: usize, k: usize) -> i8 {
        let weights = &self.bytes[self.kind.head_bytes()..];
        match self.kind.bits() {
            Bits::Eight => (weights[place(row, k)] ^ self.flip).cast_signed(),
            Bits::Four => (weights[place(row, k % 16)] >> (k / 16 * 4) & 15).cast_signed(),
        }
    }
}

/// Where row and column lie among interleaved bytes.
fn place(row: usize, k: usize) -> usize {
    k / 4 * 64 + row * 4 + k % 4
}

/// Packs one tile. `rows` (1 to 16) of it are real, the others become zeros. `weight(row, k)`, `scale(row, group)` and,
/// for affine kinds, `minimum(row, group)` are asked for rows of this tile. 8-bit weights may use all of i8,
/// 4-bit ones lie in 0 to 15. Kinds with f16 scales round to nearest what f16 can't hold: the caller
/// picks the kind.
///
/// # Panics
/// If `cols` is not a multiple of 32, `rows` is above 16, `out` is not one tile long or a 4-bit weight is above 15.
#[allow(clippy::too_many_arguments)] // three sources of numbers and a place
pub fn pack_tile(
    kind: Kind,
    layout: Layout,
    cols: usize,
    rows: usize,
    weight: impl Fn(usize, usize) -> i8,
    scale: impl Fn(usize, usize) -> f32,
    minimum: impl Fn(usize, usize) -> f32,
    out: &mut [u8],
) {
    assert!(
        cols.is_multiple_of(BLOCK) && rows <= TILE_ROWS,
        "{rows} rows of {cols} are not a tile"
    );
    assert_eq!(
        out.len(),
        cols / BLOCK * kind.block_bytes(),
        "the output is not one tile long"
    );
    let blank = match kind.bits() {
        Bits::Eight => layout.flip(),
        Bits::Four => 0,
    };
    for (index, block) in out.chunks_exact_mut(kind.block_bytes()).enumerate() {
        let (head, weights) = block.split_at_mut(kind.head_bytes());
        head.fill(0);
        weights.fill(blank);
        let (scales, minimums) = head.split_at_mut(kind.scales_bytes());
        for row in 0..rows {
            for group in 0..kind.groups() {
                let (at, whole) = (group * TILE_ROWS + row, index * kind.groups() + group);
                put(kind, scales, at, scale(row, whole));
                if kind.is_affine() {
                    put(kind, minimums, at, minimum(row, whole));
                }
            }
            for k in 0..BLOCK {
                let value = weight(row, index * BLOCK + k);
                match kind.bits() {
                    Bits::Eight => weights[place(row, k)] = value.cast_unsigned() ^ layout.flip(),
                    Bits::Four => {
                        assert!((0..16).contains(&value), "{value} has more than 4 bits");
                        weights[place(row, k % 16)] |= value.cast_unsigned() << (k / 16 * 4);
                    }
                }
            }
        }
    }
}

fn put(kind: Kind, numbers: &mut [u8], at: usize, value: f32) {
    match kind.scales() {
        Scales::F16 => numbers.as_chunks_mut().0[at] = f32_to_f16(value).to_le_bytes(),
        Scales::F32 => numbers.as_chunks_mut().0[at] = value.to_le_bytes(),
    }
}

/// Turns whole blocks from one layout into another, in place.
///
/// # Panics
/// If `bytes` is not a whole number of blocks long.
pub fn repack(kind: Kind, bytes: &mut [u8], from: Layout, to: Layout) {
    let over = bytes.len() % kind.block_bytes();
    assert_eq!(over, 0, "{over} bytes are left over after the last block");
    let flip = from.flip() ^ to.flip();
    if kind.bits() == Bits::Four || flip == 0 {
        return;
    }
    for block in bytes.chunks_exact_mut(kind.block_bytes()) {
        for byte in &mut block[kind.head_bytes()..] {
            *byte ^= flip;
        }
    }
}

/// Writes row `row` as f32 to `out` `[cols]`: weight times scale, plus the minimum. This is the embedding's lookup.
///
/// # Panics
/// If there is no such row or `out` is not `cols` long.
pub fn dequantise_row(packed: Packed, row: usize, out: &mut [f32]) {
    let shape = packed.shape;
    assert!(row < shape.rows, "row {row} of {}", shape.rows);
    assert_eq!(out.len(), shape.cols, "the output is not one row long");
    let (tile, row) = (row / TILE_ROWS, row % TILE_ROWS);
    for (index, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
        let block = packed.block(tile, index);
        let size = packed.kind.group();
        for (group, out) in out.chunks_exact_mut(size).enumerate() {
            let (scale, minimum) = (block.scale(row, group), block.minimum(row, group));
            for (k, out) in out.iter_mut().enumerate() {
                let product = f32::from(block.weight(row, group * size + k)) * scale;
                // Only where there is one: −0 + 0 would lose the sign.
                *out = if packed.kind.is_affine() {
                    product + minimum
                } else {
                    product
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_checked() {
        assert!(
            Shape::new(0, 32).is_none()
                && Shape::new(1, 0).is_none()
                && Shape::new(1, 33).is_none()
        );
        assert!(Shape::new(usize::MAX, 1 << (usize::BITS - 24)).is_none());
        assert!(Kind::all().all(|kind| kind.block_bytes() <= BLOCK_BYTES_MAX));
        let shape = Shape::new(17, 64).unwrap();
        assert_eq!(
            (
                shape.tiles(),
                shape.tile_bytes(Kind::I8),
                shape.bytes(Kind::I8)
            ),
            (2, 1088, 2176)
        );
        assert!(Packed::new(Kind::I8, shape, Layout::Signed, &[0; 2175]).is_none());
        assert!(Packed::new(Kind::Q4, shape, Layout::Signed, &[0; 2176]).is_none());
    }

    #[test]
    fn rows_come_back_from_every_kind_and_layout() {
        let shape = Shape::new(19, 96).unwrap();
        for kind in Kind::all() {
            let weight = |row: usize, k: usize| {
                let byte = ((row * 37 + k * 11) % 256) as u8;
                match kind.bits() {
                    Bits::Eight => byte as i8,
                    Bits::Four => (byte & 15) as i8,
                }
            };
            // Exact in f16.
            let scale =
                |row: usize, group: usize| [1.0, 0.5, 0.25][group % 3] * (1 + row % 2) as f32;
            let minimum = |row: usize, group: usize| (row + 3 * group) as f32 - 8.0;
            let mut bytes = vec![0; shape.bytes(kind)];
            let size = shape.tile_bytes(kind);
            for (tile, out) in bytes.chunks_exact_mut(size).enumerate() {
                let (first, rows) = (tile * 16, (shape.rows() - tile * 16).min(16));
                pack_tile(
                    kind,
                    Layout::Signed,
                    96,
                    rows,
                    |row, k| weight(first + row, k),
                    |row, group| scale(first + row, group),
                    |row, group| minimum(first + row, group),
                    out,
                );
            }
            let check = |layout, bytes: &[u8]| {
                let packed = Packed::new(kind, shape, layout, bytes).unwrap();
                for row in 0..shape.rows() {
                    let mut out = [0.0; 96];
                    dequantise_row(packed, row, &mut out);
                    for (k, got) in out.iter().enumerate() {
                        let group = k / kind.group();
                        let floor = if kind.is_affine() {
                            minimum(row, group)
                        } else {
                            0.0
                        };
                        let want = f32::from(weight(row, k)) * scale(row, group) + floor;
                        assert_eq!(*got, want, "{kind:?} row {row} column {k}");
                    }
                }
            };
            check(Layout::Signed, &bytes);
            let signed = bytes.clone();
            repack(kind, &mut bytes, Layout::Signed, Layout::Offset);
            assert_eq!(bytes != signed, kind.bits() == Bits::Eight);
            check(Layout::Offset, &bytes);
            repack(kind, &mut bytes, Layout::Offset, Layout::Signed);
            assert_eq!(bytes, signed);
        }
    }
}
