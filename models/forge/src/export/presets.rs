//! The choices that people's exporters make, by name.

use super::form::{
    Architecture, Attention, Dequantised, Embedding, Float, Form, Half, Head, Interface, Linears,
    NBits, Norm, Storage, Vintage, Zeros,
};
use anyhow::{Context, Result};
use std::fmt::Write as _;

impl Form {
    /// A preset by its name.
    pub fn find(name: &str) -> Result<&'static Self> {
        let names = || PRESETS.iter().map(|form| form.name).collect::<Vec<_>>();
        let found = PRESETS.iter().find(|form| form.name == name);
        found.with_context(|| {
            format!(
                "there is no form {name:?}; there are {}",
                names().join(", ")
            )
        })
    }

    /// A line for each preset.
    pub fn list() -> String {
        let mut text = String::new();
        for form in PRESETS {
            let _ = writeln!(text, "{:<22}{}", form.name, form.about);
        }
        text
    }
}

const FOUR: NBits = NBits {
    bits: 4,
    block: 32,
    zeros: Zeros::Packed,
    flat: false,
    bias_inside: false,
    accuracy: 0,
};
const EIGHT: NBits = NBits {
    bits: 8,
    zeros: Zeros::Absent,
    ..FOUR
};

const HALF: Half = Half {
    islands: false,
    cache: true,
    logits: true,
};

const F32: Form = Form {
    name: "f32",
    about: "plain f32, primitive attention, tied head by Transpose, external data",
    architecture: Architecture::Llama,
    linears: Linears::Plain,
    embedding: Embedding::Plain,
    head: Head::Tied,
    attention: Attention::Primitive(Vintage::New),
    norm: Norm::Primitive,
    float: Float::F32,
    interface: Interface::Plain,
    storage: Storage::External,
    opset: 18,
};
const DYNAMIC: Form = Form {
    linears: Linears::Dynamic {
        unsigned: false,
        channel: false,
        swapped: false,
    },
    embedding: Embedding::Tensor,
    head: Head::Own,
    attention: Attention::Primitive(Vintage::Old),
    interface: Interface::Web("model_int8"),
    storage: Storage::Inline,
    opset: 14,
    ..F32
};
const NBITS: Form = Form {
    linears: Linears::NBits(FOUR),
    head: Head::Own,
    interface: Interface::Web("model_q4"),
    storage: Storage::Inline,
    opset: 17,
    ..F32
};
const STANDARD: Form = Form {
    attention: Attention::Standard { mask: false },
    norm: Norm::Standard,
    interface: Interface::Plain,
    opset: 23,
    ..F32
};
const GENERATIVE: Form = Form {
    linears: Linears::NBits(NBits {
        zeros: Zeros::Absent,
        accuracy: 4,
        ..FOUR
    }),
    embedding: Embedding::Shared,
    attention: Attention::Grouped {
        packed: true,
        rotary: true,
    },
    norm: Norm::Simplified,
    interface: Interface::Generative,
    opset: 21,
    ..F32
};

