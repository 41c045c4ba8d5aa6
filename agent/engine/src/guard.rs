//! The accuracy guard: whether an import computes what its file says. Each linear is held by itself to f32 arithmetic
//! on the file's own numbers, then the whole model. Runs once, when a graph is imported, never in service.
//!
//! The reference streams: of one linear at a time the numbers are in memory as f32. Where tract can read how a
//! linear is stored, it says what the linear's result is, too; elsewhere our own dequantising is the only oracle.

use crate::arena::KvPrecision;
use crate::bundle::{Bundle, Change, Check, Guard};
use crate::bundling::Stage;
use crate::cores::{Cores, pool};
use crate::import::{Goal, Target};
use crate::onnx::{Graph, elements, value_info};
use crate::open::{Model, OpenError, Options, PlanChoice, goal};
use crate::pack::{IMPORT, each_tile};
use crate::recipe::Form;
use crate::reference::{Exact, Seen, Witness};
use crate::small;
use crate::source::Source;
use crate::text::bounded;
use crate::turn::{Batch, Row};
use millwright_kernels::packed::{Packed, Shape, TILE_ROWS};
use millwright_kernels::{Job, Kernel, Pool, Quantised, Rows};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tract_onnx::pb::{GraphProto, ModelProto, NodeProto, tensor_proto::DataType};
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::{TractErrorContext, ensure};

/// What the model reads to be measured, as far as [`TOKENS`]: prose, a record, a program.
const TEXT: &str = "Pump 7 in hall B ran hot on Tuesday: 81 °C at the drive end, where 65 °C is normal. The oil was \
    changed and the coupling aligned; since then vibration is down to 2.3 mm/s.\n\
    {\"machine\": \"P-107\", \"state\": \"running\", \"hours\": 10422, \"alarms\": []}\n\
    def mean(values):\n    return sum(values) / len(values)\n";
const TOKENS: usize = 64;
/// A linear whose result eight bits change by more than this share of it stays in f32. They change it by 3 % at
/// most in SmolLM2 and Qwen2.5.
const LINEAR_MAX: f64 = 0.1;
/// A model whose answers diverge by more than this is refused: ten times what eight bits cost good ones.
const DIVERGENCE_MAX: f64 = 0.05;
/// How far two f32 computations of a linear may be off each other, as a share of the result.
const ROUNDING: f64 = 1e-3;
/// Larger linears are not shown to tract, which would hold them in f32 several times: a gateway may have little more
/// memory than the packed model needs.
const TRACT_MAX: usize = 8 << 20;
/// Weights of a linear that are packed at a time.
const PANEL: usize = 1 << 20;

/// Told what is being done.
pub type Progress = Arc<dyn Fn(Stage) + Send + Sync>;

/// What decides the outcome.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Key {
    engine: String,
    import: u32,
    model: String,
    kernel: String,
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    key: Key,
    found: Result<Guard, Refusal>,
}

/// Why a model is refused: its packed form answers otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error(
    "its import diverges by {divergence:.3} nats a token from the same weights in f32 arithmetic, where \
     {DIVERGENCE_MAX} is the most{}",
    self.blame()
)]
pub struct Refusal {
    divergence: f64,
    worst: Option<Change>,
}

impl Refusal {
    fn blame(&self) -> String {
        let text = |worst: &Change| {
            let percent = 100.0 * worst.error;
            format!(
                "; eight bits change {} most, by {percent:.0} %",
                worst.linear
            )
        };
        self.worst.as_ref().map(text).unwrap_or_default()
    }
}

