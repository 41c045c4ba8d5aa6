//! From logits to a token. Knows neither text nor model, and keeps no state between tokens: the same
//! logits, history and settings give the same token on every CPU, and an answer resumed after a restart
//! goes on with the numbers it would have drawn.
//!
//! Order of the steps, as in `transformers`: repeat penalty, temperature, top-k, top-p, min-p, draw.

// Comparisons of floats here are meant: "off" is exactly 1, and the largest is one of the logits.
#![expect(clippy::float_cmp)]

use millwright_kernels::math;
use serde::{Deserialize, Serialize};

/// How many of the best candidates are sorted first where top-p needs an order; mostly that suffices, and
/// sorting a whole vocabulary takes longer than a step of a small model.
const SORTED_FIRST: usize = 256;

/// How a token is chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Divides the logits; 0 takes the largest one (greedy) and makes the settings below but
    /// `repeat_penalty` moot.
    pub temperature: f32,
    /// Keeps this many of the largest; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest largest whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keeps those at least this share as probable as the largest; 0 keeps all.
    pub min_p: f32,
    /// Divides the positive and multiplies the negative logits of tokens in prompt and answer; 1 is off.
    pub repeat_penalty: f32,
    pub seed: u64,
}

impl Sampling {
    /// The largest logit, always.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            seed: 0,
        }
    }

    /// Names the field that is out of range and says what the range is.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let ranged = [
            ("temperature", self.temperature, 0.0, 10.0),
            ("top_p", self.top_p, f32::MIN_POSITIVE, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repeat_penalty", self.repeat_penalty, 0.1, 10.0),
        ];
        for (field, value, low, high) in ranged {
            if !(low..=high).contains(&value) {
                let low = if field == "top_p" {
                    "above 0".to_owned()
                } else {
                    format!("{low}")
                };
                return Err((field, format!("{value} is not from {low} to {high}")));
            }
        }
        Ok(())
    }
}

impl Default for Sampling {
    fn default() -> Self {
        Self::greedy()
    }
}

/// Chooses the tokens of one answer. Owns only scratch memory.
pub struct Sampler {
    sampling: Sampling,
    candidates: Vec<Candidate>,
    /// By token: whether its logit was penalised already.
    penalised: Vec<bool>,
}

#[derive(Clone, Copy)]
struct Candidate {
    token: u32,
    /// The logit, then its exponential: proportional to the probability, 1 for the largest.
    weight: f32,
}

impl Sampler {
    pub fn new(sampling: Sampling) -> Self {
        Self {
            sampling,
            candidates: Vec::new(),
            penalised: Vec::new(),
        }
    }

    pub fn into_sampling(self) -> Sampling {
        self.sampling
    }

    /// The token after `history` (prompt and answer so far), given its `logits`, one per vocabulary entry;
    /// they are changed by the penalty. Of equal logits the lowest id wins; NaN counts as the least.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> u32 {
        self.penalise(logits, history);
        if self.sampling.temperature == 0.0 {
            return largest(logits).0;
        }
        self.collect(logits);
        self.keep_top_k();
        self.weigh();
        self.keep_top_p();
        let least = self.sampling.min_p;
        self.candidates.retain(|c| c.weight >= least);
        self.draw(uniform(self.sampling.seed, history.len() as u64))
    }

    fn penalise(&mut self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.sampling.repeat_penalty;
        if penalty == 1.0 {
            return;
        }
        self.penalised.clear();
        self.penalised.resize(logits.len(), false);
        for &token in history {
            let token = token as usize;
            if token >= logits.len() || self.penalised[token] {
                continue;
            }
            self.penalised[token] = true;
            let logit = &mut logits[token];
            *logit = if *logit > 0.0 {
                *logit / penalty
            } else {
                *logit * penalty
            };
        }
    }

    fn collect(&mut self, logits: &[f32]) {
        self.candidates.clear();
        let candidates = logits.iter().enumerate().map(|(token, &logit)| Candidate {
            token: token as u32,
            weight: if logit.is_nan() {
                f32::NEG_INFINITY
            } else {
                logit
            },
        });
        self.candidates.extend(candidates);
    }

    fn keep_top_k(&mut self) {
        let k = self.sampling.top_k;
        if k == 0 || k >= self.candidates.len() {
            return;
        }
        self.candidates
            .select_nth_unstable_by(k - 1, Candidate::before);
        self.candidates.truncate(k);
        // Selection leaves an order that depends on the algorithm; sums must not.
        self.candidates.sort_unstable_by(Candidate::before);
    }

    /// Logits become exponentials.
    fn weigh(&mut self) {
        let logits = self.candidates.iter().map(|c| c.weight);
        let max = logits.fold(f32::NEG_INFINITY, f32::max);
        for candidate in &mut self.candidates {
            let logit = candidate.weight;
            // Also where the largest is infinite, whose difference to itself is NaN.
            candidate.weight = if logit == max {
                1.0
            } else {
                math::exp((logit - max) / self.sampling.temperature)
            };
        }
    }

    fn keep_top_p(&mut self) {
        let p = self.sampling.top_p;
        if p >= 1.0 {
            return;
        }
        let wanted = f64::from(p) * sum(&self.candidates);
        let count = self.candidates.len();
        let mut sorted = SORTED_FIRST.min(count);
        loop {
            if sorted < count {
                self.candidates
                    .select_nth_unstable_by(sorted - 1, Candidate::before);
            }
            self.candidates[..sorted].sort_unstable_by(Candidate::before);
            let mut reached = 0.0;
            let enough = self.candidates[..sorted].iter().position(|c| {
                reached += f64::from(c.weight);
                reached >= wanted
            });
            match enough {
                Some(last) => return self.candidates.truncate(last + 1),
                // Rounding can leave the sum of all a hair short; then all are kept.
                None if sorted == count => return,
                None => sorted = (sorted * 8).min(count),
            }
        }
    }

    /// The candidate at `u` of the way through the weights. At least the largest one is left by now.
    fn draw(&self, u: f64) -> u32 {
        let mut left = u * sum(&self.candidates);
        for candidate in &self.candidates {
            left -= f64::from(candidate.weight);
            if left < 0.0 {
                return candidate.token;
            }
        }
        self.candidates.last().map_or(0, |c| c.token)
    }
}

impl Candidate {
    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "the sorts hand out references"
    )]
    /// Larger first, then the lower token: a total order, so that every sort gives the same.
    fn before(left: &Self, right: &Self) -> std::cmp::Ordering {
        // `+ 0.0` makes -0 equal 0, as it is for greedy.
        let (a, b) = (left.weight + 0.0, right.weight + 0.0);
        b.total_cmp(&a).then(left.token.cmp(&right.token))
    }
}

fn sum(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| f64::from(c.weight)).sum()
}

fn largest(logits: &[f32]) -> (u32, f32) {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (token as u32, logit);
        }
    }
    best
}

/// A number in [0, 1) from a seed and a position: SplitMix64's output function, applied to both in turn.
/// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
fn uniform(seed: u64, position: u64) -> f64 {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    let mixed = mix(seed.wrapping_add(GOLDEN));
    let mixed = mix(mixed ^ position.wrapping_add(1).wrapping_mul(GOLDEN));
    (mixed >> 11) as f64 / (1_u64 << 53) as f64
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests;
