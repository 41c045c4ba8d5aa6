//! Masks of numbers, zero where a token may look, computed from `attention_mask` and the lengths.

use super::decoder::Decoder;
use super::form::{Architecture, Vintage, WINDOW};
use super::tape::Dim;
use crate::onnx::int;
use half::f16;
use tract_onnx::pb::tensor_proto::DataType;

const SCOPE: &str = "/model";

/// Scalars that hold the lengths of a step.
#[derive(Debug, Clone)]
pub(super) struct Lengths {
    pub(super) batch: String,
    pub(super) sequence: String,
    /// None in the branch that has no past.
    pub(super) past: Option<String>,
    pub(super) total: String,
}

impl Decoder<'_> {
    pub(super) fn lengths(&mut self) -> Lengths {
        let tape = &mut self.tape;
        let batch = tape.dim(SCOPE, "input_ids", 0);
        let sequence = tape.dim(SCOPE, "input_ids", 1);
        if !self.has_past {
            let total = sequence.clone();
            return Lengths {
                batch,
                sequence,
                past: None,
                total,
            };
        }
        let past = tape.dim(SCOPE, "past_key_values.0.key", 2);
        let total = tape.op(SCOPE, "Add", &[&past, &sequence]);
        Lengths {
            batch,
            sequence,
            past: Some(past),
            total,
        }
    }

    /// The mask, `[batch, 1, sequence, total]`.
    pub(super) fn mask(&mut self, lengths: &Lengths) -> String {
        match self.vintage() {
            Vintage::Old => self.old_mask(lengths),
            Vintage::New | Vintage::Sdpa => self.new_mask(lengths),
        }
    }

    /// What hides a token: the least number of the type.
    fn least(&self) -> f32 {
        if self.tape.float == DataType::Float16 {
            f16::MIN.to_f32()
        } else {
            f32::MIN
        }
    }

    /// A triangle for this step's tokens, zeros for the past's, and the padding's mask on top.
    fn old_mask(&mut self, lengths: &Lengths) -> String {
        let least = self.least();
        let Lengths {
            batch,
            sequence,
            past,
            total,
        } = lengths;
        let tape = &mut self.tape;
        let size = tape.shape(SCOPE, &[Dim::Of(sequence), Dim::Of(sequence)]);
        let fill = tape.fill(least);
        let full = tape.op_with(SCOPE, "ConstantOfShape", &[&size], vec![fill]);
        let [zero, one] = [0, 1].map(|n| tape.int(SCOPE, n));
        let columns = tape.op(SCOPE, "Range", &[&zero, sequence, &one]);
        let next = tape.op(SCOPE, "Add", &[&columns, &one]);
        let rows = tape.reshape(SCOPE, &next, &[Dim::Of(sequence), Dim::Fixed(1)]);
        let seen = tape.op(SCOPE, "Less", &[&columns, &rows]);
        let nought = tape.number(SCOPE, 0.0);
        let mut mask = tape.op(SCOPE, "Where", &[&seen, &nought, &full]);
        if let Some(past) = past {
            let size = tape.shape(SCOPE, &[Dim::Of(sequence), Dim::Of(past)]);
            let fill = tape.fill(0.0);
            let open = tape.op_with(SCOPE, "ConstantOfShape", &[&size], vec![fill]);
            mask = tape.concat(SCOPE, &[&open, &mask], -1);
        }
        let size = [
            Dim::Of(batch),
            Dim::Fixed(1),
            Dim::Of(sequence),
            Dim::Of(total),
        ];
        let size = tape.shape(SCOPE, &size);
        let mask = tape.unsqueeze(SCOPE, &mask, 0);
        let mask = tape.unsqueeze(SCOPE, &mask, 1);
        let mask = tape.op(SCOPE, "Expand", &[&mask, &size]);

        let given = tape.unsqueeze(SCOPE, "attention_mask", 1);
        let given = tape.unsqueeze(SCOPE, &given, 2);
        let given = tape.op(SCOPE, "Expand", &[&given, &size]);
        let given = tape.cast(SCOPE, &given, tape.float);
        let one = tape.number(SCOPE, 1.0);
        let inverted = tape.op(SCOPE, "Sub", &[&one, &given]);
        let hidden = tape.cast(SCOPE, &inverted, DataType::Bool);
        let least = tape.number(SCOPE, least);
        let padding = tape.op(SCOPE, "Where", &[&hidden, &least, &inverted]);
        tape.op(SCOPE, "Add", &[&padding, &mask])
    }

    /// A triangle of the total length, cut off by comparing with the tokens' places, and hidden where padding is.
    fn new_mask(&mut self, lengths: &Lengths) -> String {
        let least = self.least();
        let window = self.form.architecture == Architecture::Mistral;
        let Lengths {
            batch,
            sequence,
            past,
            total,
        } = lengths;
        let tape = &mut self.tape;
        let [zero, one] = [0, 1].map(|n| tape.int(SCOPE, n));
        let past = past.clone().unwrap_or_else(|| zero.clone());
        let places = tape.op(SCOPE, "Range", &[&past, total, &one]);
        let places = tape.reshape(SCOPE, &places, &[Dim::Of(sequence), Dim::Fixed(1)]);
        let size = tape.shape(SCOPE, &[Dim::Of(sequence), Dim::Of(total)]);
        let fill = tape.fill(least);
        let full = tape.op_with(SCOPE, "ConstantOfShape", &[&size], vec![fill]);
        let keys = tape.op(SCOPE, "Range", &[&zero, total, &one]);
        let later = tape.op(SCOPE, "Greater", &[&keys, &places]);
        let (full, hidden) = if window {
            let reach = tape.int(SCOPE, WINDOW as i64);
            let edge = tape.op(SCOPE, "Sub", &[&places, &reach]);
            let gone = tape.op(SCOPE, "LessOrEqual", &[&keys, &edge]);
            (full, tape.op(SCOPE, "Or", &[&later, &gone]))
        } else {
            let upper = vec![int("upper", 1)];
            (tape.op_with(SCOPE, "Trilu", &[&full, &one], upper), later)
        };
        let hidden = tape.cast(SCOPE, &hidden, tape.float);
        let mask = tape.op(SCOPE, "Mul", &[&full, &hidden]);
        let mask = tape.unsqueeze(SCOPE, &mask, 0);
        let mask = tape.unsqueeze(SCOPE, &mask, 1);
        let size = [
            Dim::Of(batch),
            Dim::Fixed(1),
            Dim::Of(sequence),
            Dim::Of(total),
        ];
        let size = tape.shape(SCOPE, &size);
        let mask = tape.op(SCOPE, "Expand", &[&mask, &size]);

        let given = tape.unsqueeze(SCOPE, "attention_mask", 1);
        let given = tape.unsqueeze(SCOPE, &given, 2);
        let given = tape.cast(SCOPE, &given, tape.float);
        let sum = tape.op(SCOPE, "Add", &[&mask, &given]);
        let nought = tape.number(SCOPE, 0.0);
        let padding = tape.op(SCOPE, "Equal", &[&sum, &nought]);
        let least = tape.number(SCOPE, least);
        tape.op(SCOPE, "Where", &[&padding, &least, &mask])
    }
}
