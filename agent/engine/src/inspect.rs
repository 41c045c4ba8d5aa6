//! What a model's folder holds and how it would run, found by importing it; nothing is packed and no text is made.

use crate::bundle::{Bundle, Guard};
use crate::fit::Needs;
use crate::guard;
use crate::import::{EMBED, import};
use crate::onnx::{Graph, dims, elements, ints};
use crate::open::{OpenError, Options, PlanChoice};
use crate::pack::Sizes;
use crate::recipe::{Form, Scope, WeightSource};
use crate::text::Text;
use millwright_kernels::packed::{Bits, Kind, Scales};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use tract_onnx::pb::TensorProto;
use tract_onnx::pb::tensor_proto::DataType;

/// How a model would run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    pub name: String,
    /// The family, as its configuration names it: `llama`.
    pub architecture: String,
    /// The graph, relative to the folder.
    pub graph: String,
    /// How its linears are packed: `int8`, `q4` or `mixed`.
    pub precision: &'static str,
    /// Numbers in its matrices, a shared one counted once.
    pub parameters: u64,
    /// What its parts hold, in the file and packed.
    pub parts: Vec<Part>,
    /// Tokens that prompt and answer may take together.
    pub context_length: usize,
    /// `flat` or `plain`.
    pub plan: &'static str,
    /// Whether no operator is left to tract, so that the same task gives the same tokens everywhere.
    pub exact: bool,
    /// Operators of ours, and all.
    pub fused: (usize, usize),
    /// Operators left to tract, by type, and how many.
    pub left: BTreeMap<String, usize>,
    /// What was left to tract, and why.
    pub notes: Vec<String>,
    /// Bytes of the packed file, all of which stays in memory while the model runs.
    pub packed_bytes: usize,
    /// Bytes of weights that each decoded token reads.
    pub bytes_per_token: usize,
    /// Bytes in the cache for each token of context, f16; none in the plain plan, whose cache is tract's.
    pub kv_bytes_per_token: Option<usize>,
    /// The tokenizer's heap, estimated.
    pub tokenizer_bytes: usize,
    /// Whether it takes `chat` tasks.
    pub chat: bool,
    /// How an imported bundle was checked; a folder is checked when it is first opened.
    pub guard: Option<Guard>,
    #[serde(skip)]
    sizes: Sizes,
}

impl Inspection {
    /// What it takes of memory with these options, in a process that takes `process` bytes beside it.
    pub fn needs(&self, options: &Options, process: u64) -> Needs {
        Needs::new(&self.sizes, self.tokenizer_bytes, options, process)
    }
}

/// Matrices that are stored alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    /// `linears`, `head`, `embedding`, `embedding and head`.
    pub role: &'static str,
    pub matrices: usize,
    pub parameters: u64,
    /// As the file has them.
    pub stored: String,
    /// As the kernels read them.
    pub packed: String,
}

/// Looks at a model; `file` names the graph where the folder has several.
pub fn inspect(folder: &Path, file: Option<&str>) -> Result<Inspection, OpenError> {
    let bundle = Bundle::open_file(folder, file)?;
    let text = Text::open(&bundle)?;
    let guard = bundle.manifest.import.as_ref().map(|import| &import.guard);
    let target = guard::target(&bundle, PlanChoice::Auto, guard);
    let imported = import(&bundle.graph(), bundle.heads(), &target)?;
    let sizes = Sizes::of(&imported)?;
    let recipe = &imported.recipe;
    let roles = Roles::of(&imported.graph);
    let mut parts: Vec<Part> = Vec::new();
    for (index, (weight, kind)) in recipe.weights.iter().zip(&sizes.kinds).enumerate() {
        let part = Part {
            role: roles.of_weight(index),
            matrices: 1,
            parameters: (weight.rows * weight.cols) as u64,
            stored: stored(&imported.graph, weight),
            packed: packed(*kind),
        };
        let alike = |known: &&mut Part| {
            (known.role, &known.stored, &known.packed) == (part.role, &part.stored, &part.packed)
        };
        match parts.iter_mut().find(alike) {
            Some(known) => {
                known.matrices += 1;
                known.parameters += part.parameters;
            }
            None => parts.push(part),
        }
    }
    let mut left = BTreeMap::new();
    for node in &imported.graph.proto().node {
        if !node.op_type.starts_with("Millwright") {
            *left.entry(node.op_type.clone()).or_insert(0) += 1;
        }
    }
    // Matrices that stayed with tract are parameters too.
    let unread = imported.graph.proto().initializer.iter();
    let unread =
        unread.filter(|t| dims(t).len() == 2 && imported.graph.consumers(&t.name).next().is_some());
    let foreign: usize = unread.filter_map(elements).sum();
    let all = imported.graph.proto().node.len();
    let geometry = recipe.geometry;
    let positions = geometry.map_or(usize::MAX, |geometry| geometry.positions);
    Ok(Inspection {
        name: bundle.manifest.name.clone(),
        architecture: bundle.manifest.architecture.clone(),
        graph: bundle.graph_name(),
        precision: precision(recipe.linears.iter().map(|&index| sizes.kinds[index])),
        parameters: parts.iter().map(|part| part.parameters).sum::<u64>() + foreign as u64,
        parts,
        context_length: bundle.manifest.context_length.min(positions),
        plan: if geometry.is_some() { "flat" } else { "plain" },
        exact: imported.is_fused,
        fused: (all - left.values().sum::<usize>(), all),
        left,
        notes: recipe.notes.clone(),
        packed_bytes: sizes.packed,
        bytes_per_token: sizes.bytes_per_token,
        kv_bytes_per_token: geometry.map(|g| g.layers * g.kv_heads * g.head_dim * 2 * 2),
        tokenizer_bytes: text.bytes(),
        chat: text.has_template(),
        guard: guard.cloned(),
        sizes,
    })
}

