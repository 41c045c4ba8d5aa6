//! A GGUF file from its bytes to what the bundle says its weights are.

use super::*;
use crate::gguf::testing::{entry, file, text, texts};
use crate::tiny::hash;
use crate::{Precision, graph};
use half::f16;
use indicatif::ProgressBar;
use prost::Message;
use std::collections::HashMap;
use tract_onnx::pb::{ModelProto, TensorProto};

#[test]
fn interleaved_rows_become_halves() {
    // Of four rows (0, 1) turn together, then (2, 3).
    let order: Vec<usize> = (0..8).map(|row| interleaved(row, 4)).collect();
    assert_eq!(order, [0, 2, 1, 3, 4, 6, 5, 7]);
}

fn header(heads: u32, tensors: &[(&str, &[u64], u32, &[u8])]) -> Vec<u8> {
    let size = |key: &str, n: u32| entry(&format!("llama.{key}"), 4, &n.to_le_bytes());
    let float = |key: &str, x: f32| entry(&format!("llama.{key}"), 6, &x.to_le_bytes());
    let entries = [
        entry("general.architecture", 8, &text("llama")),
        size("embedding_length", 64),
        size("attention.head_count", heads),
        size("attention.head_count_kv", 2),
        size("rope.dimension_count", 16),
        size("block_count", 1),
        size("feed_forward_length", 64),
        size("context_length", 32),
        float("rope.freq_base", 10_000.0),
        float("attention.layer_norm_rms_epsilon", 1e-5),
        texts("tokenizer.ggml.tokens", &["a", "b"]),
    ];
    file(&entries, tensors)
}

#[test]
fn a_model_that_would_come_out_wrong_is_refused() {
    let says = |bytes: &[u8], part: &str| {
        let gguf = Gguf::parse(bytes).unwrap();
        let error = format!("{:#}", Source::open(&gguf).unwrap_err());
        assert!(error.contains(part), "{error}");
    };
    says(&header(3, &[]), "don't make a width of 64");
    says(
        &header(4, &[("blk.0.attn_q.bias", &[64], 0, &[0; 256])]),
        "blk.0.attn_q.bias",
    );
    says(
        &header(4, &[]),
        "the file has no tensor \"token_embd.weight\"",
    );
}

