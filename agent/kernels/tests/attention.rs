//! Attention: every kernel has the scalar one's bits, which are near the plain formula, for any cut of a batch.

mod common;

use common::{Random, assert_same, exact, scalar};
use millwright_kernels::{Heads, KV_BLOCK, Kernel, KvBlock, Pool, Token, math};

/// The cache of some sequences, f16 and 8-bit forms of equally random numbers.
struct Cache {
    heads: Heads,
    /// `[sequence][block][kv head]`
    blocks: Vec<Vec<Vec<Block>>>,
    bytes: bool,
}

#[derive(Clone)]
struct Block {
    keys: Vec<u16>,
    values: Vec<u16>,
    byte_keys: Vec<i8>,
    byte_values: Vec<i8>,
    scales: [[f32; KV_BLOCK]; 2],
}

impl Cache {
    /// Sequences of these lengths; what lies behind their ends is NaN, so that whoever looks at it is seen.
    fn new(random: &mut Random, heads: Heads, lengths: &[usize], bytes: bool) -> Self {
        let blocks = lengths.iter().map(|&length| {
            let block = |index: usize| {
                let present = (length - index * KV_BLOCK).min(KV_BLOCK);
                (0..heads.kv)
                    .map(|_| Block::new(random, heads.dim, present))
                    .collect()
            };
            (0..length.div_ceil(KV_BLOCK)).map(block).collect()
        });
        Self {
            heads,
            blocks: blocks.collect(),
            bytes,
        }
    }

    fn view(&self, sequence: usize, block: usize, head: usize) -> KvBlock<'_> {
        let block = &self.blocks[sequence][block][head];
        if self.bytes {
            KvBlock::I8 {
                keys: &block.byte_keys,
                values: &block.byte_values,
                key_scales: &block.scales[0],
                value_scales: &block.scales[1],
            }
        } else {
            KvBlock::F16 {
                keys: &block.keys,
                values: &block.values,
            }
        }
    }

    fn key(&self, sequence: usize, head: usize, position: usize, at: usize) -> f64 {
        let block = &self.blocks[sequence][position / 64][head];
        let (place, position) = (at * 64 + position % 64, position % 64);
        if self.bytes {
            f64::from(block.byte_keys[place]) * f64::from(block.scales[0][position])
        } else {
            f64::from(math::f16_to_f32(block.keys[place]))
        }
    }

    fn value(&self, sequence: usize, head: usize, position: usize, at: usize) -> f64 {
        let block = &self.blocks[sequence][position / 64][head];
        let place = position % 64 * self.heads.dim + at;
        if self.bytes {
            f64::from(block.byte_values[place]) * f64::from(block.scales[1][position % 64])
        } else {
            f64::from(math::f16_to_f32(block.values[place]))
        }
    }

    fn attend(&self, kernel: Kernel, batch: &[Token], q: &[f32], pool: &Pool) -> Vec<f32> {
        let mut out = vec![f32::NAN; q.len()];
        let view = |sequence, block, head| self.view(sequence, block, head);
        kernel.attend(self.heads, batch, q, &view, &mut out, pool);
        out
    }

    /// The formula, in f64.
    fn plain(&self, token: Token, head: usize, q: &[f32]) -> Vec<f64> {
        let kv = head / (self.heads.query / self.heads.kv);
        let score = |position: usize| {
            let products = q
                .iter()
                .enumerate()
                .map(|(at, q)| f64::from(*q) * self.key(token.sequence, kv, position, at));
            products.sum::<f64>() * f64::from(self.heads.scale)
        };
        let scores: Vec<f64> = (0..token.keys).map(score).collect();
        let top = scores.iter().copied().fold(f64::MIN, f64::max);
        let p: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
        let total: f64 = p.iter().sum();
        let mixed = |at| {
            let terms = p.iter().enumerate();
            terms
                .map(|(key, p)| p * self.value(token.sequence, kv, key, at))
                .sum::<f64>()
                / total
        };
        (0..q.len()).map(mixed).collect()
    }
}

