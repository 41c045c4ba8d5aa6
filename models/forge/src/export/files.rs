//! The files beside the graph, as the model hub has them: configurations, tokenizer, chat template.

use super::form::{self, Float, Form, Interface, WINDOW};
use crate::bundle::Description;
use crate::cache::write_synced;
use crate::llama::{Architecture, Biases, Decoder};
use crate::rotary::Scaling;
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tokenizers::Tokenizer;

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The opset from which on templates have a file of their own: exporters of that age write one.
const TEMPLATE_FILE_SINCE: i64 = 17;

/// Writes them into `dir`. `bias` says that q, k and v get seeded biases if they have none.
pub(super) fn write(dir: &Path, form: &Form, description: &Description, bias: bool) -> Result<()> {
    let put = |name: &str, text: &str| write_synced(&dir.join(name), text.as_bytes());
    let put_json = |name: &str, value: &Value| put(name, &format!("{value:#}\n"));
    let tokenizer = description.checked_tokenizer()?;
    let stops = description.stop_tokens.iter();
    let stops: Vec<u32> = stops.filter_map(|t| tokenizer.token_to_id(t)).collect();
    ensure!(!stops.is_empty(), "the model has no stop token");
    put_json("config.json", &config(form, description, bias, &stops))?;
    put_json(
        "generation_config.json",
        &json!({
            "_from_model_config": true,
            "bos_token_id": stops[0],
            "eos_token_id": stops,
            "pad_token_id": stops[0],
        }),
    )?;
    put("tokenizer.json", &description.tokenizer)?;
    let mut tokenizer = tokenizer_config(description, &tokenizer)?;
    if let Some(template) = &description.chat_template {
        if form.opset < TEMPLATE_FILE_SINCE {
            tokenizer["chat_template"] = json!(template);
        } else {
            put("chat_template.jinja", template)?;
        }
    }
    put_json(TOKENIZER_CONFIG, &tokenizer)?;
    if form.interface == Interface::Generative {
        put_json(
            "genai_config.json",
            &generative(form, description, bias, &stops),
        )?;
    }
    Ok(())
}

/// What the architecture is called: the family, and the class.
fn family(form: &Form, decoder: &Decoder, bias: bool) -> (&'static str, &'static str) {
    let seeded = bias && decoder.biases == Biases::None;
    match form.architecture {
        form::Architecture::Llama if seeded || decoder.architecture == Architecture::Qwen2 => {
            ("qwen2", "Qwen2ForCausalLM")
        }
        form::Architecture::Llama => ("llama", "LlamaForCausalLM"),
        form::Architecture::Gemma => ("gemma2", "Gemma2ForCausalLM"),
        form::Architecture::Phi => ("phi", "PhiForCausalLM"),
        form::Architecture::Mistral => ("mistral", "MistralForCausalLM"),
    }
}

fn config(form: &Form, description: &Description, bias: bool, stops: &[u32]) -> Value {
    let decoder = &description.decoder;
    let shape = &decoder.shape;
    let (family, class) = family(form, decoder, bias);
    let mut config = json!({
        "architectures": [class],
        "attention_bias": bias || decoder.biases != Biases::None,
        "attention_dropout": 0.0,
        "bos_token_id": stops[0],
        "eos_token_id": stops[0],
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp,
        "max_position_embeddings": shape.context,
        "model_type": family,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": decimal(shape.epsilon),
        "rope_scaling": scaling(&decoder.scaling),
        "rope_theta": decimal(shape.rope_base),
        "tie_word_embeddings": decoder.tied,
        "torch_dtype": if form.float == Float::F32 { "float32" } else { "float16" },
        "use_cache": true,
        "vocab_size": shape.vocab,
    });
    match form.architecture {
        form::Architecture::Llama if family == "qwen2" => qwen2(&mut config, decoder),
        form::Architecture::Llama => {}
        form::Architecture::Gemma => {
            config["hidden_act"] = json!("gelu_pytorch_tanh");
            config["query_pre_attn_scalar"] = json!(shape.head_dim);
        }
        form::Architecture::Phi => {
            config["hidden_act"] = json!("gelu");
            config["layer_norm_eps"] = json!(decimal(shape.epsilon));
            config["partial_rotary_factor"] = json!(0.5);
        }
        form::Architecture::Mistral => config["sliding_window"] = json!(WINDOW),
    }
    config
}

/// Makes it Qwen2's, in which biases go without saying, the heads' width where it follows, and no window slides.
fn qwen2(config: &mut Value, decoder: &Decoder) {
    let shape = &decoder.shape;
    if let Some(fields) = config.as_object_mut() {
        fields.remove("attention_bias");
        if shape.heads * shape.head_dim == shape.width {
            fields.remove("head_dim");
        }
    }
    config["max_window_layers"] = json!(shape.layers);
    config["sliding_window"] = json!(shape.context);
    config["use_sliding_window"] = json!(false);
}

fn scaling(scaling: &Scaling) -> Value {
    match *scaling {
        Scaling::None => Value::Null,
        Scaling::Linear { factor } => json!({ "factor": factor, "rope_type": "linear" }),
        Scaling::Llama3 {
            factor,
            low,
            high,
            original_context,
        } => json!({
            "factor": factor,
            "high_freq_factor": high,
            "low_freq_factor": low,
            "original_max_position_embeddings": original_context as u64,
            "rope_type": "llama3",
        }),
    }
}

/// The number as a person would write it, not with the digits that f64 adds.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn tokenizer_config(description: &Description, tokenizer: &Tokenizer) -> Result<Value> {
    let added: BTreeMap<_, _> = tokenizer.get_added_tokens_decoder().into_iter().collect();
    let mut config = json!({
        "add_prefix_space": false,
        "added_tokens_decoder": added,
        "bos_token": description.stop_tokens[0],
        "clean_up_tokenization_spaces": false,
        "eos_token": description.stop_tokens[0],
        "model_max_length": description.decoder.shape.context,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": null,
    });
    // What its template asks for by role, where the model's own folder says so.
    let mut others = description.others.iter();
    if let Some((_, text)) = others.find(|(name, _)| name == TOKENIZER_CONFIG) {
        let roles: serde_json::Map<String, Value> = serde_json::from_str(text)?;
        for (role, token) in roles {
            config[role] = token;
        }
    }
    Ok(config)
}

fn generative(form: &Form, description: &Description, bias: bool, stops: &[u32]) -> Value {
    let shape = &description.decoder.shape;
    let (family, _) = family(form, &description.decoder, bias);
    let mut inputs = json!({
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    });
    if form.takes_positions() {
        inputs["position_ids"] = json!("position_ids");
    }
    json!({
        "model": {
            "bos_token_id": stops[0],
            "context_length": shape.context,
            "decoder": {
                "session_options": { "log_id": "onnxruntime-genai", "provider_options": [] },
                "filename": "model.onnx",
                "head_size": shape.head_dim,
                "hidden_size": shape.width,
                "inputs": inputs,
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": shape.heads,
                "num_hidden_layers": shape.layers,
                "num_key_value_heads": shape.kv_heads,
            },
            "eos_token_id": stops,
            "pad_token_id": stops[0],
            "type": family,
            "vocab_size": shape.vocab,
        },
        "search": {
            "diversity_penalty": 0.0, "do_sample": false, "early_stopping": true,
            "length_penalty": 1.0, "max_length": shape.context, "min_length": 0,
            "no_repeat_ngram_size": 0, "num_beams": 1, "num_return_sequences": 1,
            "past_present_share_buffer": true, "repetition_penalty": 1.0,
            "temperature": 1.0, "top_k": 1, "top_p": 1.0,
        },
    })
}
