//! Packed weights: the layout, and what can be done with it without knowing the CPU.
//! Not a file format (the engine has a header for that) and not arithmetic.
//!
//! A weight `[rows, cols]` is cut into tiles of 16 rows. A tile holds its blocks of 32 columns in ascending
//! order, a block holds 16 f16 scales (little endian, one per row) and then 512 weights as `[k4: 8][row: 16][4]`.
//! So a tile is one contiguous stream of `cols / 32 * 544` bytes; rows beyond the last are zeros.

/// Columns that share a scale.
pub const BLOCK: usize = 32;
/// Rows that are interleaved.
pub const TILE_ROWS: usize = 16;
/// Bytes of one block of one tile: the scales, then the weights.
pub const BLOCK_BYTES: usize = SCALE_BYTES + WEIGHT_BYTES;

pub(crate) const SCALE_BYTES: usize = 2 * TILE_ROWS;
pub(crate) const WEIGHT_BYTES: usize = BLOCK * TILE_ROWS;

/// How a packed weight's numbers are to be read. Closed: every kernel knows all of them.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Symmetric 8-bit integers, one f16 scale per row and block.
    I8,
}

/// How a byte holds a weight; which one is wanted depends on the kernel.
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

impl Shape {
    /// `None` unless both are positive, `cols` is a multiple of 32 and the packed size fits `usize`.
    pub fn new(rows: usize, cols: usize) -> Option<Self> {
        if rows == 0 || cols == 0 || !cols.is_multiple_of(BLOCK) {
            return None;
        }
        (cols / BLOCK)
            .checked_mul(BLOCK_BYTES)?
            .checked_mul(rows.div_ceil(TILE_ROWS))?;
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
    pub fn tile_bytes(&self) -> usize {
        self.blocks() * BLOCK_BYTES
    }

    /// Bytes of the whole weight.
    pub fn bytes(&self) -> usize {
        self.tiles() * self.tile_bytes()
    }
}

/// A packed weight in memory that somebody else owns (a mapped file, mostly).
#[derive(Copy, Clone)]
pub struct Packed<'a> {
    shape: Shape,
    layout: Layout,
    bytes: &'a [u8],
}

impl<'a> Packed<'a> {
    /// `None` unless `bytes` has exactly `shape.bytes()` bytes. No alignment is asked for; 64 is fastest.
    pub fn new(shape: Shape, layout: Layout, bytes: &'a [u8]) -> Option<Self> {
        (bytes.len() == shape.bytes()).then_some(Self {
            shape,
            layout,
            bytes,
        })
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    pub fn kind(&self) -> Kind {
        Kind::I8
    }

    /// The blocks of one tile, `[blocks][544]`.
    pub(crate) fn tile(&self, tile: usize) -> &'a [[u8; BLOCK_BYTES]] {
        let bytes = self.shape.tile_bytes();
        self.bytes[tile * bytes..][..bytes].as_chunks().0
    }
}

/// Packs one tile. `rows` (1 to 16) of it are real, the others become zeros. `weight(row, k)` and
/// `scale(row, block)` (f16 bits) are asked for rows of this tile; weights may use all of i8.
///
/// # Panics
/// If `cols` is not a multiple of 32, `rows` is above 16, or `out` is not `cols / 32 * 544` bytes long.
pub fn pack_tile(
    layout: Layout,
    cols: usize,
    rows: usize,
    weight: impl Fn(usize, usize) -> i8,
    scale: impl Fn(usize, usize) -> u16,
    out: &mut [u8],
) {
    assert!(
        cols.is_multiple_of(BLOCK) && rows <= TILE_ROWS,
        "{rows} rows of {cols} are not a tile"
    );
    assert_eq!(
        out.len(),
        cols / BLOCK * BLOCK_BYTES,
        "the output is not one tile long"
    );
    for (index, block) in out.as_chunks_mut::<BLOCK_BYTES>().0.iter_mut().enumerate() {
        let (scales, weights) = block.split_at_mut(SCALE_BYTES);
        for (row, bytes) in scales.as_chunks_mut().0.iter_mut().enumerate() {
            let bits = if row < rows { scale(row, index) } else { 0 };
            *bytes = bits.to_le_bytes();
        }
        for (place, byte) in weights.iter_mut().enumerate() {
            let (k4, row, k) = (place / 64, place / 4 % TILE_ROWS, place % 4);
            let value = if row < rows {
                weight(row, index * BLOCK + k4 * 4 + k)
            } else {
                0
            };
            *byte = value.cast_unsigned() ^ layout.flip();
        }
    }
}

