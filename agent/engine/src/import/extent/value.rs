//! What is known of a value.

use tract_onnx::pb::tensor_proto::DataType;

/// Values of no more numbers than this are computed, for sizes may hang on them.
pub(super) const COMPUTED_MAX: u64 = 4096;

/// What is known of a value.
#[derive(Debug, Clone, Default)]
pub(super) struct Extent {
    /// Its sizes, or more; none where not even its rank is known.
    pub(super) dims: Option<Vec<u64>>,
    /// Numbers it has at most.
    pub(super) count: u64,
    /// Those, where they are few and known.
    pub(super) numbers: Option<Vec<f64>>,
    /// Whether it is made of nothing but stored tensors.
    pub(super) is_fixed: bool,
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

    /// Of no known rank.
    pub(super) fn flat(count: u64) -> Self {
        Self {
            count,
            ..Self::default()
        }
    }

    pub(super) fn with(mut self, numbers: Option<Vec<f64>>) -> Self {
        self.numbers = numbers.filter(|numbers| numbers.len() as u64 == self.count);
        self
    }

    /// The same sizes, other numbers.
    pub(super) fn alike(&self) -> Self {
        Self {
            numbers: None,
            ..self.clone()
        }
    }

    pub(super) fn rank(&self) -> usize {
        self.dims.as_ref().map_or(0, Vec::len)
    }

    /// Where an axis is, counted from the end if it is negative.
    pub(super) fn axis(&self, axis: i64) -> Option<usize> {
        let rank = self.dims.as_ref()?.len() as i64;
        let axis = if axis < 0 { axis + rank } else { axis };
        (0..rank).contains(&axis).then_some(axis as usize)
    }

    /// The same with another size along an axis.
    pub(super) fn resized(&self, axis: i64, size: u64) -> Option<Self> {
        let (mut dims, axis) = (self.dims.clone()?, self.axis(axis)?);
        dims[axis] = size;
        Some(Self::of(dims))
    }

    pub(super) fn ints(&self) -> Option<Vec<i64>> {
        Some(self.numbers.as_ref()?.iter().map(|&n| n as i64).collect())
    }
}

/// A number as it is in a type, if it is one that sizes are made of: larger ones may have wrapped around.
pub(super) fn fitting(value: f64, of: Option<i32>) -> Option<f64> {
    const SIZE_MAX: f64 = (1u64 << 31) as f64;
    let of = of.and_then(|of| DataType::try_from(of).ok());
    let (value, most) = match of {
        Some(DataType::Bool) => (f64::from(u8::from(value != 0.0)), 1.0),
        Some(DataType::Int8) => (value.trunc(), 127.0),
        Some(DataType::Uint8) => (value.trunc(), 255.0),
        Some(DataType::Int16 | DataType::Uint16) => (value.trunc(), 32767.0),
        Some(DataType::Int32 | DataType::Int64 | DataType::Uint32 | DataType::Uint64) => {
            (value.trunc(), SIZE_MAX)
        }
        _ => (value, SIZE_MAX),
    };
    (value.abs() <= most).then_some(value)
}

/// The common size of several, axes counted from the end.
pub(super) fn broadcast(all: &[&Extent]) -> Extent {
    if let [only] = all {
        return only.alike();
    }
    let rank = all.iter().map(|x| x.rank()).max().unwrap_or(0);
    let mut made = vec![1u64; rank];
    for x in all {
        let Some(dims) = &x.dims else {
            let counts = all.iter().map(|x| x.count.max(1));
            return Extent::flat(counts.fold(1, u64::saturating_mul));
        };
        for (size, &n) in made.iter_mut().rev().zip(dims.iter().rev()) {
            *size = if *size == 1 { n } else { n.max(*size) };
        }
    }
    Extent::of(made)
}

/// A value's numbers, one for each of those that they are broadcast to: where they are one, or as many.
pub(super) fn spread(x: &Extent, to: &Extent) -> Option<Vec<f64>> {
    let numbers = x.numbers.as_ref().filter(|_| to.count <= COMPUTED_MAX)?;
    let count = to.count as usize;
    match numbers.as_slice() {
        [one] => Some(vec![*one; count]),
        all if all.len() == count => Some(all.to_vec()),
        _ => None,
    }
}

/// Rows of the one by columns of the other.
pub(super) fn matmul(a: &Extent, b: &Extent) -> Option<Extent> {
    let (rows, columns) = (a.dims.as_ref()?, b.dims.as_ref()?);
    let row = rows.len().checked_sub(2).map(|at| rows[at]);
    let column = (columns.len() > 1)
        .then(|| columns.last().copied())
        .flatten();
    let batch = |dims: &[u64]| Extent::of(dims[..dims.len().saturating_sub(2)].to_vec());
    let shared = broadcast(&[&batch(rows), &batch(columns)]);
    let mut dims = shared.dims?;
    dims.extend(row.into_iter().chain(column));
    Some(Extent::of(dims))
}
