//! Records operators in the order in which they run, and names them as exporters do: after the module they stand in,
//! the operator and a count. Knows types and shapes, never a model.

use crate::onnx::{self, Element, Writer, int, raw, tensor_value};
use anyhow::Result;
use half::f16;
use std::collections::HashMap;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{AttributeProto, TensorProto};

/// Whose habits: how outputs are called, and whether a constant is a node or an initializer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Habit {
    Tracer,
    Builder,
}

pub(super) struct Tape {
    pub(super) onnx: Writer,
    pub(super) habit: Habit,
    /// What numbers are, unless said otherwise.
    pub(super) float: DataType,
    /// How often each name was used, so that the next one gets a number.
    uses: HashMap<String, usize>,
    /// The numbers of weights that have no other name.
    nameless: HashMap<String, usize>,
}

/// An entry of a shape that the graph computes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Dim<'a> {
    Fixed(usize),
    /// A scalar's name.
    Of(&'a str),
}

impl Tape {
    pub(super) fn new(onnx: Writer, habit: Habit, float: DataType) -> Self {
        Self {
            onnx,
            habit,
            float,
            uses: HashMap::new(),
            nameless: HashMap::new(),
        }
    }

    /// Forgets which names nodes have, for the next branch.
    pub(super) fn restart(&mut self) {
        self.uses.clear();
    }

    /// Adds an operator of one output and returns that.
    pub(super) fn op(&mut self, scope: &str, operator: &str, inputs: &[&str]) -> String {
        self.op_with(scope, operator, inputs, vec![])
    }

    pub(super) fn op_with(
        &mut self,
        scope: &str,
        operator: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) -> String {
        let name = self.name(scope, operator);
        let output = self.output(&name, 0);
        self.onnx
            .named(&name, operator, inputs, &[&output], attributes);
        output
    }

    /// Adds an operator whose outputs have names already.
    pub(super) fn op_into(
        &mut self,
        scope: &str,
        operator: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
        outputs: &[&str],
    ) {
        let name = self.name(scope, operator);
        self.onnx
            .named(&name, operator, inputs, outputs, attributes);
    }

    /// A node's name that is not taken.
    pub(super) fn name(&mut self, scope: &str, operator: &str) -> String {
        let kind = operator.rsplit('.').next().unwrap_or(operator);
        let name = format!("{scope}/{kind}");
        let count = self.uses.entry(name.clone()).or_default();
        *count += 1;
        match *count {
            1 => name,
            n => format!("{name}_{}", n - 1),
        }
    }

    /// What a node's output of this number is called.
    pub(super) fn output(&self, name: &str, number: usize) -> String {
        match self.habit {
            Habit::Tracer => format!("{name}_output_{number}"),
            Habit::Builder => format!("{name}/output_{number}"),
        }
    }

    /// The name of a weight of which an exporter has forgotten the module: a number.
    pub(super) fn nameless(&mut self, scope: &str, operator: &str) -> String {
        if self.habit == Habit::Builder {
            let module = scope.trim_start_matches('/').replace('/', ".");
            return format!("{module}.{operator}.weight");
        }
        let next = 1000 + 7 * self.nameless.len();
        let number = self.nameless.entry(scope.to_owned()).or_insert(next);
        format!("onnx::{operator}_{number}")
    }

    /// A list of integers.
    pub(super) fn ints(&mut self, scope: &str, values: &[i64]) -> String {
        self.constant(scope, &format!("INT64/{values:?}"), &[values.len()], values)
    }

    /// An integer without axes.
    pub(super) fn int(&mut self, scope: &str, value: i64) -> String {
        self.constant(scope, &format!("INT64/{value}"), &[], &[value])
    }

    /// A number without axes, of the graph's type.
    pub(super) fn number(&mut self, scope: &str, value: f32) -> String {
        self.number_as(scope, value, self.float)
    }

    pub(super) fn number_as(&mut self, scope: &str, value: f32, kind: DataType) -> String {
        if kind == DataType::Float16 {
            let half = f16::from_f32(value);
            self.constant(scope, &format!("FLOAT16/{value}"), &[], &[half])
        } else {
            self.constant(scope, &format!("FLOAT/{value}"), &[], &[value])
        }
    }

    fn constant<T: Element>(
        &mut self,
        scope: &str,
        text: &str,
        shape: &[usize],
        values: &[T],
    ) -> String {
        if self.habit == Habit::Builder {
            let name = format!("/model/constants/{text}");
            if !self.onnx.has(&name) {
                self.onnx.initializer(raw(&name, shape, values));
            }
            return name;
        }
        let value = tensor_value("value", raw("", shape, values));
        self.op_with(scope, "Constant", &[], vec![value])
    }

