//! Holds what came to what is promised: one distinct final event for each (sender, id), byte for byte the same if
//! repeated, on its own topic, with its correlation, `seq` rising, deltas that fit the answer. Never sends anything.

use super::request::Request;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Publish;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// Violations told in full; the others are counted.
const TOLD_MAX: usize = 4;
/// What is remembered of a task's events, to tell how a violation came about.
const HISTORY_MAX: usize = 40;
/// A refusal with one of these asks to try again later.
const PASSING: [&str; 3] = ["busy", "draining", "internal"];
/// How a task ends under which the agent died five times: by the agent's own rule, and an outcome like another. Here deaths
/// follow each other within seconds, so that it meets tasks that had no part in them.
const WORN_OUT: &str = "the gateway went down 5 times";

/// A message from the result tree.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    topic: String,
    payload: Vec<u8>,
    correlation: Option<Vec<u8>>,
    durable: bool,
    pub(super) at: Instant,
}

impl From<Publish> for Seen {
    fn from(publish: Publish) -> Self {
        let properties = publish.properties.unwrap_or_default();
        Self {
            topic: String::from_utf8_lossy(&publish.topic).into_owned(),
            payload: publish.payload.to_vec(),
            correlation: properties.correlation_data.map(|c| c.to_vec()),
            durable: publish.qos != QoS::AtMostOnce,
            at: Instant::now(),
        }
    }
}

/// A message that belongs to a task.
pub(super) struct News {
    pub(super) task: usize,
    pub(super) retry_after: Option<Duration>,
}

/// What was found.
#[derive(Debug, Default, Clone)]
pub(super) struct Verdict {
    pub(super) tasks: usize,
    /// Distinct final events.
    pub(super) outcomes: usize,
    /// Final events that came again, the same.
    pub(super) repeated: usize,
    /// Tasks sent again before they had an outcome.
    pub(super) resent: usize,
    pub(super) refused: BTreeMap<String, usize>,
    pub(super) violations: usize,
    pub(super) told: Vec<String>,
}

impl Verdict {
    pub(super) fn add(&mut self, other: Self) {
        self.tasks += other.tasks;
        self.outcomes += other.outcomes;
        self.repeated += other.repeated;
        self.resent += other.resent;
        for (code, count) in other.refused {
            *self.refused.entry(code).or_default() += count;
        }
        self.violations += other.violations;
        self.told.extend(other.told);
    }

    pub(super) fn violate(&mut self, what: String) {
        self.violations += 1;
        self.told.push(what);
    }
}

#[derive(Default)]
struct Run {
    /// The highest `seq` of events that the broker keeps in order.
    seq: u64,
    seen: HashMap<u64, Vec<u8>>,
    deltas: Vec<(usize, String)>,
}

struct Task {
    request: Request,
    cancelled: bool,
    cancels_sent: usize,
    cancel_answered: bool,
    /// Refused for good.
    refused: bool,
    sent: usize,
    /// Distinct ones, in the order in which they came.
    finals: Vec<Vec<u8>>,
    repeated: usize,
    /// `repeated` when it was last asked for again.
    repeated_before: usize,
    runs: HashMap<String, Run>,
    history: Vec<String>,
}

/// All tasks and what is known of them.
pub(super) struct Judge {
    began: Instant,
    tasks: Vec<Task>,
    numbers: HashMap<(String, String), usize>,
    /// By prompt, whether it was a chat's, and length.
    texts: HashMap<(String, bool, u32), String>,
    verdict: Verdict,
}

impl Default for Judge {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            tasks: Vec::new(),
            numbers: HashMap::new(),
            texts: HashMap::new(),
            verdict: Verdict::default(),
        }
    }
}

impl Judge {
    pub(super) fn len(&self) -> usize {
        self.tasks.len()
    }

    /// One more task; its number.
    pub(super) fn expect(&mut self, request: Request, cancelled: bool) -> usize {
        let n = self.tasks.len();
        self.numbers
            .insert((request.sender.to_owned(), request.id.clone()), n);
        self.tasks.push(Task {
            request,
            cancelled,
            cancels_sent: 0,
            cancel_answered: false,
            refused: false,
            sent: 0,
            finals: Vec::new(),
            repeated: 0,
            repeated_before: 0,
            runs: HashMap::new(),
            history: Vec::new(),
        });
        n
    }

