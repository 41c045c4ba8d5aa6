//! RFC 3339 to milliseconds since 1970 and back. UTC out, any offset in; no leap seconds, no time zones.

const MS_PER_DAY: i64 = 86_400_000;

/// `2026-11-23T10:29:39.000Z` for milliseconds since 1970.
pub fn format(ms: u64) -> String {
    let ms = i64::try_from(ms)
        .unwrap_or(i64::MAX / 2)
        .min(253_402_300_799_999); // the end of 9999
    let (days, rest) = (ms / MS_PER_DAY, ms % MS_PER_DAY);
    let (year, month, day) = civil(days);
    let (h, m, s, ms) = (
        rest / 3_600_000,
        rest / 60_000 % 60,
        rest / 1000 % 60,
        rest % 1000,
    );
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{ms:03}Z")
}

/// Milliseconds since 1970 of an RFC 3339 time; `None` when it isn't one, or lies before 1970.
pub fn parse(text: &str) -> Option<u64> {
    let b = text.as_bytes();
    let sep = |i: usize, any: &[u8]| b.get(i).is_some_and(|c| any.contains(c));
    if !(sep(4, b"-") && sep(7, b"-") && sep(10, b"Tt ") && sep(13, b":") && sep(16, b":")) {
        return None;
    }
    let (year, month, day) = (digits(b, 0, 4)?, digits(b, 5, 2)?, digits(b, 8, 2)?);
    let (h, m, s) = (digits(b, 11, 2)?, digits(b, 14, 2)?, digits(b, 17, 2)?);
    if !(1..=12).contains(&month)
        || !(1..=month_days(year, month)).contains(&day)
        || h > 23
        || m > 59
        || s > 60
    {
        return None;
    }
    let mut at = 19;
    let mut fraction = 0;
    if sep(at, b".") {
        let len = b[at + 1..]
            .iter()
            .take_while(|c| c.is_ascii_digit())
            .count();
        if len == 0 || len > 18 {
            return None;
        }
        let mut scale = 100;
        for c in &b[at + 1..at + 1 + len] {
            fraction += i64::from(c - b'0') * scale;
            scale /= 10;
        }
        at += 1 + len;
    }
    let offset = match &b[at..] {
        b"Z" | b"z" => 0,
        [sign @ (b'+' | b'-'), _, _, b':', _, _] => {
            let (oh, om) = (digits(b, at + 1, 2)?, digits(b, at + 4, 2)?);
            if oh > 23 || om > 59 {
                return None;
            }
            (oh * 60 + om) * if *sign == b'-' { -60_000 } else { 60_000 }
        }
        _ => return None,
    };
    let ms = days(year, month, day) * MS_PER_DAY + h * 3_600_000 + m * 60_000 + s * 1000 + fraction
        - offset;
    u64::try_from(ms).ok()
}

fn digits(b: &[u8], at: usize, len: usize) -> Option<i64> {
    let field = b.get(at..at + len)?;
    field.iter().try_fold(0, |n, c| {
        c.is_ascii_digit().then(|| n * 10 + i64::from(c - b'0'))
    })
}

fn month_days(year: i64, month: i64) -> i64 {
    let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    match month {
        4 | 6 | 9 | 11 => 30,
        2 => 28 + i64::from(leap),
        _ => 31,
    }
}

/// Days since 1970-01-01 of a date of the proleptic Gregorian calendar (Howard Hinnant, "chrono-compatible
/// low-level date algorithms": years start in March, so that the leap day is the last).
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year - era * 400;
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// The inverse of [`days`].
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let of_era = z - era * 146_097;
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let mp = (5 * of_year + 2) / 153;
    let day = of_year - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_times() {
        assert_eq!(format(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(parse("2000-03-01T00:00:00Z"), Some(951_868_800_000));
        assert_eq!(
            parse("2026-11-23T12:00:00.25+02:00"),
            parse("2026-11-23T10:00:00.250Z")
        );
        assert_eq!(
            parse("2024-02-29T00:00:00Z").map(format).as_deref(),
            Some("2024-02-29T00:00:00.000Z")
        );
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            "2026-11-23",
            "2026-11-23T10:00:00",
            "2023-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-11-23T24:00:00Z",
            "2026-11-23T10:00:00.Z",
            "1969-12-31T23:59:59Z",
            "２026-11-23T10:00:00Z",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn there_and_back(ms in 0u64..253_402_300_800_000) {
            prop_assert_eq!(parse(&format(ms)), Some(ms));
        }
        #[test]
        fn never_panics(text in "\\PC*") { parse(&text); }
    }
}
