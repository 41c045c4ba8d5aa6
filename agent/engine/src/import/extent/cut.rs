//! Operators that give the same numbers another shape, or take some of them.

use super::value::{COMPUTED_MAX, Extent};
use super::{Extents, RANK_MAX, flag};
use crate::onnx::{self, input, int, ints};
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
        since: i64,
    ) -> Result<Option<Vec<i64>>, Unknown> {
        let is_input = self.graph.opset() >= since;
        match (ints(node, name), input(node, index)) {
            ([], None) => Ok(None),
            ([], Some(_)) if is_input => {
                let numbers = self.input(node, index).and_then(|x| x.numbers.clone());
                numbers.map(Some).ok_or(Unknown)
            }
            (stated, None) if !is_input => Ok(Some(stated.to_vec())),
            // tract takes no notice of one that is not of its opset.
            _ => Err(Unknown),
        }
    }

    /// What a `Reshape` or its kin gives. Numbers stay what they were.
    pub(super) fn reshaped(&self, node: &NodeProto) -> Option<Extent> {
        let data = self.input(node, 0)?;
        if data.dims.is_none() {
            return Some(data.alike());
        }
        let dims = match node.op_type.as_str() {
            "Reshape" => {
                let is_literal = flag(node, "allowzero", false)?;
                filled(data, self.input(node, 1)?.numbers.as_ref()?, is_literal)
            }
            "Flatten" => flattened(data, int(node, "axis").unwrap_or(1)),
            "Squeeze" => {
                let axes = self.listed(node, 1, "axes", 13).ok()?;
                squeezed(data, axes.as_deref())
            }
            _ => {
                let axes = self.listed(node, 1, "axes", 13).ok()??;
                unsqueezed(data, &axes)
            }
        };
        let made = Extent::of(dims?);
        (made.count == data.count).then(|| made.with(data.numbers.clone()))
    }

    pub(super) fn concat(&self, node: &NodeProto) -> Option<Extent> {
        let all = self.inputs(node)?;
        let axis = int(node, "axis")?;
        let first = all.first()?;
        let sizes = all.iter().map(|part| {
            let size = part.size(axis)?;
            // All others agree.
            (part.resized(axis, 0)?.dims == first.resized(axis, 0)?.dims).then_some(size)
        });
        let size = sizes
            .collect::<Option<Vec<_>>>()?
            .into_iter()
            .fold(0, u64::saturating_add);
        let made = first.resized(axis, size)?;
        let numbers = || {
            let is_row = made.dims()?.len() == 1 && made.count <= COMPUTED_MAX;
            let parts = all
                .iter()
                .map(|part| part.numbers.as_deref().filter(|_| is_row));
            Some(parts.collect::<Option<Vec<_>>>()?.concat())
        };
        let numbers = numbers();
        Some(made.with(numbers))
    }

    pub(super) fn split(&self, node: &NodeProto) -> Option<Vec<Extent>> {
        let data = self.input(node, 0)?;
        let axis = int(node, "axis").unwrap_or(0);
        let (whole, parts) = (data.size(axis)?, node.output.len() as u64);
        let sizes = match self.listed(node, 1, "split", 13).ok()? {
            Some(sizes) => sizes.iter().map(|&n| u64::try_from(n).ok()).collect(),
            None => match whole.checked_rem(parts)? {
                0 => Some(vec![whole / parts; parts as usize]),
                _ => None,
            },
        };
        let sizes: Vec<u64> = sizes.filter(|sizes: &Vec<u64>| sizes.len() as u64 == parts)?;
        let sum = sizes.iter().fold(0, |all: u64, &n| all.saturating_add(n));
        (sum == whole).then_some(())?;
        sizes.iter().map(|&size| data.resized(axis, size)).collect()
    }

    /// As much as it leaves, if that is told exactly: tract believes bounds beyond an open size, and what is broadcast
    /// with the result is then made as large.
    pub(super) fn slice(&self, node: &NodeProto) -> Option<Extent> {
        let data = self.input(node, 0)?;
        let given = |i: usize, name: &str| self.listed(node, i, name, 10).ok();
        let (starts, ends) = (given(1, "starts")??, given(2, "ends")??);
        let rank = data.dims()?.len();
        (starts.len() == ends.len() && starts.len() <= rank).then_some(())?;
        let axes = given(3, "axes")?.unwrap_or_else(|| (0..starts.len() as i64).collect());
        let steps = given(4, "steps")?.unwrap_or_else(|| vec![1; starts.len()]);
        (axes.len() == starts.len() && steps.len() == starts.len()).then_some(())?;
        let (mut made, mut numbers) = (data.alike(), data.numbers.clone());
        for (((&start, &end), &axis), &step) in starts.iter().zip(&ends).zip(&axes).zip(&steps) {
            let size = i64::try_from(made.size(axis)?).ok()?;
            let step = usize::try_from(step)
                .ok()
                .filter(|step| (1..=STEP_MAX).contains(step))?;
            let (start, end) = (place(start, size)?, place(end, size)?);
            let kept = usize::try_from(end.checked_sub(start)?)
                .ok()?
                .div_ceil(step);
            made = made.resized(axis, kept as u64)?;
            numbers = numbers.and_then(|numbers| {
                let range = numbers.get(start as usize..end as usize)?;
                Some(range.iter().step_by(step).copied().collect())
            });
        }
        Some(made.with(numbers.filter(|_| rank == 1)))
    }

    pub(super) fn reduced(&self, node: &NodeProto) -> Option<Extent> {
        let data = self.input(node, 0)?;
        let since = if node.op_type == "ReduceSum" { 13 } else { 18 };
        let axes = self
            .listed(node, 1, "axes", since)
            .ok()?
            .unwrap_or_default();
        if axes.is_empty() && flag(node, "noop_with_empty_axes", false)? {
            return Some(data.alike());
        }
        let all = || (0..data.dims().map_or(0, <[u64]>::len) as i64).collect();
        let axes = if axes.is_empty() { all() } else { axes };
        let made = self.without(node, &axes)?;
        let numbers = data.numbers.as_deref().filter(|_| made.count == 1);
        let number = numbers.and_then(|all| {
            let mut all = all.iter().copied();
            match node.op_type.as_str() {
                "ReduceSum" => all.try_fold(0, i64::checked_add),
                "ReduceProd" => all.try_fold(1, i64::checked_mul),
                "ReduceMax" => all.max(),
                "ReduceMin" => all.min(),
                _ => None,
            }
        });
        let number = number.and_then(super::numbers::fitting);
        Some(made.with(number.map(|number| vec![number])))
    }

    /// The first input's sizes with these axes reduced to one number, or to none.
    pub(super) fn without(&self, node: &NodeProto, axes: &[i64]) -> Option<Extent> {
        let data = self.input(node, 0)?;
        let keeps = flag(node, "keepdims", true)?;
        let dims = data.dims()?;
        let is_gone = marked(axes, dims.len())?;
        let kept = dims
            .iter()
            .zip(is_gone)
            .filter_map(|(&n, gone)| match (gone, keeps) {
                (false, _) => Some(n),
                (true, true) => Some(1),
                (true, false) => None,
            });
        Some(Extent::of(kept.collect()))
    }
}

