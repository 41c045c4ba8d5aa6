//! Which kernel computes, and the safe way in: every argument is checked here, once per call.

use crate::attention::{KV_BLOCK, KvBlock, QUERIES_MAX, Query};
use crate::generic::Row;
use crate::heads::{Heads, KEYS_MAX, Token};
use crate::matmul::{Job, Output};
use crate::ops::{self, Ops};
use crate::packed::{Layout, Packed};
use crate::pool::{Pool, Shareable};
use crate::quantised::Quantised;
use std::fmt;

/// The environment variable that names the kernel to use.
pub const ENV: &str = "MILLWRIGHT_KERNEL";

/// One way of doing the arithmetic that this CPU is able to. All give the same bits, `reference` excepted.
#[derive(Copy, Clone)]
pub struct Kernel {
    ops: &'static Ops,
    /// Does linears with f32 activations.
    reference: bool,
}

/// Why a kernel can't be had by that name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelError {
    /// There is no kernel of that name.
    Unknown { name: String },
    /// There is, but this CPU or this build lacks `needs`.
    Unsupported {
        name: &'static str,
        needs: &'static str,
    },
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Unknown { name } => write!(f, "there is no kernel {name:?}; this machine has ")?,
            Self::Unsupported { name, needs } => {
                write!(
                    f,
                    "the kernel {name:?} needs {needs}, which this machine lacks; it has "
                )?;
            }
        }
        let names: Vec<_> = Kernel::available().iter().map(Kernel::name).collect();
        write!(
            f,
            "{} (set {ENV} to one of them, or unset it for the fastest)",
            names.join(", ")
        )
    }
}

impl std::error::Error for KernelError {}

/// Rows of activations to quantise, all `[m, width]`.
#[derive(Copy, Clone)]
pub enum Rows<'a> {
    /// As they are.
    Plain(&'a [f32]),
    /// RMS norm of each row times `gamma` `[width]`.
    Normed {
        x: &'a [f32],
        gamma: &'a [f32],
        eps: f32,
    },
    /// silu(gate) · up.
    Gated { gate: &'a [f32], up: &'a [f32] },
}

impl<'a> Rows<'a> {
    /// The number of rows; checks the sizes.
    fn count(&self, width: usize) -> usize {
        let x = match *self {
            Self::Plain(x) => x,
            Self::Normed { x, gamma, .. } => {
                assert_eq!(gamma.len(), width, "gamma is not one row long");
                x
            }
            Self::Gated { gate, up } => {
                assert_eq!(gate.len(), up.len(), "gate and up differ in size");
                gate
            }
        };
        assert!(
            x.len().is_multiple_of(width),
            "{} elements are no rows of {width}",
            x.len()
        );
        x.len() / width
    }

    fn row(&self, width: usize, token: usize) -> Row<'a> {
        let range = token * width..(token + 1) * width;
        match *self {
            Self::Plain(x) => Row::Plain(&x[range]),
            Self::Normed { x, gamma, eps } => Row::Normed {
                x: &x[range],
                gamma,
                eps,
            },
            Self::Gated { gate, up } => Row::Gated {
                gate: &gate[range.clone()],
                up: &up[range],
            },
        }
    }
}

impl Kernel {
    /// The fastest that this CPU has.
    pub fn best() -> Self {
        let ops = ops::ALL
            .iter()
            .rev()
            .find(|ops| (ops.detect)())
            .expect("the scalar kernel needs nothing");
        Self {
            ops,
            reference: false,
        }
    }

    /// The kernel of that name: `scalar`, `avx2`, `avxvnni`, `avx512vnni`, `neon`, `dotprod`, `i8mm` or `reference`.
    pub fn named(name: &str) -> Result<Self, KernelError> {
        if name == "reference" {
            // Whatever is not a linear is bit-equal anyway, so it may as well be fast.
            return Ok(Self {
                ops: Self::best().ops,
                reference: true,
            });
        }
        let Some(ops) = ops::ALL.iter().find(|ops| ops.name == name) else {
            return Err(
                match ops::FOREIGN.iter().find(|(foreign, _)| *foreign == name) {
                    Some(&(name, needs)) => KernelError::Unsupported { name, needs },
                    None => KernelError::Unknown {
                        name: name.to_owned(),
                    },
                },
            );
        };
        if (ops.detect)() {
            Ok(Self {
                ops,
                reference: false,
            })
        } else {
            Err(KernelError::Unsupported {
                name: ops.name,
                needs: ops.needs,
            })
        }
    }

    /// The kernel that `MILLWRIGHT_KERNEL` names, or the fastest if it is unset or empty.
    pub fn chosen() -> Result<Self, KernelError> {
        match std::env::var_os(ENV) {
            Some(name) if !name.is_empty() => Self::named(&name.to_string_lossy()),
            _ => Ok(Self::best()),
        }
    }

    /// All that this CPU has, slowest first; `reference` is the last.
    pub fn available() -> Vec<Self> {
        let able = ops::ALL.iter().filter(|ops| (ops.detect)());
        let mut all: Vec<_> = able
            .map(|ops| Self {
                ops,
                reference: false,
            })
            .collect();
        all.push(Self {
            reference: true,
            ..Self::best()
        });
        all
    }

