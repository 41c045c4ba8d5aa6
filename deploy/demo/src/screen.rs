//! What the demo shows. Text from tasks, models and brokers is escaped before it reaches the terminal.

use crate::operator::Summary;
use crate::{GATEWAY, OPERATOR, SITE};
use serde_json::Value;
use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::Path;

const BOLD: &str = "1";
const DIM: &str = "2";
const GREEN: &str = "32";
const RED: &str = "31";
const CYAN: &str = "36";

/// A part of the demo begins.
pub(crate) fn step(what: &str) {
    say(&format!("\n{}", paint(BOLD, &format!("■ {what}"))));
}

/// One fact, under its name.
pub(crate) fn fact(name: &str, value: &str) {
    say(&format!(
        "  {} {}",
        paint(DIM, &format!("{name:<9}")),
        plain(value)
    ));
}

pub(crate) fn summary(summary: &Summary) {
    let seconds = summary.decode_ms as f64 / 1000.0;
    let rate = if seconds > 0.0 {
        // Each answer's first token is its prefill's.
        summary.tokens.saturating_sub(summary.answered as u64) as f64 / seconds
    } else {
        0.0
    };
    say(&format!(
        "\n{} {} answered in {:.1} s: {} tokens, {rate:.0} tokens/s per task while decoding",
        paint(GREEN, "✓"),
        summary.answered,
        summary.took.as_secs_f32(),
        summary.tokens,
    ));
}

/// A work order that is on its way.
pub(crate) fn sent(id: &str, order: &str) {
    row(id, CYAN, "sent", &plain(order));
}

/// The gateway's health, on one line.
pub(crate) fn health(sample: &Value) {
    row("health", DIM, "", &paint(DIM, &health_line(sample)));
}

/// How to talk to what was left running.
pub(crate) fn keep(broker: SocketAddr, millwright: &Path) {
    let (host, port) = (broker.ip(), broker.port());
    let base = format!("millwright/v1/{SITE}/{GATEWAY}");
    step("Broker and agent keep running; Ctrl-C ends both");
    say(&format!(
        "  Watch:\n    mosquitto_sub -V mqttv5 -h {host} -p {port} -v -t '{base}/#'\n\
         \n  Send a task:\n    mosquitto_pub -V mqttv5 -h {host} -p {port} -q 1 -t {base}/task/{OPERATOR} \\\n      \
         -m '{{\"id\":\"hello-1\",\"kind\":\"generate\",\"prompt\":\"A worn bearing makes\",\"max_tokens\":40}}'\n\
         \n  Or ask:\n    {} ask --broker {host}:{port} --to {base} \"Why does a bearing run hot?\"",
        millwright.display(),
    ));
}

/// The answers as they come. Several stream at once, so a line belongs to one task and is written when it is
/// full, or when the answer ends.
#[derive(Default)]
pub(crate) struct Screen {
    lines: HashMap<String, String>,
}

impl Screen {
    /// Characters of an answer on one line.
    const WIDTH: usize = 88;

    pub(crate) fn event(&mut self, event: &Value) {
        let id = plain(event["task"].as_str().unwrap_or("?"));
        match event["event"].as_str().unwrap_or("?") {
            "accepted" => row(&id, DIM, "accepted", &queued(event)),
            "started" => row(&id, DIM, "started", ""),
            "delta" => self.delta(&id, event["text"].as_str().unwrap_or_default()),
            "done" => {
                self.flush(&id);
                row(&id, GREEN, "done", &timing(event));
            }
            other => {
                self.flush(&id);
                let text = |field: &str| plain(event[field].as_str().unwrap_or_default());
                let what = format!("{} {}", text("code"), text("reason"));
                row(&id, RED, &plain(other), what.trim());
            }
        }
    }

    fn delta(&mut self, id: &str, text: &str) {
        let line = self.lines.entry(id.to_owned()).or_default();
        line.push_str(&plain(text));
        while line.chars().count() > Self::WIDTH {
            let limit = line
                .char_indices()
                .nth(Self::WIDTH)
                .map_or(line.len(), |(at, _)| at);
            let cut = line[..limit].rfind(' ').map_or(limit, |space| space + 1);
            let rest = line.split_off(cut);
            row(id, BOLD, "", line.trim_end());
            *line = rest;
        }
    }

    fn flush(&mut self, id: &str) {
        if let Some(line) = self.lines.remove(id).filter(|line| !line.trim().is_empty()) {
            row(id, BOLD, "", line.trim_end());
        }
    }
}

fn row(id: &str, colour: &str, what: &str, text: &str) {
    let what = paint(colour, &format!("{what:<9}"));
    say(&format!("  {id:<9} {what} {text}"));
}

fn queued(event: &Value) -> String {
    match (event["queue_position"].as_u64(), event["eta_ms"].as_u64()) {
        (Some(position), Some(eta)) => format!("place {position} in the queue, about {eta} ms"),
        (Some(position), None) => format!("place {position} in the queue"),
        _ => String::new(),
    }
}

fn timing(event: &Value) -> String {
    let (timing, usage) = (&event["timing"], &event["usage"]);
    format!(
        "{} + {} tokens ({}): queue {} ms, prefill {} ms, decode {} ms, {:.0} tokens/s",
        usage["prompt_tokens"],
        usage["generated_tokens"],
        plain(event["finish"].as_str().unwrap_or("?")),
        timing["queue_ms"],
        timing["prefill_ms"],
        timing["decode_ms"],
        timing["tokens_per_s"].as_f64().unwrap_or(0.0),
    )
}

/// What of a health sample is there and fits on one line.
fn health_line(sample: &Value) -> String {
    let shown = [
        ("/machine/cpu_percent", 1.0, "% cpu"),
        ("/machine/temperature", 1.0, " °C"),
        ("/machine/agent_memory", 1e-6, " MB agent"),
        ("/running", 1.0, " running"),
        ("/queue", 1.0, " waiting"),
        ("/kv_tokens_used", 1.0, " tokens of context"),
    ];
    let part = |(path, factor, unit): &(&str, f64, &str)| {
        // A sensor that isn't there is null.
        let value = sample.pointer(path)?.as_f64()?;
        Some(format!("{:.0}{unit}", value * factor))
    };
    shown
        .iter()
        .filter_map(part)
        .collect::<Vec<_>>()
        .join(" · ")
}

/// `text` on one line, with control characters escaped.
fn plain(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => line.push(' '),
            c if c.is_control() => line.extend(c.escape_default()),
            c => line.push(c),
        }
    }
    line
}

fn paint(colour: &str, text: &str) -> String {
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{colour}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// Prints a line. A reader that went away (`| head`) is no reason to fail.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_can_not_steer_the_terminal() {
        assert_eq!(plain("a\x1b[2J\nb\u{9b}é"), "a\\u{1b}[2J b\\u{9b}é");
    }

    #[test]
    fn a_health_line_shows_what_is_there() {
        let machine =
            serde_json::json!({ "cpu_percent": 12.34, "temperature": null, "agent_memory": 190e6 });
        let sample = serde_json::json!({ "machine": machine, "queue": 3 });
        assert_eq!(health_line(&sample), "12% cpu · 190 MB agent · 3 waiting");
    }
}
