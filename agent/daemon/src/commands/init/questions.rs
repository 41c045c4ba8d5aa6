//! Questions and answers: from flags, from a terminal, or from defaults. A bad answer is asked for again on a terminal, and is
//! an error naming the flag in a script.

use super::text::{ANSWER_BYTES_MAX, plain};
use anyhow::{Context, Result, bail, ensure};
use millwright_task::wire::printable;
use std::io::{BufRead, Read, Write};

/// One thing to know.
pub(super) struct Question<'a> {
    /// Without its dashes.
    pub(super) flag: &'a str,
    pub(super) text: &'a str,
    pub(super) given: Option<String>,
    pub(super) default: Option<String>,
    /// Whether a script may leave it to the default.
    pub(super) is_optional: bool,
}

/// Somebody who answers, if anybody does.
pub(super) struct Questions<R, W> {
    answers: R,
    screen: W,
    is_asking: bool,
}

impl<R: BufRead, W: Write> Questions<R, W> {
    /// `is_asking`: somebody sits there.
    pub(super) fn new(answers: R, screen: W, is_asking: bool) -> Self {
        Self {
            answers,
            screen,
            is_asking,
        }
    }

    pub(super) fn is_asking(&self) -> bool {
        self.is_asking
    }

    pub(super) fn say(&mut self, text: &str) -> Result<()> {
        if self.is_asking {
            writeln!(self.screen, "{}", printable(text))?;
        }
        Ok(())
    }

    /// The answer, once it is a good one.
    pub(super) fn ask<T>(
        &mut self,
        question: &Question<'_>,
        check: impl Fn(&str) -> Result<T>,
    ) -> Result<T> {
        let check = |text: &str| plain(text).and_then(|()| check(text.trim()));
        if let Some(given) = &question.given {
            match check(given) {
                Ok(answer) => return Ok(answer),
                Err(e) if self.is_asking => self.say(&format!("  --{}: {e:#}", question.flag))?,
                Err(e) => return Err(e.context(format!("--{}", question.flag))),
            }
        }
        let default = question.default.as_deref();
        if !self.is_asking {
            return match default.filter(|_| question.is_optional) {
                Some(default) => check(default).with_context(|| {
                    format!(
                        "--{} would be {} and that can't be used",
                        question.flag,
                        printable(default)
                    )
                }),
                None => bail!(
                    "--{} is missing: {}",
                    question.flag,
                    question.text.to_lowercase()
                ),
            };
        }
        loop {
            let answer = self.answer(question.text, default)?;
            let checked = match (answer.trim(), default) {
                ("", Some(default)) => check(default),
                (text, _) => check(text),
            };
            match checked {
                Ok(answer) => return Ok(answer),
                Err(e) => self.say(&format!("  {e:#}"))?,
            }
        }
    }

    /// The same where there may be no answer: nothing typed, or `-` where there is a default.
    pub(super) fn ask_if_any<T>(
        &mut self,
        question: &Question<'_>,
        check: impl Fn(&str) -> Result<T>,
    ) -> Result<Option<T>> {
        if !self.is_asking && question.given.is_none() {
            return Ok(None);
        }
        if question.default.is_none() {
            let none = Question {
                default: Some("-".into()),
                text: question.text,
                flag: question.flag,
                given: question.given.clone(),
                is_optional: true,
            };
            return self.ask(&none, |text| optional(text, &check));
        }
        self.ask(question, |text| optional(text, &check))
    }

    pub(super) fn confirm(&mut self, text: &str, default: bool) -> Result<bool> {
        let hint = if default { "Y/n" } else { "y/N" };
        loop {
            match self
                .answer(text, Some(hint))?
                .trim()
                .to_lowercase()
                .as_str()
            {
                "" => return Ok(default),
                "y" | "yes" => return Ok(true),
                "n" | "no" => return Ok(false),
                _ => self.say("  y or n")?,
            }
        }
    }

