//! Whether a model fits into the memory that is there: what each of its parts takes, by its packed file or, before there is
//! one, by its import; and what to do where it is too much. Loads nothing but the tokenizer.

use crate::arena::{BLOCK_TOKENS, KvPrecision};
use crate::buffers::{KEPT_BYTES_MAX, KEPT_MAX};
use crate::bundle::Bundle;
use crate::guard;
use crate::open::{OpenError, Options};
use crate::pack::Sizes;
use crate::room::{Bound, Room};
use crate::text::Text;
use serde::Serialize;
use std::fmt;
use std::path::Path;

/// What a model takes while it runs, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Needs {
    /// The packed file. It is mapped, and yet not the kernel's to take back: each token reads nearly all of it.
    pub weights: u64,
    /// Keys and values of all `kv_tokens`; 0 in the plain plan, where they are tract's and grow with each answer.
    pub cache: u64,
    /// The tokenizer's heap, estimated.
    pub tokenizer: u64,
    /// What a step of the largest batch writes into, at most.
    pub work: u64,
    /// What the process takes beside the model.
    pub process: u64,
    /// What the cache is made of.
    pub kv_tokens: usize,
    pub kv_precision: KvPrecision,
    /// Cache bytes of a token in this precision, and in 8 bits.
    #[serde(skip)]
    per_token: [u64; 2],
}

/// A model's needs beside the memory that there is.
#[derive(Debug, Clone)]
pub struct Fit {
    pub needs: Needs,
    /// `None` where the system doesn't say; then any model is taken to fit.
    pub room: Option<Room>,
}

/// Why a model does not fit, and what would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misfit {
    pub needs: Needs,
    pub available: u64,
    bound: Bound,
}

/// Looks whether the model in `folder` fits in a process that takes `process` bytes beside it. Of an exporter's folder that
/// was never opened, what the guard will keep in f32 is not known, and what it takes itself is not counted.
pub fn fit(folder: &Path, options: &Options, process: u64) -> Result<Fit, OpenError> {
    options.check()?;
    let bundle = Bundle::open_file(folder, options.file.as_deref())?;
    let guard = guard::known(&bundle, options)?;
    let target = guard::target(&bundle, options.plan, guard.as_ref());
    let layout = options.kernel()?.layout();
    let sizes = Sizes::known(&bundle, &target, layout, &options.state_dir)?;
    let tokenizer = Text::open(&bundle)?.bytes();
    Ok(Needs::new(&sizes, tokenizer, options, process).here())
}

impl Needs {
    pub(crate) fn new(sizes: &Sizes, tokenizer: usize, options: &Options, process: u64) -> Self {
        let per_token = |precision: KvPrecision| {
            let bytes = sizes.geometry.map(|g| precision.bytes_per_position(g));
            bytes.unwrap_or(0) as u64
        };
        let per_token = [options.kv_precision, KvPrecision::I8].map(per_token);
        let kv_tokens = options.kv_tokens.next_multiple_of(BLOCK_TOKENS);
        let (rows, f32s) = (options.prefill_chunk + options.slots, size_of::<f32>());
        let kept = (KEPT_MAX * rows * sizes.widest * f32s).min(KEPT_BYTES_MAX);
        // The head's own, and the engine's copy.
        let logits = 2 * options.slots * sizes.vocab * f32s;
        Self {
            weights: sizes.packed as u64,
            cache: kv_tokens as u64 * per_token[0],
            tokenizer: tokenizer as u64,
            work: (kept + logits) as u64,
            process,
            kv_tokens,
            kv_precision: options.kv_precision,
            per_token,
        }
    }

    /// All of them.
    pub fn bytes(&self) -> u64 {
        self.beside_cache() + self.cache
    }

    fn beside_cache(&self) -> u64 {
        self.weights + self.tokenizer + self.work + self.process
    }

    /// Beside what this machine has.
    pub fn here(self) -> Fit {
        Fit {
            needs: self,
            room: Room::here(),
        }
    }

    /// The most tokens of cache for which `available` bytes would do, at so many bytes each; none where not even a block does.
    fn tokens_within(&self, available: u64, per_token: u64) -> Option<u64> {
        let left = available.checked_sub(self.beside_cache())?;
        let blocks = left.checked_div(per_token)? / BLOCK_TOKENS as u64;
        (blocks > 0).then_some(blocks * BLOCK_TOKENS as u64)
    }
}

