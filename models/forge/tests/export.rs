//! The forms of other exporters: the same bytes every time, the operators and files that each is known by, and the
//! goldens of just these bytes. That a form computes what it should is ONNX Runtime's to say: `tests/goldens/forms.py`.

use millwright_engine::bundle::sha256_of;
use millwright_forge::cache::Cache;
use millwright_forge::catalogue::Catalogue;
use millwright_forge::export::{Form, PRESETS, export, graph_path};
use prost::Message;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::{GraphProto, ModelProto, TensorProto};

fn written(form: &Form, bias: bool) -> TempDir {
    let folder = TempDir::new().unwrap();
    let cache = Cache::at(folder.path().join("no-cache"));
    let catalogue = Catalogue::built_in().unwrap();
    let out = folder.path().join("out");
    export(&cache, &catalogue, "tiny", form, bias, &out).unwrap();
    folder
}

fn model(folder: &TempDir, form: &Form) -> ModelProto {
    let path = graph_path(&folder.path().join("out"), form);
    ModelProto::decode(&*fs::read(path).unwrap()).unwrap()
}

/// Every file by its path inside the folder.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut left = vec![folder.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_owned();
                found.insert(name, fs::read(path).unwrap());
            }
        }
    }
    found
}

/// The graph and its branches.
fn graphs(graph: &GraphProto) -> Vec<&GraphProto> {
    let mut all = vec![graph];
    for attribute in graph.node.iter().flat_map(|node| &node.attribute) {
        all.extend(attribute.g.iter().flat_map(graphs));
    }
    all
}

fn operators(graph: &GraphProto) -> BTreeSet<&str> {
    let nodes = graphs(graph).into_iter().flat_map(|graph| &graph.node);
    nodes.map(|node| node.op_type.as_str()).collect()
}

fn tensor<'a>(graph: &'a GraphProto, name: &str) -> &'a TensorProto {
    let mut tensors = graph.initializer.iter();
    tensors.find(|tensor| tensor.name == name).unwrap()
}

#[test]
fn every_form_is_the_same_bytes_twice() {
    for form in PRESETS {
        for bias in [false, true] {
            let [a, b] = [written(form, bias), written(form, bias)];
            let [a, b] = [a, b].map(|folder| files(&folder.path().join("out")));
            assert!(a == b, "{}", form.name);
            assert!(!a.contains_key(Path::new("manifest.toml")));
        }
    }
}

#[test]
fn every_form_names_each_value_once_and_before_it_is_read() {
    for form in PRESETS {
        let folder = written(form, true);
        let model = model(&folder, form);
        let graph = model.graph.unwrap();
        let mut outer: BTreeSet<&str> = graph.initializer.iter().map(|t| &*t.name).collect();
        assert_eq!(outer.len(), graph.initializer.len(), "{}", form.name);
        outer.extend(graph.input.iter().map(|input| &*input.name));
        for graph in graphs(&graph).into_iter().rev() {
            let (mut known, mut names) = (outer.clone(), BTreeSet::new());
            for node in &graph.node {
                assert!(names.insert(&node.name), "{}: {}", form.name, node.name);
                for input in node.input.iter().filter(|name| !name.is_empty()) {
                    assert!(known.contains(&**input), "{}: {input}", form.name);
                }
                for output in node.output.iter().filter(|name| !name.is_empty()) {
                    assert!(known.insert(output), "{}: {output}", form.name);
                }
            }
            for output in &graph.output {
                assert!(known.contains(&*output.name), "{}", form.name);
            }
        }
    }
}

