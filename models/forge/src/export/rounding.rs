//! Quantises as the exporters' tools do, plainly, by the least and greatest value of a group. Rows are `[outputs,
//! inputs]`; a group lies within a row, is a row, or is everything. Our own precision is `quant`'s.

use super::form::{NBits, Zeros};

/// Weights that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    Everything,
    Row,
    /// This many of a row's.
    Part(usize),
}

impl Group {
    /// How many scales a row of this length has, if it has any of its own.
    pub(super) fn per_row(self, columns: usize) -> Option<usize> {
        match self {
            Self::Everything => None,
            Self::Row => Some(1),
            Self::Part(n) => Some(columns.div_ceil(n)),
        }
    }
}

/// Integers and what turns them back: `value = (weight − zero) · scale`.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Rounded {
    /// As bytes, whatever their sign.
    pub(super) weights: Vec<u8>,
    /// One for each group.
    pub(super) scales: Vec<f32>,
    pub(super) zeros: Vec<i32>,
}

/// int8 within ±127 and no zero point, or uint8 with one, as ONNX Runtime's quantiser takes its scales.
pub(super) fn eight(values: &[f32], columns: usize, group: Group, unsigned: bool) -> Rounded {
    let mut out = Rounded::default();
    for values in groups(values, columns, group) {
        let (least, greatest) = range(values);
        let (scale, zero) = if unsigned {
            let scale = narrow((f64::from(greatest) - f64::from(least)) / 255.0);
            (scale, (-least / scale).round_ties_even())
        } else {
            let largest = greatest.max(-least);
            (narrow(f64::from(largest) / 127.0), 0.0)
        };
        let round = |v: &f32| {
            let level = (v / scale).round_ties_even() + zero;
            if unsigned {
                level.clamp(0.0, 255.0) as u8
            } else {
                (level.clamp(-127.0, 127.0) as i8).cast_unsigned()
            }
        };
        out.weights.extend(values.iter().map(round));
        out.scales.push(scale);
        out.zeros.push(zero as i32);
    }
    out
}

/// Blocks of 4 or 8 bits, as `MatMulNBits` has them.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Blocks {
    /// `[rows, blocks, block · bits / 8]`: in four bits the first of two is in the low half.
    pub(super) weights: Vec<u8>,
    /// `[rows, blocks]`
    pub(super) scales: Vec<f32>,
    /// `[rows, blocks]`, as numbers.
    pub(super) zeros: Vec<f32>,
    /// `[rows, blocks · bits / 8]`, rounded up: the same as integers.
    pub(super) packed: Vec<u8>,
}

/// Quantises by the rule of the operator's own tool: without zero points the number of largest magnitude becomes the least
/// integer, with them least and greatest value are met.
pub(super) fn blocks(values: &[f32], columns: usize, form: NBits) -> Blocks {
    let mut out = Blocks::default();
    for row in values.chunks(columns) {
        let first = out.zeros.len();
        for block in row.chunks(form.block) {
            let (mut weights, scale, zero) = one_block(block, form);
            // The integer, not the number: what is beyond a row is never read.
            weights.resize(form.block, 0);
            out.weights.extend(pack(&weights, form.bits));
            out.scales.push(scale);
            out.zeros.push(zero);
        }
        let zeros: Vec<u8> = out.zeros[first..].iter().map(|zero| *zero as u8).collect();
        out.packed.extend(pack(&zeros, form.bits));
    }
    out
}

fn one_block(values: &[f32], form: NBits) -> (Vec<u8>, f32, f32) {
    let top = (1 << form.bits) as f32 - 1.0;
    let middle = (1 << (form.bits - 1)) as f32;
    let (least, greatest) = range(values);
    let (scale, zero) = if form.zeros == Zeros::Absent {
        let farthest = if greatest > -least { greatest } else { least };
        (farthest / -middle, middle)
    } else {
        let scale = (greatest - least) / top;
        let zero = if scale > 0.0 { -least / scale } else { 0.0 };
        let whole = zero.round().clamp(0.0, top);
        (
            scale,
            if form.zeros == Zeros::Packed {
                whole
            } else {
                zero
            },
        )
    };
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let round = |v: &f32| (v * inverse + zero).round().clamp(0.0, top) as u8;
    (values.iter().map(round).collect(), scale, zero)
}

