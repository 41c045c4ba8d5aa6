//! From a folder to a model that can run: bundle, graph, rewriting, packing, plan. What goes wrong here is said
//! once, at start, in a sentence.

use crate::arena::{Arena, KvPrecision};
use crate::bundle::{Bundle, BundleError, Guard};
use crate::cores::{Cores, pool};
use crate::forward::{Flat, Forward, Numbers, Parts, Plain};
use crate::guard::{Misread, Refusal};
use crate::import::{Goal, Imported, Target, import};
use crate::onnx::GraphError;
use crate::pack::{Outline, PackError, Weights};
use crate::reference::{Exact, Witness};
use crate::text::{Text, TextError};
use crate::tuning::{self, Key, Threads};
use millwright_kernels::{Kernel, KernelError};
use prost::Message;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use tract_onnx::pb::ModelProto;
use tract_onnx::prelude::TractError;

/// No context is longer: each position has a row in the rotary tables.
const CONTEXT_MAX: usize = 32_768;

/// How a model is to be run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Threads for arithmetic, the caller's included; never more than the process has cores. `None`: as many as suit
    /// the model here, measured at the start (seconds) and remembered in `state_dir` unless other work disturbed it.
    pub threads: Option<usize>,
    /// A kernel by name; the best of this CPU otherwise (or `MILLWRIGHT_KERNEL`).
    pub kernel: Option<String>,
    /// Where packed weights are kept.
    pub state_dir: PathBuf,
    /// Answers in progress at once.
    pub slots: usize,
    /// Positions in the KV arena, shared by all slots.
    pub kv_tokens: usize,
    /// How the arena keeps them; the plain plan has f32 and none of this.
    pub kv_precision: KvPrecision,
    /// Prompt tokens in one step at most.
    pub prefill_chunk: usize,
    pub plan: PlanChoice,
    /// The graph of this name, where an exporter's folder has several.
    pub file: Option<String>,
    /// Whether an exporter's folder is checked against f32 arithmetic when it is first opened.
    pub guard: bool,
}

/// Which plan to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlanChoice {
    /// Flat where every attention block is recognised, else plain.
    Auto,
    /// Plain always.
    Plain,
    /// Plain, and linears in f32 arithmetic on the file's own numbers: what other plans are measured by.
    Reference,
}

impl FromStr for PlanChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(Self::Auto),
            "plain" => Ok(Self::Plain),
            "reference" => Ok(Self::Reference),
            other => Err(format!("{other:?} is none of auto, plain and reference")),
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            threads: None,
            kernel: None,
            state_dir: std::env::temp_dir().join("millwright"),
            slots: 4,
            kv_tokens: 8192,
            kv_precision: KvPrecision::default(),
            prefill_chunk: 128,
            plan: PlanChoice::Auto,
            file: None,
            guard: true,
        }
    }
}

/// Why a model can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(transparent)]
    Pack(#[from] PackError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("option {name} is {value}; it must be {range}")]
    Option {
        name: &'static str,
        value: usize,
        range: &'static str,
    },
    #[error("tract can't run the graph in {folder}: {reason}")]
    Plan { folder: PathBuf, reason: String },
    #[error("the model in {folder} can't be trusted: {misread} ({NEVERTHELESS})")]
    Misread { folder: PathBuf, misread: Misread },
    #[error("the model in {folder} would answer wrongly here: {refusal} ({NEVERTHELESS})")]
    Unfaithful { folder: PathBuf, refusal: Refusal },
}

/// What to do about a model that the guard refuses.
const NEVERTHELESS: &str =
    "--no-guard, or guard = false in the configuration, takes it nevertheless";

impl OpenError {
    /// The same of another folder: that which the user knows.
    pub(crate) fn at(mut self, place: &Path) -> Self {
        if let Self::Plan { folder, .. }
        | Self::Misread { folder, .. }
        | Self::Unfaithful { folder, .. } = &mut self
        {
            place.clone_into(folder);
        }
        self
    }
}

/// What a model is and how it runs here.
#[derive(Debug, Clone, PartialEq)]
pub struct Card {
    pub name: String,
    pub version: String,
    pub architecture: String,
    pub precision: String,
    /// SHA-256 over the bundle's files.
    pub digest: String,
    /// Tokens that prompt and answer may take together.
    pub context_length: usize,
    /// Whether the same task gives the same tokens on every supported CPU, in any batch (ARITHMETIC.md), from every
    /// engine with the same [`Options::kv_precision`].
    pub exact: bool,
    /// `flat` or `plain`.
    pub plan: &'static str,
    pub kernel: String,
    pub threads: Threads,
    /// What was left to tract, and why.
    pub notes: Vec<String>,
    /// Whether it takes `chat` requests.
    pub chat: bool,
    /// How the import of an exporter's graph was checked.
    pub guard: Option<Guard>,
}

/// An opened model.
pub(crate) struct Model {
    pub(crate) card: Card,
    pub(crate) text: Arc<Text>,
    pub(crate) forward: Box<dyn Forward>,
    pub(crate) slots: usize,
    pub(crate) vocab: usize,
    pub(crate) packed_bytes: usize,
    pub(crate) bytes_per_token: usize,
}

