//! What is known of a value.

use crate::onnx;

/// Values of no more numbers than this are computed, for sizes may hang on them.
pub(super) const COMPUTED_MAX: u64 = 4096;

/// What is known of a value.
#[derive(Debug, Clone, Default)]
pub(super) struct Extent {
    /// Its sizes, exactly; none where all that can be said is how many numbers there are at most.
    pub(super) dims: Option<Vec<u64>>,
    /// Numbers it has; at most, where its sizes are not known.
    pub(super) count: u64,
    /// Those, where they are whole ones or truths, few and known.
    pub(super) numbers: Option<Vec<i64>>,
    /// Their type.
    pub(super) of: Option<i32>,
}

impl Extent {
    pub(super) fn of(dims: Vec<u64>) -> Self {
        let count = dims.iter().fold(1, |all: u64, &n| all.saturating_mul(n));
        Self {
            dims: Some(dims),
            count,
            ..Self::default()
        }
    }

    /// Numbers that tract may make of it on the way: a size of zero hides the others until it is reduced.
    pub(super) fn most(&self) -> u64 {
        let dims = self.dims.iter().flatten();
        dims.fold(1, |all: u64, &n| all.saturating_mul(n.max(1)))
            .max(self.count)
    }

    /// Of sizes that nobody knows.
    pub(super) fn flat(count: u64) -> Self {
        Self {
            count,
            ..Self::default()
        }
    }

    pub(super) fn with(mut self, numbers: Option<Vec<i64>>) -> Self {
        self.numbers = numbers.filter(|numbers| numbers.len() as u64 == self.count);
        self
    }

    /// The same sizes, other numbers.
    pub(super) fn alike(&self) -> Self {
        self.dims.clone().map_or(Self::flat(self.count), Self::of)
    }

    pub(super) fn dims(&self) -> Option<&[u64]> {
        self.dims.as_deref()
    }

    /// Where an axis is, counted from the end if it is negative.
    pub(super) fn axis(&self, axis: i64) -> Option<usize> {
        onnx::axis(axis, self.dims()?.len())
    }

    /// Its size along an axis.
    pub(super) fn size(&self, axis: i64) -> Option<u64> {
        Some(self.dims()?[self.axis(axis)?])
    }

    /// The same with another size along an axis.
    pub(super) fn resized(&self, axis: i64, size: u64) -> Option<Self> {
        let (mut dims, axis) = (self.dims.clone()?, self.axis(axis)?);
        dims[axis] = size;
        Some(Self::of(dims))
    }

    /// Its numbers as sizes: those below zero wrap around where tract takes them.
    pub(super) fn sizes(&self) -> Option<Vec<u64>> {
        let numbers = self.numbers.as_ref()?.iter();
        numbers.map(|&n| u64::try_from(n).ok()).collect()
    }

    /// Whether these can be added to it, number by number, without making it larger.
    pub(super) fn takes(&self, other: &Self) -> bool {
        match &self.dims {
            None => other.count <= 1,
            dims => broadcast(&[self, other]).dims == *dims,
        }
    }
}

/// The common size of several, axes counted from the end.
pub(super) fn broadcast(all: &[&Extent]) -> Extent {
    let pairs = || {
        let counts = all.iter().map(|x| x.count.max(1));
        Extent::flat(counts.fold(1, u64::saturating_mul))
    };
    let mut made: Vec<u64> = Vec::new();
    for x in all {
        let Some(dims) = x.dims() else {
            return pairs();
        };
        let missing = dims.len().saturating_sub(made.len());
        made.splice(0..0, vec![1; missing]);
        for (size, &n) in made.iter_mut().rev().zip(dims.iter().rev()) {
            match (*size, n) {
                (_, 1) => {}
                (1, n) => *size = n,
                (a, b) if a == b => {}
                _ => return pairs(),
            }
        }
    }
    Extent::of(made)
}

/// Rows of the one by columns of the other.
pub(super) fn matmul(a: &Extent, b: &Extent) -> Extent {
    let made = || {
        let (rows, columns) = (a.dims()?, b.dims()?);
        let row = rows.len().checked_sub(2).map(|at| rows[at]);
        let column = columns.last().filter(|_| columns.len() > 1).copied();
        let batch = |dims: &[u64]| Extent::of(dims[..dims.len().saturating_sub(2)].to_vec());
        let mut dims = broadcast(&[&batch(rows), &batch(columns)]).dims?;
        dims.extend(row.into_iter().chain(column));
        Some(Extent::of(dims))
    };
    made().unwrap_or_else(|| Extent::flat(a.count.saturating_mul(b.count)))
}
