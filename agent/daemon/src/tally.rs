//! What is counted since start, for the health sample. Only numbers: no ids, no text.

use millwright_engine::Reads;
use millwright_task::job::Ticket;
use millwright_task::wire::Code;
use serde::Serialize;
use serde::ser::SerializeMap;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// Upper bounds in milliseconds; histograms with the same bounds can be added up across gateways.
const BUCKETS_MS: [u64; 14] = [
    5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000,
];

/// Counts per bucket, the last one for all beyond; not cumulative.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: [u64; BUCKETS_MS.len() + 1],
    sum_ms: u64,
}

impl Histogram {
    pub fn add(&mut self, duration: Duration) {
        let ms = duration.as_millis() as u64;
        self.counts[BUCKETS_MS.partition_point(|bound| *bound < ms)] += 1;
        self.sum_ms += ms;
    }
}

impl Serialize for Histogram {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(3))?;
        map.serialize_entry("le_ms", &BUCKETS_MS)?;
        map.serialize_entry("counts", &self.counts)?;
        map.serialize_entry("sum_ms", &self.sum_ms)?;
        map.end()
    }
}

/// Tokens and the time they took.
#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    tokens: u64,
    time: Duration,
}

impl Rate {
    fn add(&mut self, tokens: u64, time: Duration) {
        self.tokens += tokens;
        self.time += time;
    }

    /// Per second; `None` before anything was measured. Starts anew.
    fn take(&mut self) -> Option<f64> {
        let Self { tokens, time } = std::mem::take(self);
        (!time.is_zero()).then(|| (tokens as f64 / time.as_secs_f64() * 10.0).round() / 10.0)
    }
}

/// The counters.
#[derive(Debug, Default)]
pub struct Tally {
    finals: BTreeMap<&'static str, u64>,
    refusals: BTreeMap<&'static str, u64>,
    first_token: Histogram,
    latency: Histogram,
    prompt: Rate,
    decode: Rate,
    arrivals: HashMap<Ticket, (Duration, bool)>,
    /// As the last sample had it.
    reads: Reads,
    pub reconnects: u64,
}

/// The counters as they are published.
#[derive(Debug, Serialize)]
pub struct Counts {
    tasks: BTreeMap<&'static str, u64>,
    refusals: BTreeMap<&'static str, u64>,
    /// Since the last sample; null when nothing ran.
    prompt_tokens_per_s: Option<f64>,
    decode_tokens_per_s: Option<f64>,
    time_to_first_token: Histogram,
    task_latency: Histogram,
    broker_reconnects: u64,
}

impl Tally {
    pub fn refused(&mut self, code: Code) {
        *self.refusals.entry(code.name()).or_default() += 1;
    }

    /// A final event of a task that never ran.
    pub fn ended(&mut self, event: &'static str) {
        *self.finals.entry(event).or_default() += 1;
    }

    pub fn accepted(&mut self, now: Duration, ticket: Ticket) {
        self.arrivals.insert(ticket, (now, false));
    }

    /// Forgets tasks that ended while they waited.
    pub fn keep(&mut self, alive: impl Fn(Ticket) -> bool) {
        self.arrivals.retain(|&ticket, _| alive(ticket));
    }

    pub fn text(&mut self, now: Duration, ticket: Ticket) {
        if let Some((at, seen @ false)) = self.arrivals.get_mut(&ticket) {
            *seen = true;
            self.first_token.add(now.saturating_sub(*at));
        }
    }

    pub fn finished(&mut self, now: Duration, ticket: Ticket, event: &'static str) {
        self.ended(event);
        if let Some((at, _)) = self.arrivals.remove(&ticket) {
            self.latency.add(now.saturating_sub(at));
        }
    }

    pub fn speed(&mut self, prompt: (u64, Duration), decode: (u64, Duration)) {
        self.prompt.add(prompt.0, prompt.1);
        self.decode.add(decode.0, decode.1);
    }

    /// The share of the memory's bandwidth, in bytes a second, that decoding used since the last sample while it
    /// decoded; `None` when it didn't, or where the bandwidth is unknown.
    pub fn share(&mut self, reads: Reads, bandwidth: Option<u64>) -> Option<f64> {
        let last = std::mem::replace(&mut self.reads, reads);
        let time = reads.time.saturating_sub(last.time).as_secs_f64();
        let bandwidth = bandwidth.filter(|&bytes| bytes > 0 && time > 0.0)?;
        let rate = reads.bytes.saturating_sub(last.bytes) as f64 / time;
        Some((rate / bandwidth as f64 * 1000.0).round() / 1000.0)
    }

    pub fn counts(&mut self) -> Counts {
        Counts {
            tasks: self.finals.clone(),
            refusals: self.refusals.clone(),
            prompt_tokens_per_s: self.prompt.take(),
            decode_tokens_per_s: self.decode.take(),
            time_to_first_token: self.first_token.clone(),
            task_latency: self.latency.clone(),
            broker_reconnects: self.reconnects,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_that_of_the_time_since_the_last_sample() {
        let reads = |bytes, ms| Reads {
            bytes,
            time: Duration::from_millis(ms),
            tokens: 0,
        };
        let mut tally = Tally::default();
        assert_eq!(tally.share(reads(0, 0), Some(1000)), None);
        assert_eq!(tally.share(reads(400, 1000), Some(1000)), Some(0.4));
        assert_eq!(tally.share(reads(400, 1000), Some(1000)), None);
        assert_eq!(tally.share(reads(1300, 2000), Some(1000)), Some(0.9));
        assert_eq!(tally.share(reads(2300, 3000), None), None);
        assert_eq!(tally.share(reads(2400, 3200), Some(1000)), Some(0.5));
        assert_eq!(tally.share(reads(9999, 9999), Some(0)), None);
    }

    #[test]
    fn a_duration_counts_once_in_the_bucket_that_holds_it() {
        let mut histogram = Histogram::default();
        for ms in [0, 5, 6, 300_000, 300_001] {
            histogram.add(Duration::from_millis(ms));
        }
        assert_eq!(histogram.counts.iter().sum::<u64>(), 5);
        assert_eq!(
            (
                histogram.counts[0],
                histogram.counts[1],
                histogram.counts[13],
                histogram.counts[14]
            ),
            (2, 1, 1, 1)
        );
    }

    #[test]
    fn only_the_first_text_counts_as_first_and_rates_start_anew() {
        let mut tally = Tally::default();
        tally.accepted(Duration::from_secs(1), Ticket(1));
        tally.text(Duration::from_secs(2), Ticket(1));
        tally.text(Duration::from_secs(9), Ticket(1));
        tally.finished(Duration::from_secs(9), Ticket(1), "done");
        tally.speed((10, Duration::from_secs(1)), (40, Duration::from_secs(2)));
        let counts = tally.counts();
        assert_eq!(
            (
                counts.time_to_first_token.sum_ms,
                counts.task_latency.sum_ms
            ),
            (1000, 8000)
        );
        assert_eq!(
            (counts.prompt_tokens_per_s, counts.decode_tokens_per_s),
            (Some(10.0), Some(20.0))
        );
        assert_eq!(tally.counts().decode_tokens_per_s, None);
    }
}
