//! Linears: a weight times an activation, in each of the ways in which exporters write it.

use super::decoder::Decoder;
use super::form::{Dequantised, Linears, NBits, Zeros};
use super::rounding::{Group, Rounded, blocks, eight, transposed};
use super::tape::Habit;
use crate::llama::Part;
use crate::onnx::int;
use anyhow::Result;
use tract_onnx::pb::tensor_proto::DataType;

/// Four- and eight-bit linears: <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>
const MATMUL_N_BITS: &str = "com.microsoft.MatMulNBits";

/// An activation that `DynamicQuantizeLinear` has made bytes of.
#[derive(Debug, Clone)]
pub(super) struct Quantised {
    bytes: String,
    scale: String,
    zero: String,
}

/// A stack of parts in a module of this name.
pub(super) struct Linear<'a> {
    pub(super) scope: &'a str,
    pub(super) parts: &'a [Part],
    /// The output's name, if it has one already.
    pub(super) out: Option<&'a str>,
}

impl Decoder<'_> {
    /// `x · Wᵀ`, and the bias if the model has one for it. Several parts are one linear whose outputs lie side by
    /// side.
    pub(super) fn linear(&mut self, scope: &str, x: &str, parts: &[Part]) -> Result<String> {
        let linear = Linear {
            scope,
            parts,
            out: None,
        };
        self.linear_as(self.form.linears, x, &linear)
    }

    pub(super) fn linear_as(
        &mut self,
        linears: Linears,
        x: &str,
        linear: &Linear<'_>,
    ) -> Result<String> {
        let Some(bias) = self.bias(linear)? else {
            return self.product(linears, x, linear, None);
        };
        if let Linears::NBits(form) = linears
            && form.bias_inside
        {
            return self.product(linears, x, linear, Some(&bias));
        }
        let alone = Linear {
            out: None,
            ..*linear
        };
        let product = self.product(linears, x, &alone, None)?;
        let last = self.tape.habit == Habit::Builder
            || matches!(linears, Linears::Dynamic { swapped: true, .. });
        let operands: [&str; 2] = if last {
            [&product, &bias]
        } else {
            [&bias, &product]
        };
        Ok(self.ending(linear, "Add", &operands))
    }

    /// The name of the bias, which is written unless it is there.
    fn bias(&mut self, linear: &Linear<'_>) -> Result<Option<String>> {
        let (model, parts) = (self.model, linear.parts);
        if !model.has_bias(parts, self.form.architecture) {
            return Ok(None);
        }
        let module = linear.scope.trim_start_matches('/').replace('/', ".");
        let operator = match self.tape.habit {
            Habit::Tracer => "",
            Habit::Builder => ".Add",
        };
        let name = format!("{module}{operator}.bias");
        let [rows, _] = self.sizes(parts);
        self.tape.weight(&name, &[rows], || model.bias(parts))?;
        Ok(Some(name))
    }

    fn product(
        &mut self,
        linears: Linears,
        x: &str,
        linear: &Linear<'_>,
        bias: Option<&str>,
    ) -> Result<String> {
        match linears {
            Linears::Plain => self.plain(x, linear),
            Linears::Dynamic {
                unsigned,
                channel,
                swapped,
            } => self.dynamic(x, linear, unsigned, channel, swapped),
            Linears::Dequantised(how) => self.dequantised(x, linear, how),
            Linears::NBits(form) => self.n_bits(x, linear, form, bias),
        }
    }

    /// The linear's last operator, which has the output's name if there is one.
    fn ending(&mut self, linear: &Linear<'_>, operator: &str, inputs: &[&str]) -> String {
        let Some(out) = linear.out else {
            return self.tape.op(linear.scope, operator, inputs);
        };
        self.tape
            .op_into(linear.scope, operator, inputs, vec![], &[out]);
        out.to_owned()
    }

    /// Outputs and inputs.
    fn sizes(&self, parts: &[Part]) -> [usize; 2] {
        let rows = parts.iter().map(|part| self.shape().of(*part)[0]).sum();
        [rows, self.shape().of(parts[0])[1]]
    }

    fn plain(&mut self, x: &str, linear: &Linear<'_>) -> Result<String> {
        let [rows, columns] = self.sizes(linear.parts);
        let weight = self.tape.nameless(linear.scope, "MatMul");
        let model = self.model;
        self.tape.weight(&weight, &[columns, rows], || {
            Ok(transposed(&model.stacked(linear.parts)?, columns))
        })?;
        Ok(self.ending(linear, "MatMul", &[x, &weight]))
    }

    fn dynamic(
        &mut self,
        x: &str,
        linear: &Linear<'_>,
        unsigned: bool,
        channel: bool,
        swapped: bool,
    ) -> Result<String> {
        let [rows, columns] = self.sizes(linear.parts);
        let weight = self.tape.nameless(linear.scope, "MatMul");
        let [q, scale, zero] =
            ["quantized", "scale", "zero_point"].map(|s| format!("{weight}_{s}"));
        let zero = if swapped { String::new() } else { zero };
        if !self.tape.onnx.has(&q) {
            let group = if channel {
                Group::Row
            } else {
                Group::Everything
            };
            let rounded = eight(&self.model.stacked(linear.parts)?, columns, group, unsigned);
            let bytes = transposed(&rounded.weights, columns);
            self.tape
                .bytes(&q, byte(unsigned), &[columns, rows], &bytes)?;
            let shape: &[usize] = if channel { &[rows] } else { &[] };
            self.small(&scale, &zero, shape, &rounded, unsigned);
        }
        let x = self.quantise(linear.scope, x);
        let mut inputs = vec![&*x.bytes, &*q, &*x.zero];
        if !swapped {
            inputs.push(&zero);
        }
        let tape = &mut self.tape;
        let product = tape.op(linear.scope, "MatMulInteger", &inputs);
        let product = tape.cast(linear.scope, &product, DataType::Float);
        let scales = if swapped {
            [&*scale, &*x.scale]
        } else {
            [&*x.scale, &*scale]
        };
        let scales = tape.op(linear.scope, "Mul", &scales);
        let operands = if swapped {
            [&*scales, &*product]
        } else {
            [&*product, &*scales]
        };
        Ok(self.ending(linear, "Mul", &operands))
    }

    /// The activation as bytes; once for all linears that read it.
    fn quantise(&mut self, scope: &str, x: &str) -> Quantised {
        if let Some(known) = self.quantised.get(x) {
            return known.clone();
        }
        let [bytes, scale, zero] = ["quantized", "scale", "zero_point"].map(|s| format!("{x}_{s}"));
        self.tape.op_into(
            scope,
            "DynamicQuantizeLinear",
            &[x],
            vec![],
            &[&bytes, &scale, &zero],
        );
        let known = Quantised { bytes, scale, zero };
        self.quantised.insert(x.to_owned(), known.clone());
        known
    }

    /// Scales and, unless that has no name, zero points, as lists.
    pub(super) fn small(
        &mut self,
        scale: &str,
        zero: &str,
        shape: &[usize],
        rounded: &Rounded,
        unsigned: bool,
    ) {
        self.tape.listed(scale, shape, &rounded.scales);
        if !zero.is_empty() {
            let kind = byte(unsigned);
            self.tape.listed_ints(zero, kind, shape, &rounded.zeros);
        }
    }

    fn dequantised(&mut self, x: &str, linear: &Linear<'_>, how: Dequantised) -> Result<String> {
        let [rows, columns] = self.sizes(linear.parts);
        let weight = self.tape.nameless(linear.scope, "MatMul");
        let [q, scale, zero] =
            ["quantized", "scale", "zero_point"].map(|s| format!("{weight}_{s}"));
        if !self.tape.onnx.has(&q) {
            let values = self.model.stacked(linear.parts)?;
            let (group, unsigned) = match how {
                Dequantised::Blocks(block) => (Group::Part(block), true),
                Dequantised::Channel | Dequantised::Transposed => (Group::Row, false),
            };
            let blocks = group.per_row(columns).unwrap_or(1);
            let rounded = eight(&values, columns, group, unsigned);
            let tape = &mut self.tape;
            match how {
                Dequantised::Transposed => {
                    tape.bytes(&q, DataType::Int8, &[rows, columns], &rounded.weights)?;
                    self.small(&scale, &zero, &[rows], &rounded, false);
                }
                Dequantised::Channel => {
                    let bytes = transposed(&rounded.weights, columns);
                    tape.bytes(&q, DataType::Int8, &[columns, rows], &bytes)?;
                    tape.numbers(&scale, &[rows], &rounded.scales)?;
                }
                Dequantised::Blocks(_) => {
                    let bytes = transposed(&rounded.weights, columns);
                    tape.bytes(&q, DataType::Uint8, &[columns, rows], &bytes)?;
                    let scales = transposed(&rounded.scales, blocks);
                    tape.numbers(&scale, &[blocks, rows], &scales)?;
                    let zeros: Vec<u8> = rounded.zeros.iter().map(|z| *z as u8).collect();
                    let zeros = transposed(&zeros, blocks);
                    tape.bytes(&zero, DataType::Uint8, &[blocks, rows], &zeros)?;
                }
            }
        }
        let tape = &mut self.tape;
        let (inputs, attributes) = match how {
            Dequantised::Channel => (vec![&*q, &*scale], vec![int("axis", 1)]),
            Dequantised::Transposed => (vec![&*q, &*scale, &*zero], vec![int("axis", 0)]),
            Dequantised::Blocks(block) => (
                vec![&*q, &*scale, &*zero],
                vec![int("axis", 0), int("block_size", block as i64)],
            ),
        };
        let mut weight = tape.op_with(linear.scope, "DequantizeLinear", &inputs, attributes);
        if how == Dequantised::Transposed {
            weight = tape.transpose(linear.scope, &weight, &[1, 0]);
        }
        Ok(self.ending(linear, "MatMul", &[x, &weight]))
    }

    fn n_bits(
        &mut self,
        x: &str,
        linear: &Linear<'_>,
        form: NBits,
        bias: Option<&str>,
    ) -> Result<String> {
        let weight = self.tape.nameless(linear.scope, "MatMul");
        self.n_bits_weight(&weight, linear.parts, form)?;
        Ok(self.n_bits_product(x, &weight, linear, form, bias))
    }

    /// The tensors of a `MatMulNBits`, unless they are there.
    pub(super) fn n_bits_weight(
        &mut self,
        weight: &str,
        parts: &[Part],
        form: NBits,
    ) -> Result<()> {
        let [q, scale, zero] = n_bits_names(weight, form);
        if self.tape.onnx.has(&q) {
            return Ok(());
        }
        let [rows, columns] = self.sizes(parts);
        let rounded = blocks(&self.model.stacked(parts)?, columns, form);
        let count = columns.div_ceil(form.block);
        let packed = (count * form.bits).div_ceil(8);
        let tape = &mut self.tape;
        let shape = [rows, count, form.block * form.bits / 8];
        tape.bytes(&q, DataType::Uint8, &shape, &rounded.weights)?;
        let axes = |last: usize| {
            if form.flat {
                vec![rows * last]
            } else {
                vec![rows, last]
            }
        };
        tape.numbers(&scale, &axes(count), &rounded.scales)?;
        match form.zeros {
            Zeros::Absent => Ok(()),
            Zeros::Packed => tape.bytes(&zero, DataType::Uint8, &axes(packed), &rounded.packed),
            Zeros::Floats => tape.numbers(&zero, &axes(count), &rounded.zeros),
        }
    }

    pub(super) fn n_bits_product(
        &mut self,
        x: &str,
        weight: &str,
        linear: &Linear<'_>,
        form: NBits,
        bias: Option<&str>,
    ) -> String {
        let [rows, columns] = self.sizes(linear.parts);
        let [q, scale, zero] = n_bits_names(weight, form);
        let mut inputs = vec![x, &q, &scale];
        if form.zeros != Zeros::Absent {
            inputs.push(&zero);
        }
        if let Some(bias) = bias {
            // Zero points may be absent, and the group index, input 4, always is.
            inputs.resize(5, "");
            inputs.push(bias);
        }
        let mut attributes = vec![
            int("K", columns as i64),
            int("N", rows as i64),
            int("bits", form.bits as i64),
            int("block_size", form.block as i64),
        ];
        if form.accuracy > 0 {
            attributes.push(int("accuracy_level", form.accuracy));
        }
        let Some(out) = linear.out else {
            let tape = &mut self.tape;
            return tape.op_with(linear.scope, MATMUL_N_BITS, &inputs, attributes);
        };
        let tape = &mut self.tape;
        tape.op_into(linear.scope, MATMUL_N_BITS, &inputs, attributes, &[out]);
        out.to_owned()
    }
}

/// What the tensors of a weight are called.
pub(super) fn n_bits_names(weight: &str, form: NBits) -> [String; 3] {
    [
        format!("Q{}", form.bits),
        "scales".to_owned(),
        "zero_points".to_owned(),
    ]
    .map(|s| format!("{weight}_{s}"))
}

pub(super) fn byte(unsigned: bool) -> DataType {
    if unsigned {
        DataType::Uint8
    } else {
        DataType::Int8
    }
}
