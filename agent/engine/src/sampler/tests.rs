//! The sampler against cases computed by hand, and its promise to draw the same again.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// ln 8, ln 4, ln 2, ln 1, ln 1: probabilities 8, 4, 2, 1 and 1 sixteenths.
const SIXTEENTHS: [f32; 5] = [2.079_441_5, 1.386_294_4, std::f32::consts::LN_2, 0.0, 0.0];

fn sampled(temperature: f32) -> Sampling {
    Sampling {
        temperature,
        ..Sampling::greedy()
    }
}

/// How often each token comes out of 4,000 draws.
fn counts(logits: &[f32], sampling: &Sampling) -> BTreeMap<u32, u32> {
    let mut counts = BTreeMap::new();
    for seed in 0..4000 {
        let mut sampler = Sampler::new(Sampling {
            seed,
            ..sampling.clone()
        });
        *counts
            .entry(sampler.sample(&mut logits.to_vec(), &[7]))
            .or_default() += 1;
    }
    counts
}

fn tokens(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
    counts(logits, sampling).into_keys().collect()
}

/// Expected shares, each within 2 % of all draws (over 2.5 standard deviations of the widest).
fn assert_shares(counts: &BTreeMap<u32, u32>, expected: &[(u32, f64)]) {
    let found: Vec<_> = counts
        .iter()
        .map(|(&t, &n)| (t, f64::from(n) / 4000.0))
        .collect();
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for (found, expected) in found.iter().zip(expected) {
        let near = (found.1 - expected.1).abs() < 0.02;
        assert!(
            found.0 == expected.0 && near,
            "{found:?} is not {expected:?}"
        );
    }
}

#[test]
fn greedy_takes_the_largest_and_of_equals_the_first() {
    let mut sampler = Sampler::new(Sampling::greedy());
    assert_eq!(sampler.sample(&mut [0.0, 3.0, 1.0, 3.0], &[]), 1);
    assert_eq!(
        sampler.sample(&mut [f32::NAN, -2.0, f32::NEG_INFINITY], &[]),
        1
    );
    assert_eq!(sampler.sample(&mut [-0.0, 0.0], &[]), 0);
}

#[test]
fn draws_follow_the_probabilities() {
    let shares = [(0, 0.5), (1, 0.25), (2, 0.125), (3, 0.0625), (4, 0.0625)];
    assert_shares(&counts(&SIXTEENTHS, &sampled(1.0)), &shares);
}

#[test]
fn temperature_divides_the_logits() {
    // Squared weights at 0.5: 64, 16, 4, 1, 1 of 86.
    let shares = [64.0, 16.0, 4.0, 1.0, 1.0].map(|w| w / 86.0);
    let shares: Vec<_> = (0..).zip(shares).collect();
    assert_shares(&counts(&SIXTEENTHS, &sampled(0.5)), &shares);
    // As it nears zero, only the largest is left.
    assert_eq!(tokens(&SIXTEENTHS, &sampled(1e-40)), [0]);
}

#[test]
fn top_k_keeps_the_k_largest() {
    let top = |top_k| Sampling {
        top_k,
        ..sampled(1.0)
    };
    assert_shares(
        &counts(&SIXTEENTHS, &top(2)),
        &[(0, 8.0 / 12.0), (1, 4.0 / 12.0)],
    );
    assert_eq!(tokens(&SIXTEENTHS, &top(1)), [0]);
    // Tokens 3 and 4 are equal: the lower id is kept.
    assert_eq!(tokens(&SIXTEENTHS, &top(4)), [0, 1, 2, 3]);
    assert_eq!(tokens(&SIXTEENTHS, &top(99)), [0, 1, 2, 3, 4]);
}

#[test]
fn top_p_keeps_the_fewest_that_reach_it() {
    let top = |top_p| Sampling {
        top_p,
        ..sampled(1.0)
    };
    assert_eq!(tokens(&SIXTEENTHS, &top(0.49)), [0]);
    assert_eq!(tokens(&SIXTEENTHS, &top(0.51)), [0, 1]);
    assert_shares(
        &counts(&SIXTEENTHS, &top(0.8)),
        &[(0, 8.0 / 14.0), (1, 4.0 / 14.0), (2, 2.0 / 14.0)],
    );
    assert_eq!(tokens(&SIXTEENTHS, &top(0.9)), [0, 1, 2, 3]);
    // It counts what top-k left: 8 of 12 reach 0.6, though they are but half of all.
    assert_eq!(
        tokens(
            &SIXTEENTHS,
            &Sampling {
                top_k: 2,
                ..top(0.6)
            }
        ),
        [0]
    );
}