/// By its name: the graph's file, operators that it has, and operators that it hasn't.
const KNOWN_BY: [(&str, &str, &[&str], &[&str]); 29] = [
    (
        "f32",
        "model.onnx",
        &["MatMul", "Transpose", "ReduceMean", "Trilu"],
        &["DequantizeLinear"],
    ),
    (
        "f32-sdpa",
        "onnx/model.onnx",
        &["Sqrt", "Softmax"],
        &["Attention"],
    ),
    (
        "f16",
        "onnx/model_fp16.onnx",
        &["MatMul", "Cast"],
        &["MatMulNBits"],
    ),
    (
        "dynamic-int8",
        "onnx/model_int8.onnx",
        &[
            "DynamicQuantizeLinear",
            "MatMulInteger",
            "DequantizeLinear",
            "Less",
        ],
        &["Trilu"],
    ),
    (
        "dynamic-int8-channel",
        "onnx/model_int8.onnx",
        &["MatMulInteger", "Trilu"],
        &["DequantizeLinear", "Less"],
    ),
    (
        "dynamic-uint8",
        "onnx/model_quantized.onnx",
        &["MatMulInteger", "DequantizeLinear"],
        &[],
    ),
    (
        "dynamic-uint8-channel",
        "onnx/model_quantized.onnx",
        &["MatMulInteger", "DequantizeLinear"],
        &[],
    ),
    (
        "dynamic-uint8-gqa",
        "onnx/model_quantized.onnx",
        &[
            "MatMulInteger",
            "GroupQueryAttention",
            "SkipSimplifiedLayerNormalization",
        ],
        &["MatMulNBits", "ReduceMean"],
    ),
    (
        "merged",
        "decoder_model_merged.onnx",
        &["If", "MatMulInteger", "Identity"],
        &[],
    ),
    (
        "q4",
        "onnx/model_q4.onnx",
        &["MatMulNBits", "Gather"],
        &["GatherBlockQuantized"],
    ),
    (
        "q4-default",
        "onnx/model_q4.onnx",
        &["MatMulNBits", "Less"],
        &["Trilu"],
    ),
    ("q4-16", "onnx/model_q4.onnx", &["MatMulNBits"], &[]),
    ("q4-256", "onnx/model_q4.onnx", &["MatMulNBits"], &[]),
    ("q4-float-zp", "onnx/model_q4.onnx", &["MatMulNBits"], &[]),
    (
        "q4f16",
        "onnx/model_q4f16.onnx",
        &["MatMulNBits", "Cast"],
        &[],
    ),
    (
        "q4f16-io",
        "onnx/model_q4f16.onnx",
        &["MatMulNBits", "Cast"],
        &[],
    ),
    ("q8", "onnx/model_q8.onnx", &["MatMulNBits"], &[]),
    ("q8-zp", "onnx/model_q8.onnx", &["MatMulNBits"], &[]),
    (
        "qdq-channel",
        "model.onnx",
        &[
            "DequantizeLinear",
            "Attention",
            "RotaryEmbedding",
            "RMSNormalization",
        ],
        &["Softmax"],
    ),
    (
        "qdq-block",
        "model.onnx",
        &["DequantizeLinear", "Attention"],
        &["Softmax"],
    ),
    (
        "qdq-gemm-transposed",
        "model.onnx",
        &["DequantizeLinear", "Transpose", "Softmax"],
        &[],
    ),
    (
        "opset23-mask",
        "model.onnx",
        &["Attention", "Trilu", "Where"],
        &["Softmax"],
    ),
    (
        "genai-int4",
        "model.onnx",
        &[
            "GroupQueryAttention",
            "GatherBlockQuantized",
            "SkipSimplifiedLayerNormalization",
        ],
        &["RotaryEmbedding", "Constant"],
    ),
    (
        "genai-int4-split",
        "model.onnx",
        &["GroupQueryAttention", "RotaryEmbedding", "MatMulNBits"],
        &["GatherBlockQuantized"],
    ),
    (
        "genai-int8",
        "model.onnx",
        &["GroupQueryAttention", "GatherBlockQuantized"],
        &[],
    ),
    (
        "genai-f16",
        "model.onnx",
        &["GroupQueryAttention", "MatMul"],
        &["MatMulNBits"],
    ),
    ("gemma", "model.onnx", &["Tanh"], &["Sigmoid"]),
    (
        "phi",
        "onnx/model_int8.onnx",
        &["LayerNormalization", "Erf"],
        &["Sigmoid", "ReduceMean"],
    ),
    ("mistral", "model.onnx", &["Or", "LessOrEqual"], &["Trilu"]),
];

#[test]
fn every_form_is_what_its_name_says() {
    for ((name, file, with, without), form) in KNOWN_BY.into_iter().zip(PRESETS) {
        assert_eq!(form.name, name);
        let folder = written(form, false);
        assert!(
            graph_path(&folder.path().join("out"), form).ends_with(file),
            "{name}"
        );
        let graph = model(&folder, form).graph.unwrap();
        let operators = operators(&graph);
        for operator in with {
            assert!(operators.contains(operator), "{name} has no {operator}");
        }
        for operator in without {
            assert!(!operators.contains(operator), "{name} has {operator}");
        }
        let inputs: Vec<&str> = graph.input.iter().map(|input| &*input.name).collect();
        let rotated_inside = matches!(
            name,
            "genai-int4" | "genai-int8" | "genai-f16" | "dynamic-uint8-gqa"
        );
        assert_eq!(inputs.contains(&"position_ids"), !rotated_inside, "{name}");
        assert_eq!(inputs.contains(&"use_cache_branch"), name == "merged");
    }
    assert_eq!(PRESETS.len(), KNOWN_BY.len());
}

#[test]
fn the_folder_is_as_the_exporter_leaves_it() {
    let names = |form: &str| {
        let folder = written(Form::find(form).unwrap(), false);
        let files = files(&folder.path().join("out"));
        let text = String::from_utf8(files[Path::new("tokenizer_config.json")].clone()).unwrap();
        let names = files.keys().map(|name| name.display().to_string());
        (names.collect::<Vec<_>>(), text.contains("chat_template"))
    };
    let common = ["config.json", "generation_config.json"];
    let tokenizer = ["tokenizer.json", "tokenizer_config.json"];
    let (old, template_inside) = names("dynamic-int8");
    let graph = ["onnx/model_int8.onnx"];
    assert_eq!(old, [&common[..], &graph, &tokenizer].concat());
    assert!(template_inside);
    let (new, template_inside) = names("genai-int4");
    let graph = ["genai_config.json"];
    let rest = ["model.onnx", "model.onnx.data"];
    let expected = [
        &["chat_template.jinja"],
        &common[..1],
        &graph,
        &common[1..],
        &rest,
        &tokenizer,
    ];
    assert_eq!(new, expected.concat());
    assert!(!template_inside);
}

