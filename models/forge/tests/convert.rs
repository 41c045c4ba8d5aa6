//! `forge convert` on Hugging Face folders: what comes out is what the forge writes of the same weights, and whatever
//! is broken is refused in a sentence, with little memory and nothing left behind.

#[path = "support/folder.rs"]
mod folder;
mod support;

use folder::{Folder, WHOLE, llama, name, qwen2};
use half::bf16;
use millwright_forge::llama::{Biases, Decoder, Part};
use millwright_forge::{Precision, tiny};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const INDEX: &str = "model.safetensors.index.json";
/// Kilobytes of address space that a refusal may take.
const MEMORY_MAX: &str = "1000000";

impl Folder {
    /// Writes all in two files with an index, in bf16.
    fn sharded(self) -> Self {
        self.put("config.json", self.config.to_string());
        let mut map = BTreeMap::new();
        for shard in 0..2 {
            let file = format!("model-0000{shard}-of-00002.safetensors");
            let every = || self.tensors.iter().skip(shard).step_by(2);
            self.save(&file, Dtype::BF16, every());
            map.extend(every().map(|(name, _)| (name.clone(), file.clone())));
        }
        self.put(
            INDEX,
            json!({"metadata": {}, "weight_map": map}).to_string(),
        );
        self
    }

    fn run(&self, source: &Path, more: &[&str]) -> Output {
        self.run_in("unlimited", source, more)
    }

    fn run_in(&self, memory: &str, source: &Path, more: &[&str]) -> Output {
        Command::new("sh")
            .args(["-c", "ulimit -v \"$0\" && exec \"$@\"", memory])
            .arg(env!("CARGO_BIN_EXE_millwright-forge"))
            .arg("convert")
            .arg(source)
            .arg("-o")
            .arg(self.output())
            .args(["--name", "tiny"])
            .args(more)
            .output()
            .unwrap()
    }

    /// The bundle's folder.
    fn converts(&self, more: &[&str]) -> (PathBuf, String) {
        let output = self.run(&self.path(), more);
        assert!(output.status.success(), "{output:?}");
        let bundle = millwright_engine::bundle::Bundle::open(&self.output()).unwrap();
        bundle.verify().unwrap();
        (self.output(), String::from_utf8(output.stderr).unwrap())
    }

    #[track_caller]
    fn says(&self, part: &str) {
        // A size that is believed before it is checked meets the limit.
        let output = self.run_in(MEMORY_MAX, &self.path(), &[]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(part), "{said}");
        assert!(!self.output().exists(), "{said}");
    }
}

#[test]
fn a_llama_folder_is_the_bundle_that_its_weights_make() {
    let folder = Folder::new(&llama()).whole();
    for precision in Precision::ALL {
        let (bundle, _) = folder.converts(&["--precision", &precision.to_string()]);
        let expected = tempfile::tempdir().unwrap();
        tiny::write(expected.path(), precision).unwrap();
        for file in [
            "model.onnx",
            "model.onnx.data",
            "tokenizer.json",
            "chat_template.jinja",
        ] {
            let read = |dir: &Path| fs::read(dir.join(file)).unwrap();
            assert!(read(&bundle) == read(expected.path()), "{precision} {file}");
        }
        fs::remove_dir_all(bundle).unwrap();
    }
}

#[test]
fn shards_in_bf16_are_the_rounded_weights_in_one_file() {
    let sharded = Folder::new(&qwen2()).sharded();
    let mut rounded = Folder::new(&qwen2());
    for (_, values) in rounded.tensors.values_mut() {
        let round = |v: &mut f32| *v = bf16::from_f32(*v).to_f32();
        values.iter_mut().for_each(round);
    }
    let rounded = rounded.whole();
    let data = |folder: &Folder| {
        let (bundle, _) = folder.converts(&[]);
        fs::read(bundle.join("model.onnx.data")).unwrap()
    };
    assert!(data(&sharded) == data(&rounded));
    let bundle = millwright_engine::bundle::Bundle::open(&sharded.output()).unwrap();
    let manifest = bundle.manifest;
    assert_eq!(manifest.architecture, "qwen2");
    assert_eq!(manifest.stop_tokens, ["<|im_end|>"]);
    assert_eq!(manifest.licence, "see LICENSE");
    assert_eq!(manifest.source.matches("sha256").count(), 2);
}

