//! The table of tokens, and the head, which is tied to it, a copy of it, or reads its very tensors, unless the model has
//! a head of its own: that is written as all linears are.

use super::decoder::Decoder;
use super::form::{Embedding, Head, Linears, NBits, Zeros};
use super::linear::{Linear, byte, n_bits_names};
use super::rounding::{Group, eight};
use crate::llama::Part;
use crate::onnx::int;
use anyhow::{Result, bail};
use tract_onnx::pb::AttributeProto;
use tract_onnx::pb::tensor_proto::DataType;

const SCOPE: &str = "/model/embed_tokens";
const HEAD: &str = "/lm_head";
const WEIGHT: &str = "model.embed_tokens.weight";
/// What the table is called that the head shares.
const SHARED: &str = "lm_head.MatMul.weight";

impl Decoder<'_> {
    /// The tokens' rows, `[batch, sequence, width]`.
    pub(super) fn embedding(&mut self) -> Result<String> {
        let gather = "Gather";
        match self.form.embedding {
            Embedding::Plain => {
                let (model, [rows, columns]) = (self.model, self.shape().of(Part::Embed));
                self.tape
                    .weight(WEIGHT, &[rows, columns], || model.values(Part::Embed))?;
                Ok(self.tape.op(SCOPE, gather, &[WEIGHT, "input_ids"]))
            }
            Embedding::Tensor => {
                let [q, scale, zero] = self.table(Group::Everything, true)?;
                let rows = self.tape.op(SCOPE, gather, &[&q, "input_ids"]);
                Ok(self
                    .tape
                    .op(SCOPE, "DequantizeLinear", &[&rows, &scale, &zero]))
            }
            Embedding::Rows | Embedding::Blocks(_) => {
                let table = self.whole_table()?;
                Ok(self.tape.op(SCOPE, gather, &[&table, "input_ids"]))
            }
            Embedding::Shared => self.shared_rows(),
        }
    }

    /// The logits, `[batch, sequence, vocab]`.
    pub(super) fn head(&mut self, x: &str) -> Result<()> {
        let cast = self.form.casts_logits();
        let out = if cast {
            "graph_output_cast_0"
        } else {
            "logits"
        };
        let tied = self.model.decoder.tied;
        let linear = Linear {
            scope: HEAD,
            parts: if tied { &[Part::Embed] } else { &[Part::Head] },
            out: Some(out),
        };
        match self.form.head {
            Head::Tied if tied => self.tied_head(x, &linear, out)?,
            Head::OwnPlain => {
                self.linear_as(Linears::Plain, x, &linear)?;
            }
            Head::Own | Head::Tied => {
                self.linear_as(self.form.linears, x, &linear)?;
            }
        }
        if cast {
            let to = vec![int("to", DataType::Float as i64)];
            self.tape.op_into(HEAD, "Cast", &[out], to, &["logits"]);
        }
        Ok(())
    }

    fn tied_head(&mut self, x: &str, linear: &Linear<'_>, out: &str) -> Result<()> {
        let weight = match self.form.embedding {
            Embedding::Shared => {
                let form = self.shared_form()?;
                self.n_bits_product(x, SHARED, linear, form, None);
                return Ok(());
            }
            Embedding::Plain => self.tape.transpose(HEAD, WEIGHT, &[1, 0]),
            Embedding::Tensor => {
                let [q, scale, zero] = self.table(Group::Everything, true)?;
                let q = self.tape.transpose(HEAD, &q, &[1, 0]);
                self.tape.op(HEAD, "DequantizeLinear", &[&q, &scale, &zero])
            }
            Embedding::Rows | Embedding::Blocks(_) => {
                let table = self.whole_table()?;
                self.tape.transpose(HEAD, &table, &[1, 0])
            }
        };
        self.tape
            .op_into(HEAD, "MatMul", &[x, &weight], vec![], &[out]);
        Ok(())
    }

    /// The tensors of a table of bytes, written unless they are there: weights, scales and zero points.
    fn table(&mut self, group: Group, unsigned: bool) -> Result<[String; 3]> {
        let [rows, columns] = self.shape().of(Part::Embed);
        let names = ["quantized", "scale", "zero_point"].map(|s| format!("{WEIGHT}_{s}"));
        let [q, scale, zero] = names.each_ref().map(String::as_str);
        if !self.tape.onnx.has(q) {
            let rounded = eight(&self.model.values(Part::Embed)?, columns, group, unsigned);
            let kind = byte(unsigned);
            self.tape
                .bytes(q, kind, &[rows, columns], &rounded.weights)?;
            let Some(blocks) = group.per_row(columns) else {
                self.small(scale, zero, &[], &rounded, unsigned);
                return Ok(names);
            };
            let shape = match group {
                Group::Part(_) => vec![rows, blocks],
                _ => vec![rows],
            };
            self.tape.numbers(scale, &shape, &rounded.scales)?;
            let zeros: Vec<u8> = rounded.zeros.iter().map(|z| *z as u8).collect();
            self.tape.bytes(zero, kind, &shape, &zeros)?;
        }
        Ok(names)
    }

    /// The table dequantised as a whole; once for rows and head.
    fn whole_table(&mut self) -> Result<String> {
        if let Some(known) = &self.whole_table {
            return Ok(known.clone());
        }
        let (group, unsigned, attributes): (_, _, Vec<AttributeProto>) = match self.form.embedding {
            Embedding::Blocks(block) => {
                let attributes = vec![int("axis", 1), int("block_size", block as i64)];
                (Group::Part(block), true, attributes)
            }
            _ => (Group::Row, false, vec![int("axis", 0)]),
        };
        let [q, scale, zero] = self.table(group, unsigned)?;
        let inputs = [&*q, &scale, &zero];
        let table = self
            .tape
            .op_with(SCOPE, "DequantizeLinear", &inputs, attributes);
        self.whole_table = Some(table.clone());
        Ok(table)
    }

    fn shared_form(&self) -> Result<NBits> {
        match self.form.linears {
            Linears::NBits(form) => Ok(form),
            other => bail!("a table can't be shared with a head of {other:?}"),
        }
    }

    /// Rows out of a table that a head can share, of which the operator wants the blocks of a row in one axis.
    fn shared_rows(&mut self) -> Result<String> {
        let form = self.shared_form()?;
        let table = if self.model.decoder.tied {
            SHARED
        } else {
            WEIGHT
        };
        self.n_bits_weight(table, &[Part::Embed], form)?;
        let [rows, columns] = self.shape().of(Part::Embed);
        let bytes = columns.next_multiple_of(form.block) * form.bits / 8;
        let [q, scale, zero] = n_bits_names(table, form);
        let shape = self.tape.ints(SCOPE, &[rows as i64, bytes as i64]);
        let q = self.tape.op(SCOPE, "Reshape", &[&q, &shape]);
        let mut inputs = vec![&*q, "input_ids", &*scale];
        if form.zeros != Zeros::Absent {
            inputs.push(&zero);
        }
        let attributes = vec![
            int("bits", form.bits as i64),
            int("block_size", form.block as i64),
            int("gather_axis", 0),
            int("quantize_axis", 1),
        ];
        let operator = "com.microsoft.GatherBlockQuantized";
        Ok(self.tape.op_with(SCOPE, operator, &inputs, attributes))
    }
}
