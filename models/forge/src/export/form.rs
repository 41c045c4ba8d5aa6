//! What can be chosen of a graph, independently. The choices that exporters make stand in `presets`.

/// A way to write a model down.
#[derive(Debug, Clone)]
pub struct Form {
    pub name: &'static str,
    /// A line for whoever chooses.
    pub about: &'static str,
    pub architecture: Architecture,
    pub linears: Linears,
    pub embedding: Embedding,
    pub head: Head,
    pub attention: Attention,
    pub norm: Norm,
    /// The type of activations, cache and logits.
    pub float: Float,
    pub interface: Interface,
    pub storage: Storage,
    pub opset: i64,
}

/// What the layers compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// RMS norms, rotary heads, SwiGLU. With biases on q, k and v it is Qwen2.
    Llama,
    /// Norms of `1 + w`, before and after each block; GeGLU; the embedding times √width.
    Gemma,
    /// Layer norms, attention and MLP side by side, half of a head rotated, biases everywhere.
    Phi,
    /// Llama that sees only the last [`WINDOW`] positions.
    Mistral,
}

/// Positions that Mistral's attention sees: few, so that short prompts meet the edge.
pub const WINDOW: usize = 8;

/// A weight times an activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Linears {
    /// `MatMul` with `[inputs, outputs]`.
    Plain,
    /// `DynamicQuantizeLinear` → `MatMulInteger` → `Cast` → `Mul`.
    Dynamic {
        unsigned: bool,
        /// A scale for each output instead of one.
        channel: bool,
        /// The operands of both `Mul`s and of the bias' `Add` the other way round, and no zero point.
        swapped: bool,
    },
    /// `DequantizeLinear` → `MatMul`.
    Dequantised(Dequantised),
    /// `com.microsoft.MatMulNBits`.
    NBits(NBits),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dequantised {
    /// int8 `[inputs, outputs]`, a scale for each output.
    Channel,
    /// uint8 `[inputs, outputs]`, scale and zero point for blocks of this many inputs.
    Blocks(usize),
    /// int8 `[outputs, inputs]`, a scale for each output, turned by a `Transpose`.
    Transposed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NBits {
    /// 4 or 8.
    pub bits: usize,
    /// Inputs that share a scale; a row's last block is filled up.
    pub block: usize,
    pub zeros: Zeros,
    /// Scales and zero points in one axis, as they were first written.
    pub flat: bool,
    /// The bias as the operator's input, not as an `Add`.
    pub bias_inside: bool,
    /// The attribute `accuracy_level`, if it is not 0: a permission to round activations.
    pub accuracy: i64,
}

/// The zero points of [`NBits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeros {
    /// The middle: 8, or 128 in eight bits.
    Absent,
    /// As many bits as a weight.
    Packed,
    /// A number, of the scales' type.
    Floats,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Embedding {
    /// `Gather`.
    Plain,
    /// `Gather` → `DequantizeLinear`: uint8 with one scale and zero point, whatever the linears are.
    Tensor,
    /// `DequantizeLinear` → `Gather`: int8 with a scale for each token.
    Rows,
    /// `DequantizeLinear` → `Gather`: uint8 with scale and zero point for blocks of this many numbers.
    Blocks(usize),
    /// `com.microsoft.GatherBlockQuantized`, quantised as the linears are, in the head's shape.
    Shared,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// A copy of the embedding, written as all linears are.
    Own,
    /// A copy in plain numbers.
    OwnPlain,
    /// The embedding's tensors.
    Tied,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// Dozens of small operators.
    Primitive(Vintage),
    /// Opset 23's `Attention` and `RotaryEmbedding`, causal by the attribute or by a mask.
    Standard { mask: bool },
    /// `com.microsoft.GroupQueryAttention`.
    Grouped {
        /// q, k and v from one linear.
        packed: bool,
        /// Rotated inside; else by `com.microsoft.RotaryEmbedding`, and there is an input for positions.
        rotary: bool,
    },
}

/// Of which years a primitive attention is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vintage {
    /// Rotary tables gathered by position, a mask by `Less` and `Where`, halves by computed shapes, `Div` by √n.
    Old,
    /// Angles computed from positions, a mask by `Trilu` and `Greater`, `Mul` by 1/√n.
    New,
    /// As new, but q and kᵀ are each multiplied by the root of a computed scale.
    Sdpa,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// `Pow`, `ReduceMean`, `Add`, `Sqrt`, `Div`, `Mul`, `Mul`; in f32 between casts when activations are f16.
    Primitive,
    /// Opset 23's `RMSNormalization`.
    Standard,
    /// `SimplifiedLayerNormalization`, and `com.microsoft.SkipSimplifiedLayerNormalization` with the residual.
    Simplified,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    F32,
    F16(Half),
}

/// How far f16 goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Half {
    /// Norms, softmax and angles are f32 between casts: a tracer keeps them so, the pass that makes f16 of a finished
    /// graph doesn't, and its table of frequencies is f16 too.
    pub islands: bool,
    /// Whether the cache is f16 outside as well; else it is cast at the border.
    pub cache: bool,
    /// The same of the logits.
    pub logits: bool,
}

/// Whose folder it looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interface {
    /// `onnx/NAME.onnx`.
    Web(&'static str),
    /// `model.onnx`.
    Plain,
    /// `model.onnx` with an `If` on whether there is a past.
    Merged,
    /// `model.onnx` beside a `genai_config.json`.
    Generative,
}

/// Where the weights are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    Inline,
    /// In a file of the graph's name and `_data` or, with [`Interface::Generative`], `.data`.
    External,
}

impl Form {
    /// Whether the caller says at which positions the tokens are.
    pub fn takes_positions(&self) -> bool {
        !matches!(self.attention, Attention::Grouped { rotary: true, .. })
    }

    /// Whether norms, softmax and angles are f32 though the rest is not.
    pub fn has_islands(&self) -> bool {
        matches!(self.float, Float::F16(Half { islands: true, .. }))
    }

    /// Whether the cache is cast where it enters and leaves.
    pub fn casts_cache(&self) -> bool {
        matches!(self.float, Float::F16(Half { cache: false, .. }))
    }

    /// Whether the logits are cast where they leave.
    pub fn casts_logits(&self) -> bool {
        matches!(self.float, Float::F16(Half { logits: false, .. }))
    }
}