/// The logits of a few tokens.
fn logits(folder: &Folder) -> Vec<f32> {
    let (bundle, _) = folder.converts(&["--precision", "f32"]);
    let plan = support::load(&bundle).unwrap();
    support::logits(&plan, &[3, 40, 77, 114, 151, 188], &[4]).unwrap()
}

#[track_caller]
fn agree(a: &[f32], b: &[f32]) {
    let off = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    let off = off.fold(0.0, f32::max);
    assert!(off < 1e-3, "{off}");
}

#[test]
fn a_qwen2_of_equal_weights_and_no_bias_is_the_llama() {
    let plain = logits(&Folder::new(&llama()).whole());
    agree(&plain, &logits(&Folder::new(&qwen2()).whole()));
}

/// What attention's weights sum up to is one, so that a bias of the values is one of the output: `W · bias`.
#[test]
fn a_bias_of_the_values_is_its_product_at_the_output() {
    let mut values = Folder::new(&qwen2());
    let all = Decoder {
        biases: Biases::All,
        ..llama()
    };
    let mut output = Folder::new(&all);
    let shape = tiny::shape();
    let bias: Vec<f32> = (0..shape.kv_heads * shape.head_dim)
        .map(|i| i as f32 / 10.0 - 1.5)
        .collect();
    let mut other = bias.clone();
    other.rotate_left(7);
    for layer in 0..shape.layers {
        let (_, matrix) = values.tensors[&name(Part::Output(layer))].clone();
        let group = shape.heads / shape.kv_heads * shape.head_dim;
        let spread = |i: usize| bias[i / group * shape.head_dim + i % shape.head_dim];
        let product = matrix.chunks(shape.width).map(|row| {
            let terms = row.iter().enumerate();
            terms.map(|(i, w)| w * spread(i)).sum()
        });
        let product: Vec<f32> = product.collect();
        let set = |folder: &mut Folder, part: Part, to: &[f32]| {
            let (_, values) = folder.tensors.get_mut(&name(part)).unwrap();
            values.copy_from_slice(to);
        };
        set(&mut values, Part::ValueBias(layer), &bias);
        set(&mut output, Part::OutputBias(layer), &product);
        for folder in [&mut values, &mut output] {
            set(folder, Part::KeyBias(layer), &other);
        }
    }
    let (values, output) = (logits(&values.whole()), logits(&output.whole()));
    agree(&values, &output);
    let plain = logits(&Folder::new(&llama()).whole());
    assert!(plain.iter().zip(&values).any(|(a, b)| (a - b).abs() > 0.1));
}