    /// A tensor of one number of the graph's type, as `ConstantOfShape` wants its value.
    pub(super) fn fill(&self, value: f32) -> AttributeProto {
        let tensor = if self.float == DataType::Float16 {
            raw("", &[1], &[f16::from_f32(value)])
        } else {
            raw("", &[1], &[value])
        };
        tensor_value("value", tensor)
    }

    pub(super) fn cast(&mut self, scope: &str, x: &str, kind: DataType) -> String {
        self.op_with(scope, "Cast", &[x], vec![int("to", kind as i64)])
    }

    pub(super) fn transpose(&mut self, scope: &str, x: &str, order: &[i64]) -> String {
        self.op_with(scope, "Transpose", &[x], vec![onnx::ints("perm", order)])
    }

    pub(super) fn concat(&mut self, scope: &str, parts: &[&str], axis: i64) -> String {
        self.op_with(scope, "Concat", parts, vec![int("axis", axis)])
    }

    pub(super) fn unsqueeze(&mut self, scope: &str, x: &str, axis: i64) -> String {
        let axes = self.ints(scope, &[axis]);
        self.op(scope, "Unsqueeze", &[x, &axes])
    }

    /// `x[begin..end]` of the last axis of four, or from `begin` on.
    pub(super) fn slice(
        &mut self,
        scope: &str,
        x: &str,
        begin: usize,
        end: Option<usize>,
    ) -> String {
        let starts = self.ints(scope, &[begin as i64]);
        let ends = self.ints(scope, &[end.map_or(i64::MAX, |end| end as i64)]);
        self.slice_by(scope, x, &starts, &ends)
    }

    /// The same between computed places, each a list of one.
    pub(super) fn slice_by(&mut self, scope: &str, x: &str, starts: &str, ends: &str) -> String {
        let axes = self.ints(scope, &[3]);
        let steps = self.ints(scope, &[1]);
        self.op(scope, "Slice", &[x, starts, ends, &axes, &steps])
    }

    /// The length of one axis of `x`, a scalar.
    pub(super) fn dim(&mut self, scope: &str, x: &str, axis: i64) -> String {
        let shape = self.op(scope, "Shape", &[x]);
        let axis = self.int(scope, axis);
        self.op_with(scope, "Gather", &[&shape, &axis], vec![int("axis", 0)])
    }

    /// A shape put together as the graph runs.
    pub(super) fn shape(&mut self, scope: &str, dims: &[Dim<'_>]) -> String {
        let mut parts = Vec::new();
        for dim in dims {
            parts.push(match dim {
                Dim::Fixed(n) => self.ints(scope, &[*n as i64]),
                Dim::Of(scalar) => self.unsqueeze(scope, scalar, 0),
            });
        }
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        self.concat(scope, &parts, 0)
    }

    pub(super) fn reshape(&mut self, scope: &str, x: &str, dims: &[Dim<'_>]) -> String {
        let shape = self.shape(scope, dims);
        self.op(scope, "Reshape", &[x, &shape])
    }

    /// Adds a tensor of numbers in the graph's type, unless it is there.
    pub(super) fn weight(
        &mut self,
        name: &str,
        shape: &[usize],
        values: impl FnOnce() -> Result<Vec<f32>>,
    ) -> Result<()> {
        if self.onnx.has(name) {
            return Ok(());
        }
        self.numbers(name, shape, &values()?)
    }

    pub(super) fn numbers(&mut self, name: &str, shape: &[usize], values: &[f32]) -> Result<()> {
        if self.float == DataType::Float16 {
            self.onnx.begin::<f16>(name, shape)?;
            for piece in values.chunks(1 << 16) {
                let halves: Vec<f16> = piece.iter().map(|v| f16::from_f32(*v)).collect();
                self.onnx.append(&halves)?;
            }
            return Ok(());
        }
        self.onnx.matrix(name, shape, values)
    }

    /// Adds a tensor of bytes, signed or not.
    pub(super) fn bytes(
        &mut self,
        name: &str,
        kind: DataType,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<()> {
        self.onnx.begin_as(name, kind, 1, shape)?;
        self.onnx.append(bytes)
    }

    /// Adds a small tensor whose numbers stand in `float_data`, as the standard's helper writes them.
    pub(super) fn listed(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.onnx.initializer(TensorProto {
            float_data: values.to_vec(),
            ..onnx::tensor(name, DataType::Float, shape)
        });
    }

    /// The same for small integers of a type, in `int32_data`.
    pub(super) fn listed_ints(
        &mut self,
        name: &str,
        kind: DataType,
        shape: &[usize],
        values: &[i32],
    ) {
        self.onnx.initializer(TensorProto {
            int32_data: values.to_vec(),
            ..onnx::tensor(name, kind, shape)
        });
    }
}
