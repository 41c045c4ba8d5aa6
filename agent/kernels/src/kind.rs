//! How a packed weight's numbers are to be read, and what that means in bytes. Not where they lie (`packed`).

use crate::packed::{BLOCK, TILE_ROWS};

/// Bits of one weight.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Bits {
    /// Two's complement, −128 to 127.
    Eight,
    /// Unsigned, 0 to 15; always with a minimum.
    Four,
}

/// Columns that share a scale.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    Sixteen,
    ThirtyTwo,
}

/// How scales and minimums are stored.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Scales {
    F16,
    /// For models whose scales f16 can't hold exactly.
    F32,
}

/// The kind of a packed weight. A weight is `q · scale`, with `+ minimum` in affine kinds. The set is closed:
/// twelve kinds, every kernel knows all of them; coarser groups are stored as several equal ones.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kind {
    bits: Bits,
    affine: bool,
    group: Group,
    scales: Scales,
}

impl Kind {
    /// The native form: symmetric 8-bit integers, one f16 scale per 32.
    pub const I8: Self = Self::eight(false, Group::ThirtyTwo, Scales::F16);
    /// 4 bits with an f16 scale and minimum per 32, as in GGUF's Q4_1.
    pub const Q4: Self = Self::four(Group::ThirtyTwo, Scales::F16);

    pub const fn eight(affine: bool, group: Group, scales: Scales) -> Self {
        Self {
            bits: Bits::Eight,
            affine,
            group,
            scales,
        }
    }

    pub const fn four(group: Group, scales: Scales) -> Self {
        Self {
            bits: Bits::Four,
            affine: true,
            group,
            scales,
        }
    }

    /// All twelve.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..=u8::MAX).filter_map(Self::from_code)
    }

    /// One byte for a file: bit 0 four bits, bit 1 affine, bit 2 groups of 16, bit 3 f32 scales.
    pub fn code(self) -> u8 {
        u8::from(self.bits == Bits::Four)
            | u8::from(self.affine) << 1
            | u8::from(self.group == Group::Sixteen) << 2
            | u8::from(self.scales == Scales::F32) << 3
    }

    /// The kind that has this [`code`](Self::code).
    pub fn from_code(code: u8) -> Option<Self> {
        let group = [Group::ThirtyTwo, Group::Sixteen][usize::from(code >> 2 & 1)];
        let scales = [Scales::F16, Scales::F32][usize::from(code >> 3 & 1)];
        let kind = if code & 1 == 1 {
            Self::four(group, scales)
        } else {
            Self::eight(code >> 1 & 1 == 1, group, scales)
        };
        (kind.code() == code).then_some(kind)
    }

    pub fn bits(self) -> Bits {
        self.bits
    }

    pub fn is_affine(self) -> bool {
        self.affine
    }

    pub fn scales(self) -> Scales {
        self.scales
    }

    /// Columns that share a scale: 16 or 32.
    pub fn group(self) -> usize {
        BLOCK / self.groups()
    }

    /// Groups in a block: 1 or 2.
    pub(crate) fn groups(self) -> usize {
        match self.group {
            Group::ThirtyTwo => 1,
            Group::Sixteen => 2,
        }
    }

    /// Whether a product needs the sums of blocks or halves of activations, for minimums and for groups of 16.
    pub fn needs_sums(self) -> bool {
        self.affine || self.group == Group::Sixteen
    }

    /// Bytes of one scale.
    pub(crate) fn scale_bytes(self) -> usize {
        match self.scales {
            Scales::F16 => 2,
            Scales::F32 => 4,
        }
    }

    /// Bytes of the scales of one block of one tile; the minimums, if any, take as much.
    pub(crate) fn scales_bytes(self) -> usize {
        self.groups() * TILE_ROWS * self.scale_bytes()
    }

    /// Bytes in front of the weights of a block: the scales and the minimums.
    pub(crate) fn head_bytes(self) -> usize {
        self.scales_bytes() * (1 + usize::from(self.affine))
    }

    /// Bytes of the weights of one block.
    pub(crate) fn weight_bytes(self) -> usize {
        match self.bits {
            Bits::Eight => BLOCK * TILE_ROWS,
            Bits::Four => BLOCK * TILE_ROWS / 2,
        }
    }

    /// Bytes of one block of one tile.
    pub fn block_bytes(self) -> usize {
        self.head_bytes() + self.weight_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_kinds() {
        assert_eq!(Kind::all().count(), 12);
        for kind in Kind::all() {
            assert_eq!(Kind::from_code(kind.code()), Some(kind));
        }
        // Files hold these.
        assert_eq!((Kind::I8.code(), Kind::Q4.code()), (0, 3));
        assert_eq!((Kind::from_code(1), Kind::from_code(16)), (None, None));
    }

    #[test]
    fn sizes_are_as_documented() {
        assert_eq!((Kind::I8.block_bytes(), Kind::Q4.block_bytes()), (544, 320));
        let widest = Kind::eight(true, Group::Sixteen, Scales::F32);
        assert_eq!(widest.block_bytes(), 512 + 2 * 2 * 64);
    }
}