impl Fit {
    /// Whether it fits.
    pub fn judge(&self) -> Result<(), Box<Misfit>> {
        match &self.room {
            Some(room) if room.bytes < self.needs.bytes() => Err(Box::new(Misfit {
                needs: self.needs.clone(),
                available: room.bytes,
                bound: room.bound.clone(),
            })),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} for weights, ", Mega(self.weights))?;
        match self.cache {
            0 => f.write_str("tract's own cache not counted, ")?,
            cache => write!(
                f,
                "{} for the cache of {} tokens in {}, ",
                Mega(cache),
                self.kv_tokens,
                self.kv_precision
            )?,
        }
        write!(
            f,
            "{} for the tokenizer, {} to work in, {} for the process",
            Mega(self.tokenizer),
            Mega(self.work),
            Mega(self.process)
        )
    }
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self {
            needs,
            available,
            bound,
        } = self;
        let (all, there) = (Mega(needs.bytes()), Mega(*available));
        write!(
            f,
            "it needs {all} of memory ({needs}), and {there} are there: {bound}; "
        )?;
        let [own, eight_bits] = needs.per_token;
        if needs.kv_precision != KvPrecision::I8 {
            match needs.tokens_within(*available, eight_bits) {
                Some(tokens) if tokens >= needs.kv_tokens as u64 => {
                    f.write_str("kv_cache = \"int8\" would fit, ")?;
                }
                Some(tokens) => {
                    write!(
                        f,
                        "kv_cache = \"int8\" with kv_tokens = {tokens} would fit, "
                    )?;
                }
                None => {}
            }
        }
        if let Some(tokens) = needs.tokens_within(*available, own) {
            write!(f, "kv_tokens = {tokens} would fit, ")?;
        }
        f.write_str("else take a smaller model, or a q4 bundle of it, or give it more memory")
    }
}

/// Bytes, in megabytes to read.
struct Mega(u64);

impl fmt::Display for Mega {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mega = self.0 as f64 / 1e6;
        let digits = usize::from(mega < 99.95);
        write!(f, "{mega:.digits$} MB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Geometry;

    const MB: u64 = 1_000_000;

    /// As SmolLM2-135M has it, in 8 bits.
    fn needs(options: &Options) -> Needs {
        let sizes = Sizes {
            packed: 143_000_000,
            bytes_per_token: 0,
            kinds: vec![],
            geometry: Some(Geometry {
                layers: 30,
                kv_heads: 3,
                head_dim: 64,
                positions: 8192,
            }),
            vocab: 49152,
            widest: 1536,
        };
        Needs::new(&sizes, 15_000_000, options, 32_000_000)
    }

    fn refused(needs: &Needs, megabytes: u64) -> String {
        let fit = |bytes| Fit {
            needs: needs.clone(),
            room: Some(Room {
                bytes,
                bound: Bound::Machine,
            }),
        };
        assert!(fit(needs.bytes()).judge().is_ok());
        assert!(fit(needs.bytes() - 1).judge().is_err());
        fit(megabytes * MB).judge().unwrap_err().to_string()
    }

    #[test]
    fn each_part_is_counted() {
        let needs = needs(&Options::default());
        assert_eq!(needs.cache, 8192 * 30 * 3 * 64 * 2 * 2);
        assert_eq!(needs.kv_tokens, 8192);
        let work = 16 * (128 + 4) * 1536 * 4 + 2 * 4 * 49152 * 4;
        assert_eq!(needs.work, work);
        let all = 143 * MB + needs.cache + 15 * MB + work + 32 * MB;
        assert_eq!(needs.bytes(), all);
        // Sizes beyond the buffers' bound are not kept.
        let large = self::needs(&Options {
            prefill_chunk: 4096,
            ..Options::default()
        });
        assert_eq!(large.work, (16 << 20) + 2 * 4 * 49152 * 4);
        // Whole blocks, as the arena has them; a byte a number and a scale a vector.
        let bytes = self::needs(&Options {
            kv_tokens: 65,
            kv_precision: KvPrecision::I8,
            ..Options::default()
        });
        assert_eq!((bytes.kv_tokens, bytes.cache), (128, 128 * 30 * 3 * 2 * 68));
    }

    #[test]
    fn what_does_not_fit_is_told_with_numbers_and_what_would() {
        let needs = needs(&Options::default());
        // 189 MB of cache: in 8 bits 100.
        let said = refused(&needs, 320);
        for words in [
            "it needs 393 MB of memory (143 MB for weights, 189 MB for the cache of 8192 tokens in f16, 15.0 MB for the",
            "and 320 MB are there: that is what the machine has free",
            "kv_cache = \"int8\" would fit, kv_tokens = 4992 would fit",
            "q4 bundle",
        ] {
            assert!(said.contains(words), "{words:?} is not in: {said}");
        }
        let said = refused(&needs, 240);
        assert!(
            said.contains("\"int8\" with kv_tokens = 2880 would fit"),
            "{said}"
        );
        // What it says would fit, does, and a block more does not.
        let with = |kv_tokens| {
            let options = Options {
                kv_tokens,
                kv_precision: KvPrecision::I8,
                ..Options::default()
            };
            self::needs(&options).bytes()
        };
        assert!(with(2880) <= 240 * MB && with(2880 + 64) > 240 * MB);
        // No cache is small enough.
        let said = refused(&needs, 150);
        assert!(
            !said.contains("would fit") && said.contains("smaller model"),
            "{said}"
        );
    }

    #[test]
    fn where_the_system_does_not_say_any_model_fits() {
        let fit = Fit {
            needs: needs(&Options::default()),
            room: None,
        };
        assert!(fit.judge().is_ok());
    }
}
