//! Random numbers for mutators: the same seed, the same mutation.

/// SplitMix64: <https://prng.di.unimi.it/splitmix64.c>
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u32) -> Self {
        Self(u64::from(seed))
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 up to `bound`, which is 0 where there is nothing to choose from.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.draw() % bound.max(1) as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn of<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        all.get(self.below(all.len()))
    }

    pub fn of_mut<'a, T>(&mut self, all: &'a mut [T]) -> Option<&'a mut T> {
        let at = self.below(all.len());
        all.get_mut(at)
    }

    /// A whole number, of the kinds that break things.
    pub fn int(&mut self) -> i64 {
        match self.below(8) {
            0 => self.draw() as i64,
            1 => [i64::MAX, i64::MIN, i64::MAX / 2, i64::from(i32::MAX), -1][self.below(5)],
            2 => 1 << self.below(63),
            3 => -(1 << self.below(63)),
            4 => (1 << self.below(63)) - 1,
            _ => self.below(70) as i64 - 3,
        }
    }
}
