//! Operators whose output is as large as numbers say.

use super::Extents;
use super::numbers::{fitting, spread};
use super::value::{COMPUTED_MAX, Extent, broadcast};
use crate::onnx::{self, int};
use tract_onnx::pb::NodeProto;

impl Extents<'_> {
    pub(super) fn constant_of_shape(&self, node: &NodeProto) -> Option<Extent> {
        let made = Extent::of(self.input(node, 0)?.sizes()?);
        let value = node.attribute.iter().find(|a| a.name == "value");
        let value = value.and_then(|a| self.graph.whole_numbers(a.t.as_ref()?));
        let numbers = match value.as_deref() {
            Some([one]) if made.count <= COMPUTED_MAX => Some(vec![*one; made.count as usize]),
            _ => None,
        };
        Some(made.with(numbers))
    }

    pub(super) fn expanded(&self, node: &NodeProto) -> Option<Extent> {
        let data = self.input(node, 0)?;
        let made = broadcast(&[data, &Extent::of(self.input(node, 1)?.sizes()?)]);
        let numbers =
            spread(data, &made).filter(|_| made.dims.is_some() && made.count <= COMPUTED_MAX);
        let numbers = numbers.map(|numbers| match numbers {
            [one] => vec![*one; made.count as usize],
            all => all.to_vec(),
        });
        Some(made.with(numbers))
    }

    pub(super) fn tiled(&self, node: &NodeProto) -> Option<Extent> {
        let (dims, times) = (self.input(node, 0)?.dims()?, self.input(node, 1)?.sizes()?);
        let pairs = (times.len() == dims.len()).then(|| dims.iter().zip(&times))?;
        Some(Extent::of(
            pairs.map(|(n, times)| n.saturating_mul(*times)).collect(),
        ))
    }

    pub(super) fn padded(&self, node: &NodeProto) -> Option<Extent> {
        let dims = self.input(node, 0)?.dims()?;
        let pads = self.listed(node, 1, "pads", 11).ok()??;
        // Some axes alone may be named, in any order: no known model does that.
        let fit = pads.len() == 2 * dims.len() && self.input(node, 3).is_none();
        let (before, after) = fit.then(|| pads.split_at(dims.len()))?;
        let size = |((&n, &a), &b): ((&u64, &i64), &i64)| {
            let around = u64::try_from(a)
                .ok()?
                .saturating_add(u64::try_from(b).ok()?);
            Some(n.saturating_add(around))
        };
        let made = dims.iter().zip(before).zip(after).map(size);
        Some(Extent::of(made.collect::<Option<_>>()?))
    }

    pub(super) fn range(&self, node: &NodeProto) -> Option<Extent> {
        let number = |i: usize| match self.input(node, i)?.numbers.as_deref()? {
            &[number] => fitting(number),
            _ => None,
        };
        let (first, end, step) = (number(0)?, number(1)?, number(2)?);
        let count = (step > 0).then(|| {
            (end - first)
                .max(0)
                .unsigned_abs()
                .div_ceil(step.unsigned_abs())
        })?;
        let numbers =
            (count <= COMPUTED_MAX).then(|| (first..end).step_by(step as usize).collect());
        Some(Extent::of(vec![count]).with(numbers))
    }

    pub(super) fn one_hot(&self, node: &NodeProto) -> Option<Extent> {
        let mut dims = self.input(node, 0)?.dims.clone()?;
        let &[depth] = self.input(node, 1)?.sizes()?.as_slice() else {
            return None;
        };
        let axis = onnx::axis(int(node, "axis").unwrap_or(-1), dims.len() + 1)?;
        dims.insert(axis, depth);
        Some(Extent::of(dims))
    }
}
