//! A small model in every form that exporters write, its large tensors in a file that all of them share.

use crate::folder::{WEIGHTS, WEIGHTS_BYTES, write_weights};
use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use millwright_forge::bundle::{Description, Licence};
use millwright_forge::export::{Form, PRESETS, graph_path, write as export};
use millwright_forge::llama::{Decoder, Part, Shape, Weights};
use millwright_forge::stored::Stored;
use millwright_forge::tokenizer::{self, Splitting, Vocabulary, byte_alphabet};
use prost::Message;
use std::fs;
use std::ops::Range;
use std::path::Path;
use tempfile::TempDir;
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::{GraphProto, ModelProto, StringStringEntryProto, TensorProto};

/// Stored tensors of more numbers than this are read from [`WEIGHTS`]: weights, not tables of angles.
const INLINE_MAX: usize = 48 * 32;
const END: &str = "<end>";

/// One graph for each form.
pub(crate) fn write(to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for form in PRESETS {
        let folder = TempDir::new()?;
        exported(folder.path(), form)?;
        let mut model = ModelProto::decode(&*fs::read(graph_path(folder.path(), form))?)?;
        shrink(model.graph.as_mut().context("no graph")?, &mut 0)?;
        fs::write(to.join(form.name), model.encode_to_vec())?;
    }
    Ok(())
}

/// Tokenizer, configuration and weights for any of these graphs.
pub(crate) fn beside(dir: &Path) -> Result<()> {
    let form = Form::find("f32")?;
    exported(dir, form)?;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            fs::remove_file(path)?;
        }
    }
    Ok(write_weights(dir)?)
}

fn exported(dir: &Path, form: &Form) -> Result<()> {
    let shape = Shape {
        layers: 1,
        width: 64,
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
        mlp: 64,
        vocab: 260,
        context: 48,
        rope_base: 10_000.0,
        epsilon: 1e-5,
    };
    let mut tokens = vec![END.to_owned(), "<a>".into(), "<b>".into(), "<c>".into()];
    tokens.extend(byte_alphabet().map(String::from));
    let vocabulary = Vocabulary {
        tokens,
        merges: vec![],
        special: vec![0],
        defined: vec![],
        splitting: Splitting::Gpt2,
    };
    let description = Description {
        name: "seed".into(),
        version: "1".into(),
        decoder: Decoder::llama(shape.clone()),
        tokenizer: tokenizer::build(&vocabulary)?,
        chat_template: None,
        stop_tokens: vec![END.into()],
        licence: Licence::apache(),
        source: String::new(),
        others: vec![],
    };
    let weights = Even(shape);
    export(
        dir,
        form,
        &description,
        &weights,
        false,
        &ProgressBar::hidden(),
    )
}

/// Weights that stand for others.
struct Even(Shape);

impl Weights for Even {
    fn load(&self, part: Part, rows: Range<usize>) -> Result<Stored> {
        let [_, columns] = self.0.of(part);
        let weight = |i: usize| 0.01 * (i % 7) as f32;
        Ok(Stored::Plain(
            (0..rows.len() * columns).map(weight).collect(),
        ))
    }
}

/// Moves large tensors out, those of branches too.
fn shrink(graph: &mut GraphProto, offset: &mut usize) -> Result<()> {
    for tensor in &mut graph.initializer {
        let numbers: i64 = tensor.dims.iter().product();
        // Truths are one and zero, which WEIGHTS has none of.
        let is_large = numbers as usize > INLINE_MAX && tensor.data_type() != DataType::Bool;
        if is_large || tensor.data_location() == DataLocation::External {
            *tensor = outside(tensor, offset)?;
        }
    }
    let attributes = graph.node.iter_mut().flat_map(|node| &mut node.attribute);
    for branch in attributes.filter_map(|attribute| attribute.g.as_mut()) {
        shrink(branch, offset)?;
    }
    Ok(())
}

/// Tensors begin at places of their own, so that no two are the same.
fn outside(tensor: &TensorProto, offset: &mut usize) -> Result<TensorProto> {
    let bits = match tensor.data_type() {
        DataType::Int64 | DataType::Double => 64,
        DataType::Float | DataType::Int32 => 32,
        DataType::Float16 | DataType::Bfloat16 => 16,
        DataType::Int4 | DataType::Uint4 => 4,
        _ => 8,
    };
    let numbers: i64 = tensor.dims.iter().product();
    let bytes = (numbers as usize * bits).div_ceil(8);
    ensure!(
        bytes <= WEIGHTS_BYTES,
        "{} takes {bytes} bytes",
        tensor.name
    );
    *offset = (*offset + 64) % (WEIGHTS_BYTES - bytes).max(64) / 64 * 64;
    let entry = |key: &str, value: String| StringStringEntryProto {
        key: key.into(),
        value,
    };
    Ok(TensorProto {
        name: tensor.name.clone(),
        dims: tensor.dims.clone(),
        data_type: tensor.data_type,
        data_location: Some(DataLocation::External as i32),
        external_data: vec![
            entry("location", WEIGHTS.into()),
            entry("offset", offset.to_string()),
            entry("length", bytes.to_string()),
        ],
        ..TensorProto::default()
    })
}