#[test]
fn a_long_context_is_cut_and_said_so_unless_one_is_asked_for() {
    let mut folder = Folder::new(&llama());
    folder.config["max_position_embeddings"] = json!(100_000);
    let folder = folder.whole();
    let context = || {
        let bundle = millwright_engine::bundle::Bundle::open(&folder.output()).unwrap();
        fs::remove_dir_all(folder.output()).unwrap();
        bundle.manifest.context_length
    };
    let (_, said) = folder.converts(&[]);
    assert!(
        said.contains("cut from 100000 positions to 32768"),
        "{said}"
    );
    assert_eq!(context(), 32_768);
    let (_, said) = folder.converts(&["--context", "40000"]);
    assert!(!said.contains("cut"), "{said}");
    assert_eq!(context(), 40_000);
    let output = folder.run(&folder.path(), &["--context", "100001"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("the model has 100000"), "{said}");
}

#[test]
fn broken_files_are_refused_in_words() {
    let folder = Folder::new(&llama()).whole();
    let sound = fs::read(folder.path().join(WHOLE)).unwrap();
    let spoilt = |bytes: &[u8], part: &str| {
        folder.put(WHOLE, bytes);
        folder.says(part);
    };
    spoilt(&sound[..sound.len() - 1], "but the file has");
    spoilt(&sound[..40], "its header should have");
    spoilt(&sound[..5], "before its header begins");
    spoilt(
        &[&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
        "its header should have",
    );
    spoilt(&[&2u64.to_le_bytes()[..], b"{]"].concat(), "its header");
    let header = |tensors: &str| {
        let length = tensors.len() as u64;
        [&length.to_le_bytes()[..], tensors.as_bytes(), &[0; 8]].concat()
    };
    let overlapping = r#"{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}"#;
    spoilt(&header(overlapping), "offset");
    let absurd =
        r#"{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 2], "data_offsets": [0, 8]}}"#;
    spoilt(&header(absurd), "overflow");
    let vast =
        r#"{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}"#;
    spoilt(&header(vast), "its tensors take 4000000000000 bytes");
    folder.put(WHOLE, &sound);
    folder.put("config.json", "{\"model_type\": ");
    folder.says("config.json can't be understood");
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    folder.put("config.json", folder.config.to_string());
    folder.says("there is no tokenizer.json");
}

#[test]
fn an_index_that_leads_nowhere_or_out_of_the_folder_is_refused() {
    let folder = Folder::new(&llama()).sharded();
    let sound: Value =
        serde_json::from_slice(&fs::read(folder.path().join(INDEX)).unwrap()).unwrap();
    let pointing = |file: &str| {
        let mut index = sound.clone();
        index["weight_map"]["model.norm.weight"] = json!(file);
        folder.put(INDEX, index.to_string());
    };
    pointing("../x.safetensors");
    folder.says("\"../x.safetensors\", which is not a file of the folder");
    pointing("..");
    folder.says("not a file of the folder");
    pointing("model-00003-of-00002.safetensors");
    folder.says("model-00003-of-00002.safetensors can't be opened");
    let files = [
        "model-00000-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
    ];
    let own = sound["weight_map"]["model.norm.weight"].as_str().unwrap();
    pointing(files.iter().find(|file| **file != own).unwrap());
    folder.says("has no tensor \"model.norm.weight\", though");
    fs::remove_file(folder.path().join(INDEX)).unwrap();
    folder.says("neither model.safetensors nor");
}

#[test]
fn a_configuration_that_its_tensors_belie_is_refused() {
    let says = |key: &str, value: Value, part: &str| {
        let mut folder = Folder::new(&llama());
        folder.config[key] = value;
        folder.whole().says(part);
    };
    says(
        "num_hidden_layers",
        json!(1),
        "for which its config.json leaves no place",
    );
    says("num_hidden_layers", json!(3), "no tensor \"model.layers.2");
    says(
        "num_hidden_layers",
        json!(4_000_000_000_u64),
        "out of range",
    );
    says(
        "num_hidden_layers",
        json!(-1),
        "config.json can't be understood",
    );
    says(
        "hidden_size",
        json!(1 << 23),
        "where config.json asks for [400, 8388608]",
    );
    says("hidden_size", json!(u64::MAX), "out of range");
    says("vocab_size", json!(16_000_000), "asks for [16000000, 64]");
    says("head_dim", json!(1 << 22), "q_proj");
    says(
        "max_position_embeddings",
        json!(1_u64 << 60),
        "out of range",
    );
    says(
        "tie_word_embeddings",
        json!(false),
        "no tensor \"lm_head.weight\"",
    );
    says(
        "attention_bias",
        json!(true),
        "no tensor \"model.layers.0.self_attn.q_proj.bias\"",
    );
    says("rope_theta", json!(0), "rotary base");
    says("eos_token_id", json!(4000), "token 4000");
}

#[test]
fn what_is_neither_folder_nor_gguf_is_said() {
    let folder = Folder::new(&llama());
    let file = folder.path().join("config.json");
    fs::write(&file, "{}").unwrap();
    let said = |path: &Path| {
        let output = folder.run(path, &[]);
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(said(&file).contains("not a sound GGUF file"));
    assert!(said(&folder.path().join("absent")).contains("absent can't be converted"));
    fs::create_dir(folder.output()).unwrap();
    fs::write(folder.output().join("mine"), "").unwrap();
    assert!(said(&file).contains("not a new or empty folder"));
    assert!(folder.output().join("mine").exists());
}