    pub fn name(&self) -> &'static str {
        if self.reference {
            "reference"
        } else {
            self.ops.name
        }
    }

    /// The layout that weights must be packed in.
    pub fn layout(&self) -> Layout {
        if self.reference {
            Layout::Signed
        } else {
            self.ops.layout
        }
    }

    /// Whether it quantises activations, and so is bit-equal to the scalar kernel.
    pub fn is_exact(&self) -> bool {
        !self.reference
    }

    /// Computes and quantises all rows into `into`, which becomes `[m, width]`; rows are split over the pool.
    ///
    /// # Panics
    /// If the sizes don't fit, or `width` is zero or not a multiple of 32.
    pub fn quantise_rows(&self, rows: Rows, width: usize, into: &mut Quantised, pool: &Pool) {
        let m = rows.count(width);
        into.resize(m, width);
        self.prepare(into);
        if self.reference {
            pool.chunks(&mut into.plain[..m * width], width, |token, out| {
                // SAFETY: this kernel was detected.
                unsafe { (self.ops.evaluate)(rows.row(width, token), out) }
            });
            return;
        }
        let slots = into.slots();
        let work = |worker, workers| {
            for token in Pool::split(m, worker, workers) {
                // SAFETY: `into` is borrowed until the pool is done, and each token has one worker.
                let (mut slot, mut remainder) = unsafe { slots.token(token) };
                let row = rows.row(width, token);
                // SAFETY: this kernel was detected.
                unsafe { (self.ops.quantise)(row, width, &mut slot, remainder.as_mut()) }
            }
        };
        // One token is not worth waking anybody.
        if m == 1 { work(0, 1) } else { pool.run(&work) }
    }

    fn prepare(self, into: &mut Quantised) {
        into.is_plain = self.reference;
        if self.reference {
            into.grow_plain();
        }
    }

    /// `y = a · wᵀ`, `y` `[m, rows]`, tiles of rows split over the pool.
    ///
    /// # Panics
    /// If the sizes or the layout don't fit.
    pub fn matmul(&self, weight: Packed, a: &Quantised, y: &mut [f32], pool: &Pool) {
        let job = Job {
            weight,
            y,
            bias: None,
            residual: None,
            fine: false,
        };
        self.matmuls(&mut [job], a, pool);
    }

    /// Several linears of the same activations in one dispatch.
    ///
    /// # Panics
    /// If the sizes or the layout don't fit.
    pub fn matmuls(&self, jobs: &mut [Job], a: &Quantised, pool: &Pool) {
        for job in &*jobs {
            let shape = job.weight.shape();
            assert_eq!(
                shape.cols(),
                a.k(),
                "weight and activations differ in width"
            );
            assert_eq!(
                job.y.len(),
                a.m() * shape.rows(),
                "the output is not [m, rows]"
            );
            assert!(
                job.bias.is_none_or(|bias| bias.len() == shape.rows()),
                "the bias is not [rows]"
            );
            assert!(
                job.residual
                    .is_none_or(|residual| residual.len() == job.y.len()),
                "the residual is not [m, rows]"
            );
            assert_eq!(
                job.weight.layout(),
                self.layout(),
                "the weight is packed for another kernel"
            );
        }
        assert!(
            jobs.iter().all(|job| a.suits(job.weight.kind(), job.fine)),
            "the activations lack sums that a weight needs, or remainders"
        );
        assert_eq!(
            a.is_plain, self.reference,
            "the activations were quantised by another kernel"
        );
        let total = jobs.iter().map(|job| job.weight.shape().tiles()).sum();
        let base = Shareable(jobs.as_mut_ptr());
        let count = jobs.len();
        pool.run(&|worker, workers| {
            let mine = Pool::split(total, worker, workers);
            let mut before = 0;
            for index in 0..count {
                // SAFETY: in bounds, and the jobs are borrowed until the pool is done. No reference to the output
                // is made, only a pointer from the one that the job holds.
                let (weight, bias, residual, fine, y) = unsafe {
                    let job = base.at(index);
                    (
                        (*job).weight,
                        (*job).bias,
                        (*job).residual,
                        (*job).fine,
                        &raw mut *(*job).y,
                    )
                };
                let tiles = weight.shape().tiles();
                let bounds = (before, before + tiles);
                let range = mine.start.clamp(bounds.0, bounds.1) - before
                    ..mine.end.clamp(bounds.0, bounds.1) - before;
                before += tiles;
                // SAFETY: `y` is borrowed as the jobs are, and the ranges of the workers are disjoint.
                let rows = weight.shape().rows();
                let out = unsafe { Output::new(y.cast(), y.len(), rows, bias, residual, fine) };
                if self.reference {
                    crate::reference::tiles(weight, range, a, &out);
                } else {
                    // SAFETY: this kernel was detected.
                    unsafe { (self.ops.tiles)(weight, range, a, &out) }
                }
            }
        });
    }

    /// `out = x / sqrt(mean(x²) + eps) · gamma`, all `[n]`.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn rms_norm(&self, x: &[f32], gamma: &[f32], eps: f32, out: &mut [f32]) {
        assert!(
            x.len() == gamma.len() && x.len() == out.len(),
            "the sizes of a norm differ"
        );
        // SAFETY: this kernel was detected.
        unsafe { (self.ops.evaluate)(Row::Normed { x, gamma, eps }, out) }
    }

    /// `gate = silu(gate) · up`, both `[n]`.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "gate and up differ in size");
        // SAFETY: this kernel was detected.
        unsafe { (self.ops.silu_mul)(gate, up) }
    }

    /// Rotates the first `2 · half` elements of one head: the pairs (i, i + half) by the angles whose cosines
    /// and sines `[half]` are given.
    ///
    /// # Panics
    /// If the sizes don't fit.
    pub fn rope(&self, x: &mut [f32], cos: &[f32], sin: &[f32]) {
        assert!(
            cos.len() == sin.len() && x.len() >= 2 * cos.len(),
            "the sizes of a rotation don't fit"
        );
        let rotated = 2 * cos.len();
        // SAFETY: this kernel was detected.
        unsafe { (self.ops.rope)(&mut x[..rotated], cos, sin) }
    }

    /// f16 bits of `x`, to nearest, ties to even.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn to_f16(&self, x: &[f32], out: &mut [u16]) {
        assert_eq!(x.len(), out.len(), "f32 and f16 differ in size");
        // SAFETY: this kernel was detected.
        unsafe { (self.ops.to_f16)(x, out) }
    }

    /// `x` as bytes times a scale, which is returned: how an 8-bit cache holds a key or a value.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn to_i8(&self, x: &[f32], out: &mut [i8]) -> f32 {
        assert_eq!(x.len(), out.len(), "f32 and bytes differ in size");
        // SAFETY: this kernel was detected.
        unsafe { (self.ops.to_i8)(x, out) }
    }

    /// Causal attention of a flat batch. `q` and `out` are `[tokens, query heads · dim]`; `blocks(sequence, i, head)`
    /// gives positions `64 i..64 i + 64` of one KV head's cache, of which those from a token's `keys` on are not
    /// looked at. Split over the pool.
    ///
    /// # Panics
    /// If the sizes don't fit or a token sees nothing, or more than 2³⁰ positions.
    pub fn attend<'kv>(
        &self,
        heads: Heads,
        batch: &[Token],
        q: &[f32],
        blocks: &(dyn Fn(usize, usize, usize) -> KvBlock<'kv> + Sync),
        out: &mut [f32],
        pool: &Pool,
    ) {
        let width = heads.query.checked_mul(heads.dim);
        let width = width.expect("a token's heads fit the memory");
        assert!(
            heads.kv > 0
                && heads.query > 0
                && heads.query.is_multiple_of(heads.kv)
                && heads.dim > 0,
            "{heads:?} is no attention"
        );
        assert!(
            batch.len().checked_mul(width) == Some(q.len()) && out.len() == q.len(),
            "queries and results are not [tokens, heads · dim]"
        );
        assert!(
            batch
                .iter()
                .all(|token| (1..=KEYS_MAX).contains(&token.keys)),
            "a token sees 1 to {KEYS_MAX} positions"
        );
        let out = Shareable(out.as_mut_ptr());
        pool.run(&|worker, workers| {
            heads.share(batch, worker, workers, |tokens, range| {
                let sequence = batch[tokens.start].sequence;
                let kv_head = range.start / heads.group();
                let view = |block| checked(blocks(sequence, block, kv_head), heads.dim);
                let count = tokens.len() * range.len();
                let mut queries: [Query; QUERIES_MAX] = std::array::from_fn(|index| {
                    if index >= count {
                        return Query {
                            q: &[],
                            keys: 0,
                            out: &mut [],
                        };
                    }
                    let token = tokens.start + index / range.len();
                    let at = token * width + (range.start + index % range.len()) * heads.dim;
                    Query {
                        q: &q[at..at + heads.dim],
                        keys: batch[token].keys,
                        // SAFETY: in bounds, since `out` is as long as `q`; it is borrowed until the pool is
                        // done, and `share` gives out each query once.
                        out: unsafe { std::slice::from_raw_parts_mut(out.at(at), heads.dim) },
                    }
                });
                // SAFETY: this kernel was detected.
                unsafe { (self.ops.attend)(&mut queries[..count], &view, heads.scale) }
            });
        });
    }
}

/// The block, if it has the size of one.
fn checked(block: KvBlock, dim: usize) -> KvBlock {
    let (keys, values) = match block {
        KvBlock::F16 { keys, values } => (keys.len(), values.len()),
        KvBlock::I8 { keys, values, .. } => (keys.len(), values.len()),
    };
    assert!(
        keys == KV_BLOCK * dim && values == KV_BLOCK * dim,
        "a KV block of {keys} and {values} numbers for heads of {dim}"
    );
    block
}