/// What is known of a model's import: as its manifest says, as `state_dir` remembers, or measured now. `None` for a
/// bundle that was made in our own form, and where nobody wants to know.
pub(crate) fn settled(bundle: &Bundle, options: &Options) -> Result<Option<Guard>, OpenError> {
    let (key, path) = match standing(bundle, options)? {
        Ok(guard) => return Ok(guard),
        Err(open) => open,
    };
    tracing::info!(
        "checking the import of {} against f32 arithmetic",
        bundle.manifest.name
    );
    let found = match measured(bundle, options) {
        Err(OpenError::Unfaithful { refusal, .. }) => Err(refusal),
        found => Ok(found?),
    };
    let remembered = Remembered { key, found };
    if let Err(error) = small::remember(&path, &remembered) {
        tracing::warn!(
            "{} can't be written, so the next start measures again: {error}",
            path.display()
        );
    }
    remembered.outcome(bundle)
}

/// The same without measuring anything: of a folder that was not opened before, nothing.
pub(crate) fn known(bundle: &Bundle, options: &Options) -> Result<Option<Guard>, OpenError> {
    Ok(standing(bundle, options)?.unwrap_or(None))
}

/// What is known of an import already, or as what and where it will be remembered.
fn standing(
    bundle: &Bundle,
    options: &Options,
) -> Result<Result<Option<Guard>, (Key, PathBuf)>, OpenError> {
    if let Some(import) = &bundle.manifest.import {
        return Ok(Ok(Some(import.guard.clone())));
    }
    if bundle.is_stated() || options.plan != PlanChoice::Auto {
        return Ok(Ok(None));
    }
    if !options.guard {
        return Ok(Ok(Some(Guard::Skipped)));
    }
    let key = Key {
        engine: env!("CARGO_PKG_VERSION").into(),
        import: IMPORT,
        model: bundle.digest(),
        kernel: options.kernel()?.name().into(),
    };
    let name = format!(
        "{}-{}.guard.json",
        key.model.get(..16).unwrap_or("model"),
        key.kernel
    );
    let path = options.state_dir.join(name);
    match small::recall::<Remembered>(&path) {
        Ok(Some(known)) if known.key == key => return known.outcome(bundle).map(Ok),
        Ok(_) => {}
        Err(why) => tracing::warn!("{} is measured anew: {why}", path.display()),
    }
    Ok(Err((key, path)))
}

impl Remembered {
    fn outcome(self, bundle: &Bundle) -> Result<Option<Guard>, OpenError> {
        self.found
            .map(Some)
            .map_err(|refusal| OpenError::Unfaithful {
                folder: bundle.dir().to_owned(),
                refusal,
            })
    }
}

/// What importing is to make of a graph, after all that is known of it.
pub(crate) fn target(bundle: &Bundle, plan: PlanChoice, guard: Option<&Guard>) -> Target {
    let mut target = Target::new(goal(bundle, plan));
    if let Some(Guard::Passed(check)) = guard {
        if check.plain && plan == PlanChoice::Auto {
            target.goal = Goal::Plain;
        }
        target.kept = check.kept.iter().map(|kept| kept.weight.clone()).collect();
    }
    target
}

/// Imports a model twice and compares; what is packed for it goes to `state_dir`.
fn measured(bundle: &Bundle, options: &Options) -> Result<Guard, OpenError> {
    Ok(match Reference::of(bundle, options, Arc::new(drop))? {
        Err(why) => Guard::Unable(why),
        Ok(reference) => {
            let check = reference.hold(bundle, options)?;
            for change in &check.kept {
                let (linear, percent) = (&change.linear, 100.0 * change.error);
                tracing::warn!(
                    "{linear} stays in f32: eight bits would change it by {percent:.0} %"
                );
            }
            Guard::Passed(check)
        }
    })
}

/// What a model answers in f32 arithmetic, and how its linears stand.
pub(crate) struct Reference {
    tokens: Vec<u32>,
    /// `[tokens, vocab]`
    logits: Vec<f32>,
    vocab: usize,
    check: Check,
}

