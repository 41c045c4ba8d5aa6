//! What the commands share that run a model here, without a broker.

use anyhow::{Context, Result};
use millwright_engine::{Engine, KvPrecision, Options, PlanChoice};
use std::env;
use std::path::{Path, PathBuf};

/// What the agent takes beside the model, measured: programs' pages in use, and heap after 500,000 tasks (tests/cost). Its bounds
/// (task/src/limits.rs) add up to three times that, which a flood of the largest tasks takes.
pub(super) const PROCESS_BYTES: u64 = 32_000_000;
/// Bytes in a megabyte.
pub(super) const MEGA: f64 = 1e6;

/// Which model, and how it runs.
#[derive(Debug, clap::Args)]
pub(super) struct ModelArgs {
    /// The model's folder: a bundle, as `cargo forge path NAME` prints it, or an exporter's with its ONNX graph
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// Which graph to take where an exporter's folder has several, such as model_q4.onnx
    #[arg(long, value_name = "NAME")]
    file: Option<String>,
    /// Take an exporter's folder without checking its import against f32 arithmetic when it is first opened
    #[arg(long)]
    no_guard: bool,
    /// Where packed weights are kept [default: the packed folder of the Millwright cache]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// How it runs: fused as far as it goes; plain, with tract's own attention; or as the reference, in f32 arithmetic
    /// on the file's own numbers
    #[arg(long, value_name = "auto|plain|reference", default_value = "auto")]
    plan: PlanChoice,
    /// How keys and values are kept: f16, or int8 for half their memory at some loss of fidelity
    #[arg(long, value_name = "f16|int8", default_value = "f16")]
    kv_cache: KvPrecision,
}

impl ModelArgs {
    /// Opens the model.
    pub(super) fn open(
        &self,
        threads: Option<usize>,
        slots: usize,
        kv_tokens: Option<usize>,
    ) -> Result<Engine> {
        let options = self.options(threads, slots, kv_tokens)?;
        Ok(Engine::open(&self.model, &options)?)
    }

    /// Opens another model beside it, for one sequence, as the reference.
    pub(super) fn open_reference(&self, folder: &Path, threads: Option<usize>) -> Result<Engine> {
        let options = Options {
            file: None,
            plan: PlanChoice::Reference,
            kv_precision: KvPrecision::default(),
            ..self.options(threads, 1, None)?
        };
        Ok(Engine::open(folder, &options)?)
    }

    fn options(
        &self,
        threads: Option<usize>,
        slots: usize,
        kv_tokens: Option<usize>,
    ) -> Result<Options> {
        let default = Options::default();
        let state_dir = match &self.state_dir {
            Some(dir) => dir.clone(),
            None => packed_folder()?,
        };
        Ok(Options {
            threads,
            state_dir,
            slots,
            kv_tokens: kv_tokens.unwrap_or(default.kv_tokens),
            kv_precision: self.kv_cache,
            file: self.file.clone(),
            guard: !self.no_guard,
            plan: self.plan,
            ..default
        })
    }
}

/// `MILLWRIGHT_CACHE`, else the XDG cache, as the forge has it.
pub(super) fn packed_folder() -> Result<PathBuf> {
    let cache = |name: &str| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let folder = cache("MILLWRIGHT_CACHE")
        .or_else(|| cache("XDG_CACHE_HOME").map(|dir| dir.join("millwright")))
        .or_else(|| cache("HOME").map(|dir| dir.join(".cache/millwright")))
        .context("no cache folder: set MILLWRIGHT_CACHE or HOME, or give --state-dir")?;
    Ok(folder.join("packed"))
}

/// This process's resident bytes, from the kernel; `None` where it doesn't say.
pub(super) fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim()
        .strip_suffix(" kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}