    pub(super) fn request(&self, n: usize) -> &Request {
        &self.tasks[n].request
    }

    pub(super) fn sent(&mut self, n: usize) {
        let task = &mut self.tasks[n];
        task.sent += 1;
        self.verdict.resent += usize::from(task.sent > 1 && task.finals.is_empty());
        self.note(n, Instant::now(), "→ task");
    }

    pub(super) fn is_sent_once(&self, n: usize) -> bool {
        self.tasks[n].sent == 1
    }

    pub(super) fn cancel_sent(&mut self, n: usize) {
        self.tasks[n].cancels_sent += 1;
        self.note(n, Instant::now(), "→ cancel");
    }

    pub(super) fn ask_again(&mut self, n: usize) {
        self.tasks[n].repeated_before = self.tasks[n].repeated + self.tasks[n].finals.len();
    }

    /// Whether a final event came since it was asked for again.
    pub(super) fn is_repeated(&self, n: usize) -> bool {
        let task = &self.tasks[n];
        task.refused || task.repeated + task.finals.len() > task.repeated_before
    }

    /// Whether it has its outcome, and its cancel a reply.
    pub(super) fn is_settled(&self, n: usize) -> bool {
        let task = &self.tasks[n];
        task.refused || !task.finals.is_empty() && !self.wants_cancel_reply(n)
    }

    pub(super) fn wants_cancel_reply(&self, n: usize) -> bool {
        self.tasks[n].cancelled && !self.tasks[n].cancel_answered
    }

    /// Judges a message.
    pub(super) fn see(&mut self, seen: &Seen) -> Option<News> {
        let Ok(event) = serde_json::from_slice::<Value>(&seen.payload) else {
            self.violated(None, format!("not JSON on {}", seen.topic));
            return None;
        };
        let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
        let Some(&n) = self.numbers.get(&(text("sender"), text("task"))) else {
            self.violated(None, format!("nobody's event on {}: {event}", seen.topic));
            return None;
        };
        let name = text("event");
        self.note(n, seen.at, &brief(&event));
        self.judge_address(n, seen, &name);
        self.judge_order(n, seen, &event);
        let mut retry_after = None;
        match name.as_str() {
            "accepted" | "started" | "delta" => {}
            // Of a cancel that came too early or too late.
            "unknown" | "already_final" => self.tasks[n].cancel_answered = true,
            "rejected" => retry_after = Some(self.judge_refusal(n, &event)),
            "done" | "cancelled" | "failed" | "expired" => self.judge_final(n, seen, &event),
            _ => self.violated(Some(n), format!("an event that isn't any: {name}")),
        }
        Some(News {
            task: n,
            retry_after,
        })
    }

    /// The topic and the correlation.
    fn judge_address(&mut self, n: usize, seen: &Seen, name: &str) {
        let request = &self.tasks[n].request;
        let of_a_cancel = ["unknown", "already_final"].contains(&name);
        let topic = if of_a_cancel {
            request.default_topic()
        } else {
            request.topic()
        };
        let wrong = if seen.topic != topic {
            Some(format!("{name} on {} instead of {topic}", seen.topic))
        } else if !of_a_cancel && seen.correlation != request.correlation {
            Some(format!("{name} with another correlation"))
        } else {
            None
        };
        if let Some(what) = wrong {
            self.violated(Some(n), what);
        }
    }

    /// `seq` and `offset`. Events of QoS 0 may overtake at the broker, so only the others' order counts.
    fn judge_order(&mut self, n: usize, seen: &Seen, event: &Value) {
        let (Some(run), Some(seq)) = (event["run"].as_str(), event["seq"].as_u64()) else {
            return self.violated(Some(n), format!("no run or seq: {event}"));
        };
        let entry = self.tasks[n].runs.entry(run.to_owned()).or_default();
        let wrong = if let Some(before) = entry.seen.get(&seq) {
            (*before != seen.payload).then(|| format!("two events of run {run} have seq {seq}"))
        } else if seen.durable && seq < entry.seq {
            Some(format!("run {run}: seq {seq} after {}", entry.seq))
        } else {
            None
        };
        entry.seq = entry.seq.max(if seen.durable { seq } else { 0 });
        entry.seen.insert(seq, seen.payload.clone());
        if event["event"] == "delta" {
            let offset = event["offset"].as_u64().unwrap_or(u64::MAX) as usize;
            let text = event["text"].as_str().unwrap_or_default().to_owned();
            entry.deltas.push((offset, text));
        }
        if let Some(what) = wrong {
            self.violated(Some(n), what);
        }
    }