impl Reference {
    /// Runs a model's text through it, linear by linear; the inner error says why that can't be done.
    pub(crate) fn of(
        bundle: &Bundle,
        options: &Options,
        progress: Progress,
    ) -> Result<Result<Self, String>, OpenError> {
        let options = brief(options);
        let report = Arc::new(Mutex::new(Report::default()));
        let comparison = Comparison {
            kernel: options.kernel()?,
            pool: pool(1, None),
            quantised: Quantised::new(),
            report: Arc::clone(&report),
            progress,
        };
        let exact = Target::new(Goal::Exact);
        let mut model = match Model::of(bundle, &options, &exact, Some(Box::new(comparison))) {
            Err(OpenError::Plan { reason, .. }) => return Ok(Err(bounded(&reason))),
            opened => opened?,
        };
        let mut tokens = model.text.encode(TEXT)?;
        tokens.truncate(TOKENS.min(model.card.context_length));
        if tokens.is_empty() {
            return Ok(Err("its tokenizer makes nothing of the text".into()));
        }
        // A model that never needs tract's attention may make tract panic there.
        let run = catch_unwind(AssertUnwindSafe(|| model.logits(&tokens)));
        let logits = run.unwrap_or_else(|_| Err("tract panicked".into()));
        let report = std::mem::take(&mut *report.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(misread) = report.misread {
            return Err(OpenError::Misread {
                folder: bundle.dir().to_owned(),
                misread,
            });
        }
        Ok(match logits {
            Err(reason) => Err(bounded(&reason)),
            Ok(logits) => Ok(Self {
                check: report.check(),
                tokens,
                logits,
                vocab: model.vocab,
            }),
        })
    }

    /// Linears that eight bits would change too much.
    pub(crate) fn kept(&mut self) -> &mut [Change] {
        &mut self.check.kept
    }

    /// How near the packed model comes, with its own attention or with tract's.
    pub(crate) fn hold(self, bundle: &Bundle, options: &Options) -> Result<Check, OpenError> {
        let options = brief(options);
        let mut check = self.check;
        for plain in [false, true] {
            check.plain = plain;
            let target = target(bundle, options.plan, Some(&Guard::Passed(check.clone())));
            let mut model = Model::of(bundle, &options, &target, None)?;
            let found = model.logits(&self.tokens);
            let found = found.map_err(|reason| OpenError::Plan {
                folder: bundle.dir().to_owned(),
                reason,
            })?;
            (check.divergence, check.tokens) = divergence(&self.logits, &found, self.vocab);
            if check.divergence <= DIVERGENCE_MAX {
                return Ok(check);
            }
            if model.card.plan == "plain" {
                break;
            }
            let beyond = check.divergence;
            tracing::warn!(
                "fused attention diverges by {beyond:.3} nats a token; tract's is tried"
            );
        }
        Err(OpenError::Unfaithful {
            folder: bundle.dir().to_owned(),
            refusal: Refusal {
                divergence: check.divergence,
                worst: check.worst,
            },
        })
    }
}

/// Whether a model can be run as it is, when there is nothing to compare it with.
pub(crate) fn runs(bundle: &Bundle, options: &Options) -> Result<(), OpenError> {
    let options = brief(options);
    Model::of(bundle, &options, &target(bundle, options.plan, None), None).map(drop)
}

/// Options for one short sequence.
fn brief(options: &Options) -> Options {
    Options {
        threads: Some(Cores::here().threads_fast()),
        slots: 1,
        kv_tokens: 2 * TOKENS,
        kv_precision: KvPrecision::default(),
        prefill_chunk: TOKENS,
        ..options.clone()
    }
}

impl Model {
    /// The logits of each token, or of the last where the graph itself leaves the others out: `[1 or tokens, vocab]`.
    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, String> {
        let all = self.sampled(tokens, 0);
        all.or_else(|why| self.sampled(tokens, tokens.len() - 1).map_err(|_| why))
    }

