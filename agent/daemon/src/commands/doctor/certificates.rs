//! Certificates: ours, the CA's and the broker's, by the agent's own judgement of time. Chains and names are judged by
//! connecting.

use super::report::Finding;
use crate::broker::{Settings, certificate, tls};
use crate::clock;
use std::time::Duration;

const CHECK: &str = "certificates";

/// Ours. That the key belongs to it was seen when the configuration was read.
pub(super) fn own(settings: &Settings) -> Vec<Finding> {
    let Some(client) = settings.access.tls() else {
        return Vec::new();
    };
    let now = clock::latest();
    let lives = client.lives();
    lives
        .map(|(place, begins, ends)| {
            judged(
                &format!("the certificate in {place}"),
                begins,
                ends,
                now,
                "put a renewed one in its place; the agent needs no restart for that",
            )
        })
        .collect()
}

/// The broker's, where it shows one that we take.
pub(super) fn brokers(settings: &Settings) -> Option<Finding> {
    let (begins, ends) = certificate(settings)?;
    let advice = "have the broker's certificate renewed: no gateway can connect once it has ended";
    Some(judged(
        "the broker's certificate",
        begins,
        ends,
        clock::latest(),
        advice,
    ))
}

fn judged(what: &str, begins: Duration, ends: Duration, now: Duration, advice: &str) -> Finding {
    let (from, until) = (tls::date(begins), tls::date(ends));
    if ends <= now {
        return Finding::problem(CHECK, format!("{what} ended on {until}"), advice);
    }
    if begins > now {
        let advice = "check this gateway's clock, and whether it is the right certificate";
        return Finding::problem(CHECK, format!("{what} begins on {from}"), advice);
    }
    if tls::ends_soon(begins, ends, now) {
        return Finding::warning(CHECK, format!("{what} ends on {until}"), advice);
    }
    Finding::ok(CHECK, format!("{what} is good until {until}"))
}

#[cfg(test)]
mod tests {
    use super::super::report::Level;
    use super::*;

    #[test]
    fn a_certificate_is_judged_by_its_time() {
        let day = |n: u64| Duration::from_hours(24 * n);
        let level =
            |begins, ends| judged("it", day(begins), day(ends), day(1000), "renew it").level;
        assert_eq!(level(900, 1300), Level::Ok);
        assert_eq!(level(900, 1013), Level::Warning);
        // One of a short life.
        assert_eq!((level(996, 1003), level(999, 1003)), (Level::Ok, Level::Ok));
        assert_eq!(level(995, 1002), Level::Warning);
        assert_eq!(
            (level(900, 1000), level(1001, 1300)),
            (Level::Problem, Level::Problem)
        );
    }
}