/// A qwen2 of one layer: plain numbers that count up, a head of its own, biases, every type of token.
fn qwen2() -> Vec<u8> {
    let size = |key: &str, n: u32| entry(&format!("qwen2.{key}"), 4, &n.to_le_bytes());
    let float = |key: &str, x: f32| entry(&format!("qwen2.{key}"), 6, &x.to_le_bytes());
    let mut types = [&5u32.to_le_bytes()[..], &5u64.to_le_bytes()].concat();
    for kind in [1i32, 5, 4, 3, 3] {
        types.extend(kind.to_le_bytes());
    }
    let tokens = ["a", "[PAD]", "<tool_call>", "<|im_end|>", "<|endoftext|>"];
    let entries = [
        entry("general.architecture", 8, &text("qwen2")),
        size("embedding_length", 64),
        size("attention.head_count", 4),
        size("attention.head_count_kv", 2),
        size("block_count", 1),
        size("feed_forward_length", 96),
        size("context_length", 32),
        float("rope.freq_base", 1e6),
        float("attention.layer_norm_rms_epsilon", 1e-6),
        entry("tokenizer.ggml.model", 8, &text("gpt2")),
        entry("tokenizer.ggml.pre", 8, &text("qwen2")),
        texts("tokenizer.ggml.tokens", &tokens),
        entry("tokenizer.ggml.token_type", 9, &types),
        texts("tokenizer.ggml.merges", &[]),
        entry("tokenizer.ggml.eos_token_id", 4, &3u32.to_le_bytes()),
    ];
    let count = |n: u64| -> Vec<u8> { (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect() };
    let shapes: [(&str, &[u64]); 15] = [
        ("token_embd.weight", &[64, 5]),
        ("output_norm.weight", &[64]),
        ("output.weight", &[64, 5]),
        ("blk.0.attn_norm.weight", &[64]),
        ("blk.0.attn_q.weight", &[64, 64]),
        ("blk.0.attn_q.bias", &[64]),
        ("blk.0.attn_k.weight", &[64, 32]),
        ("blk.0.attn_k.bias", &[32]),
        ("blk.0.attn_v.weight", &[64, 32]),
        ("blk.0.attn_v.bias", &[32]),
        ("blk.0.attn_output.weight", &[64, 64]),
        ("blk.0.ffn_norm.weight", &[64]),
        ("blk.0.ffn_gate.weight", &[64, 96]),
        ("blk.0.ffn_up.weight", &[64, 96]),
        ("blk.0.ffn_down.weight", &[96, 64]),
    ];
    let data = shapes.map(|(name, shape)| (name, shape, count(shape.iter().product())));
    let tensors: Vec<(&str, &[u64], u32, &[u8])> = data
        .iter()
        .map(|(name, shape, bytes)| (*name, *shape, 0, bytes.as_slice()))
        .collect();
    file(&entries, &tensors)
}

#[test]
fn a_qwen2_has_biases_a_head_and_its_rows_in_order() {
    let bytes = qwen2();
    let gguf = Gguf::parse(&bytes).unwrap();
    let source = Source::open(&gguf).unwrap();
    let decoder = source.decoder();
    assert_eq!(
        (decoder.architecture, decoder.biases, decoder.tied),
        (Architecture::Qwen2, Biases::Inputs, false)
    );
    assert_eq!((decoder.shape.head_dim, decoder.shape.vocab), (16, 5));
    let first = |part, row| source.load(part, row..row + 1).unwrap().into_values()[0];
    assert_eq!(first(Part::Query(0), 1).to_bits(), 64f32.to_bits());
    let bias = source.load(Part::KeyBias(0), 0..1).unwrap().into_values();
    assert_eq!(bias[..3], [0.0, 1.0, 2.0]);
}

#[test]
fn every_type_of_token_has_its_place() {
    let bytes = qwen2();
    let gguf = Gguf::parse(&bytes).unwrap();
    let vocabulary = vocabulary(&gguf).unwrap();
    assert_eq!(vocabulary.splitting, Splitting::Qwen2);
    assert_eq!(
        (vocabulary.special.as_slice(), vocabulary.defined.as_slice()),
        (&[3, 4][..], &[2][..])
    );
    let stops = stop_tokens(&gguf, &vocabulary).unwrap();
    assert_eq!(stops, ["<|im_end|>", "<|endoftext|>"]);
    assert_eq!(chat_template(&gguf).unwrap(), None);
}

/// Random blocks with a Q4_1 block's layout, or a Q8_0 block's, as ggml describes them.
fn blocks(kind: u32, weights: u64, seed: u64) -> Vec<u8> {
    let half = |least: f32, range: f32, draw: u64| {
        f16::from_f32(least + range * (draw % 1000) as f32 / 1000.0).to_le_bytes()
    };
    let block = |block: u64| {
        let draw = |i: u64| hash(seed << 32 | block << 8 | i);
        let mut bytes = half(0.001, 0.05, draw(0)).to_vec();
        if kind == 3 {
            bytes.extend(half(-0.5, 0.6, draw(1)));
        }
        let count = if kind == 3 { 16 } else { 32 };
        bytes.extend((0..count).map(|i| (draw(2 + i) as u8).max(u8::from(kind == 8) * 129)));
        // A block of one value, and one of nothing.
        if kind == 3 && block < 2 {
            bytes[..2].fill(0);
            bytes[2..4].fill(0x30 * (block as u8));
        }
        bytes
    };
    (0..weights / 32).flat_map(block).collect()
}

/// What ggml says that a block holds.
fn ggml(kind: u32, bytes: &[u8]) -> Vec<f32> {
    let half = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]).to_f32();
    if kind == 8 {
        let weights = |b: &[u8]| {
            b[2..]
                .iter()
                .map(|w| half(b) * f32::from(*w as i8))
                .collect()
        };
        return bytes
            .chunks(34)
            .flat_map(|b| -> Vec<f32> { weights(b) })
            .collect();
    }
    let value = |b: &[u8], q: u8| f32::from(q) * half(b) + half(&b[2..]);
    bytes
        .chunks(20)
        .flat_map(|b| {
            let low = b[4..].iter().map(|q| value(b, q & 15));
            low.chain(b[4..].iter().map(|q| value(b, q >> 4)))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// The bytes of a bundle's tensors, by name.
fn tensors(dir: &std::path::Path) -> HashMap<String, Vec<u8>> {
    let model = ModelProto::decode(&*std::fs::read(dir.join("model.onnx")).unwrap()).unwrap();
    let data = std::fs::read(dir.join("model.onnx.data")).unwrap();
    let bytes = |tensor: TensorProto| {
        let number = |key: &str| {
            let entry = tensor.external_data.iter().find(|entry| entry.key == key);
            entry.map(|entry| entry.value.parse::<usize>().unwrap())
        };
        let inside = number("offset").map(|at| data[at..at + number("length").unwrap()].to_vec());
        let bytes = inside.unwrap_or(tensor.raw_data.clone());
        (tensor.name, bytes)
    };
    let all = model.graph.unwrap().initializer;
    all.into_iter().map(bytes).collect()
}

/// A `MatMulNBits` weight read as an importer may: the minimum is the product of zero point and scale.
fn read_back(tensors: &HashMap<String, Vec<u8>>, name: &str) -> Vec<f32> {
    let floats = |tensor: &str| -> Vec<f32> {
        let bytes = tensors[&format!("{name}.{tensor}")].as_chunks().0.iter();
        bytes.map(|&b| f32::from_le_bytes(b)).collect()
    };
    let (scales, zero_points) = (floats("scale"), floats("zero_point"));
    let weights = tensors[&format!("{name}.q")]
        .iter()
        .flat_map(|pair| [pair & 15, pair >> 4]);
    let value = |(i, weight): (usize, u8)| {
        let minimum = -f64::from(zero_points[i / 32]) * f64::from(scales[i / 32]);
        f32::from(weight) * scales[i / 32] + f16::from_f64(minimum).to_f32()
    };
    weights.enumerate().map(value).collect()
}

#[test]
fn four_bit_weights_come_out_as_they_are_in_the_file() {
    let (q, k, square) = ([64, 64], [32, 64], [64, 64]);
    let parts: [(&str, &str, [u64; 2]); 7] = [
        ("attn_q", "q_proj", q),
        ("attn_k", "k_proj", k),
        ("attn_v", "v_proj", k),
        ("attn_output", "o_proj", square),
        ("ffn_gate", "gate_proj", square),
        ("ffn_up", "up_proj", square),
        ("ffn_down", "down_proj", square),
    ];
    let norm: Vec<u8> = (0..64).flat_map(|_| 1f32.to_le_bytes()).collect();
    let table = blocks(8, 2 * 64, 99);
    let stored = parts.map(|(name, _, [rows, columns])| {
        let bytes = blocks(3, rows * columns, name.len() as u64);
        (format!("blk.0.{name}.weight"), [columns, rows], bytes)
    });
    let mut all: Vec<(&str, &[u64], u32, &[u8])> = vec![
        ("token_embd.weight", &[64, 2], 8, &table),
        ("output_norm.weight", &[64], 0, &norm),
        ("blk.0.attn_norm.weight", &[64], 0, &norm),
        ("blk.0.ffn_norm.weight", &[64], 0, &norm),
    ];
    for (name, dimensions, bytes) in &stored {
        all.push((name, dimensions, 3, bytes));
    }
    let bytes = header(4, &all);
    let gguf = Gguf::parse(&bytes).unwrap();
    let source = Source::open(&gguf).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let bar = ProgressBar::hidden();
    graph::write(
        dir.path(),
        "m",
        source.decoder(),
        Precision::Q4,
        &source,
        &bar,
    )
    .unwrap();
    let tensors = tensors(dir.path());
    for ((_, [columns, rows], bytes), (_, name, _)) in stored.iter().zip(parts) {
        let (expected, found) = (
            ggml(3, bytes),
            read_back(&tensors, &format!("layers.0.{name}")),
        );
        assert_eq!(found.len() as u64, columns * rows);
        for (row, found) in found.chunks(64).enumerate() {
            // Channel i of a head of 16 is the file's row 2i, channel 8 + i its row 2i + 1.
            let turned = row / 16 * 16 + row % 8 * 2 + row % 16 / 8;
            let from = if matches!(name, "q_proj" | "k_proj") {
                turned
            } else {
                row
            };
            let expected = &expected[from * 64..][..64];
            let same = expected
                .iter()
                .zip(found)
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name}, row {row}");
        }
    }
    let scales = tensors["embed.scale"].as_chunks().0.iter();
    let scales: Vec<f32> = scales.map(|&b| f32::from_le_bytes(b)).collect();
    let table_back = tensors["embed.q"].iter().enumerate();
    let table_back: Vec<f32> = table_back
        .map(|(i, q)| scales[i / 32] * f32::from(*q as i8))
        .collect();
    assert_eq!(table_back, ggml(8, &table));
}
