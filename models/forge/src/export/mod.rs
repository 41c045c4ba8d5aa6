//! Writes a model as people's exporters write theirs: their graphs, their quantisation, their folders. What comes out
//! is for tests of whoever reads such files; a model that is to be run is a bundle, which `graph` draws.

mod attention;
mod decoder;
mod embedding;
mod files;
mod form;
mod linear;
mod mask;
mod model;
mod norm;
mod presets;
mod rotary;
mod rounding;
mod source;
mod tape;

pub use form::{
    Architecture, Attention, Dequantised, Embedding, Float, Form, Half, Head, Interface, Linears,
    NBits, Norm, Storage, Vintage, WINDOW, Zeros,
};
pub use presets::PRESETS;
pub use source::export;

use crate::bundle::Description;
use crate::llama::{Part, Weights};
use crate::onnx::{Layout, Writer};
use anyhow::{Context, Result};
use indicatif::ProgressBar;
use model::Model;
use std::fs;
use std::path::{Path, PathBuf};

/// Writes the model that `description` and `weights` make into `dir`, which is created if need be: the same bytes
/// every time. `bias` adds seeded biases to q, k and v of a model that has none. The bar advances by one for each weight loaded; see [`work`].
///
/// The most that is in memory at once is twice the largest tensor in f32, and its quantised form.
pub fn write(
    dir: &Path,
    form: &Form,
    description: &Description,
    weights: &dyn Weights,
    bias: bool,
    bar: &ProgressBar,
) -> Result<()> {
    let model = Model {
        decoder: &description.decoder,
        shape: &description.decoder.shape,
        weights,
        bias,
        bar,
    };
    model.decoder.check()?;
    let layout = layout(dir, form);
    let folder = layout.graph.parent().unwrap_or(dir);
    fs::create_dir_all(folder).with_context(|| format!("{} can't be created", folder.display()))?;
    files::write(dir, form, description, bias)?;
    let onnx = Writer::with(layout, "main_graph")?;
    decoder::write(onnx, form, &model)
}

/// The weights that [`write`] loads: a head that copies the embedding reads it a second time, and Phi has fewer parts.
pub fn work(form: &Form, description: &Description) -> u64 {
    let decoder = &description.decoder;
    let unread = |part: &Part| {
        let phi = form.architecture == Architecture::Phi;
        phi && matches!(part, Part::Gate(_) | Part::MlpNorm(_))
    };
    let copied = decoder.tied && form.head != Head::Tied;
    let parts = decoder.parts().into_iter().filter(|part| !unread(part));
    let parts = parts.chain(copied.then_some(Part::Embed));
    parts.map(|part| decoder.shape.count(part)).sum()
}

/// The graph's file in a folder that [`write`] has filled.
pub fn graph_path(dir: &Path, form: &Form) -> PathBuf {
    layout(dir, form).graph
}

fn layout(dir: &Path, form: &Form) -> Layout {
    let graph = match form.interface {
        Interface::Web(name) => dir.join("onnx").join(format!("{name}.onnx")),
        Interface::Plain | Interface::Generative => dir.join("model.onnx"),
        Interface::Merged => dir.join("decoder_model_merged.onnx"),
    };
    let ending = if form.interface == Interface::Generative {
        "onnx.data"
    } else {
        "onnx_data"
    };
    let producer = match form.interface {
        Interface::Generative => ["onnxruntime-genai", "0.9.0"],
        _ if matches!(form.linears, Linears::Dynamic { .. }) => ["onnx.quantize", "0.1.0"],
        _ => ["pytorch", "2.7.1"],
    };
    Layout {
        data: graph.with_extension(ending),
        graph,
        inline: form.storage == Storage::Inline,
        opset: form.opset,
        producer: producer.map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::{self, Biases, Decoder, Shape};
    use crate::stored::Stored;
    use crate::tiny;
    use std::ops::Range;

    struct Ones<'a>(&'a Shape);

    impl Weights for Ones<'_> {
        fn load(&self, part: Part, rows: Range<usize>) -> Result<Stored> {
            Ok(Stored::Plain(vec![1.0; rows.len() * self.0.of(part)[1]]))
        }
    }

    #[test]
    fn the_bar_reaches_its_end() {
        let qwen2 = Decoder {
            architecture: llama::Architecture::Qwen2,
            biases: Biases::Inputs,
            tied: false,
            ..Decoder::llama(tiny::shape())
        };
        let mut description = tiny::whole().unwrap();
        for decoder in [description.decoder.clone(), qwen2] {
            description.decoder = decoder;
            let ones = Ones(&description.decoder.shape);
            for form in PRESETS {
                let folder = tempfile::tempdir().unwrap();
                let bar = ProgressBar::hidden();
                write(folder.path(), form, &description, &ones, false, &bar).unwrap();
                assert_eq!(bar.position(), work(form, &description), "{}", form.name);
            }
        }
    }
}