/// Which weights the embedding and the head read.
#[derive(Default)]
struct Roles {
    embedding: Vec<i64>,
    head: Vec<i64>,
}

impl Roles {
    fn of(graph: &Graph) -> Self {
        let mut roles = Self::default();
        for node in &graph.proto().node {
            let weights = ints(node, "weights");
            if node.op_type == EMBED {
                roles.embedding.extend(weights);
            } else if ints(node, "head") == [1] {
                roles.head.extend(weights);
            }
        }
        roles
    }

    fn of_weight(&self, index: usize) -> &'static str {
        let index = index as i64;
        match (self.embedding.contains(&index), self.head.contains(&index)) {
            (true, true) => "embedding and head",
            (true, false) => "embedding",
            (false, true) => "head",
            (false, false) => "linears",
        }
    }
}

impl Part {
    /// What it holds, in words.
    pub fn content(&self) -> String {
        let count = match self.matrices {
            1 => "1 matrix".to_owned(),
            several => format!("{several} matrices"),
        };
        let numbers = self.parameters as f64 / 1e6;
        let (stored, packed) = (&self.stored, &self.packed);
        format!("{count}, {numbers:.1} million: {stored}; packed as {packed}")
    }
}

/// What linears are packed in, in a word.
fn precision(mut kinds: impl Iterator<Item = Kind>) -> &'static str {
    let Some(first) = kinds.next() else {
        return "f32";
    };
    if kinds.any(|kind| kind.bits() != first.bits()) {
        return "mixed";
    }
    match first.bits() {
        Bits::Eight => "int8",
        Bits::Four => "q4",
    }
}

/// A matrix's form in words: `uint8 by output, with zero points`.
fn stored(graph: &Graph, weight: &WeightSource) -> String {
    let of = graph.initializer(&weight.values);
    let of = of.map(TensorProto::data_type);
    let name = match (&weight.form, of) {
        (Form::Bits { bits, .. }, _) => format!("{bits} bits"),
        (_, Some(DataType::Float)) => "f32".into(),
        (_, Some(DataType::Float16)) => "f16".into(),
        (_, Some(DataType::Bfloat16)) => "bf16".into(),
        (_, Some(other)) => other.as_str_name().to_lowercase(),
        (_, None) => "nothing".into(),
    };
    let Some(scaling) = weight.form.scaling() else {
        return name;
    };
    let scope = match scaling.scope {
        Scope::Matrix => "by tensor".to_owned(),
        Scope::Row => "by output".to_owned(),
        Scope::Block(block) => format!("in blocks of {block}"),
    };
    let zeros = if scaling.zero_points.is_some() {
        ", with zero points"
    } else {
        ""
    };
    format!("{name} {scope}{zeros}")
}

/// A packed kind in words: `int8 in 32s, f16 scales`.
fn packed(kind: Kind) -> String {
    let bits = match kind.bits() {
        Bits::Eight => "int8",
        Bits::Four => "4 bits",
    };
    let scales = match kind.scales() {
        Scales::F16 => "f16",
        Scales::F32 => "f32",
    };
    let minimums = if kind.is_affine() {
        " and minimums"
    } else {
        ""
    };
    format!("{bits} in {}s, {scales} scales{minimums}", kind.group())
}