/// Turns whole blocks from one layout into another, in place.
///
/// # Panics
/// If `bytes` is not a multiple of 544 long.
pub fn repack(bytes: &mut [u8], from: Layout, to: Layout) {
    let flip = from.flip() ^ to.flip();
    let (blocks, rest) = bytes.as_chunks_mut::<BLOCK_BYTES>();
    assert!(
        rest.is_empty(),
        "{} bytes are left over after the last whole block",
        rest.len()
    );
    for block in blocks {
        for byte in &mut block[SCALE_BYTES..] {
            *byte ^= flip;
        }
    }
}

/// Writes row `row` as f32 to `out` `[cols]`: weight times scale. This is the embedding's lookup.
///
/// # Panics
/// If there is no such row or `out` is not `cols` long.
pub fn dequantise_row(packed: Packed, row: usize, out: &mut [f32]) {
    assert!(
        row < packed.shape.rows,
        "row {row} of {}",
        packed.shape.rows
    );
    assert_eq!(
        out.len(),
        packed.shape.cols,
        "the output is not one row long"
    );
    let flip = packed.layout.flip();
    let (tile, row) = (row / TILE_ROWS, row % TILE_ROWS);
    for (block, out) in packed.tile(tile).iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let scale =
            crate::math::f16_to_f32(u16::from_le_bytes([block[2 * row], block[2 * row + 1]]));
        for (k4, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let at = SCALE_BYTES + k4 * 64 + row * 4;
            for (byte, out) in block[at..at + 4].iter().zip(out) {
                *out = f32::from((byte ^ flip).cast_signed()) * scale;
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
        assert!(Shape::new(usize::MAX, 1 << 40).is_none());
        let shape = Shape::new(17, 64).unwrap();
        assert_eq!(
            (shape.tiles(), shape.tile_bytes(), shape.bytes()),
            (2, 1088, 2176)
        );
        assert!(Packed::new(shape, Layout::Signed, &[0; 2175]).is_none());
    }

    #[test]
    fn rows_come_back_from_every_layout() {
        let shape = Shape::new(19, 96).unwrap();
        let weight = |row: usize, k: usize| ((row * 37 + k * 11) % 256) as u8 as i8;
        let mut bytes = vec![0; shape.bytes()];
        for (tile, out) in bytes.chunks_exact_mut(shape.tile_bytes()).enumerate() {
            let rows = (shape.rows() - tile * 16).min(16);
            // 0x3800 is one half; 0x3c00 is one.
            let scale = |_: usize, block: usize| if block == 1 { 0x3800 } else { 0x3c00 };
            pack_tile(
                Layout::Signed,
                96,
                rows,
                |row, k| weight(tile * 16 + row, k),
                scale,
                out,
            );
        }
        let check = |layout, bytes: &[u8]| {
            let packed = Packed::new(shape, layout, bytes).unwrap();
            for row in 0..shape.rows() {
                let mut out = [0.0; 96];
                dequantise_row(packed, row, &mut out);
                for (k, got) in out.iter().enumerate() {
                    let factor = if k / 32 == 1 { 0.5 } else { 1.0 };
                    assert_eq!(*got, f32::from(weight(row, k)) * factor);
                }
            }
        };
        check(Layout::Signed, &bytes);
        let signed = bytes.clone();
        repack(&mut bytes, Layout::Signed, Layout::Offset);
        assert_ne!(bytes, signed);
        check(Layout::Offset, &bytes);
        repack(&mut bytes, Layout::Offset, Layout::Signed);
        assert_eq!(bytes, signed);
    }
}