    /// When to try again.
    fn judge_refusal(&mut self, n: usize, event: &Value) -> Duration {
        let code = event["code"].as_str().unwrap_or_default().to_owned();
        if !PASSING.contains(&code.as_str()) {
            self.tasks[n].refused = true;
            self.violated(Some(n), format!("a good task was refused: {event}"));
        }
        *self.verdict.refused.entry(code).or_default() += 1;
        let asked = event["retry_after_ms"].as_u64().unwrap_or(500);
        Duration::from_millis(asked.clamp(50, 1000))
    }

    fn judge_final(&mut self, n: usize, seen: &Seen, event: &Value) {
        let task = &mut self.tasks[n];
        if event["event"] == "cancelled" {
            task.cancel_answered = true;
        }
        if task.finals.contains(&seen.payload) {
            task.repeated += 1;
            return;
        }
        task.finals.push(seen.payload.clone());
        if task.finals.len() > 1 {
            let payloads = task.finals.iter().map(|p| String::from_utf8_lossy(p));
            let all = payloads.collect::<Vec<_>>().join("\n    ");
            self.violated(Some(n), format!("another outcome:\n    {all}"));
        }
        let task = &self.tasks[n];
        let name = event["event"].as_str().unwrap_or_default();
        let reason = event["reason"].as_str().unwrap_or_default();
        if name == "failed" && reason.starts_with(WORN_OUT) {
            let worn_out = "failed after five deaths".to_owned();
            *self.verdict.refused.entry(worn_out).or_default() += 1;
        } else if !(name == "done" || name == "cancelled" && task.cancels_sent > 0) {
            self.violated(Some(n), format!("ended as {name} without a cause: {event}"));
        } else if name == "done" {
            let text = event["text"].as_str().unwrap_or_default().to_owned();
            let request = &task.request;
            let alike = (request.prompt.clone(), request.is_chat, request.tokens);
            let first = self.texts.entry(alike).or_insert_with(|| text.clone());
            if *first != text {
                let what = format!("{text:?} where the same task had {first:?}");
                self.violated(Some(n), what);
            }
        }
    }

    /// Something was said on a topic on which nobody may hear of tasks.
    pub(super) fn stray(&mut self, topic: &str) {
        self.violated(None, format!("a message on {topic}"));
    }

    /// All that can only be said at the end.
    pub(super) fn verdict(mut self) -> Verdict {
        for n in 0..self.tasks.len() {
            let task = &self.tasks[n];
            if task.finals.is_empty() {
                self.violated(Some(n), "no outcome".into());
                continue;
            }
            if self.wants_cancel_reply(n) {
                self.violated(Some(n), "no reply to its cancel".into());
            }
            if let Some(what) = self.wrong_delta(n) {
                self.violated(Some(n), what);
            }
        }
        self.verdict.tasks = self.tasks.len();
        self.verdict.outcomes = self.tasks.iter().map(|t| t.finals.len()).sum();
        self.verdict.repeated = self.tasks.iter().map(|t| t.repeated).sum();
        self.verdict
    }

    /// Each delta is the piece of the answer at its offset; of a task cut short, as far as the answer goes.
    fn wrong_delta(&self, n: usize) -> Option<String> {
        let task = &self.tasks[n];
        let last: Value = serde_json::from_slice(task.finals.first()?).ok()?;
        let answer = last["text"].as_str().unwrap_or_default();
        let whole = last["event"] == "done";
        for (run, Run { deltas, .. }) in &task.runs {
            for (offset, text) in deltas {
                let rest = answer.get(*offset..);
                let fits = match rest {
                    Some(rest) if whole => rest.starts_with(text.as_str()),
                    Some(rest) => rest.starts_with(text.as_str()) || text.starts_with(rest),
                    None => !whole,
                };
                if !fits {
                    return Some(format!(
                        "run {run}: {text:?} at {offset} is not of {answer:?}"
                    ));
                }
            }
        }
        None
    }

