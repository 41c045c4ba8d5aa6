//! Attention that is one operator, and rotation: the sizes of heads, tokens and the cache.

use super::Extents;
use super::value::Extent;
use crate::onnx::int;
use tract_onnx::pb::NodeProto;

/// Sizes `[batch, heads, tokens, width]` of queries, keys or values.
struct Parted {
    batch: u64,
    heads: u64,
    tokens: u64,
    width: u64,
}

impl Parted {
    /// Of `[batch, heads, tokens, width]`, or of `[batch, tokens, heads · width]` with so many heads.
    fn of(x: &Extent, heads: Option<u64>) -> Option<Self> {
        let (batch, heads, tokens, width) = match *x.dims()? {
            [batch, heads, tokens, width] => (batch, heads, tokens, width),
            [batch, tokens, all] => {
                let heads = heads?;
                let width = all
                    .is_multiple_of(heads)
                    .then(|| all.checked_div(heads))??;
                (batch, heads, tokens, width)
            }
            _ => return None,
        };
        Some(Self {
            batch,
            heads,
            tokens,
            width,
        })
    }
}

impl Extents<'_> {
    /// The result, keys and values with those of the past, and the products on the way.
    pub(super) fn attention(&self, node: &NodeProto) -> Option<Vec<Extent>> {
        let x = |i: usize| self.input(node, i);
        let op = node.op_type.as_str();
        let heads_of = |name: &str| int(node, name).and_then(|n| u64::try_from(n).ok());
        let (query_heads, past) = match op {
            "Attention" => (heads_of("q_num_heads"), [4, 5]),
            "GroupQueryAttention" => (heads_of("num_heads"), [3, 4]),
            _ => (heads_of("num_heads"), [6, 7]),
        };
        let kv_heads = if op == "MultiHeadAttention" {
            query_heads
        } else {
            heads_of("kv_num_heads")
        };
        let (query, key, value) = match (x(1), x(2)) {
            (Some(key), Some(value)) => (
                Parted::of(x(0)?, query_heads)?,
                Parted::of(key, kv_heads)?,
                Parted::of(value, kv_heads)?,
            ),
            // All three lie in the first.
            (None, None) => {
                let shared = query_heads?.checked_add(kv_heads?.checked_mul(2)?)?;
                let part = |heads: Option<u64>| {
                    let heads = heads?;
                    let all = Parted::of(x(0)?, Some(shared))?;
                    Some(Parted { heads, ..all })
                };
                (part(query_heads)?, part(kv_heads)?, part(kv_heads)?)
            }
            _ => return None,
        };
        let cached = |new: &Parted, past: usize| {
            let rows = |tokens| Extent::of(vec![new.batch, new.heads, tokens, new.width]);
            let before = match x(past) {
                None => 0,
                Some(past) => {
                    let before = past.size(-2)?;
                    (past.dims == rows(before).dims).then_some(before)?
                }
            };
            Some(rows(before.saturating_add(new.tokens)))
        };
        ([key.batch, value.batch] == [query.batch; 2]).then_some(())?;
        let (keys, values) = (cached(&key, past[0])?, cached(&value, past[1])?);
        let all = keys.size(-2)?;
        let products = Extent::of(vec![query.batch, query.heads, query.tokens, all]);
        // Keys and values may be repeated for all heads that share them.
        let width = key.width.max(value.width);
        let repeated = Extent::of(vec![query.batch, query.heads, all, width]);
        let mask = x(3).filter(|_| op == "Attention");
        mask.is_none_or(|mask| products.takes(mask)).then_some(())?;
        let result = Extent::of(if x(0)?.dims()?.len() == 4 {
            vec![query.batch, query.heads, query.tokens, value.width]
        } else {
            let width = query.heads.saturating_mul(value.width);
            vec![query.batch, query.tokens, width]
        });
        Some(vec![result, keys, values, products, repeated])
    }

    /// Rotated in place: one row of angles a token, no wider than half a head.
    pub(super) fn rotated(&self, node: &NodeProto) -> Option<Extent> {
        let x = |i: usize| self.input(node, i);
        let heads = int(node, "num_heads").and_then(|n| u64::try_from(n).ok());
        let of = Parted::of(x(0)?, heads.filter(|&n| n > 0).or(Some(1)))?;
        let places = Extent::of(vec![of.batch, of.tokens]);
        let (cos, sin, at) = if node.domain == "com.microsoft" {
            (x(2)?, x(3)?, x(1))
        } else {
            (x(1)?, x(2)?, x(3))
        };
        for table in [cos, sin] {
            let (width, rows) = table.dims()?.split_last()?;
            let rows = match at {
                Some(at) => (rows.len() == 1).then(|| at.alike())?,
                None => Extent::of(rows.to_vec()),
            };
            let fits = places.takes(&rows) && width.saturating_mul(2) <= of.width;
            fits.then_some(())?;
        }
        Some(x(0)?.alike())
    }
}
