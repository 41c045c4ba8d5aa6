//! How long tasks take: what was measured of those that are done, and what it says of others. Decides nothing.

use crate::job::Product;
use std::time::Duration;

/// What an estimate is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Size {
    pub prompt_tokens: usize,
    /// At most.
    pub answer_tokens: usize,
    /// What of the model's cache it holds while it runs, in tokens.
    pub kv_tokens: usize,
}

/// Moving averages; each new task counts a quarter.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Of a prompt's token, and of an answer's, with whatever ran beside.
    prefill: Option<Duration>,
    decode: Option<Duration>,
    /// How much of what they asked for answers use.
    used: Option<f64>,
    error: Option<f64>,
}

impl Pace {
    /// Learns from a task that the model did to its end.
    pub(super) fn learn(&mut self, size: Size, product: &Product) {
        let usage = &product.usage;
        let prompt = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
        let each = |time: Duration, tokens: u64| time.div_f64(tokens.max(1) as f64);
        let average =
            |old: Option<Duration>, new| old.map_or(new, |old: Duration| (old * 3 + new) / 4);
        self.prefill = Some(average(self.prefill, each(product.prefill, prompt)));
        // The first token is the prefill's; an answer of one token says nothing of decoding.
        let decoded = usage.generated_tokens.saturating_sub(1);
        if decoded > 0 || self.decode.is_none() {
            self.decode = Some(average(self.decode, each(product.decode, decoded)));
        }
        let used = usage.generated_tokens as f64 / size.answer_tokens.max(1) as f64;
        self.used = Some(self.used.map_or(used, |old| (old * 3.0 + used) / 4.0));
    }

    /// The time that a task takes in the model; unknown until one was done.
    pub(super) fn service(&self, size: Size) -> Option<Duration> {
        let (prefill, decode, used) = (self.prefill?, self.decode?, self.used?);
        let answer = size.answer_tokens as f64 * used;
        Some(prefill * size.prompt_tokens as u32 + decode.mul_f64(answer))
    }

    /// Learns how far from the truth an estimate of a task's whole time was.
    pub(super) fn judge(&mut self, estimated: Duration, took: Duration) {
        let truth = took.as_secs_f64().max(0.001);
        let error = (estimated.as_secs_f64() - took.as_secs_f64()).abs() / truth;
        self.error = Some(self.error.map_or(error, |old| (old * 3.0 + error) / 4.0));
    }

    /// How far estimates were from the truth, as a share of it.
    pub(super) fn error(&self) -> Option<f64> {
        self.error
    }

    /// When a task is done that has to wait for those that run (each with the time it has had) and those before it.
    pub(super) fn finish(
        &self,
        slots: usize,
        running: impl Iterator<Item = (Size, Duration)>,
        before: impl Iterator<Item = Size>,
        size: Size,
    ) -> Option<Duration> {
        let left = |(size, had)| Some(self.service(size)?.saturating_sub(had));
        let mut free: Vec<Duration> = running.map(left).collect::<Option<_>>()?;
        // Where more run than there are slots by now, the first to end leave none.
        free.sort_unstable();
        free.drain(..free.len().saturating_sub(slots));
        free.resize(slots.max(1), Duration::ZERO);
        let mut end = |size| {
            let first = free.iter_mut().min()?;
            *first += self.service(size)?;
            Some(*first)
        };
        for size in before {
            end(size)?;
        }
        end(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Usage;

    const MS: Duration = Duration::from_millis(1);

    fn size(prompt_tokens: usize, answer_tokens: usize) -> Size {
        Size {
            prompt_tokens,
            answer_tokens,
            kv_tokens: prompt_tokens + answer_tokens,
        }
    }

    fn product(prompt: u64, generated: u64, prefill: Duration, decode: Duration) -> Product {
        let usage = Usage {
            prompt_tokens: prompt,
            generated_tokens: generated,
            ..Usage::default()
        };
        Product {
            text: String::new(),
            usage,
            prefill,
            decode,
        }
    }

    #[test]
    fn rates_and_the_share_of_answers_make_an_estimate() {
        let mut pace = Pace::default();
        assert_eq!(pace.service(size(1, 1)), None);
        pace.learn(size(100, 80), &product(100, 41, 50 * MS, 400 * MS));
        // Half a millisecond a prompt token, ten a decoded one, and half of what is asked for.
        let service = pace.service(size(200, 100)).unwrap();
        assert_eq!(service.as_millis(), 100 + 512);
    }

    #[test]
    fn who_waits_is_done_after_those_before_him() {
        let mut pace = Pace::default();
        pace.learn(size(10, 11), &product(10, 11, 10 * MS, 100 * MS));
        // A millisecond a prompt token and ten an answer's: 110 ms each.
        let each = size(0, 11);
        let finish = |slots, running: &[(Size, Duration)], before: usize| {
            let before = std::iter::repeat_n(each, before);
            pace.finish(slots, running.iter().copied(), before, each)
        };
        assert_eq!(finish(1, &[], 0), Some(110 * MS));
        assert_eq!(finish(1, &[(each, 30 * MS)], 2), Some((80 + 330) * MS));
        assert_eq!(finish(2, &[(each, 30 * MS)], 2), Some(220 * MS));
        let running = [(each, 30 * MS), (each, 10 * MS)];
        assert_eq!(
            finish(1, &running, 0),
            Some(210 * MS),
            "a slot was taken away"
        );
    }
}
