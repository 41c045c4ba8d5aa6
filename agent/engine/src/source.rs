//! A weight's numbers as its initializers hold them, whatever form they have there, and the packed kind that carries
//! them. Knows nothing of tiles or files.

use crate::onnx::{Graph, Numbers};
use crate::pack::PackError;
use crate::quant;
use crate::recipe::{Form, Order, Scope, WeightSource};
use half::f16;
use millwright_kernels::packed::{BLOCK, Bits, Group, Kind, Scales};
use std::ops::Range;
use tract_onnx::pb::tensor_proto::DataType;

/// One weight, `[rows, cols]`, in the bytes of the graph's files.
pub(crate) struct Source<'a> {
    of: &'a WeightSource,
    values: Numbers<'a>,
    scales: Option<Numbers<'a>>,
    zeros: Zeros<'a>,
}

/// What a group's weights are counted from.
enum Zeros<'a> {
    /// The same for all groups.
    Same(f64),
    /// Four bits a group, the first in the byte's low half; rows begin on whole bytes.
    Pairs(Numbers<'a>),
    Each(Numbers<'a>),
}

/// Rows of a weight as they are packed: `[rows, cols]` integers, and for each group of 16 or 32 a scale and what an
/// integer of zero stands for.
#[derive(Default)]
pub(crate) struct Panel {
    pub(crate) weights: Vec<i8>,
    pub(crate) scales: Vec<f32>,
    pub(crate) minimums: Vec<f32>,
}

impl<'a> Source<'a> {
    /// Finds the initializers. Importing has checked their types and shapes.
    pub(crate) fn open(graph: &'a Graph, of: &'a WeightSource) -> Result<Self, PackError> {
        let numbers = |name: &str| {
            graph.numbers(name).ok_or_else(|| PackError::Weight {
                name: name.to_owned(),
                reason: "it is missing".into(),
            })
        };
        let scaling = of.form.scaling();
        let middle = match of.form {
            Form::Bits { bits, .. } => f64::from(1 << (bits - 1)),
            _ => 0.0,
        };
        let zeros = match scaling.and_then(|scaling| scaling.zero_points.as_deref()) {
            None => Zeros::Same(middle),
            Some(name) => match (numbers(name)?, &of.form) {
                (zeros, Form::Bits { bits: 4, .. }) if zeros.of() == DataType::Uint8 => {
                    Zeros::Pairs(zeros)
                }
                (zeros, _) => Zeros::Each(zeros),
            },
        };
        Ok(Self {
            of,
            values: numbers(&of.values)?,
            scales: scaling.map(|s| numbers(&s.scales)).transpose()?,
            zeros,
        })
    }

    /// Inputs.
    pub(crate) fn cols(&self) -> usize {
        self.of.cols
    }

    /// The kind that carries every scale and minimum: f16 where they are exact in it, f32 where one isn't; without
    /// minimums where there are none. Reads them all.
    pub(crate) fn kind(&self) -> Result<Kind, PackError> {
        let (bits, group) = match self.of.form {
            Form::Floats(_) => return self.quantisable().map(|()| Kind::I8),
            _ if self.is_four() => (Bits::Four, self.group()),
            _ => (Bits::Eight, self.group()),
        };
        let (rows, groups) = match self.scope() {
            Scope::Matrix => (1, 1),
            Scope::Row => (self.of.rows, 1),
            Scope::Block(_) => (self.of.rows, self.of.cols / group),
        };
        let (mut scales, mut affine) = (Scales::F16, false);
        for (row, at) in (0..rows).flat_map(|row| (0..groups).map(move |at| (row, at))) {
            let (scale, minimum) = self.scaling(row, at);
            if !scale.is_finite() || !minimum.is_finite() {
                return Err(self.wrong(format!(
                    "row {row}, group {at} has the scale {scale} and the minimum {minimum}"
                )));
            }
            affine |= minimum != 0.0;
            if !is_f16(scale) || !is_f16(minimum) {
                scales = Scales::F32;
            }
        }
        let group = if group == 16 {
            Group::Sixteen
        } else {
            Group::ThirtyTwo
        };
        Ok(match bits {
            Bits::Four => Kind::four(group, scales),
            Bits::Eight => Kind::eight(affine, group, scales),
        })
    }

    /// Whether every number can be written as int8 with an f16 scale.
    fn quantisable(&self) -> Result<(), PackError> {
        let mut beyond = None;
        self.each(0..self.of.rows, |_, index| {
            let value = self.values.at(index);
            if value.is_nan() || value.abs() > quant::VALUE_MAX {
                beyond = Some(value);
            }
        });
        let reason = |value| format!("it holds {value}, which can't be quantised");
        beyond.map_or(Ok(()), |value| Err(self.wrong(reason(value))))
    }

    fn wrong(&self, reason: String) -> PackError {
        PackError::Weight {
            name: self.of.values.clone(),
            reason,
        }
    }

    fn scope(&self) -> Scope {
        self.of
            .form
            .scaling()
            .map_or(Scope::Block(BLOCK), |scaling| scaling.scope)
    }

    /// Columns that share a scale once packed: 16 or 32.
    fn group(&self) -> usize {
        match self.scope() {
            Scope::Block(block) if !block.is_multiple_of(BLOCK) => 16,
            _ => BLOCK,
        }
    }

    /// The scale of a packed group, and what an integer of zero stands for; coarser groups of the file are several
    /// equal ones.
    fn scaling(&self, row: usize, group: usize) -> (f32, f32) {
        let Some(scales) = &self.scales else {
            return (0.0, 0.0);
        };
        let index = self.index(row, group);
        let zero = match &self.zeros {
            Zeros::Same(zero) => *zero,
            Zeros::Each(numbers) => f64::from(numbers.at(index)),
            Zeros::Pairs(numbers) => {
                let groups = self.file_groups();
                let (row, group) = (index / groups, index % groups);
                let byte = numbers.bytes()[row * groups.div_ceil(2) + group / 2];
                f64::from(byte >> (4 * (group % 2)) & 15)
            }
        };
        let scale = scales.at(index);
        (scale, minimum((self.shift() - zero) * f64::from(scale)))
    }

    /// What is taken from a stored integer to make it a packed one.
    fn shift(&self) -> f64 {
        match (&self.of.form, self.values.of()) {
            (Form::Bits { bits: 8, .. }, _) | (Form::Whole { .. }, DataType::Uint8) => 128.0,
            (Form::Whole { .. }, DataType::Int4) => -8.0,
            _ => 0.0,
        }
    }

    /// Whether two weights share a byte.
    fn is_four(&self) -> bool {
        matches!(self.of.form, Form::Bits { bits: 4, .. })
            || matches!(self.values.of(), DataType::Int4 | DataType::Uint4)
    }

    /// Where the file keeps a packed group's scale.
    fn index(&self, row: usize, group: usize) -> usize {
        let row = self.of.first + row;
        match (self.scope(), &self.of.form) {
            (Scope::Matrix, _) => 0,
            (Scope::Row, _) => row,
            (Scope::Block(block), form) => {
                let group = group * self.group() / block;
                match form {
                    Form::Whole {
                        order: Order::ColumnMajor,
                        ..
                    } => group * self.of.stored + row,
                    _ => row * self.file_groups() + group,
                }
            }
        }
    }

    /// Groups in a row of the file.
    fn file_groups(&self) -> usize {
        match self.scope() {
            Scope::Block(block) => self.of.cols.div_ceil(block),
            Scope::Matrix | Scope::Row => 1,
        }
    }

    /// Reads rows as they are packed.
    pub(crate) fn panel(&self, rows: Range<usize>, out: &mut Panel) {
        let cols = self.of.cols;
        if let Form::Floats(_) = self.of.form {
            let mut values = vec![0.0; rows.len() * cols];
            self.each(rows, |at, index| values[at] = self.values.at(index));
            (out.weights, out.scales) = quant::eight(&values);
            out.minimums.clear();
            out.minimums.resize(out.scales.len(), 0.0);
            return;
        }
        let groups = cols / self.group();
        out.scales.clear();
        out.minimums.clear();
        for row in rows.clone() {
            for group in 0..groups {
                let (scale, minimum) = self.scaling(row, group);
                out.scales.push(scale);
                out.minimums.push(minimum);
            }
        }
        out.weights.clear();
        out.weights.resize(rows.len() * cols, 0);
        let (weights, bytes) = (&mut out.weights, self.values.bytes());
        // In two's complement, taking or adding half of the range turns the first bit.
        let turned = self.shift() != 0.0;
        if self.is_four() {
            let flip = if turned { 8 } else { 0 };
            self.each(rows, |at, index| {
                let weight = bytes[index / 2] >> (4 * (index % 2)) & 15;
                weights[at] = (weight ^ flip).cast_signed();
            });
        } else {
            let flip = if turned { 0x80 } else { 0 };
            self.each(rows, |at, index| {
                weights[at] = (bytes[index] ^ flip).cast_signed();
            });
        }
    }

    /// Rows as numbers, as ONNX's operators define them.
    pub(crate) fn values(&self, rows: Range<usize>, out: &mut Vec<f32>) {
        out.clear();
        out.resize(rows.len() * self.of.cols, 0.0);
        if let Form::Floats(_) = self.of.form {
            self.each(rows, |at, index| out[at] = self.values.at(index));
            return;
        }
        let mut panel = Panel::default();
        self.panel(rows, &mut panel);
        let groups = panel
            .weights
            .chunks(self.group())
            .zip(out.chunks_mut(self.group()));
        let scaling = panel.scales.iter().zip(&panel.minimums);
        for ((weights, out), (&scale, &minimum)) in groups.zip(scaling) {
            for (weight, out) in weights.iter().zip(out) {
                *out = f32::from(*weight) * scale + minimum;
            }
        }
    }

    /// Calls `take` with each place in `[rows, cols]` and the number's place in the file. A column-major file is read
    /// along its own lines.
    fn each(&self, rows: Range<usize>, mut take: impl FnMut(usize, usize)) {
        let (cols, first) = (self.of.cols, self.of.first);
        match &self.of.form {
            Form::Floats(Order::ColumnMajor)
            | Form::Whole {
                order: Order::ColumnMajor,
                ..
            } => {
                for col in 0..cols {
                    for (at, row) in rows.clone().enumerate() {
                        take(at * cols + col, col * self.of.stored + first + row);
                    }
                }
            }
            form => {
                let stride = match (form, self.scope()) {
                    (Form::Bits { .. }, Scope::Block(block)) => self.file_groups() * block,
                    _ => cols,
                };
                for (at, row) in rows.enumerate() {
                    for col in 0..cols {
                        take(at * cols + col, (first + row) * stride + col);
                    }
                }
            }
        }
    }
}

/// A minimum as it is stored: in f16 where f32 arithmetic couldn't tell the difference. A zero point that was made as
/// −minimum / scale gives back that very minimum (the quotient's rounding moves the product by 2⁻²⁴ of it, and the
/// nearest f16 boundary is 2⁻¹² away).
fn minimum(exact: f64) -> f32 {
    let half = f16::from_f64(exact).to_f64();
    let close = (half - exact).abs() <= exact.abs() * f64::from(f32::EPSILON);
    if close { half as f32 } else { exact as f32 }
}

fn is_f16(value: f32) -> bool {
    f16::from_f32(value).to_f32().to_bits() == value.to_bits()
}