    /// The logits from the `first` token on.
    fn sampled(&mut self, tokens: &[u32], first: usize) -> Result<Vec<f32>, String> {
        let row = |(position, &token)| Row {
            token,
            slot: 0,
            position,
        };
        let rows: Vec<Row> = tokens.iter().enumerate().map(row).collect();
        let batch = Batch {
            sample: (first..rows.len()).collect(),
            rows,
        };
        let mut logits = Vec::new();
        if !self.forward.reserve(0, tokens.len()) {
            return Err("its context is too short".into());
        }
        let threads = self.card.threads.prefill;
        let done = self.forward.forward(&batch, threads, &mut logits);
        self.forward.release(0);
        done.map_err(|e| format!("{e:#}"))?;
        Ok(logits)
    }
}

/// The mean of KL(expected ‖ found) over the last rows that both have, in nats, and how many these are.
fn divergence(expected: &[f32], found: &[f32], vocab: usize) -> (f64, usize) {
    let norm = |row: &[f32]| {
        let most = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        most + row
            .iter()
            .map(|&v| (f64::from(v) - most).exp())
            .sum::<f64>()
            .ln()
    };
    let rows = expected
        .rchunks_exact(vocab)
        .zip(found.rchunks_exact(vocab));
    let count = rows.len();
    let sum: f64 = rows
        .map(|(p, q)| {
            let (of_p, of_q) = (norm(p), norm(q));
            let terms = p.iter().zip(q).map(|(&p, &q)| {
                let p = f64::from(p) - of_p;
                p.exp() * (p - (f64::from(q) - of_q))
            });
            terms.sum::<f64>()
        })
        .sum();
    let mean = sum / count as f64;
    // What isn't a number is no agreement.
    let mean = if mean.is_finite() {
        mean.max(0.0)
    } else {
        f64::MAX
    };
    (mean, count)
}

/// Our reading of a weight is not tract's.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "the linear {linear} on {weight} is read in another way than tract reads it: the results are {error:.2e} of them apart"
)]
pub struct Misread {
    linear: String,
    weight: String,
    error: f64,
}

/// What was seen of the linears.
#[derive(Default)]
struct Report {
    /// By their outputs: a text may have to be run twice.
    linears: HashSet<String>,
    by_tract: usize,
    worst: Option<Change>,
    kept: Vec<Change>,
    misread: Option<Misread>,
}

impl Report {
    fn check(self) -> Check {
        let oracle = match (self.by_tract, self.linears.len()) {
            (0, _) => "own".to_owned(),
            (some, all) if some == all => "tract".to_owned(),
            (some, all) => format!("tract for {some} of {all} linears, own for the others"),
        };
        Check {
            divergence: 0.0,
            tokens: 0,
            plain: false,
            oracle,
            worst: self.worst,
            kept: self.kept,
        }
    }
}

/// Computes each linear of the reference once more, as the packed weights would.
struct Comparison {
    kernel: Kernel,
    pool: Pool,
    quantised: Quantised,
    report: Arc<Mutex<Report>>,
    progress: Progress,
}

impl Witness for Comparison {
    fn linear(&mut self, exact: &Exact, seen: &Seen) -> TractResult<()> {
        let known = |report: &Report| report.linears.contains(seen.name);
        if known(&self.report.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(());
        }
        let weight = seen.weight;
        let error = match self.error(exact, seen) {
            // Numbers that can't be quantised.
            Err(_) if matches!(weight.form, Form::Floats(_)) => f64::MAX,
            error => error?,
        };
        let origin = exact.recipe.origins.get(seen.name);
        let small = weight.rows * weight.cols <= TRACT_MAX;
        let by_tract = origin.filter(|_| small).and_then(|nodes| {
            let run = AssertUnwindSafe(|| run(&exact.graph, nodes, seen).ok());
            catch_unwind(run).ok().flatten()
        });
        let report = &mut *self.report.lock().unwrap_or_else(PoisonError::into_inner);
        report.linears.insert(seen.name.to_owned());
        (self.progress)(Stage::Checking(
            report.linears.len(),
            exact.recipe.linears.len(),
        ));
        let known = Change {
            weight: weight.values.clone(),
            linear: seen.name.to_owned(),
            error,
        };
        // What overflows proves nothing.
        let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        if let Some(theirs) = by_tract.filter(|theirs| finite(theirs) && finite(seen.y)) {
            report.by_tract += 1;
            let error = apart(seen.y, &theirs).share();
            if error > ROUNDING {
                report.misread.get_or_insert(Misread {
                    linear: known.linear.clone(),
                    weight: known.weight.clone(),
                    error,
                });
            }
        }
        if error > LINEAR_MAX {
            report.kept.push(known.clone());
        }
        if report
            .worst
            .as_ref()
            .is_none_or(|worst| worst.error < error)
        {
            report.worst = Some(known);
        }
        Ok(())
    }
}