impl Block {
    fn new(random: &mut Random, dim: usize, present: usize) -> Self {
        let mut keys = vec![0x7e00; KV_BLOCK * dim];
        let mut values = keys.clone();
        let mut byte_keys = vec![0x55; KV_BLOCK * dim];
        let mut byte_values = byte_keys.clone();
        let mut scales = [[f32::NAN; KV_BLOCK]; 2];
        for position in 0..present {
            for at in 0..dim {
                keys[at * KV_BLOCK + position] = math::f32_to_f16(random.unit() * 3.0);
                values[position * dim + at] = math::f32_to_f16(random.unit() * 3.0);
                byte_keys[at * KV_BLOCK + position] = random.bits() as i8;
                byte_values[position * dim + at] = random.bits() as i8;
            }
            scales[0][position] = random.unit() * 0.03;
            scales[1][position] = random.unit() * 0.03;
        }
        Self {
            keys,
            values,
            byte_keys,
            byte_values,
            scales,
        }
    }
}

fn heads(query: usize, kv: usize, dim: usize) -> Heads {
    Heads {
        query,
        kv,
        dim,
        scale: 0.125,
    }
}

/// One token of each of several sequences, and the end of a longer one as a prompt's chunk.
fn batch(lengths: &[usize], chunk: usize) -> Vec<Token> {
    let (last, singles) = lengths.split_last().unwrap();
    let single = |(sequence, &keys)| Token { sequence, keys };
    let prompt = (last - chunk + 1..=*last).map(|keys| Token {
        sequence: singles.len(),
        keys,
    });
    singles
        .iter()
        .enumerate()
        .map(single)
        .chain(prompt)
        .collect()
}

#[test]
fn attention_is_the_scalar_one_and_right() {
    let mut random = Random(8);
    let pools = [Pool::new(1), Pool::new(3)];
    for (query, kv, dim) in [
        (9, 3, 64),
        (3, 3, 8),
        (14, 2, 24),
        (6, 1, 80),
        (4, 2, 128),
        (2, 1, 256),
        (32, 1, 16),
    ] {
        let heads = heads(query, kv, dim);
        for lengths in [vec![1, 2, 15, 16, 17], vec![63, 64, 65, 200]] {
            for bytes in [false, true] {
                let cache = Cache::new(&mut random, heads, &lengths, bytes);
                let batch = batch(&lengths, if lengths.len() == 5 { 17 } else { 9 });
                let q = random.floats(batch.len() * query * dim, false);
                let want = cache.attend(scalar(), &batch, &q, &pools[0]);
                for kernel in exact() {
                    for pool in &pools {
                        let what = format!("{} {heads:?} bytes {bytes}", kernel.name());
                        assert_same(&cache.attend(kernel, &batch, &q, pool), &want, &what);
                    }
                }
                for (at, (got, q)) in want.chunks(dim).zip(q.chunks(dim)).enumerate() {
                    let plain = cache.plain(batch[at / query], at % query, q);
                    for (got, want) in got.iter().zip(plain) {
                        let error = (f64::from(*got) - want).abs();
                        assert!(error < 2e-5, "{heads:?} query {at}: {got} for {want}");
                    }
                }
            }
        }
    }
}

