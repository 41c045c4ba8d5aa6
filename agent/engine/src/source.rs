//! A weight's numbers as its initializers hold them, whatever form they have there, and the packed kind that carries
//! them. Knows nothing of tiles or files.

use crate::onnx::Graph;
use crate::pack::PackError;
use crate::recipe::{Form, Order, WeightSource, ZeroPoints};
use half::f16;
use millwright_kernels::packed::{BLOCK, Group, Kind, Scales};
use std::borrow::Cow;
use std::ops::Range;
use tract_onnx::pb::tensor_proto::DataType;

/// One weight, `[rows, cols]`, in the bytes of the graph's files.
pub(crate) struct Source<'a> {
    of: &'a WeightSource,
    values: Cow<'a, [u8]>,
    scales: Floats<'a>,
    zeros: Zeros<'a>,
}

/// What a group's weights are counted from.
enum Zeros<'a> {
    /// The same for all groups.
    Same(f64),
    /// Four bits a group, the first in the byte's low half; rows begin on whole bytes.
    Packed(Cow<'a, [u8]>),
    Floats(Floats<'a>),
}

/// f32 or f16 numbers as bytes.
struct Floats<'a> {
    bytes: Cow<'a, [u8]>,
    half: bool,
}

impl Floats<'_> {
    fn at(&self, index: usize) -> f32 {
        if self.half {
            f16::from_le_bytes(self.bytes.as_chunks().0[index]).to_f32()
        } else {
            f32::from_le_bytes(self.bytes.as_chunks().0[index])
        }
    }
}

impl<'a> Source<'a> {
    /// Finds the initializers. Lowering has checked their types and shapes.
    pub(crate) fn open(graph: &'a Graph, of: &'a WeightSource) -> Result<Self, PackError> {
        let tensor = |name: &str| {
            graph.initializer(name).ok_or_else(|| PackError::Weight {
                name: name.to_owned(),
                reason: "it is missing".into(),
            })
        };
        let floats = |name: &str| -> Result<Floats<'a>, PackError> {
            let tensor = tensor(name)?;
            Ok(Floats {
                half: tensor.data_type() == DataType::Float16,
                bytes: graph.bytes(tensor)?,
            })
        };
        let zeros = match &of.form {
            Form::Eight(_) => Zeros::Same(0.0),
            Form::Four { zero_points, .. } => match zero_points {
                ZeroPoints::Absent => Zeros::Same(8.0),
                ZeroPoints::Packed(name) => Zeros::Packed(graph.bytes(tensor(name)?)?),
                ZeroPoints::Floats(name) => Zeros::Floats(floats(name)?),
            },
        };
        Ok(Self {
            of,
            values: graph.bytes(tensor(&of.values)?)?,
            scales: floats(&of.scales)?,
            zeros,
        })
    }

    /// The kind that carries every scale and minimum: f16 where they are exact in it, f32 where one isn't. Reads
    /// them all.
    pub(crate) fn kind(&self) -> Result<Kind, PackError> {
        let mut scales = Scales::F16;
        for row in 0..self.of.rows {
            for group in 0..self.of.cols / self.group() {
                let (scale, minimum) = (self.scale(row, group), self.minimum(row, group));
                if !scale.is_finite() || !minimum.is_finite() {
                    return Err(PackError::Weight {
                        name: self.of.scales.clone(),
                        reason: format!(
                            "row {row}, group {group} has the scale {scale} and the minimum {minimum}"
                        ),
                    });
                }
                if !is_f16(scale) || !is_f16(minimum) {
                    scales = Scales::F32;
                }
            }
        }
        Ok(kind_of(self.of, scales))
    }

    /// Columns that share a scale once packed: 16 or 32.
    fn group(&self) -> usize {
        kind_of(self.of, Scales::F16).group()
    }

    /// The scale of a packed group; coarser groups of the file are several equal ones.
    pub(crate) fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales.at(self.index(row, group))
    }

    /// What a weight of zero stands for, −zero point · scale, in f16 where f32 arithmetic couldn't tell the
    /// difference: a zero point that was made as −minimum / scale gives back that very minimum (the quotient's
    /// rounding moves the product by 2⁻²⁴ of it, and the nearest f16 boundary is 2⁻¹² away).
    pub(crate) fn minimum(&self, row: usize, group: usize) -> f32 {
        let index = self.index(row, group);
        let zero = match &self.zeros {
            Zeros::Same(zero) => *zero,
            Zeros::Floats(floats) => f64::from(floats.at(index)),
            Zeros::Packed(bytes) => {
                let groups = self.file_groups();
                let (row, group) = (index / groups, index % groups);
                let byte = bytes[row * groups.div_ceil(2) + group / 2];
                f64::from(byte >> (4 * (group % 2)) & 15)
            }
        };
        let minimum = -zero * f64::from(self.scales.at(index));
        let half = f16::from_f64(minimum).to_f64();
        let close = (half - minimum).abs() <= minimum.abs() * f64::from(f32::EPSILON);
        if close { half as f32 } else { minimum as f32 }
    }

    /// Where the file keeps a packed group's scale.
    fn index(&self, row: usize, group: usize) -> usize {
        match self.of.form {
            Form::Eight(Order::ColumnMajor) => group * self.of.rows + row,
            Form::Eight(Order::RowMajor) => row * (self.of.cols / BLOCK) + group,
            Form::Four { block, .. } => row * self.file_groups() + group * self.group() / block,
        }
    }

    /// Groups in a row of the file.
    fn file_groups(&self) -> usize {
        self.of.cols.div_ceil(self.of.form.block())
    }

    /// Writes rows of weights to `out` `[rows][cols]`.
    pub(crate) fn rows(&self, rows: Range<usize>, out: &mut Vec<i8>) {
        let (all, cols) = (self.of.rows, self.of.cols);
        out.clear();
        match self.of.form {
            Form::Eight(Order::RowMajor) => {
                let values = &self.values[rows.start * cols..rows.end * cols];
                out.extend(values.iter().map(|value| value.cast_signed()));
            }
            Form::Eight(Order::ColumnMajor) => {
                out.resize(rows.len() * cols, 0);
                for col in 0..cols {
                    let values = &self.values[col * all..][rows.clone()];
                    for (row, value) in values.iter().enumerate() {
                        out[row * cols + col] = value.cast_signed();
                    }
                }
            }
            Form::Four { block, .. } => {
                let stride = self.file_groups() * block / 2;
                for row in rows {
                    let pairs = &self.values[row * stride..][..cols / 2];
                    let pairs = pairs.iter().map(|pair| pair.cast_signed());
                    out.extend(pairs.flat_map(|pair| [pair & 15, pair >> 4 & 15]));
                }
            }
        }
    }
}

fn is_f16(value: f32) -> bool {
    f16::from_f32(value).to_f32().to_bits() == value.to_bits()
}

/// The kind of this form, whose scales are stored so.
pub(crate) fn kind_of(of: &WeightSource, scales: Scales) -> Kind {
    match of.form {
        Form::Eight(_) => Kind::eight(false, Group::ThirtyTwo, scales),
        Form::Four { block: 16, .. } => Kind::four(Group::Sixteen, scales),
        Form::Four { .. } => Kind::four(Group::ThirtyTwo, scales),
    }
}
