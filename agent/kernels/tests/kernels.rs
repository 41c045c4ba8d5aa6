//! Every kernel that this CPU has must give the scalar kernel's bits, for ordinary numbers and for the worst.

use millwright_kernels::packed::{Layout, Packed, Shape, dequantise_row, pack_tile, repack};
use millwright_kernels::{Job, Kernel, KernelError, Pool, Quantised, Rows, math};

/// Xorshift64*: enough for test data.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, n: u64) -> u64 {
        self.bits() % n
    }

    /// In ±1.
    fn unit(&mut self) -> f32 {
        (self.below(1 << 24) as f32 / (1 << 23) as f32) - 1.0
    }

    /// Ordinary numbers with, `wild`, extreme ones among them.
    fn floats(&mut self, n: usize, wild: bool) -> Vec<f32> {
        let extreme = [
            0.0, -0.0, 1e-45, -1e-40, 1e-31, 3e38, -3e38, 65504.0, 88.5, -88.0, -104.0, 2.5, -126.5,
        ];
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        let mut pick = |_| match self.below(if wild { 40 } else { 1 }) {
            1..=4 => extreme[self.below(extreme.len() as u64) as usize],
            5 if self.below(8) == 0 => odd[self.below(3) as usize],
            6 => f32::from_bits(self.bits() as u32),
            _ => self.unit() * 4.0,
        };
        (0..n).map(&mut pick).collect()
    }
}

/// Equal bits, except that any NaN equals any other.
fn assert_same(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len());
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
        assert!(
            same,
            "{what}: element {at} is {got:e}, the scalar kernel says {want:e}"
        );
    }
}

fn scalar() -> Kernel {
    Kernel::named("scalar").unwrap()
}

fn exact() -> Vec<Kernel> {
    Kernel::available()
        .into_iter()
        .filter(Kernel::is_exact)
        .collect()
}

/// A weight in the signed layout; `extreme` uses only −128, ±127 and 0.
fn weight(random: &mut Random, shape: Shape, extreme: bool) -> Vec<u8> {
    let cols = shape.cols();
    let mut bytes = vec![0; shape.bytes()];
    let values: Vec<i8> = (0..shape.rows() * cols)
        .map(|_| {
            if extreme {
                [-128, -127, 127, 127, 0][random.below(5) as usize]
            } else {
                random.bits() as i8
            }
        })
        .collect();
    let scales: Vec<u16> = (0..shape.rows() * cols / 32)
        .map(|_| math::f32_to_f16(random.unit() * 0.01))
        .collect();
    for (tile, out) in bytes.chunks_exact_mut(shape.tile_bytes()).enumerate() {
        let first = tile * 16;
        let rows = (shape.rows() - first).min(16);
        let scale = |row, block| scales[(first + row) * (cols / 32) + block];
        pack_tile(
            Layout::Signed,
            cols,
            rows,
            |row, k| values[(first + row) * cols + k],
            scale,
            out,
        );
    }
    bytes
}

fn matmul(kernel: Kernel, shape: Shape, signed: &[u8], x: &[f32], pool: &Pool) -> Vec<f32> {
    let mut bytes = signed.to_vec();
    repack(&mut bytes, Layout::Signed, kernel.layout());
    let mut a = Quantised::new();
    kernel.quantise_rows(Rows::Plain(x), shape.cols(), &mut a, pool);
    let mut y = vec![f32::NAN; a.m() * shape.rows()];
    kernel.matmul(
        Packed::new(shape, kernel.layout(), &bytes).unwrap(),
        &a,
        &mut y,
        pool,
    );
    y
}

