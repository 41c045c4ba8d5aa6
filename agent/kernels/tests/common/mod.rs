//! Random numbers, ordinary and extreme, and what equal means.

use millwright_kernels::Kernel;

/// Xorshift64*: enough for test data.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.bits() % n
    }

    /// In ±1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.below(1 << 24) as f32 / (1 << 23) as f32) - 1.0
    }

    /// Ordinary numbers with, `wild`, extreme ones among them.
    pub(crate) fn floats(&mut self, n: usize, wild: bool) -> Vec<f32> {
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
pub(crate) fn assert_same(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len());
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
        assert!(
            same,
            "{what}: element {at} is {got:e}, the scalar kernel says {want:e}"
        );
    }
}

pub(crate) fn scalar() -> Kernel {
    Kernel::named("scalar").unwrap()
}

pub(crate) fn exact() -> Vec<Kernel> {
    Kernel::available()
        .into_iter()
        .filter(Kernel::is_exact)
        .collect()
}