/// tract takes steps as numbers of 32 bits.
const STEP_MAX: usize = i32::MAX as usize;

/// Where a slice starts or ends. tract takes what lies beyond a size as it is stated where it doesn't know the size.
fn place(at: i64, size: i64) -> Option<i64> {
    let at = match at {
        // What exporters write for either end.
        i64::MIN => 0,
        END | i64::MAX => size,
        at if at < 0 => at.checked_add(size)?,
        at => at,
    };
    (0..=size).contains(&at).then_some(at)
}

/// The end of all for exporters that count in 32 bits.
const END: i64 = i32::MAX as i64;

/// Which of `rank` axes are named, each once.
fn marked(axes: &[i64], rank: usize) -> Option<Vec<bool>> {
    let mut marks = vec![false; rank];
    for &axis in axes {
        let mark = &mut marks[onnx::axis(axis, rank)?];
        (!*mark).then_some(())?;
        *mark = true;
    }
    Some(marks)
}

/// The sizes that a `Reshape` asks for, those left open filled in.
fn filled(data: &Extent, wanted: &[i64], is_literal: bool) -> Option<Vec<u64>> {
    let dims = data.dims()?;
    let mut open = None;
    let size = |(axis, &n): (usize, &i64)| match n {
        0 if !is_literal => dims.get(axis).copied(),
        -1 => open.replace(axis).is_none().then_some(1),
        n => u64::try_from(n).ok(),
    };
    let made = wanted.iter().take(RANK_MAX + 1).enumerate().map(size);
    let mut made = made.collect::<Option<Vec<_>>>()?;
    if let Some(open) = open {
        let rest = Extent::of(made.clone()).count;
        made[open] = data
            .count
            .is_multiple_of(rest)
            .then(|| data.count.checked_div(rest))??;
    }
    Some(made)
}

fn flattened(data: &Extent, axis: i64) -> Option<Vec<u64>> {
    let dims = data.dims()?;
    let at = onnx::axis(axis, dims.len());
    let at = at.or((axis == dims.len() as i64).then_some(dims.len()))?;
    let (a, b) = dims.split_at(at);
    Some([a, b].map(|part| Extent::of(part.to_vec()).count).to_vec())
}

fn squeezed(data: &Extent, axes: Option<&[i64]>) -> Option<Vec<u64>> {
    let dims = data.dims()?;
    let Some(axes) = axes else {
        // Which axes go depends on sizes that tract may not know; one number becomes no vector in any case.
        return (dims == [1]).then(Vec::new);
    };
    let is_gone = marked(axes, dims.len())?;
    let kept = dims.iter().zip(is_gone).filter(|(_, gone)| !gone);
    Some(kept.map(|(&n, _)| n).collect())
}

fn unsqueezed(data: &Extent, axes: &[i64]) -> Option<Vec<u64>> {
    let dims = data.dims()?;
    let rank = dims.len() + axes.len();
    let is_new = marked(axes, (rank <= RANK_MAX).then_some(rank)?)?;
    let mut rest = dims.iter().copied();
    is_new
        .iter()
        .map(|new| if *new { Some(1) } else { rest.next() })
        .collect()
}