/// All named forms.
pub const PRESETS: &[Form] = &[
    F32,
    Form {
        name: "f32-sdpa",
        about: "f32 with the scale split between q and k, inline",
        attention: Attention::Primitive(Vintage::Sdpa),
        storage: Storage::Inline,
        interface: Interface::Web("model"),
        ..F32
    },
    Form {
        name: "f16",
        about: "f16 weights, activations, cache and logits; norms, softmax and angles in f32 between casts",
        head: Head::OwnPlain,
        float: Float::F16(Half {
            islands: true,
            ..HALF
        }),
        interface: Interface::Web("model_fp16"),
        opset: 17,
        ..F32
    },
    Form {
        name: "dynamic-int8",
        about: "MatMulInteger, int8 per tensor, zero point 0 written out; uint8 embedding, head its own copy",
        ..DYNAMIC
    },
    Form {
        name: "dynamic-int8-channel",
        about: "MatMulInteger, int8 per channel, no zero point, Mul operands swapped; f32 embedding",
        linears: Linears::Dynamic {
            unsigned: false,
            channel: true,
            swapped: true,
        },
        embedding: Embedding::Plain,
        attention: Attention::Primitive(Vintage::New),
        opset: 17,
        ..DYNAMIC
    },
    Form {
        name: "dynamic-uint8",
        about: "MatMulInteger, uint8 per tensor with zero point; uint8 embedding, head tied to it",
        linears: Linears::Dynamic {
            unsigned: true,
            channel: false,
            swapped: false,
        },
        embedding: Embedding::Tensor,
        head: Head::Tied,
        interface: Interface::Web("model_quantized"),
        ..DYNAMIC
    },
    Form {
        name: "dynamic-uint8-channel",
        about: "MatMulInteger, uint8 with scale and zero point per channel; uint8 embedding, head tied to it",
        linears: Linears::Dynamic {
            unsigned: true,
            channel: true,
            swapped: false,
        },
        embedding: Embedding::Tensor,
        head: Head::Tied,
        attention: Attention::Primitive(Vintage::Sdpa),
        interface: Interface::Web("model_quantized"),
        opset: 18,
        ..DYNAMIC
    },
    Form {
        name: "dynamic-uint8-gqa",
        about: "dynamic-uint8 made of the generative builder's graph: GroupQueryAttention on packed q, k, v",
        linears: Linears::Dynamic {
            unsigned: true,
            channel: false,
            swapped: false,
        },
        attention: GENERATIVE.attention,
        norm: Norm::Simplified,
        interface: Interface::Web("model_quantized"),
        opset: 21,
        ..DYNAMIC
    },
    Form {
        name: "merged",
        about: "dynamic-int8 in an If with a branch for the first step and one for those with a past",
        interface: Interface::Merged,
        ..DYNAMIC
    },
    Form {
        name: "q4",
        about: "MatMulNBits, 4 bits, blocks of 32, packed zero points; f32 embedding, head its own copy",
        ..NBITS
    },
    Form {
        name: "q4-default",
        about: "MatMulNBits, 4 bits, blocks of 128, no zero points; f32 head tied to the embedding",
        linears: Linears::NBits(NBits {
            block: 128,
            zeros: Zeros::Absent,
            ..FOUR
        }),
        head: Head::Tied,
        attention: Attention::Primitive(Vintage::Old),
        opset: 14,
        ..NBITS
    },
    Form {
        name: "q4-16",
        about: "MatMulNBits, 4 bits, blocks of 16, packed zero points, flat scales; f32 head of its own",
        linears: Linears::NBits(NBits {
            block: 16,
            flat: true,
            ..FOUR
        }),
        head: Head::OwnPlain,
        ..NBITS
    },
    Form {
        name: "q4-256",
        about: "MatMulNBits, 4 bits, blocks of 256, packed zero points",
        linears: Linears::NBits(NBits { block: 256, ..FOUR }),
        attention: Attention::Primitive(Vintage::Sdpa),
        ..NBITS
    },
    Form {
        name: "q4-float-zp",
        about: "MatMulNBits, 4 bits, blocks of 32, zero points that are numbers",
        linears: Linears::NBits(NBits {
            zeros: Zeros::Floats,
            ..FOUR
        }),
        ..NBITS
    },
    Form {
        name: "q4f16",
        about: "q4 made f16 throughout: activations, norms, angles, scales, embedding, cache and logits",
        float: Float::F16(HALF),
        interface: Interface::Web("model_q4f16"),
        ..NBITS
    },
    Form {
        name: "q4f16-io",
        about: "the same with cache and logits in f32, cast where they enter and leave",
        float: Float::F16(Half {
            cache: false,
            logits: false,
            ..HALF
        }),
        interface: Interface::Web("model_q4f16"),
        ..NBITS
    },
    Form {
        name: "q8",
        about: "MatMulNBits, 8 bits, blocks of 32, no zero points (128)",
        linears: Linears::NBits(EIGHT),
        interface: Interface::Web("model_q8"),
        ..NBITS
    },
    Form {
        name: "q8-zp",
        about: "MatMulNBits, 8 bits, blocks of 64, zero points, a bias as its input 5; external data",
        linears: Linears::NBits(NBits {
            block: 64,
            zeros: Zeros::Packed,
            bias_inside: true,
            ..EIGHT
        }),
        interface: Interface::Web("model_q8"),
        storage: Storage::External,
        ..NBITS
    },
    Form {
        name: "qdq-channel",
        about: "DequantizeLinear per output before MatMul, int8; opset 23's attention, rotary embedding and norm",
        linears: Linears::Dequantised(Dequantised::Channel),
        embedding: Embedding::Rows,
        ..STANDARD
    },
    Form {
        name: "qdq-block",
        about: "DequantizeLinear in blocks of 64, uint8 with zero points; opset 23's attention",
        linears: Linears::Dequantised(Dequantised::Blocks(64)),
        embedding: Embedding::Blocks(64),
        ..STANDARD
    },
    Form {
        name: "qdq-gemm-transposed",
        about: "DequantizeLinear per output on [outputs, inputs], then Transpose; primitive attention",
        linears: Linears::Dequantised(Dequantised::Transposed),
        opset: 17,
        ..F32
    },
    Form {
        name: "opset23-mask",
        about: "f32, opset 23's attention with a mask of numbers instead of is_causal",
        attention: Attention::Standard { mask: true },
        ..STANDARD
    },
    Form {
        name: "genai-int4",
        about: "GroupQueryAttention on packed q, k, v, rotated inside; 4 bits; embedding and head share a table",
        ..GENERATIVE
    },
    Form {
        name: "genai-int4-split",
        about: "GroupQueryAttention on q, k, v of their own, rotated outside by position_ids; zero points",
        linears: Linears::NBits(FOUR),
        embedding: Embedding::Plain,
        head: Head::Own,
        attention: Attention::Grouped {
            packed: false,
            rotary: false,
        },
        ..GENERATIVE
    },
    Form {
        name: "genai-int8",
        about: "genai-int4 in 8 bits, q, k, v of their own, rotated inside",
        linears: Linears::NBits(EIGHT),
        attention: Attention::Grouped {
            packed: false,
            rotary: true,
        },
        ..GENERATIVE
    },
    Form {
        name: "genai-f16",
        about: "GroupQueryAttention, all in f16; logits cast to f32",
        linears: Linears::Plain,
        embedding: Embedding::Plain,
        head: Head::Own,
        float: Float::F16(Half {
            logits: false,
            ..HALF
        }),
        ..GENERATIVE
    },
    Form {
        name: "gemma",
        about: "gemma2's layers in f32: norms of 1 + w on both sides of a block, GeGLU, scaled embedding",
        architecture: Architecture::Gemma,
        ..F32
    },
    Form {
        name: "phi",
        about: "phi's layers as dynamic-int8: layer norms, attention beside MLP, half a head rotated, biases",
        architecture: Architecture::Phi,
        opset: 17,
        ..DYNAMIC
    },
    Form {
        name: "mistral",
        about: "f32 whose mask is a sliding window of 8 positions",
        architecture: Architecture::Mistral,
        ..F32
    },
];
