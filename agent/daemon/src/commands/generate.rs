//! `millwright generate`: one answer on the terminal, without a broker.

use super::model::ModelArgs;
use anyhow::{Context, Result, bail};
use millwright_engine::sampler::Sampling;
use millwright_engine::text::Message;
use millwright_engine::{Completion, Event, Finish, Prompt, Request};
use millwright_task::wire::printable;
use serde_json::json;
use std::io::{Read, Write, stdout};
use std::path::{Path, PathBuf};

/// A prompt file larger than this is refused.
const FILE_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    source: Source,
    /// Tokens to make at most
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// Threads for arithmetic [default: as many as suit the model, measured once and remembered]
    #[arg(long)]
    threads: Option<usize>,
    /// 0 takes the likeliest token each time
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Keep the likeliest N tokens; 0 keeps all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Keep the likeliest tokens that make up this share
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Keep tokens at least this likely beside the likeliest
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    /// Divide the logits of tokens already seen; 1 is off
    #[arg(long, default_value_t = 1.0)]
    repeat_penalty: f32,
    /// Draws the same tokens for the same seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// End the answer before this text; may be given again
    #[arg(long)]
    stop: Vec<String>,
    /// Print one JSON object at the end instead of streaming
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Source {
    /// The prompt as it stands
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// A file with the prompt as it stands
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// A JSON file of messages, `[{"role": "user", "content": "…"}]`, for the model's chat template
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,
}

impl Source {
    fn read(&self) -> Result<Prompt> {
        match (&self.prompt, &self.prompt_file, &self.messages) {
            (Some(text), _, _) => Ok(Prompt::Text(text.clone())),
            (_, Some(path), _) => Ok(Prompt::Text(read_text(path)?)),
            (_, _, Some(path)) => {
                let messages: Vec<Message> =
                    serde_json::from_str(&read_text(path)?).with_context(|| {
                        format!(
                            "{} is not a JSON list of messages with role and content",
                            path.display()
                        )
                    })?;
                Ok(Prompt::Chat(messages))
            }
            _ => bail!("give --prompt, --prompt-file or --messages"),
        }
    }
}

/// A text file, bounded; names the file in every error.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let file =
        std::fs::File::open(path).with_context(|| format!("can't open {}", path.display()))?;
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("can't read {}", path.display()))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        bail!("{} is larger than {FILE_BYTES_MAX} bytes", path.display());
    }
    String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text", path.display()))
}

pub(super) fn run(args: &Args) -> Result<()> {
    let prompt = args.source.read()?;
    let mut engine = args.model.open(args.threads, 1, None)?;
    let request = Request {
        prompt,
        max_tokens: args.max_tokens,
        sampling: Sampling {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            repeat_penalty: args.repeat_penalty,
            seed: args.seed,
        },
        stop: args.stop.clone(),
    };
    let prepared = engine.preparer().prepare(request)?;
    let needed = prepared.tokens_max();
    if engine.start(prepared).is_err() {
        bail!("the KV cache has no room for {needed} tokens");
    }
    loop {
        for (_, event) in engine.step()? {
            match event {
                Event::Text(text) if !args.json => {
                    write!(stdout(), "{}", printable(&text))?;
                    stdout().flush()?;
                }
                Event::Done(done) => {
                    report(&done, args.json);
                    return Ok(());
                }
                Event::Started | Event::Text(_) => {}
            }
        }
    }
}

fn report(done: &Completion, as_json: bool) {
    let decoded = done.tokens.len().saturating_sub(1);
    let rate = |tokens: usize, time: std::time::Duration| match time.as_secs_f64() {
        seconds if seconds > 0.0 => Some(tokens as f64 / seconds),
        _ => None,
    };
    let prefill_rate = rate(done.prompt_tokens, done.prefill);
    let decode_rate = rate(decoded, done.decode);
    let finish = match done.finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::Cancelled => "cancelled",
    };
    if as_json {
        let timing = json!({
            "prefill_ms": done.prefill.as_secs_f64() * 1e3,
            "decode_ms": done.decode.as_secs_f64() * 1e3,
            "prefill_tokens_per_s": prefill_rate,
            "decode_tokens_per_s": decode_rate,
        });
        let answer = json!({
            "text": done.text, "tokens": done.tokens, "prompt_tokens": done.prompt_tokens,
            "finish": finish, "timing": timing,
        });
        println!("{answer}");
    } else {
        println!();
        eprintln!(
            "{} prompt tokens in {:.0} ms ({:.0}/s), {} tokens in {:.0} ms ({:.0}/s), ended by {finish}",
            done.prompt_tokens,
            done.prefill.as_secs_f64() * 1e3,
            prefill_rate.unwrap_or(0.0),
            done.tokens.len(),
            done.decode.as_secs_f64() * 1e3,
            decode_rate.unwrap_or(0.0),
        );
    }
}
