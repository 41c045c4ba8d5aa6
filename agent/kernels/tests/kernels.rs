//! Every kernel that this CPU has must give the scalar kernel's bits, for ordinary numbers and for the worst.

use millwright_kernels::packed::{
    Bits, Kind, Layout, Packed, Shape, dequantise_row, pack_tile, repack,
};
use millwright_kernels::{Job, Kernel, KernelError, Pool, Quantised, Rows, math};

mod common;
use common::{Random, assert_same, exact, scalar};

/// A weight in the signed layout; `extreme` uses only the ends of the range and zero.
fn weight(random: &mut Random, kind: Kind, shape: Shape, extreme: bool) -> Vec<u8> {
    let cols = shape.cols();
    let mut bytes = vec![0; shape.bytes(kind)];
    let ends: [i8; 5] = match kind.bits() {
        Bits::Eight => [-128, -127, 127, 127, 0],
        Bits::Four => [0, 15, 15, 15, 0],
    };
    let values: Vec<i8> = (0..shape.rows() * cols)
        .map(|_| match (extreme, kind.bits()) {
            (true, _) => ends[random.below(5) as usize],
            (false, Bits::Eight) => random.bits() as i8,
            (false, Bits::Four) => random.below(16) as i8,
        })
        .collect();
    let groups = cols / kind.group();
    let mut numbers = || -> Vec<f32> {
        (0..shape.rows() * groups)
            .map(|_| random.unit() * 0.01)
            .collect()
    };
    let (scales, minimums) = (numbers(), numbers());
    let size = shape.tile_bytes(kind);
    for (tile, out) in bytes.chunks_exact_mut(size).enumerate() {
        let first = tile * 16;
        pack_tile(
            kind,
            Layout::Signed,
            cols,
            (shape.rows() - first).min(16),
            |row, k| values[(first + row) * cols + k],
            |row, group| scales[(first + row) * groups + group],
            |row, group| minimums[(first + row) * groups + group],
            out,
        );
    }
    bytes
}

