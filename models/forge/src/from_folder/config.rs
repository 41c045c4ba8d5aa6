//! What `config.json` says of a model, in its older layout and its newer one (`rope_parameters`). What it leaves out
//! has the value that transformers gives it.

use crate::llama::{Architecture, Biases, Decoder, Shape};
use crate::rotary::Scaling;
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};

/// The base of rotary angles where a configuration names none.
const ROPE_BASE: f64 = 10_000.0;
const EPSILON: f64 = 1e-6;

/// The file's fields that are understood, or whose presence is not.
#[derive(Debug, Deserialize)]
pub(super) struct Settings {
    model_type: String,
    num_hidden_layers: usize,
    hidden_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Rotary>,
    rope_parameters: Option<Rotary>,
    partial_rotary_factor: Option<f64>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    sliding_window: Option<Value>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
    auto_map: Option<Value>,
    eos_token_id: Option<Ids>,
}

/// How angles are made, wherever the layout has it.
#[derive(Debug, Deserialize)]
struct Rotary {
    rope_type: Option<String>,
    /// The older name of `rope_type`.
    r#type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// One token or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Ids {
    One(u32),
    Several(Vec<u32>),
}

impl Ids {
    pub(super) fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Several(ids) => ids,
        }
    }
}

impl Settings {
    /// The model, if it is one that the graph can be. `has_head` says whether there is a head beside the embedding,
    /// for configurations that don't.
    pub(super) fn decoder(&self, has_head: bool) -> Result<Decoder> {
        let (architecture, biases) = match self.model_type.as_str() {
            "llama" if self.attention_bias == Some(true) => (Architecture::Llama, Biases::All),
            "llama" => (Architecture::Llama, Biases::None),
            "qwen2" => (Architecture::Qwen2, Biases::Inputs),
            other => bail!("the model_type {other:?} is neither \"llama\" nor \"qwen2\""),
        };
        self.refuse_others(architecture)?;
        ensure!(
            self.num_attention_heads > 0,
            "num_attention_heads is 0, so there is no attention"
        );
        let head_dim = self
            .head_dim
            .unwrap_or(self.hidden_size / self.num_attention_heads);
        Ok(Decoder {
            architecture,
            biases,
            tied: self.tie_word_embeddings.unwrap_or(!has_head),
            scaling: self.scaling()?,
            shape: Shape {
                layers: self.num_hidden_layers,
                width: self.hidden_size,
                heads: self.num_attention_heads,
                kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
                head_dim,
                mlp: self.intermediate_size,
                vocab: self.vocab_size,
                context: self.max_position_embeddings,
                rope_base: self.rope_base() as f32,
                epsilon: self.rms_norm_eps.unwrap_or(EPSILON) as f32,
            },
        })
    }

    /// Tokens that end an answer.
    pub(super) fn stop_ids(&self) -> Vec<u32> {
        self.eos_token_id.clone().map_or(vec![], Ids::into_vec)
    }

    fn refuse_others(&self, architecture: Architecture) -> Result<()> {
        let act = self.hidden_act.as_deref().unwrap_or("silu");
        ensure!(act == "silu", "the hidden_act {act:?} is not \"silu\"");
        ensure!(
            self.mlp_bias != Some(true),
            "mlp_bias is set, and the graph has no place for such biases"
        );
        ensure!(
            self.quantization_config.is_none(),
            "it has a quantization_config; give the folder of the unquantised weights"
        );
        ensure!(
            self.auto_map.is_none(),
            "it has an auto_map: the model is computed by code of its own"
        );
        let layers = self.layer_types.iter().flatten();
        let slides = layers.into_iter().any(|layer| layer != "full_attention");
        // Qwen2's configurations name a window that is not in use.
        let window = architecture == Architecture::Llama && self.sliding_window.is_some();
        ensure!(
            !slides && !window && self.use_sliding_window != Some(true),
            "attention is in a sliding window; the graph's is to all that came before"
        );
        let ropes = self.ropes().map(|rope| rope.partial_rotary_factor);
        for factor in ropes.chain([self.partial_rotary_factor]).flatten() {
            ensure!(
                (factor - 1.0).abs() < f64::EPSILON,
                "the partial_rotary_factor is {factor}; the graph turns whole heads"
            );
        }
        Ok(())
    }

    /// The newer layout first.
    fn ropes(&self) -> impl Iterator<Item = &Rotary> {
        self.rope_parameters.iter().chain(&self.rope_scaling)
    }

    fn rope_base(&self) -> f64 {
        let base = self.ropes().find_map(|rope| rope.rope_theta);
        base.or(self.rope_theta).unwrap_or(ROPE_BASE)
    }

    fn scaling(&self) -> Result<Scaling> {
        let all = self.ropes().map(Rotary::scaling);
        let all = all.collect::<Result<Vec<Scaling>>>()?;
        ensure!(
            all.iter().all(|scaling| *scaling == all[0]),
            "rope_parameters and rope_scaling ask for different rotary angles"
        );
        Ok(all.first().map_or(Scaling::None, |scaling| *scaling))
    }
}