#[test]
fn top_p_sorts_as_many_as_it_needs() {
    // 10,000 equal tokens: half of them reach 0.5, far more than are sorted first, in order of their ids.
    let flat = vec![1.0; 10_000];
    let half = Sampling {
        top_p: 0.5,
        ..sampled(1.0)
    };
    let drawn = tokens(&flat, &half);
    assert!(
        *drawn.last().unwrap() < 5_000 && *drawn.last().unwrap() > 4_900,
        "{:?}",
        drawn.last()
    );
}

#[test]
fn min_p_keeps_what_is_near_the_largest() {
    let min = |min_p| Sampling {
        min_p,
        ..sampled(1.0)
    };
    assert_eq!(tokens(&SIXTEENTHS, &min(0.51)), [0]);
    assert_eq!(tokens(&SIXTEENTHS, &min(0.49)), [0, 1]);
    assert_eq!(tokens(&SIXTEENTHS, &min(0.2)), [0, 1, 2]);
    assert_eq!(tokens(&SIXTEENTHS, &min(1.0)), [0]);
}

#[test]
fn the_penalty_pushes_seen_tokens_down_once() {
    let mut sampler = Sampler::new(Sampling {
        repeat_penalty: 2.0,
        ..Sampling::greedy()
    });
    let mut logits = [4.0, 3.0, -1.0, -1.5];
    // Token 0 was seen twice: 4 / 2 = 2 all the same; token 2: -1 · 2; token 9 is not in the vocabulary.
    assert_eq!(sampler.sample(&mut logits, &[0, 2, 0, 9]), 1);
    assert_eq!(logits, [2.0, 3.0, -2.0, -1.5]);
}

#[test]
fn settings_out_of_range_are_named() {
    assert_eq!(Sampling::greedy().check(), Ok(()));
    let field = |sampling: Sampling| sampling.check().unwrap_err().0;
    assert_eq!(field(sampled(-0.1)), "temperature");
    assert_eq!(field(sampled(f32::NAN)), "temperature");
    assert_eq!(
        field(Sampling {
            top_p: 0.0,
            ..sampled(1.0)
        }),
        "top_p"
    );
    assert_eq!(
        field(Sampling {
            top_p: 1.01,
            ..sampled(1.0)
        }),
        "top_p"
    );
    assert_eq!(
        field(Sampling {
            min_p: 2.0,
            ..sampled(1.0)
        }),
        "min_p"
    );
    assert_eq!(
        field(Sampling {
            repeat_penalty: 0.0,
            ..sampled(1.0)
        }),
        "repeat_penalty"
    );
    let (_, reason) = Sampling {
        top_p: 0.0,
        ..sampled(1.0)
    }
    .check()
    .unwrap_err();
    assert_eq!(reason, "0 is not from above 0 to 1");
}

#[test]
fn the_generator_is_fixed_for_ever() {
    // Journaled seeds must draw the same after an update: these values are part of the contract.
    let bits = |seed, position| (uniform(seed, position) * (1_u64 << 53) as f64) as u64;
    assert_eq!(
        [bits(0, 0), bits(0, 1), bits(1, 0)],
        [
            126_398_290_100_432,
            6_771_271_217_910_728,
            7_802_399_198_872_995
        ]
    );
}

proptest! {
    /// The same logits, seed and history draw the same, whatever the sampler drew before.
    #[test]
    fn a_resumed_answer_draws_the_same(
        logits in proptest::collection::vec(-8.0_f32..8.0, 1..400),
        seed in any::<u64>(),
        position in 0_usize..50,
        top_k in 0_usize..50,
        top_p in 0.05_f32..=1.0,
        min_p in 0.0_f32..0.5,
    ) {
        let sampling = Sampling { temperature: 0.8, top_k, top_p, min_p, repeat_penalty: 1.1, seed };
        prop_assert_eq!(sampling.check(), Ok(()));
        let history: Vec<u32> = (0..position as u32).collect();
        let mut used = Sampler::new(sampling.clone());
        for earlier in 0..position.min(3) {
            used.sample(&mut logits.clone(), &history[..earlier]);
        }
        let token = used.sample(&mut logits.clone(), &history);
        prop_assert_eq!(token, Sampler::new(sampling).sample(&mut logits.clone(), &history));
        prop_assert!((token as usize) < logits.len());
    }

    /// Logits that no model should give end in a token of the vocabulary, not in a panic.
    #[test]
    fn odd_logits_do_no_harm(
        logits in proptest::collection::vec(
            prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(0.0), any::<f32>()],
            1..20,
        ),
        temperature in 0.0_f32..2.0,
        top_p in 0.05_f32..=1.0,
    ) {
        let mut sampler = Sampler::new(Sampling { top_p, min_p: 0.1, ..sampled(temperature) });
        let size = logits.len();
        prop_assert!((sampler.sample(&mut logits.clone(), &[]) as usize) < size);
    }

    #[test]
    fn numbers_are_from_zero_to_below_one(seed in any::<u64>(), position in any::<u64>()) {
        prop_assert!((0.0..1.0).contains(&uniform(seed, position)));
    }
}
