//! Operators that give the same numbers another shape, or some of them.

use super::Extents;
use super::value::{Extent, fitting};
use crate::onnx::{input, int, ints};
use tract_onnx::pb::NodeProto;

/// Numbers that are there and can't be told.
pub(super) struct Unknown;

impl Extents<'_> {
    /// Whole numbers that an operator has in an attribute or, since some opset, in an input; `None` without either.
    pub(super) fn listed(
        &self,
        node: &NodeProto,
        index: usize,
        name: &str,
    ) -> Result<Option<Vec<i64>>, Unknown> {
        match (ints(node, name), input(node, index)) {
            ([], None) => Ok(None),
            ([], Some(_)) => {
                let numbers = self.input(node, index).and_then(Extent::ints);
                numbers.map(Some).ok_or(Unknown)
            }
            (stated, None) => Ok(Some(stated.to_vec())),
            // tract takes one of them, by the opset.
            _ => Err(Unknown),
        }
    }

    /// The sizes that a `Reshape` or its kin gives.
    pub(super) fn reshaped(&self, node: &NodeProto) -> Option<Extent> {
        let data = self.input(node, 0)?;
        let dims = data.dims.as_ref();
        let named = || self.listed(node, 1, "axes");
        Some(Extent::of(match node.op_type.as_str() {
            "Reshape" => {
                let wanted = self.input(node, 1)?.ints()?;
                let size = |(axis, &n): (usize, &i64)| match n {
                    0 => dims?.get(axis).copied(),
                    -1 => Some(1),
                    n => u64::try_from(n).ok(),
                };
                let mut made = wanted
                    .iter()
                    .enumerate()
                    .map(size)
                    .collect::<Option<Vec<_>>>()?;
                if let Some(open) = wanted.iter().position(|&n| n == -1) {
                    let rest = Extent::of(made.clone()).count;
                    made[open] = data.count.checked_div(rest).unwrap_or(0);
                }
                made
            }
            "Flatten" => {
                let dims = dims?;
                let axis = int(node, "axis").unwrap_or(1);
                let at = if axis < 0 {
                    axis + dims.len() as i64
                } else {
                    axis
                };
                let (a, b) = dims.split_at_checked(usize::try_from(at).ok()?)?;
                [a, b].map(|part| Extent::of(part.to_vec()).count).to_vec()
            }
            "Squeeze" => {
                let axes: Option<Vec<usize>> = match named().ok()? {
                    None => None,
                    Some(axes) => Some(axes.iter().map(|&a| data.axis(a)).collect::<Option<_>>()?),
                };
                let gone =
                    |axis: usize, n: u64| axes.as_ref().map_or(n == 1, |a| a.contains(&axis));
                let kept = dims?
                    .iter()
                    .enumerate()
                    .filter(|&(axis, &n)| !gone(axis, n));
                kept.map(|(_, &n)| n).collect()
            }
            _ => {
                let axes = named().ok()??;
                let rank = dims?.len() + axes.len();
                let place = |&axis: &i64| if axis < 0 { axis + rank as i64 } else { axis };
                let ones: Vec<i64> = axes.iter().map(place).collect();
                let mut rest = dims?.iter().copied();
                let size = |axis: usize| {
                    if ones.contains(&(axis as i64)) {
                        Some(1)
                    } else {
                        rest.next()
                    }
                };
                (0..rank).map(size).collect::<Option<_>>()?
            }
        }))
    }

    pub(super) fn split(&self, node: &NodeProto) -> Option<Vec<Extent>> {
        let data = self.input(node, 0)?;
        let axis = int(node, "axis").unwrap_or(0);
        let at = data.axis(axis)?;
        let parts = node.output.len().max(1) as u64;
        let sizes = match self.listed(node, 1, "split").ok()? {
            Some(sizes) => sizes,
            None => vec![data.dims.as_ref()?[at].div_ceil(parts) as i64; parts as usize],
        };
        let mut first = 0usize;
        let part = |&size: &i64| {
            let size = usize::try_from(size).ok()?;
            let numbers = data.numbers.as_ref().filter(|_| data.rank() == 1);
            let numbers = numbers.and_then(|n| n.get(first..first.checked_add(size)?));
            first = first.checked_add(size)?;
            Some(
                data.resized(axis, size as u64)?
                    .with(numbers.map(<[f64]>::to_vec)),
            )
        };
        sizes.iter().take(node.output.len()).map(part).collect()
    }

    /// As much as it leaves, or all where that can't be told.
    pub(super) fn slice(&self, node: &NodeProto) -> Option<Extent> {
        let data = self.input(node, 0)?;
        let given = |i: usize, name: &str| self.listed(node, i, name);
        let (Ok(Some(starts)), Ok(Some(ends))) = (given(1, "starts"), given(2, "ends")) else {
            return Some(data.alike());
        };
        let (Ok(axes), Ok(steps)) = (given(3, "axes"), given(4, "steps")) else {
            return Some(data.alike());
        };
        let axes = axes.unwrap_or_else(|| (0..starts.len() as i64).collect());
        let steps = steps.unwrap_or_else(|| vec![1; starts.len()]);
        let (mut made, mut numbers) = (data.alike(), data.numbers.clone());
        for (((&start, &end), &axis), &step) in starts.iter().zip(&ends).zip(&axes).zip(&steps) {
            let at = data.axis(axis)?;
            let size = i64::try_from(data.dims.as_ref()?[at]).ok()?;
            if step != 1 {
                numbers = None;
                continue;
            }
            let place = |n: i64| (if n < 0 { n.saturating_add(size) } else { n }).clamp(0, size);
            let (start, end) = (place(start), place(end).max(place(start)));
            made = made.resized(axis, (end - start) as u64)?;
            numbers = numbers.and_then(|n| Some(n.get(start as usize..end as usize)?.to_vec()));
        }
        Some(made.with(numbers.filter(|_| data.rank() == 1)))
    }

    pub(super) fn reduced(&self, node: &NodeProto) -> Option<Extent> {
        let data = self.input(node, 0)?;
        let keeps = int(node, "keepdims").unwrap_or(1) != 0;
        let axes = self.listed(node, 1, "axes").ok()?;
        let axes = axes.unwrap_or_else(|| (0..data.rank() as i64).collect());
        let axes = axes
            .iter()
            .map(|&axis| data.axis(axis))
            .collect::<Option<Vec<_>>>()?;
        let sizes = data.dims.as_ref()?.iter().enumerate();
        let kept = sizes.filter_map(|(axis, &n)| match (axes.contains(&axis), keeps) {
            (false, _) => Some(n),
            (true, true) => Some(1),
            (true, false) => None,
        });
        let made = Extent::of(kept.collect());
        let all = data.numbers.as_deref().filter(|_| made.count == 1);
        let number = all.and_then(|all| match node.op_type.as_str() {
            "ReduceSum" => Some(all.iter().sum()),
            "ReduceProd" => Some(all.iter().product()),
            "ReduceMax" => all.iter().copied().reduce(f64::max),
            "ReduceMin" => all.iter().copied().reduce(f64::min),
            _ => None,
        });
        let number = number.and_then(|number| fitting(number, None));
        Some(made.with(number.map(|number| vec![number])))
    }
}