impl Comparison {
    /// By how much of itself the result changes when the linear is packed.
    fn error(&mut self, exact: &Exact, seen: &Seen) -> TractResult<f64> {
        let (weight, x) = (seen.weight, seen.x);
        let numbers = Source::open(&exact.graph, weight)?;
        let kind = numbers.kind()?;
        let layout = self.kernel.layout();
        self.quantised.keep_sums(kind.needs_sums());
        self.kernel
            .quantise_rows(Rows::Plain(x), weight.cols, &mut self.quantised, &self.pool);
        let step = (PANEL / weight.cols).max(1).next_multiple_of(TILE_ROWS);
        let (mut bytes, mut difference) = (Vec::new(), Difference::default());
        for first in (0..weight.rows).step_by(step) {
            let rows = first..weight.rows.min(first + step);
            bytes.clear();
            let packed = each_tile(&numbers, kind, layout, rows.clone(), |tile| {
                bytes.extend_from_slice(tile);
                Ok::<(), Infallible>(())
            });
            let Ok(()) = packed;
            let shape = Shape::new(rows.len(), weight.cols);
            let packed = shape.and_then(|shape| Packed::new(kind, shape, layout, &bytes));
            let tokens = x.len() / weight.cols;
            let mut y = vec![0.0; tokens * rows.len()];
            let job = Job {
                weight: packed.context("a weight of another size")?,
                y: &mut y,
                bias: None,
                residual: None,
                fine: false,
            };
            self.kernel.matmuls(&mut [job], &self.quantised, &self.pool);
            let wanted = seen
                .y
                .chunks_exact(weight.rows)
                .map(|row| &row[rows.clone()]);
            for (wanted, found) in wanted.zip(y.chunks_exact(rows.len())) {
                difference.add(&apart(wanted, found));
            }
        }
        Ok(difference.share())
    }
}

/// Sums of squares.
#[derive(Default)]
struct Difference {
    of: f64,
    between: f64,
}

impl Difference {
    fn add(&mut self, other: &Self) {
        self.of += other.of;
        self.between += other.between;
    }

    fn share(&self) -> f64 {
        if self.between == 0.0 {
            return 0.0;
        }
        (self.between / self.of.max(f64::MIN_POSITIVE))
            .sqrt()
            .min(f64::MAX)
    }
}

fn apart(wanted: &[f32], found: &[f32]) -> Difference {
    let square = |v: f32| f64::from(v) * f64::from(v);
    Difference {
        of: wanted.iter().map(|&v| square(v)).sum(),
        between: wanted.iter().zip(found).map(|(&a, &b)| square(a - b)).sum(),
    }
}

