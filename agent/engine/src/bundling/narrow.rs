//! A model of plain floats as its bundle keeps it: a quarter of the size. Its matrices are quantised once, as packing
//! would do it, and written under the names that ONNX Runtime has for eight bits in blocks. The graph around them is the
//! imported one, for the agent alone.
//!
//! The operators: <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>

use crate::bundle::{Bundle, WEIGHTS};
use crate::import::{EMBED, Goal, Imported, LINEAR, Target, import};
use crate::onnx::{GraphError, float_tensor, int_attribute, ints, new_node};
use crate::pack::{Counted, PANEL_ROWS, PackError};
use crate::recipe::{Form, WeightSource};
use crate::source::{Panel, Source};
use prost::Message;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::{
    ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
};

const DOMAIN: &str = "com.microsoft";
const BLOCK: usize = crate::quant::BLOCK;
/// Where a tensor begins in the data.
const ALIGN: usize = 64;

/// A graph of floats, imported.
pub(super) struct Floats(Imported);

impl Floats {
    /// The bundle's graph, if all its matrices are floats. Linears on `kept` weights stay so.
    pub(super) fn of(bundle: &Bundle, kept: &BTreeSet<String>) -> Result<Option<Self>, GraphError> {
        let target = Target {
            goal: Goal::Exact,
            kept: kept.clone(),
        };
        let imported = import(&bundle.graph(), bundle.heads(), &target)?;
        let is_plain = |of: &WeightSource| {
            matches!(of.form, Form::Floats(_)) && of.first == 0 && of.rows == of.stored
        };
        let weights = &imported.recipe.weights;
        let all = !weights.is_empty() && weights.iter().all(is_plain);
        Ok(all.then_some(Self(imported)))
    }

    /// Bytes that [`Floats::write`] will write beside the graph.
    pub(super) fn bytes(&self) -> u64 {
        let weights = self.0.recipe.weights.iter();
        weights
            .map(|of| of.rows as u64 * (of.cols as u64 + of.cols as u64 / 8))
            .sum()
    }

    /// Writes the graph, and its matrices beside it.
    pub(super) fn write(&self, graph: &Path, data: &Path) -> Result<(), WriteError> {
        let Imported {
            graph: source,
            recipe,
            ..
        } = &self.0;
        let mut model = source.to_model()?;
        let proto = model.graph.get_or_insert_default();
        for node in &mut proto.node {
            let weight = ints(node, "weights").first().map(|&index| index as usize);
            if let Some(index) = weight {
                let of = &recipe.weights[index];
                let bias = ints(node, "bias").first();
                let bias = bias.map(|&table| &recipe.tables[table as usize]);
                let made = match node.op_type.as_str() {
                    EMBED => gather(node, of),
                    LINEAR => product(node, of, bias.is_some()),
                    _ => continue,
                };
                if let Some(values) = bias {
                    proto
                        .initializer
                        .push(float_tensor(&made.input[5], &[of.rows], values));
                }
                *node = made;
            }
        }
        let mut out = Counted::new(BufWriter::with_capacity(1 << 20, File::create(data)?));
        for of in &recipe.weights {
            let numbers = Source::open(source, of)?;
            numbers.kind()?;
            let (mut panel, mut scales) = (Panel::default(), Vec::new());
            let at = out.align(ALIGN)?;
            for first in (0..of.rows).step_by(PANEL_ROWS) {
                numbers.panel(first..of.rows.min(first + PANEL_ROWS), &mut panel);
                let bytes: Vec<u8> = panel
                    .weights
                    .iter()
                    .map(|w| w.cast_unsigned() ^ 0x80)
                    .collect();
                out.write_all(&bytes)?;
                scales.extend(panel.scales.iter().flat_map(|scale| scale.to_le_bytes()));
            }
            source.forget();
            let groups = of.cols / BLOCK;
            let dims = [of.rows, of.cols];
            proto
                .initializer
                .push(external(weights(of), DataType::Uint8, &dims, at));
            let at = out.align(ALIGN)?;
            out.write_all(&scales)?;
            let dims = [of.rows, groups];
            proto
                .initializer
                .push(external(scale(of), DataType::Float, &dims, at));
        }
        out.flush()?;
        if !model.opset_import.iter().any(|set| set.domain == DOMAIN) {
            model.opset_import.push(OperatorSetIdProto {
                domain: DOMAIN.into(),
                version: 1,
            });
        }
        Ok(std::fs::write(graph, ModelProto::encode_to_vec(&model))?)
    }
}

/// Why it can't be written.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(transparent)]
    Pack(#[from] PackError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

fn weights(of: &WeightSource) -> String {
    format!("{}/weights", of.values)
}

fn scale(of: &WeightSource) -> String {
    format!("{}/scales", of.values)
}

/// `MatMulNBits` without zero points: all are 128.
fn product(linear: &NodeProto, of: &WeightSource, bias: bool) -> NodeProto {
    let (x, out) = (&linear.input[0], &linear.output[0]);
    let (weights, scale, added) = (weights(of), scale(of), format!("{out}/bias"));
    let mut inputs = vec![x.as_str(), &weights, &scale];
    if bias {
        inputs.extend(["", "", &added]);
    }
    let mut node = new_node("MatMulNBits", &inputs, &[out]);
    let sizes = [
        ("K", of.cols),
        ("N", of.rows),
        ("bits", 8),
        ("block_size", BLOCK),
    ];
    attribute(&mut node, &sizes);
    node
}

fn gather(embed: &NodeProto, of: &WeightSource) -> NodeProto {
    let (weights, scale) = (weights(of), scale(of));
    let inputs = [weights.as_str(), &embed.input[0], &scale];
    let mut node = new_node("GatherBlockQuantized", &inputs, &[&embed.output[0]]);
    let sizes = [
        ("bits", 8),
        ("block_size", BLOCK),
        ("gather_axis", 0),
        ("quantize_axis", 1),
    ];
    attribute(&mut node, &sizes);
    node
}

fn attribute(node: &mut NodeProto, values: &[(&str, usize)]) {
    node.domain = DOMAIN.into();
    let values = values
        .iter()
        .map(|&(name, value)| int_attribute(name, value as i64));
    node.attribute.extend(values);
}

fn external(name: String, of: DataType, dims: &[usize], offset: usize) -> TensorProto {
    let element = if of == DataType::Float { 4 } else { 1 };
    let length = dims.iter().product::<usize>() * element;
    let entries = [
        ("location", WEIGHTS.to_owned()),
        ("offset", offset.to_string()),
        ("length", length.to_string()),
    ];
    let entries = entries.map(|(key, value)| StringStringEntryProto {
        key: key.into(),
        value,
    });
    TensorProto {
        name,
        dims: dims.iter().map(|&dim| dim as i64).collect(),
        data_type: of as i32,
        data_location: Some(DataLocation::External as i32),
        external_data: entries.into(),
        ..TensorProto::default()
    }
}