#[test]
fn weights_inside_the_graph_are_those_beside_it() {
    let [inside, beside] = ["f32-sdpa", "f32"].map(|form| Form::find(form).unwrap());
    let folder = written(beside, false);
    let data = fs::read(folder.path().join("out/model.onnx_data")).unwrap();
    let beside = model(&folder, beside).graph.unwrap();
    let folder = written(inside, false);
    let inside = model(&folder, inside).graph.unwrap();
    assert_eq!(inside.initializer.len(), beside.initializer.len());
    for tensor in &beside.initializer {
        let twin = self::tensor(&inside, &tensor.name);
        assert_eq!(twin.dims, tensor.dims);
        assert!(twin.external_data.is_empty());
        if tensor.data_location() == DataLocation::External {
            let entry = |key: &str| {
                let entry = tensor.external_data.iter().find(|e| e.key == key).unwrap();
                entry.value.parse::<usize>().unwrap()
            };
            let bytes = &data[entry("offset")..][..entry("length")];
            assert_eq!(twin.raw_data, bytes, "{}", tensor.name);
        }
    }
}

#[test]
fn both_branches_of_the_merged_form_read_the_weights_outside() {
    let form = Form::find("merged").unwrap();
    let graph = model(&written(form, false), form).graph.unwrap();
    assert_eq!(graph.node.len(), 1);
    let branches = &graphs(&graph)[1..];
    assert_eq!(branches.len(), 2);
    for branch in branches {
        assert!(branch.initializer.is_empty());
        let products = branch
            .node
            .iter()
            .filter(|node| node.op_type == "MatMulInteger");
        assert_eq!(products.count(), 2 * 7 + 1);
    }
}

#[test]
fn biases_stand_where_the_form_has_them() {
    let inputs = |form: &str, operator: &str| {
        let form = Form::find(form).unwrap();
        let graph = model(&written(form, true), form).graph.unwrap();
        let mut nodes = graph.node.iter();
        let node = nodes.find(|node| {
            node.op_type == operator
                && node
                    .input
                    .iter()
                    .any(|name| name.contains("proj") && name.contains("bias"))
        });
        node.unwrap().input.clone()
    };
    let bias = "model.layers.0.self_attn.q_proj.bias";
    assert_eq!(inputs("dynamic-int8", "Add")[0], bias);
    assert_eq!(inputs("dynamic-int8-channel", "Add")[1], bias);
    assert_eq!(inputs("q8-zp", "MatMulNBits")[4..], ["", bias]);
    let bias = "model.layers.0.attn.qkv_proj.Add.bias";
    assert_eq!(inputs("genai-int4", "Add")[1], bias);
}

#[test]
fn half_precision_is_in_weights_and_where_the_form_says_in_cache_and_logits() {
    let (full, half) = (DataType::Float, DataType::Float16);
    for (name, logits, cache) in [
        ("f16", half, half),
        ("q4f16", half, half),
        ("q4f16-io", full, full),
        ("genai-f16", full, half),
    ] {
        let form = Form::find(name).unwrap();
        let graph = model(&written(form, false), form).graph.unwrap();
        let kind = |value: &tract_onnx::pb::ValueInfoProto| {
            let Some(tract_onnx::pb::type_proto::Value::TensorType(tensor)) =
                value.r#type.as_ref().unwrap().value.as_ref()
            else {
                panic!("{} is not a tensor", value.name);
            };
            tensor.elem_type
        };
        assert_eq!(kind(&graph.output[0]), logits as i32, "{name}");
        assert!(graph.output[1..].iter().all(|o| kind(o) == cache as i32));
        let norm = graph
            .initializer
            .iter()
            .find(|t| t.name.contains("norm"))
            .unwrap();
        assert_eq!(norm.data_type, half as i32);
    }
}

#[test]
fn the_goldens_are_of_these_bytes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/forms");
    let mut forms = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap() {
        let golden: Value =
            serde_json::from_slice(&fs::read(entry.unwrap().path()).unwrap()).unwrap();
        let form = Form::find(golden["form"].as_str().unwrap()).unwrap();
        let folder = written(form, golden["bias"].as_bool().unwrap());
        for (file, digest) in golden["files"].as_object().unwrap() {
            let found = sha256_of(&folder.path().join("out").join(file)).unwrap();
            assert_eq!(
                digest.as_str().unwrap(),
                found,
                "{} has changed: run tests/goldens/forms.py",
                form.name
            );
        }
        forms.insert(form.name);
    }
    assert_eq!(forms.len(), PRESETS.len());
}

#[test]
fn the_readme_has_a_row_for_every_form() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = fs::read_to_string(path).unwrap();
    for form in PRESETS {
        assert!(
            text.contains(&format!("\n| `{}` |", form.name)),
            "{}",
            form.name
        );
    }
}
