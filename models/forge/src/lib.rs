//! Real weights in, ONNX bundle out: reads published weights, quantises them to the native precision and
//! writes the folder that the agent loads. Runs where models are prepared; nothing of it runs a model.

#![forbid(unsafe_code)]

pub mod bundle;
pub mod cache;
pub mod catalogue;
pub mod convert;
pub mod dequant;
pub mod export;
pub mod fetch;
pub mod from_folder;
pub mod from_gguf;
pub mod gguf;
pub mod graph;
pub mod like;
pub mod llama;
pub mod onnx;
mod own;
pub mod pull;
pub mod quant;
pub mod rotary;
pub mod stored;
pub mod tiny;
pub mod tokenizer;

use std::fmt;

/// How a bundle's weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Blocks of 32 int8 weights with one scale each: the native form, what gateways run.
    Int8,
    /// Linears in blocks of 32 four-bit weights with a scale and a minimum each, the embedding as in int8. For
    /// weights that are published so; others lose much by it.
    Q4,
    /// Plain f32: the reference that `millwright eval` compares with.
    F32,
}

impl Precision {
    pub const ALL: [Self; 3] = [Self::Int8, Self::Q4, Self::F32];
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Int8 => "int8",
            Self::Q4 => "q4",
            Self::F32 => "f32",
        })
    }
}