/// The linear as its file writes it, run by tract.
fn run(graph: &Graph, origin: &[NodeProto], seen: &Seen) -> TractResult<Vec<f32>> {
    let product = origin.first().context("a linear without operators")?;
    let x = product.input.first().context("a product of nothing")?;
    let stored = origin.iter().flat_map(|node| &node.input);
    let stored = stored.filter_map(|name| graph.initializer(name));
    let mut initializer = stored
        .map(|tensor| graph.resident(tensor))
        .collect::<Result<Vec<_>, _>>()?;
    initializer.sort_by(|a, b| a.name.cmp(&b.name));
    initializer.dedup_by(|a, b| a.name == b.name);
    ensure!(initializer.iter().all(|tensor| elements(tensor).is_some()));
    let float = DataType::Float as i32;
    let model = ModelProto {
        opset_import: graph.model.opset_import.clone(),
        ir_version: graph.model.ir_version,
        graph: Some(GraphProto {
            node: origin.to_vec(),
            initializer,
            input: vec![value_info(x, float)],
            output: vec![value_info(&product.output[0], float)],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    };
    let onnx = tract_onnx::onnx().with_ignore_value_info(true);
    let parsed = onnx.parse(&model, None)?;
    ensure!(parsed.unresolved_inputs.is_empty());
    let shape = [1, seen.x.len() / seen.weight.cols, seen.weight.cols];
    let mut model = parsed.model;
    model.set_input_fact(0, f32::fact(shape).into())?;
    let model = model.into_optimized()?.into_runnable()?;
    let made = model.run(tvec![Tensor::from_shape(&shape, seen.x)?.into_tvalue()])?;
    let made = made[0].try_as_plain_ram()?.as_slice::<f32>()?.to_vec();
    ensure!(made.len() == seen.y.len());
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::import;
    use millwright_forge::cache::Cache;
    use millwright_forge::catalogue::Catalogue;
    use millwright_forge::export::{Form, export};

    #[test]
    fn a_reading_that_is_not_tracts_is_noticed() {
        let folder = tempfile::TempDir::new().unwrap();
        let out = folder.path().join("out");
        let cache = Cache::at(folder.path().join("no-cache"));
        let form = Form::find("qdq-channel").unwrap();
        export(
            &cache,
            &Catalogue::built_in().unwrap(),
            "tiny",
            form,
            false,
            &out,
        )
        .unwrap();
        let bundle = Bundle::open(&out).unwrap();
        let target = Target::new(Goal::Exact);
        let imported = import(&bundle.graph(), bundle.heads(), &target).unwrap();
        let exact = Exact {
            graph: imported.graph,
            recipe: imported.recipe,
            witness: None,
        };
        let (name, _) = exact
            .recipe
            .origins
            .iter()
            .min_by_key(|(name, _)| *name)
            .unwrap();
        let node = exact.graph.producer(name).unwrap();
        let weight = &exact.recipe.weights[crate::onnx::ints(node, "weights")[0] as usize];
        // One token that asks for the first column.
        let mut x = vec![0.0; weight.cols];
        x[0] = 1.0;
        let mut values = Vec::new();
        let source = Source::open(&exact.graph, weight).unwrap();
        source.values(0..weight.rows, &mut values);
        let right: Vec<f32> = values.iter().step_by(weight.cols).copied().collect();
        let wrong: Vec<f32> = right.iter().map(|y| y * 1.01).collect();
        for (y, is_misread) in [(right, false), (wrong, true)] {
            let report = Arc::new(Mutex::new(Report::default()));
            let mut comparison = Comparison {
                kernel: Kernel::chosen().unwrap(),
                pool: pool(1, None),
                quantised: Quantised::new(),
                report: Arc::clone(&report),
                progress: Arc::new(drop),
            };
            let seen = Seen {
                name,
                weight,
                x: &x,
                y: &y,
            };
            comparison.linear(&exact, &seen).unwrap();
            let report = report.lock().unwrap();
            assert_eq!((report.by_tract, report.misread.is_some()), (1, is_misread));
        }
    }

    #[test]
    fn rows_are_held_to_each_other_from_the_last() {
        let peaked = [0.0, 0.0, 5.0, 0.0];
        assert_eq!(divergence(&peaked, &peaked, 2), (0.0, 2));
        assert_eq!(divergence(&peaked, &[5.0, 0.0], 2), (0.0, 1));
        assert!(divergence(&peaked, &[0.0, 5.0], 2).0 > 1.0);
        for nothing in [&[][..], &[f32::NAN, 0.0]] {
            assert!(divergence(&peaked, nothing, 2).0 > 1e300);
        }
    }
}
