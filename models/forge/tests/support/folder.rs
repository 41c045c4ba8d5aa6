//! Hugging Face folders of the tiny model, for whoever reads such.

use half::bf16;
use millwright_forge::Precision;
use millwright_forge::llama::{Architecture, Biases, Decoder, Part, Weights};
use millwright_forge::stored::Stored;
use millwright_forge::tiny::{self, Seeded};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

pub(crate) const WHOLE: &str = "model.safetensors";

/// A folder of the tiny model's weights, to be spoilt at will.
pub(crate) struct Folder {
    pub(crate) root: tempfile::TempDir,
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Folder {
    /// Of the architecture's parts; those that the tiny llama hasn't are zeros, but a head is the embedding.
    pub(crate) fn new(decoder: &Decoder) -> Self {
        let root = tempfile::tempdir().unwrap();
        let bundle = root.path().join("tiny");
        tiny::write(&bundle, Precision::F32).unwrap();
        let folder = root.path().join("folder");
        fs::create_dir(&folder).unwrap();
        for name in ["tokenizer.json", "chat_template.jinja", "LICENSE"] {
            fs::copy(bundle.join(name), folder.join(name)).unwrap();
        }
        let shape = &decoder.shape;
        let mut tensors = BTreeMap::new();
        for part in decoder.parts() {
            let [rows, columns] = shape.of(part);
            let source = if part == Part::Head {
                Part::Embed
            } else {
                part
            };
            let values = Seeded.load(source, 0..rows);
            let values = values.map_or(vec![0.0; columns], Stored::into_values);
            let dimensions = if rows == 1 {
                vec![columns]
            } else {
                vec![rows, columns]
            };
            tensors.insert(name(part), (dimensions, values));
        }
        let config = json!({
            "model_type": decoder.architecture.to_string(), "num_hidden_layers": shape.layers,
            "hidden_size": shape.width, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "intermediate_size": shape.mlp,
            "vocab_size": shape.vocab, "max_position_embeddings": shape.context, "rms_norm_eps": shape.epsilon,
            "rope_theta": shape.rope_base, "tie_word_embeddings": decoder.tied, "eos_token_id": 2,
            "attention_bias": decoder.biases == Biases::All,
        });
        Self {
            root,
            config,
            tensors,
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.root.path().join("folder")
    }

    pub(crate) fn output(&self) -> PathBuf {
        self.root.path().join("out")
    }

    pub(crate) fn put(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path().join(name), bytes).unwrap();
    }

    /// Writes these tensors into one file.
    pub(crate) fn save<'a>(
        &self,
        file: &str,
        dtype: Dtype,
        tensors: impl Iterator<Item = (&'a String, &'a (Vec<usize>, Vec<f32>))>,
    ) {
        let bytes = |v: &f32| match dtype {
            Dtype::F32 => v.to_le_bytes().to_vec(),
            _ => bf16::from_f32(*v).to_le_bytes().to_vec(),
        };
        let all: Vec<(&String, &Vec<usize>, Vec<u8>)> = tensors
            .map(|(name, (shape, values))| (name, shape, values.iter().flat_map(bytes).collect()))
            .collect();
        let views = all.iter().map(|(name, shape, bytes)| {
            (
                name,
                TensorView::new(dtype, (*shape).clone(), bytes).unwrap(),
            )
        });
        serialize_to_file(views, None, &self.path().join(file)).unwrap();
    }

    /// Writes all in one file.
    pub(crate) fn whole(self) -> Self {
        self.put("config.json", self.config.to_string());
        self.save(WHOLE, Dtype::F32, self.tensors.iter());
        self
    }
}

/// As Hugging Face's transformers calls it.
pub(crate) fn name(part: Part) -> String {
    let (layer, name) = match part {
        Part::Embed => return "model.embed_tokens.weight".into(),
        Part::FinalNorm => return "model.norm.weight".into(),
        Part::Head => return "lm_head.weight".into(),
        Part::AttentionNorm(l) => (l, "input_layernorm.weight"),
        Part::MlpNorm(l) => (l, "post_attention_layernorm.weight"),
        Part::Query(l) => (l, "self_attn.q_proj.weight"),
        Part::Key(l) => (l, "self_attn.k_proj.weight"),
        Part::Value(l) => (l, "self_attn.v_proj.weight"),
        Part::Output(l) => (l, "self_attn.o_proj.weight"),
        Part::QueryBias(l) => (l, "self_attn.q_proj.bias"),
        Part::KeyBias(l) => (l, "self_attn.k_proj.bias"),
        Part::ValueBias(l) => (l, "self_attn.v_proj.bias"),
        Part::OutputBias(l) => (l, "self_attn.o_proj.bias"),
        Part::Gate(l) => (l, "mlp.gate_proj.weight"),
        Part::Up(l) => (l, "mlp.up_proj.weight"),
        Part::Down(l) => (l, "mlp.down_proj.weight"),
    };
    format!("model.layers.{layer}.{name}")
}

pub(crate) fn llama() -> Decoder {
    Decoder::llama(tiny::shape())
}

pub(crate) fn qwen2() -> Decoder {
    Decoder {
        architecture: Architecture::Qwen2,
        biases: Biases::Inputs,
        tied: false,
        ..llama()
    }
}