#[test]
fn matmul_is_the_scalar_one() {
    let mut random = Random(1);
    let pools = [Pool::new(1), Pool::new(3)];
    for (rows, cols) in [(1, 32), (16, 32), (17, 64), (40, 96), (33, 576), (50, 1536)] {
        let shape = Shape::new(rows, cols).unwrap();
        for m in (1..=9).chain([17, 23]) {
            for style in 0..3 {
                let bytes = weight(&mut random, shape, style == 1);
                let mut x = random.floats(m * cols, style == 2);
                if style == 1 {
                    for x in &mut x {
                        *x = x.signum() * 3.0;
                    }
                }
                let want = matmul(scalar(), shape, &bytes, &x, &pools[0]);
                for kernel in exact() {
                    for pool in &pools {
                        let got = matmul(kernel, shape, &bytes, &x, pool);
                        assert_same(
                            &got,
                            &want,
                            &format!("{} [{m}, {cols}] to {rows}", kernel.name()),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_is_the_same_in_every_batch() {
    let mut random = Random(2);
    let (shape, pool) = (Shape::new(48, 320).unwrap(), Pool::new(2));
    let bytes = weight(&mut random, shape, false);
    let x = random.floats(13 * 320, false);
    for kernel in Kernel::available() {
        let all = matmul(kernel, shape, &bytes, &x, &pool);
        for token in 0..13 {
            let one = matmul(kernel, shape, &bytes, &x[token * 320..][..320], &pool);
            assert_same(&one, &all[token * 48..][..48], kernel.name());
        }
    }
}

#[test]
fn scalar_and_reference_are_near_the_plain_product() {
    let mut random = Random(3);
    let (shape, pool) = (Shape::new(20, 256).unwrap(), Pool::new(1));
    let bytes = weight(&mut random, shape, false);
    let x = random.floats(3 * 256, false);
    let packed = Packed::new(shape, Layout::Signed, &bytes).unwrap();
    for (kernel, tolerance) in [
        (scalar(), 0.01),
        (Kernel::named("reference").unwrap(), 1e-6),
    ] {
        let y = matmul(kernel, shape, &bytes, &x, &pool);
        for (token, x) in x.chunks(256).enumerate() {
            for row in 0..20 {
                let mut w = [0.0; 256];
                dequantise_row(packed, row, &mut w);
                let want: f64 = w
                    .iter()
                    .zip(x)
                    .map(|(w, x)| f64::from(*w) * f64::from(*x))
                    .sum();
                let size: f64 = w.iter().zip(x).map(|(w, x)| f64::from(w * x).abs()).sum();
                let got = f64::from(y[token * 20 + row]);
                assert!(
                    (got - want).abs() < tolerance * size,
                    "{}: {got} for {want}",
                    kernel.name()
                );
            }
        }
    }
}

#[test]
fn several_linears_in_one_dispatch() {
    let mut random = Random(4);
    let x = random.floats(5 * 128, false);
    let shapes =
        [(30, 128), (7, 128), (64, 128)].map(|(rows, cols)| Shape::new(rows, cols).unwrap());
    let signed = shapes.map(|shape| weight(&mut random, shape, false));
    for kernel in Kernel::available() {
        for threads in [1, 2, 7] {
            let pool = Pool::new(threads);
            let mut a = Quantised::new();
            kernel.quantise_rows(Rows::Plain(&x), 128, &mut a, &pool);
            let bytes = signed.clone().map(|mut bytes| {
                repack(&mut bytes, Layout::Signed, kernel.layout());
                bytes
            });
            let mut y = shapes.map(|shape| vec![f32::NAN; 5 * shape.rows()]);
            let mut jobs: Vec<Job> = Vec::new();
            for ((shape, bytes), y) in shapes.iter().zip(&bytes).zip(&mut y) {
                jobs.push(Job {
                    weight: Packed::new(*shape, kernel.layout(), bytes).unwrap(),
                    y,
                });
            }
            kernel.matmuls(&mut jobs, &a, &pool);
            for ((shape, bytes), y) in shapes.iter().zip(&signed).zip(&y) {
                assert_same(y, &matmul(kernel, *shape, bytes, &x, &pool), kernel.name());
            }
        }
    }
}

#[test]
fn quantised_blocks_are_the_scalar_ones() {
    let mut random = Random(5);
    for m in [1, 2, 9, 20] {
        let (x, up) = (random.floats(m * 96, true), random.floats(m * 96, true));
        let gamma = random.floats(96, false);
        let rows = [
            Rows::Plain(&x),
            Rows::Normed {
                x: &x,
                gamma: &gamma,
                eps: 1e-5,
            },
            Rows::Gated { gate: &x, up: &up },
        ];
        for rows in rows {
            let (mut want, mut got) = (Quantised::new(), Quantised::new());
            scalar().quantise_rows(rows, 96, &mut want, &Pool::new(1));
            for kernel in exact() {
                kernel.quantise_rows(rows, 96, &mut got, &Pool::new(3));
                for token in 0..m {
                    for block in 0..3 {
                        let (got, want) = (got.block(token, block), want.block(token, block));
                        assert_eq!(
                            (got.0, got.1.to_bits(), got.2),
                            (want.0, want.1.to_bits(), want.2)
                        );
                        assert_eq!(got.2, got.0.iter().map(|q| i32::from(*q)).sum::<i32>());
                    }
                }
            }
        }
    }
}

#[test]
fn quantisation_follows_its_definition() {
    let mut x = vec![0.0f32; 96];
    x[..4].copy_from_slice(&[127.0, 0.5, 1.5, -2.5]);
    x[32..35].copy_from_slice(&[f32::NAN, 2.0, -4.0]);
    x[64] = f32::INFINITY;
    for kernel in exact() {
        let mut a = Quantised::new();
        a.resize(1, 96);
        kernel.quantise(&x, &mut a, 0);
        let (q, scale, sum) = a.block(0, 0);
        assert_eq!(
            (&q[..4], scale, sum),
            (&[127, 0, 2, -2][..], 1.0, 127),
            "{}",
            kernel.name()
        );
        let (q, scale, _) = a.block(0, 1);
        assert_eq!(
            (&q[..3], scale),
            (&[0, 64, -127][..], 4.0 / 127.0),
            "a NaN counts as zero"
        );
        assert_eq!(
            a.block(0, 2),
            (&[0; 32], 0.0, 0),
            "an infinite block is zero"
        );
    }
}

#[test]
fn elementwise_operations_are_the_scalar_ones() {
    let mut random = Random(6);
    for n in [1, 7, 16, 31, 64, 576, 1536] {
        for wild in [false, true] {
            let (x, other) = (random.floats(n, wild), random.floats(n, wild));
            let run = |kernel: Kernel| {
                let mut norm = vec![0.0; n];
                kernel.rms_norm(&x, &other, 1e-5, &mut norm);
                let mut gate = x.clone();
                kernel.silu_mul(&mut gate, &other);
                let mut half = vec![0; n];
                kernel.to_f16(&x, &mut half);
                let mut head = x.clone();
                kernel.rope(&mut head, &other[..n / 2], &x[..n / 2]);
                (norm, gate, half, head)
            };
            let want = run(scalar());
            for kernel in exact() {
                let got = run(kernel);
                assert_same(&got.0, &want.0, &format!("{} rms_norm {n}", kernel.name()));
                assert_same(&got.1, &want.1, &format!("{} silu_mul {n}", kernel.name()));
                assert_eq!(got.2, want.2, "{} to_f16 {n}", kernel.name());
                assert_same(&got.3, &want.3, &format!("{} rope {n}", kernel.name()));
            }
        }
    }
}

#[test]
fn elementwise_operations_are_right() {
    let mut random = Random(7);
    let (x, up) = (random.floats(100, false), random.floats(100, false));
    for kernel in exact() {
        let mut norm = vec![0.0; 100];
        kernel.rms_norm(&x, &up, 1e-5, &mut norm);
        let mean = x.iter().map(|x| f64::from(x * x)).sum::<f64>() / 100.0;
        let mut gate = x.clone();
        kernel.silu_mul(&mut gate, &up);
        let mut head = x.clone();
        kernel.rope(&mut head, &up[..50], &x[..50]);
        for at in 0..100 {
            let (x64, up64) = (f64::from(x[at]), f64::from(up[at]));
            let want = x64 / (mean + 1e-5).sqrt() * up64;
            assert!(
                (f64::from(norm[at]) - want).abs() < 1e-5,
                "{} norm",
                kernel.name()
            );
            let want = x64 / (1.0 + (-x64).exp()) * up64;
            assert!(
                (f64::from(gate[at]) - want).abs() < 1e-5,
                "{} silu",
                kernel.name()
            );
            let (cos, sin) = (up[at % 50], x[at % 50]);
            let want = if at < 50 {
                x[at] * cos - x[at + 50] * sin
            } else {
                x[at] * cos + x[at - 50] * sin
            };
            assert!((head[at] - want).abs() < 1e-4, "{} rope", kernel.name());
        }
    }
}

/// Keys and values of one head, as many blocks as asked for; what lies behind `keys` is NaN.
fn cache(random: &mut Random, keys: usize, head: usize) -> Vec<(Vec<u16>, Vec<u16>)> {
    let mut fill = |block: usize| -> Vec<u16> {
        let place = |at: usize| {
            if block * 64 + at / head < keys {
                math::f32_to_f16(random.unit() * 3.0)
            } else {
                0x7e00
            }
        };
        (0..64 * head).map(place).collect()
    };
    (0..keys.div_ceil(64))
        .map(|block| (fill(block), fill(block)))
        .collect()
}

fn attend(kernel: Kernel, q: &[f32], cache: &[(Vec<u16>, Vec<u16>)], keys: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; q.len()];
    kernel.attend(
        q,
        &|block| (&cache[block].0, &cache[block].1),
        keys,
        0.125,
        &mut out,
    );
    out
}

#[test]
fn attention_is_the_scalar_one_and_right() {
    let mut random = Random(8);
    for head in [8, 16, 24, 64, 80, 128, 256] {
        let longest = if head == 64 { 200 } else { 70 };
        for keys in (1..=longest).step_by(if head == 64 { 1 } else { 23 }) {
            let cache = cache(&mut random, keys, head);
            let q = random.floats(head, false);
            let want = attend(scalar(), &q, &cache, keys);
            for kernel in exact() {
                let what = format!("{} head {head}, {keys} keys", kernel.name());
                assert_same(&attend(kernel, &q, &cache, keys), &want, &what);
            }
            for (got, exact) in want.iter().zip(plain_attention(&q, &cache, keys)) {
                assert!(
                    (f64::from(*got) - exact).abs() < 1e-5,
                    "head {head}, {keys} keys: {got} for {exact}"
                );
            }
        }
    }
}

fn plain_attention(q: &[f32], cache: &[(Vec<u16>, Vec<u16>)], keys: usize) -> Vec<f64> {
    let head = q.len();
    let number = |bits: u16| f64::from(math::f16_to_f32(bits));
    let score = |key: usize| {
        let k = &cache[key / 64].0[key % 64 * head..][..head];
        k.iter()
            .zip(q)
            .map(|(k, q)| number(*k) * f64::from(*q))
            .sum::<f64>()
            * 0.125
    };
    let scores: Vec<f64> = (0..keys).map(score).collect();
    let top = scores.iter().copied().fold(f64::MIN, f64::max);
    let p: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
    let total: f64 = p.iter().sum();
    let value = |key: usize, at: usize| number(cache[key / 64].1[key % 64 * head + at]);
    (0..head)
        .map(|at| (0..keys).map(|key| p[key] * value(key, at)).sum::<f64>() / total)
        .collect()
}

#[test]
fn attention_does_not_see_later_keys() {
    let mut random = Random(9);
    let cache = cache(&mut random, 192, 64);
    let q = random.floats(64, false);
    for kernel in exact() {
        for keys in [1, 63, 64, 65, 130] {
            let mut cut = cache.clone();
            for position in keys..192 {
                cut[position / 64].0[position % 64 * 64..][..64].fill(0x7c00);
                cut[position / 64].1[position % 64 * 64..][..64].fill(0x7e00);
            }
            assert_same(
                &attend(kernel, &q, &cut, keys),
                &attend(kernel, &q, &cache, keys),
                kernel.name(),
            );
        }
    }
}

#[test]
fn kernels_are_found_by_name() {
    for kernel in Kernel::available() {
        assert_eq!(Kernel::named(kernel.name()).unwrap().name(), kernel.name());
    }
    let unknown = Kernel::named("abacus").err().unwrap();
    assert_eq!(
        unknown,
        KernelError::Unknown {
            name: "abacus".into()
        }
    );
    assert!(
        unknown
            .to_string()
            .contains("\"abacus\"; this machine has scalar"),
        "{unknown}"
    );
    let foreign = if cfg!(target_arch = "x86_64") {
        "neon"
    } else {
        "avx2"
    };
    let unsupported = Kernel::named(foreign).err().unwrap();
    assert!(
        matches!(unsupported, KernelError::Unsupported { .. }),
        "{unsupported}"
    );
    assert!(Kernel::best().is_exact());
}

/// Under emulation the caller knows which kernels there must be; see cross/test-kernels.
#[test]
fn the_expected_kernels_are_there() {
    let names: Vec<_> = Kernel::available().iter().map(Kernel::name).collect();
    match std::env::var("MILLWRIGHT_TEST_KERNELS") {
        Ok(expected) => assert_eq!(names.join(","), expected),
        Err(_) => assert!(names.starts_with(&["scalar"]) && names.ends_with(&["reference"])),
    }
}