    fn note(&mut self, n: usize, at: Instant, what: &str) {
        let history = &mut self.tasks[n].history;
        if history.len() < HISTORY_MAX {
            let ms = at.saturating_duration_since(self.began).as_millis();
            history.push(format!("{ms:>7} ms {what}"));
        }
    }

    fn violated(&mut self, n: Option<usize>, what: String) {
        self.verdict.violations += 1;
        if self.verdict.told.len() >= TOLD_MAX {
            return;
        }
        let told = match n.map(|n| &self.tasks[n]) {
            None => what,
            Some(task) => format!(
                "{}/{}: {what}\n  {}",
                task.request.sender,
                task.request.id,
                task.history.join("\n  ")
            ),
        };
        self.verdict.told.push(told);
    }
}

/// An event in a few words.
fn brief(event: &Value) -> String {
    let of = |field: &str| match &event[field] {
        Value::Null => String::new(),
        value => format!(" {field} {value}"),
    };
    let name = event["event"].as_str().unwrap_or("?");
    format!(
        "← {name}{}{}{}{}",
        of("run"),
        of("seq"),
        of("code"),
        of("offset")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn judge() -> Judge {
        let mut judge = Judge::default();
        judge.expect(Request::new(1, 0, 8), false);
        judge.sent(0);
        judge
    }

    fn seen(judge: &Judge, topic: Option<&str>, event: &Value) -> Seen {
        let request = judge.request(0);
        let mut event = event.clone();
        event["sender"] = request.sender.into();
        event["task"] = request.id.clone().into();
        Seen {
            topic: topic.map_or_else(|| request.topic(), str::to_owned),
            payload: event.to_string().into_bytes(),
            correlation: request.correlation.clone(),
            durable: event["event"] != "delta",
            at: Instant::now(),
        }
    }

    /// The number of violations after these events.
    fn violations(events: &[Value]) -> usize {
        let mut judge = judge();
        for event in events {
            let seen = seen(&judge, None, event);
            judge.see(&seen);
        }
        judge.verdict().violations
    }

    fn done(run: &str, seq: u64) -> Value {
        json!({ "event": "done", "run": run, "seq": seq, "text": "pump it" })
    }

    #[test]
    fn one_outcome_however_often_is_right() {
        let accepted = json!({ "event": "accepted", "run": "a", "seq": 0 });
        let delta = json!({ "event": "delta", "run": "a", "seq": 1, "text": "it", "offset": 5 });
        let events = [
            accepted.clone(),
            delta,
            accepted,
            done("a", 2),
            done("a", 2),
        ];
        assert_eq!(violations(&events), 0);
    }

    #[test]
    fn each_broken_promise_is_found() {
        assert_eq!(violations(&[]), 1, "no outcome");
        assert_eq!(violations(&[done("a", 1), done("b", 1)]), 1, "two outcomes");
        let late = json!({ "event": "started", "run": "a", "seq": 0 });
        assert_eq!(violations(&[done("a", 1), late]), 1, "seq falls");
        let delta = json!({ "event": "delta", "run": "a", "seq": 1, "text": "at", "offset": 5 });
        assert_eq!(
            violations(&[delta, done("a", 2)]),
            1,
            "a delta of another text"
        );
        let cancelled = json!({ "event": "cancelled", "run": "a", "seq": 1, "text": "" });
        assert_eq!(violations(&[cancelled]), 1, "nobody cancelled");
        let refused = json!({ "event": "rejected", "run": "r", "seq": 0, "code": "conflict" });
        assert_eq!(
            violations(&[refused, done("a", 0)]),
            1,
            "a good task refused"
        );
        let busy = json!({ "event": "rejected", "run": "r", "seq": 0, "code": "busy" });
        assert_eq!(violations(&[busy, done("a", 0)]), 0);
    }

    #[test]
    fn a_wrong_address_is_found() {
        let mut judge = judge();
        let elsewhere = seen(
            &judge,
            Some("millwright/v1/plant/gw-1/result/hmi/x"),
            &done("a", 0),
        );
        judge.see(&elsewhere);
        let mut other = seen(&judge, None, &done("a", 0));
        other.correlation = Some(b"other".to_vec());
        judge.see(&other);
        judge.stray("elsewhere");
        assert_eq!(judge.verdict().violations, 3);
    }
}