impl Rotary {
    fn scaling(&self) -> Result<Scaling> {
        let kind = self.rope_type.as_ref().or(self.r#type.as_ref());
        let kind = kind.map_or("default", String::as_str);
        let needed = |name: &str, value: Option<f64>| {
            value.with_context(|| format!("rotary scaling of type {kind:?} has no {name}"))
        };
        let scaling = match kind {
            "default" => {
                ensure!(
                    self.factor.is_none(),
                    "there is a rotary scaling factor, but its rope_type says \"default\" or nothing"
                );
                Scaling::None
            }
            "linear" => Scaling::Linear {
                factor: needed("factor", self.factor)?,
            },
            "llama3" => Scaling::Llama3 {
                factor: needed("factor", self.factor)?,
                low: needed("low_freq_factor", self.low_freq_factor)?,
                high: needed("high_freq_factor", self.high_freq_factor)?,
                original_context: needed(
                    "original_max_position_embeddings",
                    self.original_max_position_embeddings,
                )?,
            },
            other => bail!(
                "rotary scaling of type {other:?} is not written by this forge, only \"linear\" and \"llama3\" are"
            ),
        };
        if let Some(field) = self.others.keys().next() {
            bail!("rotary scaling has a field {field:?} that this forge doesn't know");
        }
        Ok(scaling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A sound configuration with these fields instead.
    fn config(other: &Value) -> Result<Decoder> {
        let mut all = json!({
            "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 400, "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "sliding_window": 256, "use_sliding_window": false,
        });
        for (key, value) in other.as_object().unwrap() {
            all[key] = value.clone();
        }
        serde_json::from_value::<Settings>(all)?.decoder(false)
    }

    #[test]
    fn both_layouts_say_the_same() {
        let scaling = json!({
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        });
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = json!(500_000.0);
        let older = config(
            &json!({"rope_theta": 500_000, "rope_scaling": scaling, "torch_dtype": "bfloat16"}),
        );
        let newer = config(&json!({"rope_parameters": parameters, "dtype": "bfloat16"}));
        let older = older.unwrap();
        assert_eq!(older, newer.unwrap());
        assert_eq!(older.shape.rope_base.to_bits(), 500_000f32.to_bits());
        assert!(matches!(older.scaling, Scaling::Llama3 { .. }));
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let decoder = config(&json!({"num_key_value_heads": null, "rms_norm_eps": null})).unwrap();
        assert_eq!((decoder.shape.kv_heads, decoder.shape.head_dim), (4, 16));
        assert_eq!(decoder.shape.rope_base.to_bits(), 10_000f32.to_bits());
        assert_eq!((decoder.biases, decoder.tied), (Biases::Inputs, true));
        let llama = json!({"model_type": "llama", "attention_bias": true, "head_dim": 32,
            "sliding_window": null, "rope_scaling": {"type": "linear", "factor": 2}});
        let decoder = config(&llama).unwrap();
        assert_eq!((decoder.biases, decoder.shape.head_dim), (Biases::All, 32));
        assert_eq!(decoder.scaling, Scaling::Linear { factor: 2.0 });
    }

    #[test]
    fn what_would_come_out_wrong_is_named() {
        let says = |other: Value, part: &str| {
            let error = format!("{:#}", config(&other).unwrap_err());
            assert!(error.contains(part), "{error}");
        };
        says(json!({"model_type": "gemma"}), "\"gemma\" is neither");
        says(json!({"hidden_act": "gelu"}), "\"gelu\" is not \"silu\"");
        says(json!({"mlp_bias": true}), "mlp_bias");
        says(json!({"quantization_config": {}}), "unquantised weights");
        says(json!({"auto_map": {}}), "code of its own");
        says(json!({"use_sliding_window": true}), "sliding window");
        says(json!({"model_type": "llama"}), "sliding window");
        let mixed = json!(["full_attention", "sliding_attention"]);
        says(json!({"layer_types": mixed}), "sliding window");
        says(json!({"partial_rotary_factor": 0.5}), "0.5");
        says(json!({"num_attention_heads": 0}), "no attention");
        says(json!({"hidden_size": -1}), "invalid value");
        let yarn = json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 32});
        says(json!({"rope_scaling": yarn}), "type \"yarn\"");
        let linear = json!({"rope_type": "linear", "factor": 4.0});
        let both = json!({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": linear});
        says(both, "different rotary angles");
        let more = json!({"rope_type": "linear", "factor": 4.0, "mscale": 2});
        says(json!({"rope_scaling": more}), "\"mscale\"");
        says(json!({"rope_scaling": {"factor": 4.0}}), "says \"default\"");
        says(
            json!({"rope_scaling": {"type": "llama3", "factor": 4.0}}),
            "no low_freq_factor",
        );
    }
}
