//! `forge export` of somebody's own model: its biases, its head and its rotary angles stand where each form has them,
//! its configuration says so, and what can't be read is refused in a sentence with nothing left behind.

#[path = "support/folder.rs"]
mod folder;

use folder::{Folder, WHOLE, llama, name, qwen2};
use millwright_forge::cache::Cache;
use millwright_forge::catalogue::Catalogue;
use millwright_forge::export::{Form, export, graph_path};
use millwright_forge::llama::{Biases, Decoder, Part};
use millwright_forge::rotary::{Scaling, frequencies};
use millwright_forge::tiny;
use prost::Message;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tract_onnx::pb::{GraphProto, ModelProto, TensorProto};

/// A written form.
struct Written {
    graph: GraphProto,
    data: Vec<u8>,
    config: Value,
}

impl Written {
    fn tensor(&self, name: &str) -> &TensorProto {
        let mut tensors = self.graph.initializer.iter();
        let found = tensors.find(|tensor| tensor.name == name);
        found.unwrap_or_else(|| panic!("there is no {name}"))
    }

    /// The values of an f32 tensor, wherever they are.
    fn values(&self, name: &str) -> Vec<f32> {
        let tensor = self.tensor(name);
        let entry = |key: &str| {
            let mut entries = tensor.external_data.iter();
            let entry = entries.find(|entry| entry.key == key)?;
            entry.value.parse::<usize>().ok()
        };
        let bytes = match (entry("offset"), entry("length")) {
            (Some(offset), Some(length)) => &self.data[offset..][..length],
            _ => &tensor.raw_data,
        };
        let values = bytes.as_chunks::<4>().0.iter();
        values.map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    fn count(&self, operator: &str) -> usize {
        let nodes = self.graph.node.iter();
        nodes.filter(|node| node.op_type == operator).count()
    }

    /// The inputs of the operator that makes the logits.
    fn head(&self) -> &[String] {
        let mut nodes = self.graph.node.iter();
        let node = nodes.find(|node| node.output[0] == "logits").unwrap();
        &node.input
    }
}

/// A folder of other numbers everywhere, so that no part passes for another.
fn folder(decoder: &Decoder) -> Folder {
    let mut folder = Folder::new(decoder);
    for (name, (_, values)) in &mut folder.tensors {
        if name.ends_with("_proj.bias") {
            let numbers = 0_u16..;
            let ramp = numbers.map(|i| f32::from(i) / 64.0 + name.len() as f32);
            *values = ramp.take(values.len()).collect();
        }
        if name == "lm_head.weight" {
            values.reverse();
        }
    }
    folder.whole()
}

fn attempt(folder: &Folder, form: &str, bias: bool) -> anyhow::Result<Written> {
    let form = Form::find(form)?;
    let (cache, catalogue) = (Cache::at("no-cache".into()), Catalogue::built_in()?);
    let (path, out) = (folder.path(), folder.output());
    export(&cache, &catalogue, path.to_str().unwrap(), form, bias, &out)?;
    let graph = graph_path(&out, form);
    let written = Written {
        graph: ModelProto::decode(&*fs::read(&graph)?)?.graph.unwrap(),
        data: fs::read(graph.with_extension("onnx_data")).unwrap_or_default(),
        config: serde_json::from_slice(&fs::read(out.join("config.json"))?)?,
    };
    fs::remove_dir_all(out)?;
    Ok(written)
}

fn written(folder: &Folder, form: &str) -> Written {
    attempt(folder, form, false).unwrap()
}

#[test]
fn a_qwen2s_biases_and_head_are_its_own_in_every_kind_of_form() {
    let folder = folder(&qwen2());
    let own = |part: Part| folder.tensors[&name(part)].1.clone();
    let plain = written(&folder, "f32");
    for (module, part) in [
        ("q", Part::QueryBias(1)),
        ("k", Part::KeyBias(1)),
        ("v", Part::ValueBias(1)),
    ] {
        let bias = format!("model.layers.1.self_attn.{module}_proj.bias");
        assert_eq!(plain.values(&bias), own(part));
    }
    let head = plain.values(&plain.head()[1]);
    let [rows, columns] = tiny::shape().of(Part::Head);
    let turned = (0..rows * columns).map(|i| head[i % columns * rows + i / columns]);
    assert_eq!(turned.collect::<Vec<_>>(), own(Part::Head));
    assert_eq!(
        plain.values("model.embed_tokens.weight"),
        own(Part::Embed),
        "the embedding stays what it is"
    );

    // Of a tied model the head of this form is a MatMul of the embedding.
    let dynamic = written(&folder, "dynamic-uint8");
    assert_eq!(dynamic.count("MatMulInteger"), 2 * 7 + 1);
    let four = written(&folder, "q4-default");
    assert_eq!(four.count("MatMulNBits"), 2 * 7 + 1);

    // And of this one it reads the embedding's tensors.
    let shared = written(&folder, "genai-int4");
    assert_eq!(shared.head()[1], "lm_head.MatMul.weight_Q4");
    let dims = |name: &str| shared.tensor(name).dims.clone();
    let table = "model.embed_tokens.weight_Q4";
    assert_eq!(dims(table), dims("lm_head.MatMul.weight_Q4"));
    let bias = shared.tensor("model.layers.0.attn.qkv_proj.Add.bias");
    assert_eq!(bias.dims, [(4 + 2 + 2) * 16]);
    let reshape = shared.graph.node.iter().find(|n| n.op_type == "Reshape");
    assert_eq!(reshape.unwrap().input[0], table);
}

#[test]
fn seeded_biases_are_for_models_that_have_none() {
    let graph = |decoder: &Decoder, bias: bool| {
        let folder = folder(decoder);
        attempt(&folder, "q4", bias).unwrap().graph
    };
    assert!(graph(&qwen2(), true) == graph(&qwen2(), false));
    assert!(graph(&llama(), true) != graph(&llama(), false));
}

#[test]
fn the_configuration_is_the_architectures() {
    let of = |decoder: &Decoder| written(&folder(decoder), "f32").config;
    let qwen = of(&qwen2());
    assert_eq!(qwen["model_type"], "qwen2");
    assert_eq!(qwen["architectures"], json!(["Qwen2ForCausalLM"]));
    assert_eq!(qwen["tie_word_embeddings"], false);
    assert_eq!(qwen["use_sliding_window"], false);
    assert_eq!(
        (&qwen["attention_bias"], &qwen["head_dim"]),
        (&Value::Null, &Value::Null)
    );

    let biased = Decoder {
        biases: Biases::All,
        ..llama()
    };
    let llama = written(&folder(&biased), "f32");
    assert_eq!(llama.config["model_type"], "llama");
    assert_eq!(llama.config["attention_bias"], true);
    assert_eq!(llama.config["tie_word_embeddings"], true);
    let bias = llama.tensor("model.layers.0.self_attn.o_proj.bias");
    assert_eq!(bias.dims, [64]);
}

#[test]
fn stretched_angles_are_in_frequencies_tables_and_configuration() {
    let mut folder = Folder::new(&llama());
    let rope = json!({
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64, "rope_type": "llama3",
    });
    folder.config["rope_scaling"] = rope.clone();
    let folder = folder.whole();
    let scaling = Scaling::Llama3 {
        factor: 8.0,
        low: 1.0,
        high: 4.0,
        original_context: 64.0,
    };
    let expected = frequencies(&tiny::shape(), &scaling);
    assert_ne!(expected, frequencies(&tiny::shape(), &Scaling::None));
    let new = written(&folder, "f32");
    assert_eq!(new.config["rope_scaling"], rope);
    let narrow: Vec<f32> = expected.iter().map(|f| *f as f32).collect();
    assert_eq!(new.values("model.rotary_emb.inv_freq"), narrow);
    let second_row = |written: &Written, table: &str| {
        let half = expected.len();
        let values = written.values(table);
        let width = values.len() / tiny::shape().context;
        values[width..][..half].to_vec()
    };
    let cosines: Vec<f32> = expected.iter().map(|f| f.cos() as f32).collect();
    let old = written(&folder, "q4-default");
    assert_eq!(second_row(&old, "rotary_emb.cos_cached"), cosines);
    let whole = written(&folder, "qdq-channel");
    assert_eq!(second_row(&whole, "cos_cache"), cosines);
}

#[test]
fn a_model_that_cannot_chat_has_no_template_and_roles_are_the_folders() {
    let folder = folder(&llama());
    fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    folder.put("tokenizer_config.json", r#"{"bos_token": "<|im_start|>"}"#);
    let (cache, catalogue) = (Cache::at("no-cache".into()), Catalogue::built_in().unwrap());
    let (path, out) = (folder.path(), folder.output());
    let form = Form::find("q4").unwrap();
    export(
        &cache,
        &catalogue,
        path.to_str().unwrap(),
        form,
        false,
        &out,
    )
    .unwrap();
    assert!(!out.join("chat_template.jinja").exists());
    let text = fs::read_to_string(out.join("tokenizer_config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["bos_token"], "<|im_start|>");
    assert_eq!(config["tokenizer_class"], "GPT2Tokenizer");
}

#[test]
fn what_cannot_be_read_is_refused_and_leaves_nothing() {
    let says = |folder: &Folder, part: &str| {
        let error = attempt(folder, "q4", false).err().unwrap();
        let said = format!("{error:#}");
        assert!(
            said.contains("can't be exported") && said.contains(part),
            "{said}"
        );
        assert!(!folder.output().exists());
    };
    let mut headless = Folder::new(&qwen2());
    headless.tensors.remove("lm_head.weight");
    says(&headless.whole(), "no tensor \"lm_head.weight\"");
    let mut infinite = Folder::new(&qwen2());
    let bias = name(Part::KeyBias(1));
    infinite.tensors.get_mut(&bias).unwrap().1[3] = f32::INFINITY;
    says(
        &infinite.whole(),
        "KeyBias(1) holds a weight that is not a number",
    );
    let short = Folder::new(&llama()).whole();
    short.put(WHOLE, "short");
    says(&short, WHOLE);

    let (cache, catalogue) = (Cache::at("no-cache".into()), Catalogue::built_in().unwrap());
    let file = short.path().join("config.json");
    let form = Form::find("q4").unwrap();
    let tell = |model: &Path| {
        let model = model.to_str().unwrap();
        let written = export(&cache, &catalogue, model, form, false, &short.output());
        format!("{:#}", written.unwrap_err())
    };
    assert!(tell(&file).contains("config.json can't be exported: not a sound GGUF file"));
    assert!(tell(&short.path().join("absent")).contains("nor is there a file or folder"));
}
