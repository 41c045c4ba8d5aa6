//! Real weights in, ONNX bundle out: reads published weights, quantises them to the native precision and
//! writes the folder that the agent loads. Runs where models are prepared; nothing of it runs a model.

#![forbid(unsafe_code)]

pub mod bundle;
pub mod cache;
pub mod catalogue;
pub mod convert;
pub mod dequant;
pub mod fetch;
pub mod gguf;
pub mod graph;
pub mod llama;
pub mod onnx;
pub mod pull;
pub mod quant;
pub mod tiny;
pub mod tokenizer;

use std::fmt;

/// How a bundle's weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// Blocks of 32 int8 weights with one scale each: the native form, what gateways run.
    Int8,
    /// Plain f32: the reference that `millwright eval` compares with.
    F32,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Int8 => "int8",
            Self::F32 => "f32",
        })
    }
}
