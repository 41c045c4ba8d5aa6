//! The chat template: Jinja as Hugging Face's models use it, bounded in work and in memory.
//! Sees messages and the names of two tokens; no files, no environment.

use super::Message;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, context};
use serde::Deserialize;
use std::time::{SystemTime, UNIX_EPOCH};

/// The work a rendering may do: about an instruction each, or 64 bytes of text made, so this bounds its
/// memory to 16 MB too. SmolLM2's template takes about 20 for a message.
const FUEL: u64 = 250_000;
/// How deep macros and includes may nest.
const DEPTH_MAX: usize = 64;
/// An error's text is cut here: it can hold a template's, and so a sender's, words.
const REASON_BYTES_MAX: usize = 256;
const NAME: &str = "chat_template.jinja";

/// A parsed chat template.
pub(super) struct Template {
    environment: Environment<'static>,
    names: SpecialNames,
}

/// The tokens that templates ask for by role.
#[derive(Debug, Default)]
pub(super) struct SpecialNames {
    pub(super) bos_token: Option<String>,
    pub(super) eos_token: Option<String>,
}

impl Template {
    pub(super) fn parse(source: &str, names: SpecialNames) -> Result<Self, String> {
        let mut environment = Environment::new();
        // As in `transformers`, so that templates written for it mean the same here.
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|e| describe(&e))?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(DEPTH_MAX);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| strftime(format, now()));
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|e| describe(&e))?;
        Ok(Self { environment, names })
    }

    /// The prompt up to where the answer begins, or a sentence on why there is none.
    pub(super) fn render(&self, messages: &[Message]) -> Result<String, String> {
        let names = &self.names;
        let context = context! {
            messages => Serde(messages),
            add_generation_prompt => true,
            bos_token => names.bos_token.as_deref().unwrap_or_default(),
            eos_token => names.eos_token.as_deref().unwrap_or_default(),
        };
        let template = self.environment.get_template(NAME);
        template
            .and_then(|t| t.render(context))
            .map_err(|e| describe(&e))
    }
}

impl SpecialNames {
    /// Reads `tokenizer_config.json`, where a token is a string or an object with `content`.
    pub(super) fn parse(text: &str) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Token {
            Plain(String),
            Object { content: String },
        }
        #[derive(Deserialize)]
        struct Config {
            bos_token: Option<Token>,
            eos_token: Option<Token>,
        }
        let config: Config = serde_json::from_str(text)?;
        let content = |token| match token {
            Token::Plain(content) | Token::Object { content } => content,
        };
        Ok(Self {
            bos_token: config.bos_token.map(content),
            eos_token: config.eos_token.map(content),
        })
    }
}

/// `text` without control characters and marks, cut at a character.
pub(crate) fn bounded(text: &str) -> String {
    let text = text.replace(super::control::MARK, "");
    let mut end = text.len().min(REASON_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let tail = if end < text.len() { "…" } else { "" };
    let one_line = text[..end].replace(|c: char| c.is_control(), " ");
    format!("{one_line}{tail}")
}

fn describe(error: &Error) -> String {
    let at = error
        .line()
        .map_or(String::new(), |line| format!(" (line {line})"));
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "it does more work than a template may".to_owned(),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    bounded(&format!("the chat template says{at}: {what}"))
}

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// Plain JSON; minijinja's own filter would escape `<` and `&` for HTML.
#[expect(clippy::needless_pass_by_value, reason = "the shape of a filter")]
fn to_json(_: &State, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let text = match indent {
        None | Some(0) => serde_json::to_string(value),
        Some(_) => serde_json::to_string_pretty(value),
    };
    text.map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// Seconds since 1970, UTC.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// Formats a UTC time as C's `strftime` does, for what templates use of it.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[(days % 7) as usize];
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(c) = characters.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let part = match characters.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => format!("{:02}", second / 3600),
            Some('M') => format!("{:02}", second / 60 % 60),
            Some('S') => format!("{:02}", second % 60),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('%') => "%".to_owned(),
            other => {
                let other = other.map_or(String::new(), String::from);
                let reason = format!("strftime_now does not know %{other}");
                return Err(Error::new(ErrorKind::InvalidOperation, reason));
            }
        };
        text += &part;
    }
    Ok(text)
}

/// Year, month and day of a day since 1970-01-01. Source: H. Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms", `civil_from_days`, for days that are not negative.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_as_strftime_writes_them() {
        // `date -u -d @1709251199` is Thu Feb 29 23:59:59 UTC 2024.
        let at = |format| strftime(format, 1_709_251_199).unwrap();
        assert_eq!(
            at("%A %d %B %Y, %H:%M:%S 100%%"),
            "Thursday 29 February 2024, 23:59:59 100%"
        );
        assert_eq!(at("%a %b %y %F"), "Thu Feb 24 2024-02-29");
        assert_eq!(strftime("%d %b %Y", 0).unwrap(), "01 Jan 1970");
        assert!(strftime("%Q", 0).is_err());
        assert!(strftime("%", 0).is_err());
    }
}
