//! Rotary embedding written out, with its angles computed from positions or looked up.

use super::decoder::Decoder;
use super::form::{Architecture, Vintage};
use super::tape::Dim;
use crate::llama::Shape;
use crate::rotary;
use anyhow::Result;
use tract_onnx::pb::tensor_proto::DataType;

const TABLES: [&str; 2] = ["rotary_emb.cos_cached", "rotary_emb.sin_cached"];

impl Decoder<'_> {
    /// Channels of a head that turn.
    pub(super) fn turning(&self) -> usize {
        match self.form.architecture {
            Architecture::Phi => self.shape().head_dim / 2,
            _ => self.shape().head_dim,
        }
    }

    /// The model as if its heads were what turns of them.
    fn turned(&self) -> Shape {
        Shape {
            head_dim: self.turning(),
            ..self.shape().clone()
        }
    }

    /// Cosine and sine of all tokens, `[batch, sequence, turning]`, computed once for all layers.
    pub(super) fn angles(&mut self) -> Result<[String; 2]> {
        let scope = "/model/rotary_emb";
        let turning = self.turning();
        let frequencies = rotary::frequencies(&self.turned(), &self.model.decoder.scaling);
        let frequencies: Vec<f32> = frequencies.into_iter().map(|f| f as f32).collect();
        let name = "model.rotary_emb.inv_freq";
        let shape = [1, turning / 2, 1];
        let island = self.form.has_islands();
        let tape = &mut self.tape;
        let kind = if island { DataType::Float } else { tape.float };
        if !tape.onnx.has(name) {
            if island {
                tape.onnx.matrix(name, &shape, &frequencies)?;
            } else {
                tape.numbers(name, &shape, &frequencies)?;
            }
        }
        let batch = tape.dim(scope, "position_ids", 0);
        let dims = [Dim::Of(&batch), Dim::Fixed(turning / 2), Dim::Fixed(1)];
        let size = tape.shape(scope, &dims);
        let frequencies = tape.op(scope, "Expand", &[name, &size]);
        let positions = tape.unsqueeze(scope, "position_ids", 1);
        let positions = tape.cast(scope, &positions, kind);
        let angles = tape.op(scope, "MatMul", &[&frequencies, &positions]);
        let angles = tape.transpose(scope, &angles, &[0, 2, 1]);
        let angles = tape.concat(scope, &[&angles, &angles], -1);
        Ok(["Cos", "Sin"].map(|function| {
            let out = tape.op(scope, function, &[&angles]);
            if island {
                tape.cast(scope, &out, tape.float)
            } else {
                out
            }
        }))
    }

    /// The same out of tables, as each layer looks them up for itself.
    pub(super) fn looked_up(&mut self, scope: &str, total: &str) -> Result<[String; 2]> {
        let (scope, turning) = (format!("{scope}/rotary_emb"), self.turning());
        if !self.tape.onnx.has(TABLES[0]) {
            let context = self.shape().context;
            let (cos, sin) = rotary::tables(&self.turned(), &self.model.decoder.scaling);
            for (name, half) in TABLES.iter().zip([cos, sin]) {
                let rows = half.chunks(turning / 2);
                let both: Vec<f32> = rows.flat_map(|row| [row, row].concat()).collect();
                self.tape.numbers(name, &[1, 1, context, turning], &both)?;
            }
        }
        let tape = &mut self.tape;
        Ok(TABLES.map(|table| {
            let [starts, axes, steps] = [0, 2, 1].map(|n| tape.ints(&scope, &[n]));
            let ends = tape.unsqueeze(&scope, total, 0);
            let rows = tape.op(&scope, "Slice", &[table, &starts, &ends, &axes, &steps]);
            let ones = tape.ints(&scope, &[0, 1]);
            let rows = tape.op(&scope, "Squeeze", &[&rows, &ones]);
            tape.op(&scope, "Gather", &[&rows, "position_ids"])
        }))
    }

    /// `x` with its heads turned, `[batch, heads, sequence, head_dim]`.
    pub(super) fn rotate(&mut self, scope: &str, x: &str, [cos, sin]: [&str; 2]) -> String {
        let turning = self.turning();
        if turning == self.shape().head_dim {
            return self.turn(scope, x, [cos, sin]);
        }
        let moving = self.tape.slice(scope, x, 0, Some(turning));
        let resting = self.tape.slice(scope, x, turning, None);
        let moved = self.turn(scope, &moving, [cos, sin]);
        self.tape.concat(scope, &[&moved, &resting], -1)
    }

    /// `x · cos + half-turned x · sin`.
    fn turn(&mut self, scope: &str, x: &str, [cos, sin]: [&str; 2]) -> String {
        let straight = self.tape.op(scope, "Mul", &[x, cos]);
        let half = self.turning() / 2;
        let (upper, lower) = if self.vintage() == Vintage::Old {
            self.computed_halves(scope, x)
        } else {
            let lower = self.tape.slice(scope, x, 0, Some(half));
            (self.tape.slice(scope, x, half, None), lower)
        };
        let tape = &mut self.tape;
        let negative = tape.op(scope, "Neg", &[&upper]);
        let turned = tape.concat(scope, &[&negative, &lower], -1);
        let turned = tape.op(scope, "Mul", &[&turned, sin]);
        tape.op(scope, "Add", &[&straight, &turned])
    }

    /// The upper and the lower half, cut where the shape says that the middle is.
    fn computed_halves(&mut self, scope: &str, x: &str) -> (String, String) {
        let tape = &mut self.tape;
        let width = tape.dim(scope, x, 3);
        let two = tape.int(scope, 2);
        let middle = tape.op(scope, "Div", &[&width, &two]);
        let middle = tape.unsqueeze(scope, &middle, 0);
        let [begin, end] = [0, i64::MAX].map(|n| tape.ints(scope, &[n]));
        let lower = tape.slice_by(scope, x, &begin, &middle);
        (tape.slice_by(scope, x, &middle, &end), lower)
    }
}
