//! Operators whose output is as large as numbers say.

use super::Extents;
use super::value::{COMPUTED_MAX, Extent, broadcast, spread};
use crate::onnx::int;
use tract_onnx::pb::NodeProto;

impl Extents<'_> {
    /// Operators whose output is as large as numbers say: `None` for others, an error where those aren't known.
    pub(super) fn sized(&self, node: &NodeProto) -> Option<Result<Extent, &'static str>> {
        let x = |i: usize| self.input(node, i);
        // Below zero they wrap around where tract takes them.
        let sizes = |i: usize| -> Option<Vec<u64>> {
            let sizes = x(i)?.ints()?.into_iter();
            sizes.map(|n| u64::try_from(n).ok()).collect()
        };
        let made = match node.op_type.as_str() {
            "ConstantOfShape" => sizes(0).map(|dims| {
                let made = Extent::of(dims);
                let value = node.attribute.first().and_then(|a| a.t.as_ref());
                let value = value.map_or(Some(0.0), |t| {
                    Some(f64::from(crate::onnx::Numbers::inline(t)?.at(0)))
                });
                let few = made.count <= COMPUTED_MAX;
                let numbers = value.filter(|_| few).map(|v| vec![v; made.count as usize]);
                made.with(numbers)
            }),
            "Expand" => x(0).zip(sizes(1)).map(|(data, dims)| {
                let wanted = Extent::of(dims);
                let made = broadcast(&[data, &wanted]);
                let numbers = spread(data, &made);
                made.with(numbers)
            }),
            "Tile" => x(0).zip(sizes(1)).map(|(data, times)| {
                let Some(dims) = &data.dims else {
                    let times = times
                        .iter()
                        .fold(1, |all: u64, &n| all.saturating_mul(n.max(1)));
                    return Extent::flat(data.count.saturating_mul(times));
                };
                let dims = dims
                    .iter()
                    .zip(&times)
                    .map(|(n, times)| n.saturating_mul(*times));
                Extent::of(dims.collect())
            }),
            "Pad" => {
                let pads = self.listed(node, 1, "pads").ok().flatten();
                x(0).zip(pads).and_then(|(data, pads)| {
                    let rank = data.rank();
                    let around = |axis: usize| {
                        let pad = |i: usize| pads.get(i).map_or(0, |&n| n.max(0)) as u64;
                        pad(axis).saturating_add(pad(axis + rank))
                    };
                    let dims = data.dims.as_ref()?.iter().enumerate();
                    // Axes may be given in any order; then all of the padding may lie on each.
                    let all = pads
                        .iter()
                        .fold(0, |all: u64, &n| all.saturating_add(n.max(0) as u64));
                    let named = x(3).is_some();
                    let more = |axis| if named { all } else { around(axis) };
                    let dims = dims.map(|(axis, n)| n.saturating_add(more(axis)));
                    Some(Extent::of(dims.collect()))
                })
            }
            "Range" => {
                let number = |i: usize| x(i)?.numbers.as_ref()?.first().copied();
                let ends = || Some((number(0)?, number(1)?, number(2)?));
                let counts =
                    |&(first, end, step): &(f64, f64, f64)| ((end - first) / step).is_finite();
                ends().filter(counts).map(|(first, end, step)| {
                    let count = ((end - first) / step).ceil().max(0.0);
                    let few = count <= COMPUTED_MAX as f64;
                    let numbers = few.then(|| (0..count as u64).map(|i| first + step * i as f64));
                    Extent::of(vec![count as u64]).with(numbers.map(Iterator::collect))
                })
            }
            "OneHot" => {
                let depth = sizes(1).and_then(|depth| depth.first().copied());
                x(0).zip(depth).map(|(data, depth)| {
                    let mut dims = data.dims.clone().unwrap_or_else(|| vec![data.count]);
                    dims.push(depth);
                    Extent::of(dims)
                })
            }
            "TopK" => x(0)
                .zip(sizes(1))
                .and_then(|(data, k)| data.resized(int(node, "axis").unwrap_or(-1), *k.first()?)),
            _ => return None,
        };
        Some(made.ok_or("whose size does not follow from the sizes of its inputs"))
    }
}
