//! How attention over a flat batch is cut into pieces of work and shared among workers. No arithmetic.

use crate::attention::QUERIES_MAX;
use std::ops::Range;

/// The shape of an attention layer.
#[derive(Copy, Clone, Debug)]
pub struct Heads {
    /// Query heads, a multiple of `kv`.
    pub query: usize,
    /// Key and value heads; query heads `i · query / kv ..` share KV head `i`.
    pub kv: usize,
    /// Numbers in a head.
    pub dim: usize,
    /// What scores are multiplied by.
    pub scale: f32,
}

/// Positions that a token may see: what keeps the sums below exact, and far beyond any model.
pub(crate) const KEYS_MAX: usize = 1 << 30;

/// One token of a flat batch.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Whose it is; what a number means is the caller's.
    pub sequence: usize,
    /// Positions that it sees, its own included, so at least 1.
    pub keys: usize,
}

impl Heads {
    /// Query heads of one KV head.
    pub(crate) fn group(&self) -> usize {
        self.query / self.kv
    }

    /// Calls `each(tokens, heads)` for this worker's pieces: at most twelve queries of one sequence and one KV head,
    /// later tokens seeing more keys. All workers' pieces together are the batch, each query once. Workers
    /// get equal numbers of keys to look at, as far as whole heads allow.
    pub(crate) fn share(
        &self,
        batch: &[Token],
        worker: usize,
        workers: usize,
        mut each: impl FnMut(Range<usize>, Range<usize>),
    ) {
        // 128 bits, since this decides who writes where: these sums don't overflow them.
        let keys = |tokens: &[Token]| tokens.iter().map(|token| token.keys as u128).sum::<u128>();
        let query = self.query as u128;
        let total = keys(batch) * query;
        let bound = |worker: usize| total * worker as u128 / workers as u128;
        let mine = bound(worker)..bound(worker + 1);
        let mut before = 0;
        for tokens in runs(batch, QUERIES_MAX / self.group().min(QUERIES_MAX)) {
            // A head belongs to whom its first key belongs to.
            let cost = keys(&batch[tokens.clone()]);
            let head =
                |bound: u128| bound.saturating_sub(before).div_ceil(cost).min(query) as usize;
            let mut heads = head(mine.start)..head(mine.end);
            before += cost * query;
            while !heads.is_empty() {
                let group_end = (heads.start / self.group() + 1) * self.group();
                let end = heads.end.min(group_end).min(heads.start + QUERIES_MAX);
                each(tokens.clone(), heads.start..end);
                heads.start = end;
            }
        }
    }
}

/// Runs of at most `longest` tokens of one sequence that see ever more keys.
fn runs(batch: &[Token], longest: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let rest = &batch[start..];
        let follows =
            |pair: &[Token]| pair[0].sequence == pair[1].sequence && pair[0].keys < pair[1].keys;
        let together = rest
            .windows(2)
            .take_while(|pair| follows(pair))
            .take(longest - 1);
        let run = start..start + (1 + together.count()).min(rest.len());
        start = run.end;
        (!run.is_empty()).then_some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(heads: Heads, batch: &[Token], workers: usize) {
        let mut done = vec![0; batch.len() * heads.query];
        let mut keys = vec![0; workers];
        for (worker, keys) in keys.iter_mut().enumerate() {
            heads.share(batch, worker, workers, |tokens, range| {
                assert!(!range.is_empty() && tokens.len() * range.len() <= QUERIES_MAX);
                assert_eq!(range.start / heads.group(), (range.end - 1) / heads.group());
                for token in tokens.clone() {
                    assert_eq!(batch[token].sequence, batch[tokens.start].sequence);
                    *keys += batch[token].keys * range.len();
                    range
                        .clone()
                        .for_each(|head| done[token * heads.query + head] += 1);
                }
            });
        }
        assert!(
            done.iter().all(|&times| times == 1),
            "{heads:?} {workers}: {done:?}"
        );
        // Nobody has more than a fair share and one head of one run.
        let longest = QUERIES_MAX * batch.iter().map(|token| token.keys).max().unwrap_or(0);
        let most = keys.iter().max().unwrap();
        assert!(*most <= keys.iter().sum::<usize>() / workers + longest);
    }

    #[test]
    fn every_query_has_one_worker() {
        let token = |sequence, keys| Token { sequence, keys };
        let prompt: Vec<_> = (0..130).map(|at| token(0, at + 1)).collect();
        let mut mixed = vec![token(3, 900), token(1, 7), token(1, 8), token(2, 8)];
        mixed.extend((0..21).map(|at| token(0, 64 + at)));
        for (query, kv) in [(9, 3), (14, 2), (12, 2), (4, 4), (32, 1), (1, 1)] {
            let heads = Heads {
                query,
                kv,
                dim: 64,
                scale: 1.0,
            };
            for workers in [1, 2, 3, 7] {
                check(heads, &prompt, workers);
                check(heads, &mixed, workers);
                check(heads, &mixed[..1], workers);
                check(heads, &[], workers);
            }
        }
    }
}
