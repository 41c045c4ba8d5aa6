//! What the operator sees: text on stdout as it comes, status on stderr. Text from models is data, so control
//! characters are escaped.

use anyhow::{Result, bail};
use millwright_task::limits::ANSWER_BYTES_MAX;
use millwright_task::wire::{Body, Event, Finish, Format, Refusal, printable};
use std::io::{IsTerminal, Write, stderr, stdout};

pub(super) struct Screen {
    json: bool,
    /// The run that is followed, and its text so far.
    run: String,
    heard: String,
    /// What is on the screen.
    shown: String,
    /// The cursor is inside a line of the answer.
    open: bool,
}

impl Screen {
    pub(super) fn new(json: bool) -> Self {
        Self {
            json,
            run: String::new(),
            heard: String::new(),
            shown: String::new(),
            open: false,
        }
    }

    /// A line for the operator, not for a program.
    pub(super) fn status(&mut self, line: &str) {
        // On a terminal both streams meet: the answer's line ends first.
        if self.open && stdout().is_terminal() && stderr().is_terminal() {
            println!();
            self.open = false;
        }
        eprintln!("· {line}");
    }

    pub(super) fn show(&mut self, event: &Event) {
        match &event.body {
            Body::Accepted {
                queue_position,
                eta_ms,
                ..
            } => {
                self.follow(&event.run);
                let eta = eta_ms.map_or(String::new(), |ms| {
                    format!(", about {:.1} s", ms as f64 / 1000.0)
                });
                let gateway = printable(&event.gateway);
                self.status(&format!(
                    "accepted by {gateway} (position {queue_position}{eta})"
                ));
            }
            Body::Started {} if self.run == event.run => self.status("started"),
            Body::Delta { text, offset } => self.delta(&event.run, text, *offset),
            Body::AlreadyFinal {} => self.status("the task had ended before the cancel"),
            Body::Unknown {} => self.status("the gateway doesn't know the task"),
            _ => {}
        }
    }

    /// What another run says is not shown from now on.
    fn follow(&mut self, run: &str) {
        if self.run != run {
            run.clone_into(&mut self.run);
            self.heard.clear();
        }
    }

    fn delta(&mut self, run: &str, text: &str, offset: u64) {
        if self.run.is_empty() {
            self.follow(run);
        }
        // After a gap the final event brings the whole text.
        let is_next = self.run == run && offset == self.heard.len() as u64;
        if !is_next || self.heard.len() + text.len() > ANSWER_BYTES_MAX {
            return;
        }
        self.heard.push_str(text);
        // A new run repeats first what is there; if it says something else, so does the final event.
        if let Some(rest) = self.heard.strip_prefix(self.shown.as_str()) {
            let rest = rest.to_owned();
            self.print(&rest);
        }
    }

    fn print(&mut self, text: &str) {
        if self.json {
            return;
        }
        self.shown.push_str(text);
        self.open = !self.shown.ends_with('\n');
        let mut out = stdout().lock();
        // A reader that went away is not worth a panic; the task goes on and ends in its time.
        let _ = out
            .write_all(printable(text).as_bytes())
            .and_then(|()| out.flush());
    }

    /// Ends the answer's line.
    pub(super) fn end(&mut self) {
        if std::mem::take(&mut self.open) {
            let _ = writeln!(stdout());
        }
    }

    /// Shows the final event; an error for anything but an answer.
    pub(super) fn finish(&mut self, event: Event) -> Result<()> {
        if self.json {
            let json = String::from_utf8_lossy(&Format::Json.encode(&event)).into_owned();
            let _ = writeln!(stdout(), "{}", escaped(&json));
        }
        match event.body {
            Body::Done {
                text,
                finish,
                usage,
                timing,
                provenance,
            } => {
                self.rest(&text);
                self.end();
                let end = if finish == Finish::Length {
                    ", cut at max_tokens"
                } else {
                    ""
                };
                self.status(&format!(
                    "{} tokens{end} for a prompt of {}: queue {} ms, prefill {} ms, decode {} ms, {:.1} tokens/s, {}",
                    usage.generated_tokens, usage.prompt_tokens, timing.queue_ms, timing.prefill_ms, timing.decode_ms,
                    timing.tokens_per_s, printable(&provenance.model),
                ));
                Ok(())
            }
            Body::Cancelled(partial) | Body::Expired(partial) => {
                self.rest(&partial.text);
                self.end();
                bail!("no answer: {}", partial.reason)
            }
            Body::Rejected(refusal) => bail!("rejected, {}", sentence(&refusal)),
            Body::Failed(refusal) => bail!("failed, {}", sentence(&refusal)),
            other => bail!("unexpected end: {}", other.name()),
        }
    }

    /// Shows what of the whole text isn't on the screen yet.
    fn rest(&mut self, text: &str) {
        if let Some(rest) = text.strip_prefix(self.shown.as_str()) {
            let rest = rest.to_owned();
            self.print(&rest);
        } else {
            self.status("the answer was made anew; from its beginning:");
            self.shown.clear();
            self.print(text);
        }
    }
}

fn sentence(refusal: &Refusal) -> String {
    let retry = refusal.retry_after_ms.map_or(String::new(), |ms| {
        format!(" (try again in {:.1} s)", ms as f64 / 1000.0)
    });
    format!("{}: {}{retry}", refusal.code.name(), refusal.reason)
}

/// JSON with everything written as `\uXXXX` that could drive a terminal; the value is the same.
fn escaped(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if printable(c.encode_utf8(&mut [0; 4])).starts_with(c) {
            out.push(c);
        } else {
            let mut units = [0; 2];
            out.extend(
                c.encode_utf16(&mut units)
                    .iter()
                    .map(|unit| format!("\\u{unit:04x}")),
            );
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_runs_only_the_newest_goes_on_and_nothing_is_shown_twice() {
        let mut screen = Screen::new(false);
        screen.follow("a");
        screen.delta("a", "one ", 0);
        screen.delta("a", "two ", 4);
        assert_eq!(screen.shown, "one two ");
        screen.follow("b");
        screen.delta("a", "old", 8);
        screen.delta("b", "one ", 0);
        assert_eq!(screen.shown, "one two ");
        screen.delta("b", "two three", 4);
        assert_eq!(screen.shown, "one two three");
        // Another text: what is there stays until the final event.
        screen.follow("c");
        screen.delta("c", "ten eleven twelve", 0);
        assert_eq!(screen.shown, "one two three");
        screen.rest("ten eleven twelve thirteen");
        assert_eq!(screen.shown, "ten eleven twelve thirteen");
    }

    #[test]
    fn a_gap_and_a_text_beyond_any_answer_are_left_to_the_final_event() {
        let mut screen = Screen::new(false);
        screen.delta("a", "one", 0);
        screen.delta("a", "three", 7);
        assert_eq!(screen.shown, "one");
        screen.delta("a", &"x".repeat(ANSWER_BYTES_MAX), 3);
        assert_eq!(screen.shown, "one");
    }

    #[test]
    fn json_for_a_terminal_drives_nothing_and_means_the_same() {
        let text = "a\u{9b}31m\u{202e}b ü 😀";
        let json = serde_json::to_string(text).unwrap();
        let safe = escaped(&json);
        assert_eq!(safe, r#""a\u009b31m\u202eb ü 😀""#);
        assert_eq!(serde_json::from_str::<String>(&safe).unwrap(), text);
    }
}