fn matmul(
    kernel: Kernel,
    kind: Kind,
    shape: Shape,
    signed: &[u8],
    x: &[f32],
    pool: &Pool,
) -> Vec<f32> {
    let mut bytes = signed.to_vec();
    repack(kind, &mut bytes, Layout::Signed, kernel.layout());
    let mut a = Quantised::new();
    a.keep_sums(kind.needs_sums());
    kernel.quantise_rows(Rows::Plain(x), shape.cols(), &mut a, pool);
    let mut y = vec![f32::NAN; a.m() * shape.rows()];
    kernel.matmul(
        Packed::new(kind, shape, kernel.layout(), &bytes).unwrap(),
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
        for kind in Kind::all() {
            // The native kind at every size, the others where the code differs.
            let batches = if kind == Kind::I8 { 1..=23 } else { 7..=9 };
            for m in batches.chain(1..=3) {
                for style in 0..3 {
                    let bytes = weight(&mut random, kind, shape, style == 1);
                    let mut x = random.floats(m * cols, style == 2);
                    if style == 1 {
                        for x in &mut x {
                            *x = x.signum() * 3.0;
                        }
                    }
                    let want = matmul(scalar(), kind, shape, &bytes, &x, &pools[0]);
                    for kernel in exact() {
                        for pool in &pools {
                            let got = matmul(kernel, kind, shape, &bytes, &x, pool);
                            let name = kernel.name();
                            let what = format!("{name} {kind:?} [{m}, {cols}] to {rows}");
                            assert_same(&got, &want, &what);
                        }
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
    let x = random.floats(13 * 320, false);
    for kind in Kind::all() {
        let bytes = weight(&mut random, kind, shape, false);
        for kernel in Kernel::available() {
            let all = matmul(kernel, kind, shape, &bytes, &x, &pool);
            for token in 0..13 {
                let x = &x[token * 320..][..320];
                let one = matmul(kernel, kind, shape, &bytes, x, &pool);
                assert_same(&one, &all[token * 48..][..48], kernel.name());
            }
        }
    }
}

#[test]
fn scalar_and_reference_are_near_the_plain_product() {
    let mut random = Random(3);
    let (shape, pool) = (Shape::new(20, 256).unwrap(), Pool::new(1));
    let x = random.floats(3 * 256, false);
    let reference = Kernel::named("reference").unwrap();
    for kind in Kind::all() {
        let bytes = weight(&mut random, kind, shape, false);
        let packed = Packed::new(kind, shape, Layout::Signed, &bytes).unwrap();
        for (kernel, tolerance) in [(scalar(), 0.01), (reference, 1e-6)] {
            let y = matmul(kernel, kind, shape, &bytes, &x, &pool);
            for (token, x) in x.chunks(256).enumerate() {
                for row in 0..20 {
                    let mut w = [0.0; 256];
                    dequantise_row(packed, row, &mut w);
                    let products = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                    let want: f64 = products.clone().sum();
                    let size: f64 = products.map(f64::abs).sum();
                    let got = f64::from(y[token * 20 + row]);
                    assert!(
                        (got - want).abs() < tolerance * size,
                        "{} {kind:?}: {got} for {want}",
                        kernel.name()
                    );
                }
            }
        }
    }
}

#[test]
fn several_linears_in_one_dispatch() {
    let mut random = Random(4);
    let x = random.floats(5 * 128, false);
    let residual = random.floats(5 * 30, false);
    let bias = random.floats(64, false);
    // Kinds may be mixed; one has a residual and a bias, one a bias alone.
    let shapes = [(30, Kind::I8), (7, Kind::Q4), (64, Kind::I8)]
        .map(|(rows, kind)| (Shape::new(rows, 128).unwrap(), kind));
    let signed = shapes.map(|(shape, kind)| weight(&mut random, kind, shape, false));
    for kernel in Kernel::available() {
        for threads in [1, 2, 7] {
            let pool = Pool::new(threads);
            let mut a = Quantised::new();
            kernel.quantise_rows(Rows::Plain(&x), 128, &mut a, &pool);
            let mut packed = signed.clone();
            for (bytes, (_, kind)) in packed.iter_mut().zip(shapes) {
                repack(kind, bytes, Layout::Signed, kernel.layout());
            }
            let mut y = shapes.map(|(shape, _)| vec![f32::NAN; 5 * shape.rows()]);
            let mut jobs: Vec<Job> = Vec::new();
            for (((shape, kind), bytes), y) in shapes.iter().zip(&packed).zip(&mut y) {
                jobs.push(Job {
                    weight: Packed::new(*kind, *shape, kernel.layout(), bytes).unwrap(),
                    y,
                    bias: (shape.rows() != 7).then(|| &bias[..shape.rows()]),
                    residual: None,
                    fine: false,
                });
            }
            jobs[0].residual = Some(&residual);
            kernel.matmuls(&mut jobs, &a, &pool);
            for (((shape, kind), bytes), y) in shapes.iter().zip(&signed).zip(&y) {
                let mut want = matmul(kernel, *kind, *shape, bytes, &x, &pool);
                if shape.rows() != 7 {
                    for (want, bias) in want.iter_mut().zip(bias[..shape.rows()].iter().cycle()) {
                        *want += bias;
                    }
                }
                if shape.rows() == 30 {
                    for (want, residual) in want.iter_mut().zip(&residual) {
                        *want += residual;
                    }
                }
                assert_same(y, &want, kernel.name());
            }
        }
    }
}

#[test]
fn a_fine_linear_adds_what_rounding_took() {
    let mut random = Random(8);
    // Seven tiles: three at once, and one.
    let (shape, pools) = (Shape::new(104, 96).unwrap(), [Pool::new(1), Pool::new(3)]);
    for kind in Kind::all() {
        let signed = weight(&mut random, kind, shape, false);
        for m in [1, 2, 3, 4, 5, 8, 9, 20] {
            let x = random.floats(m * 96, m == 9);
            let bias = random.floats(104, false);
            let residual = random.floats(m * 104, false);
            for (kernel, pool) in exact()
                .into_iter()
                .flat_map(|k| pools.iter().map(move |p| (k, p)))
            {
                let mut bytes = signed.clone();
                repack(kind, &mut bytes, Layout::Signed, kernel.layout());
                let weight = Packed::new(kind, shape, kernel.layout(), &bytes).unwrap();
                let mut a = Quantised::new();
                a.keep_remainders(true);
                kernel.quantise_rows(Rows::Plain(&x), 96, &mut a, pool);
                let mut y = [(); 2].map(|()| vec![f32::NAN; m * 104]);
                let mut jobs = Vec::new();
                for (y, fine) in y.iter_mut().zip([false, true]) {
                    jobs.push(Job {
                        weight,
                        y,
                        bias: fine.then_some(&bias),
                        residual: fine.then_some(&residual),
                        fine,
                    });
                }
                kernel.matmuls(&mut jobs, &a, pool);
                let mut left = Vec::new();
                for (at, x) in x.chunks(32).enumerate() {
                    let (q, scale, _) = a.block(at / 3, at % 3);
                    let left_of = |(x, q): (&f32, &i8)| f32::from(*q).mul_add(-scale, *x);
                    let is_zero = scale == 0.0;
                    left.extend(
                        x.iter()
                            .zip(q)
                            .map(|pair| if is_zero { 0.0 } else { left_of(pair) }),
                    );
                }
                let first = matmul(scalar(), kind, shape, &signed, &x, pool);
                let second = matmul(scalar(), kind, shape, &signed, &left, pool);
                let of_both = |i: usize| first[i] + bias[i % 104] + residual[i] + second[i];
                let fine: Vec<f32> = (0..m * 104).map(of_both).collect();
                let what = format!("{} {kind:?} [{m}, 96]", kernel.name());
                assert_same(&y[0], &first, &what);
                assert_same(&y[1], &fine, &what);
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
            want.keep_remainders(true);
            got.keep_remainders(true);
            scalar().quantise_rows(rows, 96, &mut want, &Pool::new(1));
            for kernel in exact() {
                kernel.quantise_rows(rows, 96, &mut got, &Pool::new(3));
                for token in 0..2 * m {
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
        kernel.quantise_rows(Rows::Plain(&x), 96, &mut a, &Pool::new(1));
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
                // As f32, where any NaN equals any other.
                let wide = |half: &[u16]| -> Vec<f32> {
                    half.iter().map(|bits| math::f16_to_f32(*bits)).collect()
                };
                let what = format!("{} to_f16 {n}", kernel.name());
                assert_same(&wide(&got.2), &wide(&want.2), &what);
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

/// Under emulation the caller knows which kernels there must be; see cross/test.
#[test]
fn the_expected_kernels_are_there() {
    let names: Vec<_> = Kernel::available().iter().map(Kernel::name).collect();
    match std::env::var("MILLWRIGHT_TEST_KERNELS") {
        Ok(expected) => assert_eq!(names.join(","), expected),
        Err(_) => assert!(names.starts_with(&["scalar"]) && names.ends_with(&["reference"])),
    }
}

#[test]
#[should_panic(expected = "lack sums")]
fn activations_without_sums_are_not_for_affine_weights() {
    let shape = Shape::new(16, 32).unwrap();
    let bytes = weight(&mut Random(1), Kind::Q4, shape, false);
    let (kernel, pool) = (scalar(), Pool::new(1));
    let mut a = Quantised::new();
    a.keep_sums(false);
    kernel.quantise_rows(Rows::Plain(&[1.0; 32]), 32, &mut a, &pool);
    let weight = Packed::new(Kind::Q4, shape, kernel.layout(), &bytes).unwrap();
    kernel.matmul(weight, &a, &mut [0.0; 16], &pool);
}