/// Queries and caches with infinities, NaN, denormals and zero scales.
#[test]
fn extremes_are_the_scalar_ones() {
    let mut random = Random(12);
    let (heads, pool) = (heads(4, 2, 24), Pool::new(2));
    // What 32-bit ARM guarantees leaves denormals out; its own tests have them.
    let denormals = !cfg!(target_arch = "arm");
    let tiny = if denormals { 1e-41 } else { 1e-30 };
    for _ in 0..20 {
        for bytes in [false, true] {
            let mut cache = Cache::new(&mut random, heads, &[90, 70], bytes);
            for block in cache.blocks.iter_mut().flatten().flatten() {
                for _ in 0..random.below(4) {
                    let odd = [0x7c00, 0xfc00, 0x7e00, 0x0001, 0x8000, 0x7bff];
                    let pick = odd[random.below(6) as usize];
                    let at = random.below(block.keys.len() as u64) as usize;
                    block.keys[at] = pick;
                    block.values[at] = pick;
                    block.scales[0][at % KV_BLOCK] = [0.0, tiny, f32::INFINITY][at % 3];
                }
            }
            let batch = batch(&[90, 70], 9);
            let mut q = random.floats(batch.len() * 4 * 24, true);
            if !denormals {
                q.iter_mut()
                    .filter(|q| q.is_subnormal())
                    .for_each(|q| *q = 0.0);
            }
            let want = cache.attend(scalar(), &batch, &q, &pool);
            for kernel in exact() {
                let what = format!("{} bytes {bytes}", kernel.name());
                assert_same(&cache.attend(kernel, &batch, &q, &pool), &want, &what);
            }
        }
    }
}

#[test]
fn nothing_is_attended_to_by_nobody() {
    let (heads, pool) = (heads(4, 2, 24), Pool::new(2));
    let cache = Cache::new(&mut Random(13), heads, &[], false);
    for kernel in exact() {
        assert!(cache.attend(kernel, &[], &[], &pool).is_empty());
    }
}

#[test]
fn a_query_is_the_same_in_every_batch() {
    for bytes in [false, true] {
        check_batches(bytes);
    }
}

fn check_batches(bytes: bool) {
    let mut random = Random(9);
    let (heads, pool) = (heads(6, 2, 64), Pool::new(2));
    let width = heads.query * heads.dim;
    let cache = Cache::new(&mut random, heads, &[100, 150], bytes);
    let batch = batch(&[100, 150], 90);
    let q = random.floats(batch.len() * width, false);
    for kernel in exact() {
        let all = cache.attend(kernel, &batch, &q, &pool);
        for (at, token) in batch.iter().enumerate() {
            let one = cache.attend(kernel, &[*token], &q[at * width..][..width], &pool);
            assert_same(&one, &all[at * width..][..width], kernel.name());
        }
    }
}

#[test]
fn later_keys_are_not_seen() {
    let mut random = Random(10);
    let (heads, pool) = (heads(3, 1, 64), Pool::new(1));
    let whole = Cache::new(&mut random, heads, &[192], false);
    let q = random.floats(3 * 64, false);
    for kernel in exact() {
        for keys in [1, 63, 64, 65, 130] {
            let token = [Token { sequence: 0, keys }];
            let mut cut = Cache {
                blocks: whole.blocks.clone(),
                ..whole
            };
            for position in keys..192 {
                let block = &mut cut.blocks[0][position / 64][0];
                block.values[position % 64 * 64..][..64].fill(0x7c00);
                (0..64).for_each(|at| block.keys[at * 64 + position % 64] = 0x7e00);
            }
            let (got, want) = (
                cut.attend(kernel, &token, &q, &pool),
                whole.attend(kernel, &token, &q, &pool),
            );
            assert_same(&got, &want, kernel.name());
        }
    }
}

#[test]
fn bytes_hold_a_vector_to_half_a_step() {
    let mut random = Random(11);
    for n in [1, 16, 64, 80] {
        let x = random.floats(n, false);
        let mut want = vec![0; n];
        let scale = scalar().to_i8(&x, &mut want);
        for (x, q) in x.iter().zip(&want) {
            assert!((f32::from(*q) * scale - x).abs() <= scale * 0.501);
        }
        for wild in [false, true] {
            let x = random.floats(n, wild);
            let scale = scalar().to_i8(&x, &mut want);
            for kernel in exact() {
                let mut got = vec![0; n];
                assert_eq!(kernel.to_i8(&x, &mut got).to_bits(), scale.to_bits());
                assert_eq!(got, want, "{}", kernel.name());
            }
        }
    }
}
