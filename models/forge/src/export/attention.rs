//! Attention: dozens of small operators, opset 23's one, or ONNX Runtime's.

use super::decoder::Decoder;
use super::form::{Attention, Vintage};
use super::mask::Lengths;
use super::tape::Dim;
use crate::llama::Part;
use crate::onnx::{float, int};
use crate::rotary;
use anyhow::Result;
use tract_onnx::pb::tensor_proto::DataType;

/// What all layers' attention shares in a step.
#[derive(Debug)]
pub(super) enum Shared {
    Primitive {
        lengths: Lengths,
        mask: String,
        /// None where each layer looks them up.
        angles: Option<[String; 2]>,
    },
    Standard {
        mask: Option<String>,
    },
    Grouped {
        /// Length of each sequence without this step's first token, and the longest whole length.
        lengths: [String; 2],
    },
}

const CACHES: [&str; 2] = ["cos_cache", "sin_cache"];

impl Decoder<'_> {
    pub(super) fn vintage(&self) -> Vintage {
        match self.form.attention {
            Attention::Primitive(vintage) => vintage,
            _ => Vintage::New,
        }
    }

    /// What is computed once, before the first layer.
    pub(super) fn shared(&mut self) -> Result<Shared> {
        match self.form.attention {
            Attention::Primitive(vintage) => {
                let lengths = self.lengths();
                let mask = self.mask(&lengths);
                let angles = if vintage == Vintage::Old {
                    None
                } else {
                    Some(self.angles()?)
                };
                Ok(Shared::Primitive {
                    lengths,
                    mask,
                    angles,
                })
            }
            Attention::Standard { mask } => {
                self.caches()?;
                let mask = mask.then(|| {
                    let lengths = self.lengths();
                    self.mask(&lengths)
                });
                Ok(Shared::Standard { mask })
            }
            Attention::Grouped { .. } => {
                self.caches()?;
                let lengths = self.grouped_lengths();
                Ok(Shared::Grouped { lengths })
            }
        }
    }

    pub(super) fn attention(&mut self, layer: usize, x: &str, shared: &Shared) -> Result<String> {
        let module = if matches!(shared, Shared::Grouped { .. }) {
            "attn"
        } else {
            "self_attn"
        };
        let scope = format!("/model/layers.{layer}/{module}");
        let attended = match shared {
            Shared::Primitive {
                lengths,
                mask,
                angles,
            } => {
                let qkv = self.qkv(&scope, layer, x)?;
                let angles = match angles {
                    Some(angles) => angles.clone(),
                    None => self.looked_up(&scope, &lengths.total)?,
                };
                self.primitive(&scope, layer, qkv, lengths, mask, &angles)
            }
            Shared::Standard { mask } => {
                let qkv = self.qkv(&scope, layer, x)?;
                self.standard(&scope, layer, qkv, mask.as_deref())
            }
            Shared::Grouped { lengths } => self.grouped(&scope, layer, x, lengths)?,
        };
        self.linear(
            &format!("{scope}/o_proj"),
            &attended,
            &[Part::Output(layer)],
        )
    }

    fn qkv(&mut self, scope: &str, layer: usize, x: &str) -> Result<[String; 3]> {
        Ok([
            self.linear(&format!("{scope}/q_proj"), x, &[Part::Query(layer)])?,
            self.linear(&format!("{scope}/k_proj"), x, &[Part::Key(layer)])?,
            self.linear(&format!("{scope}/v_proj"), x, &[Part::Value(layer)])?,
        ])
    }

    fn primitive(
        &mut self,
        scope: &str,
        layer: usize,
        [q, k, v]: [String; 3],
        lengths: &Lengths,
        mask: &str,
        angles: &[String; 2],
    ) -> String {
        let (heads, kv_heads) = (self.shape().heads, self.shape().kv_heads);
        let q = self.split(scope, &q, heads);
        let k = self.split(scope, &k, kv_heads);
        let v = self.split(scope, &v, kv_heads);
        let [cos, sin] = angles
            .each_ref()
            .map(|table| self.tape.unsqueeze(scope, table, 1));
        let q = self.rotate(scope, &q, [&cos, &sin]);
        let k = self.rotate(scope, &k, [&cos, &sin]);
        let k = self.join(scope, layer, "key", &k);
        let v = self.join(scope, layer, "value", &v);
        let k = self.repeat(scope, &k, lengths);
        let v = self.repeat(scope, &v, lengths);
        let scores = self.scores(scope, &q, &k);
        let tape = &mut self.tape;
        let scores = tape.op(scope, "Add", &[&scores, mask]);
        let island = self.form.has_islands();
        let scores = if island {
            tape.cast(scope, &scores, DataType::Float)
        } else {
            scores
        };
        let mut shares = tape.op_with(scope, "Softmax", &[&scores], vec![int("axis", -1)]);
        if island {
            shares = tape.cast(scope, &shares, tape.float);
        }
        let out = tape.op(scope, "MatMul", &[&shares, &v]);
        let out = tape.transpose(scope, &out, &[0, 2, 1, 3]);
        let size = [
            Dim::Of(&lengths.batch),
            Dim::Of(&lengths.sequence),
            Dim::Fixed(heads * self.model.shape.head_dim),
        ];
        tape.reshape(scope, &out, &size)
    }

    /// `[batch, sequence, heads · head_dim]` as `[batch, heads, sequence, head_dim]`.
    fn split(&mut self, scope: &str, x: &str, heads: usize) -> String {
        let head_dim = self.shape().head_dim;
        let tape = &mut self.tape;
        let [batch, sequence] = [0, 1].map(|axis| tape.dim(scope, x, axis));
        let size = [
            Dim::Of(&batch),
            Dim::Of(&sequence),
            Dim::Fixed(heads),
            Dim::Fixed(head_dim),
        ];
        let x = tape.reshape(scope, x, &size);
        tape.transpose(scope, &x, &[0, 2, 1, 3])
    }

    /// The past and this step's keys or values, which are the present.
    fn join(&mut self, scope: &str, layer: usize, kind: &str, x: &str) -> String {
        let (past, present) = self.cache_names(layer, kind);
        if self.has_past {
            let axis = vec![int("axis", 2)];
            self.tape
                .op_into(scope, "Concat", &[&past, x], axis, &[&present]);
        } else {
            self.tape
                .op_into(scope, "Identity", &[x], vec![], &[&present]);
        }
        present
    }

    /// Each key head once for each query head that it serves.
    fn repeat(&mut self, scope: &str, x: &str, lengths: &Lengths) -> String {
        let shape = self.model.shape;
        let each = shape.heads / shape.kv_heads;
        if each == 1 {
            return x.to_owned();
        }
        let guarded = self.vintage() != Vintage::Old;
        let tape = &mut self.tape;
        let total = tape.dim(scope, x, 2);
        let wide = tape.unsqueeze(scope, x, 2);
        let dims = [
            Dim::Of(&lengths.batch),
            Dim::Fixed(shape.kv_heads),
            Dim::Fixed(each),
            Dim::Of(&total),
            Dim::Fixed(shape.head_dim),
        ];
        let mut size = tape.shape(scope, &dims);
        if guarded {
            // Tracers put ones where the size is −1, which it never is here.
            let rank = tape.op(scope, "Shape", &[&size]);
            let value = crate::onnx::raw("", &[1], &[1i64]);
            let value = vec![crate::onnx::tensor_value("value", value)];
            let ones = tape.op_with(scope, "ConstantOfShape", &[&rank], value);
            let minus = tape.int(scope, -1);
            let kept = tape.op(scope, "Mul", &[&ones, &minus]);
            let keeps = tape.op(scope, "Equal", &[&size, &kept]);
            size = tape.op(scope, "Where", &[&keeps, &ones, &size]);
        }
        let wide = tape.op(scope, "Expand", &[&wide, &size]);
        let dims = [
            Dim::Of(&lengths.batch),
            Dim::Fixed(shape.heads),
            Dim::Of(&total),
            Dim::Fixed(shape.head_dim),
        ];
        tape.reshape(scope, &wide, &dims)
    }

    /// `q · kᵀ` over the root of a head's width.
    fn scores(&mut self, scope: &str, q: &str, k: &str) -> String {
        let root = (self.shape().head_dim as f32).sqrt();
        let vintage = self.vintage();
        let tape = &mut self.tape;
        if vintage == Vintage::Sdpa {
            let width = tape.dim(scope, q, 3);
            let width = tape.cast(scope, &width, tape.float);
            let width = tape.op(scope, "Sqrt", &[&width]);
            let one = tape.number(scope, 1.0);
            let scale = tape.op(scope, "Div", &[&one, &width]);
            let scale = tape.op(scope, "Sqrt", &[&scale]);
            let k = tape.transpose(scope, k, &[0, 1, 3, 2]);
            let q = tape.op(scope, "Mul", &[q, &scale]);
            let k = tape.op(scope, "Mul", &[&k, &scale]);
            return tape.op(scope, "MatMul", &[&q, &k]);
        }
        let k = tape.transpose(scope, k, &[0, 1, 3, 2]);
        let scores = tape.op(scope, "MatMul", &[q, &k]);
        if vintage == Vintage::Old {
            let root = tape.number(scope, root);
            tape.op(scope, "Div", &[&scores, &root])
        } else {
            let scale = tape.number(scope, 1.0 / root);
            tape.op(scope, "Mul", &[&scores, &scale])
        }
    }

    fn standard(
        &mut self,
        scope: &str,
        layer: usize,
        [q, k, v]: [String; 3],
        mask: Option<&str>,
    ) -> String {
        let shape = self.model.shape;
        let rotated = [(&q, shape.heads), (&k, shape.kv_heads)].map(|(x, heads)| {
            let attributes = vec![int("interleaved", 0), int("num_heads", heads as i64)];
            let inputs = [x, CACHES[0], CACHES[1], "position_ids"];
            self.tape
                .op_with(scope, "RotaryEmbedding", &inputs, attributes)
        });
        let [(past_k, present_k), (past_v, present_v)] =
            ["key", "value"].map(|kind| self.cache_names(layer, kind));
        let name = self.tape.name(scope, "Attention");
        let out = self.tape.output(&name, 0);
        let mut attributes = vec![
            int("q_num_heads", shape.heads as i64),
            int("kv_num_heads", shape.kv_heads as i64),
            float("scale", 1.0 / (shape.head_dim as f32).sqrt()),
        ];
        if mask.is_none() {
            attributes.push(int("is_causal", 1));
        }
        let [q, k] = rotated;
        self.tape.onnx.named(
            &name,
            "Attention",
            &[&q, &k, &v, mask.unwrap_or(""), &past_k, &past_v],
            &[&out, &present_k, &present_v],
            attributes,
        );
        out
    }

    /// The tables that whole operators read, `[context, head_dim / 2]`.
    fn caches(&mut self) -> Result<()> {
        let (shape, scaling) = (self.shape(), &self.model.decoder.scaling);
        let size = [shape.context, shape.head_dim / 2];
        let (cos, sin) = rotary::tables(shape, scaling);
        self.tape.numbers(CACHES[0], &size, &cos)?;
        self.tape.numbers(CACHES[1], &size, &sin)
    }

    /// From the mask's sums and shape, as the generative builder computes them.
    fn grouped_lengths(&mut self) -> [String; 2] {
        let scope = "/model/attn_mask_reformat/attn_mask_subgraph";
        let tape = &mut self.tape;
        let one = tape.ints(scope, &[1]);
        let sums = tape.op(scope, "ReduceSum", &["attention_mask", &one]);
        let last = tape.op(scope, "Sub", &[&sums, &one]);
        let total = tape.dim(scope, "attention_mask", 1);
        [("Sub", last), ("Gather", total)].map(|(module, length)| {
            tape.cast(&format!("{scope}/{module}"), &length, DataType::Int32)
        })
    }

    fn grouped(
        &mut self,
        scope: &str,
        layer: usize,
        x: &str,
        [last, total]: &[String; 2],
    ) -> Result<String> {
        let Attention::Grouped { packed, rotary } = self.form.attention else {
            unreachable!("only grouped attention has grouped lengths");
        };
        let [mut q, mut k, v] = if packed {
            let parts = [Part::Query(layer), Part::Key(layer), Part::Value(layer)];
            let all = self.linear(&format!("{scope}/qkv_proj"), x, &parts)?;
            [all, String::new(), String::new()]
        } else {
            self.qkv(scope, layer, x)?
        };
        if !rotary {
            [q, k] = [("q_rotary", &q), ("k_rotary", &k)].map(|(module, x)| {
                let inputs = [x, "position_ids", CACHES[0], CACHES[1]];
                let attributes = vec![int("interleaved", 0)];
                let operator = "com.microsoft.RotaryEmbedding";
                self.tape
                    .op_with(&format!("{scope}/{module}"), operator, &inputs, attributes)
            });
        }
        let shape = self.model.shape;
        let [(past_k, present_k), (past_v, present_v)] =
            ["key", "value"].map(|kind| self.cache_names(layer, kind));
        let mut inputs = vec![&*q, &*k, &*v, &*past_k, &*past_v, &**last, &**total];
        if rotary {
            inputs.extend(CACHES);
        }
        let name = self.tape.name(scope, "GroupQueryAttention");
        let out = self.tape.output(&name, 0);
        self.tape.onnx.named(
            &name,
            "com.microsoft.GroupQueryAttention",
            &inputs,
            &[&out, &present_k, &present_v],
            vec![
                int("num_heads", shape.heads as i64),
                int("kv_num_heads", shape.kv_heads as i64),
                float("scale", 1.0 / (shape.head_dim as f32).sqrt()),
                int("local_window_size", -1),
                int("do_rotary", i64::from(rotary)),
                int("rotary_interleaved", 0),
            ],
        );
        Ok(out)
    }
}