/// What fills the byte of a row's last zero point, if it has that for itself.
const ODD: u8 = 8;

fn pack(values: &[u8], bits: usize) -> Vec<u8> {
    if bits == 8 {
        return values.to_vec();
    }
    let pair = |pair: &[u8]| pair[0] | pair.get(1).copied().unwrap_or(ODD) << 4;
    values.chunks(2).map(pair).collect()
}

fn groups(values: &[f32], columns: usize, group: Group) -> impl Iterator<Item = &[f32]> {
    let (row, part) = match group {
        Group::Everything => (values.len(), values.len()),
        Group::Row => (columns, columns),
        Group::Part(part) => (columns, part),
    };
    values.chunks(row).flat_map(move |row| row.chunks(part))
}

/// Least and greatest, zero among them.
fn range(values: &[f32]) -> (f32, f32) {
    let wider = |(least, greatest): (f32, f32), v: &f32| (least.min(*v), greatest.max(*v));
    values.iter().fold((0.0, 0.0), wider)
}

fn narrow(scale: f64) -> f32 {
    if scale < f64::from(f32::MIN_POSITIVE) {
        1.0
    } else {
        scale as f32
    }
}

/// `[rows, columns]` as `[columns, rows]`.
pub(super) fn transposed<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    let rows = values.len() / columns;
    let mut out = Vec::with_capacity(values.len());
    for column in 0..columns {
        out.extend((0..rows).map(|row| values[row * columns + column]));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORM: NBits = NBits {
        bits: 4,
        block: 4,
        zeros: Zeros::Packed,
        flat: false,
        bias_inside: false,
        accuracy: 0,
    };

    #[test]
    fn groups_are_everything_a_row_or_a_part_of_one() {
        let values = [1.0, -2.0, 4.0, 0.5, 127.0, 0.0];
        let scales = |group| eight(&values, 3, group, false).scales;
        assert_eq!(scales(Group::Everything), [1.0]);
        assert_eq!(scales(Group::Row), [4.0 / 127.0, 1.0]);
        assert_eq!(scales(Group::Part(2)).len(), 4);
    }

    #[test]
    fn unsigned_bytes_reach_from_least_to_greatest() {
        let rounded = eight(&[-1.0, 0.0, 1.55, 0.0], 4, Group::Row, true);
        assert_eq!(rounded.zeros, [100]);
        assert_eq!(rounded.weights, [0, 100, 255, 100]);
        // Where all are positive zero is still met.
        assert_eq!(eight(&[5.1], 1, Group::Row, true).zeros, [0]);
    }

    #[test]
    fn a_last_block_is_filled_with_integers_zero_and_zero_points_of_a_row_are_packed() {
        let values = [0.0, 15.0, 7.0, 1.0, -5.0, 10.0];
        let rounded = blocks(&values, 6, FORM);
        assert_eq!(rounded.scales, [1.0, 1.0]);
        assert_eq!(rounded.weights, [0xF0, 0x17, 0xF0, 0x00]);
        assert_eq!(rounded.packed, [0x50]);
        let absent = blocks(
            &values,
            6,
            NBits {
                zeros: Zeros::Absent,
                ..FORM
            },
        );
        assert_eq!(absent.scales, [-15.0 / 8.0, -10.0 / 8.0]);
        assert_eq!(absent.weights[0], 0x08);
    }

    #[test]
    fn transposing_swaps_rows_and_columns() {
        assert_eq!(transposed(&[1, 2, 3, 4, 5, 6], 3), [1, 4, 2, 5, 3, 6]);
    }
}