impl Options {
    /// Whether it could be met: each number within its range, and the kernel one that this CPU has.
    pub fn check(&self) -> Result<(), OpenError> {
        let bounds = [
            ("threads", self.threads.unwrap_or(1), 256, "1 to 256"),
            ("slots", self.slots, 64, "1 to 64"),
            ("kv_tokens", self.kv_tokens, 1 << 20, "1 to 1048576"),
            ("prefill_chunk", self.prefill_chunk, 4096, "1 to 4096"),
        ];
        for (name, value, max, range) in bounds {
            if value == 0 || value > max {
                return Err(OpenError::Option { name, value, range });
            }
        }
        self.kernel()?;
        Ok(())
    }

    /// The kernel that is asked for, or this CPU's best.
    pub(crate) fn kernel(&self) -> Result<Kernel, KernelError> {
        match &self.kernel {
            Some(name) => Kernel::named(name),
            None => Kernel::chosen(),
        }
    }
}

impl Model {
    /// Imports and packs a bundle where that was not done yet, and plans it. A witness sees the linears of a reference
    /// at work.
    pub(crate) fn of(
        bundle: &Bundle,
        options: &Options,
        target: &Target,
        witness: Option<Box<dyn Witness>>,
    ) -> Result<Self, OpenError> {
        options.check()?;
        let kernel = options.kernel()?;
        let text = Arc::new(Text::open(bundle)?);
        let plan = |e: TractError| OpenError::Plan {
            folder: bundle.dir().into(),
            reason: format!("{e:#}"),
        };
        let (model, numbers, outline) = if target.goal == Goal::Exact {
            let imported = import(&bundle.graph(), bundle.heads(), target)?;
            let outline = Outline::of(&imported);
            let Imported { graph, recipe, .. } = imported;
            (
                graph.to_model()?,
                Numbers::Exact(Box::new(Exact {
                    graph,
                    recipe,
                    witness: witness.map(RefCell::new),
                })),
                outline,
            )
        } else {
            let weights = Weights::open(bundle, target, kernel.layout(), &options.state_dir)?;
            let model = ModelProto::decode(weights.graph()).map_err(|e| plan(e.into()))?;
            let outline = weights.outline().clone();
            (model, Numbers::Packed(Arc::new(weights)), outline)
        };
        let (packed_bytes, bytes_per_token) = match &numbers {
            Numbers::Packed(weights) => (weights.bytes(), weights.bytes_per_token()),
            Numbers::Exact(_) => (0, 0),
        };
        let cores = Cores::here();
        let threads = match options.threads {
            None => cores.threads_fast(),
            Some(threads) => threads.min(cores.threads_max()),
        };
        let kept_to = cores.kept_to(threads).map(<[usize]>::to_vec);
        let pool = pool(threads, kept_to.clone());
        let parts = Parts {
            model,
            numbers,
            kernel,
            pool,
            kept_to,
        };
        let Outline {
            geometry,
            is_fused,
            mut notes,
            ..
        } = outline;
        let context_length = bundle
            .manifest
            .context_length
            .min(options.kv_tokens)
            .min(geometry.map_or(usize::MAX, |geometry| geometry.positions));
        let is_flat = geometry.is_some();
        let mut forward: Box<dyn Forward> = if let Some(geometry) = geometry {
            let precision = options.kv_precision;
            if precision == KvPrecision::I8 {
                notes.push("keys and values are kept in 8 bits".into());
            }
            let arena = Arena::new(geometry, precision, options.slots, options.kv_tokens);
            Box::new(Flat::new(parts, arena).map_err(plan)?)
        } else {
            Box::new(Plain::new(parts, context_length).map_err(plan)?)
        };
        let name = if is_flat { "flat" } else { "plain" };
        let digest = bundle.digest();
        let threads = if options.threads.is_some() {
            Threads {
                decode: threads,
                prefill: threads,
            }
        } else {
            let key = Key {
                engine: env!("CARGO_PKG_VERSION").into(),
                model: digest.clone(),
                kernel: kernel.name().into(),
                plan: name.into(),
                cores: cores.name(),
                prefill_chunk: options.prefill_chunk,
            };
            let folder = &options.state_dir;
            tuning::threads(key, &cores, folder, context_length, &mut *forward).map_err(plan)?
        };
        let card = Card {
            name: bundle.manifest.name.clone(),
            version: bundle.manifest.version.clone(),
            architecture: bundle.manifest.architecture.clone(),
            precision: bundle.manifest.precision.clone(),
            digest,
            context_length,
            exact: is_fused && kernel.is_exact(),
            plan: name,
            kernel: kernel.name().into(),
            threads,
            notes,
            chat: text.has_template(),
            guard: None,
        };
        let slots = if is_flat { options.slots } else { 1 };
        let vocab = forward.vocab();
        Ok(Self {
            card,
            text,
            forward,
            slots,
            vocab,
            packed_bytes,
            bytes_per_token,
        })
    }
}

/// What importing is to reach.
pub(crate) fn goal(bundle: &Bundle, plan: PlanChoice) -> Goal {
    match plan {
        PlanChoice::Auto => Goal::Flat {
            positions: bundle.manifest.context_length.min(CONTEXT_MAX),
        },
        PlanChoice::Plain => Goal::Plain,
        PlanChoice::Reference => Goal::Exact,
    }
}
