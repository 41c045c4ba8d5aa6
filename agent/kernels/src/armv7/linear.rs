//! The call of linear.s: walks tiles and tokens as `matmul` does, and says where things lie.

use crate::matmul::Output;
use crate::packed::{BLOCK, Kind, Packed, TILE_ROWS};
use crate::quantised::{OCTET, OctetView, Quantised, Sums};
use crate::scalar::Scalar;
use std::arch::global_asm;
use std::ops::Range;

global_asm!(include_str!("linear.s"), options(raw));

// The strides in linear.s.
const _: () = {
    assert!(size_of::<[[i8; BLOCK]; OCTET]>() == 256);
    assert!(size_of::<[f32; OCTET]>() == 32 && size_of::<Sums>() == 160);
};

/// What a function of linear.s is called with.
#[repr(C)]
struct Step {
    /// The tile.
    weights: *const u8,
    blocks: usize,
    /// Of the first token, in block 0.
    q: *const i8,
    scale: *const f32,
    /// Sums of activations times their scale, over blocks or, with groups of 16, over halves.
    sum: *const f32,
    /// `[tokens][16]`, zeros.
    out: *mut [f32; TILE_ROWS],
}

type Linear = unsafe extern "C" fn(&Step);

/// Names the functions of linear.s: by the kind's code, one token and two.
macro_rules! linears {
    ($($code:literal: $one:ident, $two:ident;)*) => {
        unsafe extern "C" {
            $(fn $one(step: &Step); fn $two(step: &Step);)*
        }

        fn linear(kind: Kind) -> [Linear; 2] {
            match kind.code() {
                $($code => [$one, $two],)*
                code => unreachable!("there is no kind {code}"),
            }
        }
    };
}

linears! {
    0: millwright_armv7_linear_0_1, millwright_armv7_linear_0_2;
    2: millwright_armv7_linear_2_1, millwright_armv7_linear_2_2;
    3: millwright_armv7_linear_3_1, millwright_armv7_linear_3_2;
    4: millwright_armv7_linear_4_1, millwright_armv7_linear_4_2;
    6: millwright_armv7_linear_6_1, millwright_armv7_linear_6_2;
    7: millwright_armv7_linear_7_1, millwright_armv7_linear_7_2;
    8: millwright_armv7_linear_8_1, millwright_armv7_linear_8_2;
    10: millwright_armv7_linear_10_1, millwright_armv7_linear_10_2;
    11: millwright_armv7_linear_11_1, millwright_armv7_linear_11_2;
    12: millwright_armv7_linear_12_1, millwright_armv7_linear_12_2;
    14: millwright_armv7_linear_14_1, millwright_armv7_linear_14_2;
    15: millwright_armv7_linear_15_1, millwright_armv7_linear_15_2;
}

/// Computes `tiles` for all tokens, as `matmul::tiles` does. Tiles are the outer loop: one stays in the cache while
/// the tokens pass.
///
/// # Safety
/// [`detect`](super::detect) says so.
pub(crate) unsafe fn tiles(w: Packed, tiles: Range<usize>, a: &Quantised, out: &Output) {
    let steps = linear(w.kind());
    for tile in tiles {
        for octet in 0..out.activations().div_ceil(OCTET) {
            let (view, base) = (a.octet(octet), octet * OCTET);
            let tokens = OCTET.min(out.activations() - base);
            for first in (0..tokens).step_by(2) {
                let count = (tokens - first).min(2);
                let mut sums = [[0.0; TILE_ROWS]; 2];
                // SAFETY: the caller's promise, and `count` tokens from `first` on are the octet's.
                unsafe { step(steps[count - 1], w, tile, view, first, &mut sums) }
                for (token, sums) in sums.iter().take(count).enumerate() {
                    out.put(Scalar, base + first + token, tile, *sums);
                }
            }
        }
    }
}

/// # Safety
/// The CPU has what [`detect`](super::detect) asks for; `linear` is the kind's, for a number of tokens that the octet
/// has from `first` on.
unsafe fn step(
    linear: Linear,
    w: Packed,
    tile: usize,
    a: OctetView,
    first: usize,
    out: &mut [[f32; TILE_ROWS]; 2],
) {
    let blocks = w.shape().blocks();
    assert!(a.q.len() == blocks && a.scale.len() == blocks && a.sums.len() == blocks);
    let sum = if w.kind().groups() == 1 {
        &raw const a.sums[0].block
    } else {
        &raw const a.sums[0].half[0]
    };
    let step = Step {
        weights: w.tile(tile).as_ptr(),
        blocks,
        q: a.q.as_ptr().cast::<i8>().wrapping_add(first * BLOCK),
        scale: a.scale.as_ptr().cast::<f32>().wrapping_add(first),
        sum: sum.cast::<f32>().wrapping_add(first),
        out: out.as_mut_ptr(),
    };
    // SAFETY: the tile and the octet have `blocks` blocks each, one at least, by the assertion and `Packed`.
    unsafe { linear(&step) }
}
