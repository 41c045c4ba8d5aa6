//! The numbers that every kernel must agree on, one at a time: exp, and f16 to and from f32.
//! The vector forms are in `simd` and follow these step by step.

/// Above this, `exp` is infinite: 127.5 · ln 2, the last argument whose power of two is a normal f32.
pub(crate) const EXP_HIGH: f32 = 88.376_26;
/// Below this, `exp` is zero: −126 · ln 2, so that no result is denormal.
pub(crate) const EXP_LOW: f32 = -87.336_54;
/// ln 2 in two parts, of which the first has so few bits that its product with a whole number is exact.
pub(crate) const LN2_HIGH: f32 = 0.693_359_4;
pub(crate) const LN2_LOW: f32 = -2.121_944_4e-4;
/// The polynomial of Cephes' `expf` (Moshier): exp(r) ≈ 1 + r + r² · p(r) for |r| ≤ ln 2 / 2, highest power first.
pub(crate) const EXP_POLYNOMIAL: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_5e-1,
    0.5,
];

/// e to the `x`, within 2 units in the last place, the same on every CPU. Infinite above 88.376, zero below
/// −87.336, NaN for NaN.
pub fn exp(x: f32) -> f32 {
    if x > EXP_HIGH {
        return f32::INFINITY;
    }
    if EXP_LOW > x {
        return 0.0;
    }
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut p = EXP_POLYNOMIAL[0];
    for coefficient in &EXP_POLYNOMIAL[1..] {
        p = p.mul_add(r, *coefficient);
    }
    let y = (r * r).mul_add(p, r) + 1.0;
    y * power_of_two(n)
}

/// 2 to the `n` for a whole `n` from −126 to 127; anything for other numbers.
pub(crate) fn power_of_two(n: f32) -> f32 {
    f32::from_bits(((n as i32).wrapping_add(127) << 23).cast_unsigned())
}

/// The f32 with the value of these f16 bits; exact.
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let (exponent, mantissa) = (u32::from(bits >> 10 & 0x1f), u32::from(bits & 0x3ff));
    match exponent {
        // Denormal: the mantissa counts units of 2^-24, and the product is exact.
        0 => f32::from_bits(sign | (mantissa as f32 * f32::from_bits(0x3380_0000)).to_bits()),
        // Infinity stays so; a NaN becomes quiet, as the hardware does it.
        0x1f if mantissa != 0 => f32::from_bits(sign | 0x7fc0_0000 | mantissa << 13),
        0x1f => f32::from_bits(sign | 0x7f80_0000),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | mantissa << 13),
    }
}

/// The f16 bits nearest to `x`, ties to even; too large becomes infinite.
pub fn f32_to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00 | (magnitude >> 13 & 0x3ff) as u16;
    }
    // 65520 is the first that rounds up to 2^16.
    if magnitude >= 0x477f_f000 {
        return sign | 0x7c00;
    }
    if magnitude >= 0x3880_0000 {
        let odd = magnitude >> 13 & 1;
        return sign | ((magnitude - 0x3800_0000 + 0xfff + odd) >> 13) as u16;
    }
    // Denormal: adding one half aligns the units of 2^-24 with an f32's last bit, which rounds for us.
    let aligned = f32::from_bits(magnitude) + 0.5;
    sign | (aligned.to_bits() - 0x3f00_0000) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units() {
        let mut worst = 0.0f64;
        for step in 0..2_000_000 {
            let x = -87.33 + step as f32 * (175.7 / 2_000_000.0);
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            let unit =
                f64::from(f32::from_bits((want as f32).to_bits() + 1)) - f64::from(want as f32);
            worst = worst.max(((got - want) / unit).abs());
        }
        assert!(worst < 2.0, "{worst} units");
    }

    #[test]
    fn exp_at_the_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(EXP_HIGH).is_finite() && exp(EXP_LOW) >= f32::MIN_POSITIVE * 0.999);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn every_f16_survives() {
        for bits in 0..=u16::MAX {
            let x = f16_to_f32(bits);
            if x.is_nan() {
                assert_eq!(f32_to_f16(x), bits | 0x200);
            } else {
                assert_eq!(f32_to_f16(x), bits);
            }
        }
    }

    #[test]
    fn f16_rounds_to_nearest_even() {
        for bits in 0..0x7bffu16 {
            let (low, high) = (f64::from(f16_to_f32(bits)), f64::from(f16_to_f32(bits + 1)));
            let middle = f64::midpoint(low, high) as f32;
            assert_eq!(
                f32_to_f16(middle),
                bits + (bits & 1),
                "between {low} and {high}"
            );
            assert_eq!(f32_to_f16(f32::from_bits(middle.to_bits() - 1)), bits);
            assert_eq!(f32_to_f16(f32::from_bits(middle.to_bits() + 1)), bits + 1);
        }
        assert_eq!(f32_to_f16(65519.9), 0x7bff);
        assert_eq!(f32_to_f16(65520.0), 0x7c00);
        assert_eq!(f32_to_f16(f32::NEG_INFINITY), 0xfc00);
    }
}