    /// One line, which is too long as an error is: it is read to its end, so that the next one begins afresh.
    fn answer(&mut self, text: &str, default: Option<&str>) -> Result<String> {
        let default = default.map(|default| format!(" [{}]", printable(default)));
        write!(self.screen, "{text}{}: ", default.unwrap_or_default())?;
        self.screen.flush()?;
        let mut line = Vec::new();
        let most = ANSWER_BYTES_MAX as u64 + 2;
        let read = (&mut self.answers)
            .take(most)
            .read_until(b'\n', &mut line)?;
        ensure!(read > 0, "the answers ended: nothing was written");
        while line.last() != Some(&b'\n') && read as u64 == most {
            let mut rest = Vec::new();
            let more = (&mut self.answers)
                .take(most)
                .read_until(b'\n', &mut rest)?;
            if more == 0 || rest.last() == Some(&b'\n') {
                break;
            }
        }
        while matches!(line.last(), Some(b'\n' | b'\r')) {
            line.pop();
        }
        // What is no UTF-8 is refused by its replacement.
        Ok(String::from_utf8_lossy(&line).replace('\u{fffd}', "\u{0}"))
    }
}

fn optional<T>(text: &str, check: impl Fn(&str) -> Result<T>) -> Result<Option<T>> {
    if text == "-" {
        return Ok(None);
    }
    check(text).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(text: &str) -> Result<u16> {
        text.parse().context("it is no number")
    }

    fn question(given: Option<&str>, default: Option<&str>) -> Question<'static> {
        Question {
            flag: "port",
            text: "Port",
            given: given.map(str::to_owned),
            default: default.map(str::to_owned),
            is_optional: true,
        }
    }

    /// What is answered, what was shown, and what of the input is left.
    fn asked(typed: &[u8], question: &Question<'_>) -> (Result<u16>, String) {
        let mut screen = Vec::new();
        let answer = Questions::new(typed, &mut screen, true).ask(question, number);
        (answer, String::from_utf8(screen).unwrap())
    }

    #[test]
    fn a_bad_answer_is_asked_for_again() {
        let long = [&[b'1'; 5000][..], b"\n8\n"].concat();
        let typed = [b"x\n\x1b[2J\n\xff\n", &long[..]].concat();
        let (answer, screen) = asked(&typed, &question(None, None));
        assert_eq!(answer.unwrap(), 8);
        assert_eq!(screen.matches("Port: ").count(), 5, "{screen}");
        assert!(
            screen.contains("no number")
                && screen.contains("longer than 1024")
                && !screen.contains('\u{1b}'),
            "{screen}"
        );
        let (answer, screen) = asked(b"\n", &question(None, Some("1883")));
        assert_eq!((answer.unwrap(), screen.as_str()), (1883, "Port [1883]: "));
        assert!(asked(b"x\n", &question(None, None)).0.is_err());
        // A flag that is no good is said, and the question asked.
        let (answer, screen) = asked(b"9\n", &question(Some("x"), None));
        assert!(
            answer.unwrap() == 9 && screen.contains("--port: it is no number"),
            "{screen}"
        );
    }

    #[test]
    fn a_script_hears_which_flag_is_missing_or_wrong() {
        let silent = |question: &Question<'_>| {
            Questions::new(&b""[..], Vec::new(), false).ask(question, number)
        };
        let error = |question| format!("{:#}", silent(&question).unwrap_err());
        assert_eq!(error(question(None, None)), "--port is missing: port");
        assert_eq!(
            error(question(Some("x"), None)),
            "--port: it is no number: invalid digit found in string"
        );
        let needed = Question {
            is_optional: false,
            ..question(None, Some("1883"))
        };
        assert!(error(needed).contains("missing"));
        assert_eq!(silent(&question(None, Some("1883"))).unwrap(), 1883);
        assert_eq!(silent(&question(Some("7"), Some("1883"))).unwrap(), 7);
    }

    #[test]
    fn there_may_be_no_answer() {
        let any = |typed: &[u8], default| {
            let mut questions = Questions::new(typed, Vec::new(), true);
            questions
                .ask_if_any(&question(None, default), number)
                .unwrap()
        };
        assert_eq!(any(b"\n", None), None);
        assert_eq!(any(b"-\n", Some("5")), None);
        assert_eq!(
            (any(b"\n", Some("5")), any(b"6\n", None)),
            (Some(5), Some(6))
        );
        let mut nobody = Questions::new(&b""[..], Vec::new(), false);
        assert_eq!(
            nobody
                .ask_if_any(&question(None, Some("5")), number)
                .unwrap(),
            None
        );
        assert!(
            Questions::new(&b"maybe\nn\n"[..], Vec::new(), true)
                .confirm("Sure?", true)
                .is_ok_and(|yes| !yes)
        );
    }
}
