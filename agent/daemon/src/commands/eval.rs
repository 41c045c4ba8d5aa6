//! `millwright eval`: how well a model predicts a text, alone and beside a reference.

use super::generate::read_text;
use super::model::ModelArgs;
use anyhow::{Context, Result, bail};
use millwright_engine::Engine;
use serde::Serialize;
use std::io::{IsTerminal, stderr};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to predict, UTF-8
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// A second model to compare with
    #[arg(long, value_name = "DIR")]
    reference: Option<PathBuf>,
    /// Tokens in a window
    #[arg(long, default_value_t = 512)]
    window: usize,
    /// Stop after this many tokens; 0 takes the whole text
    #[arg(long, default_value_t = 0)]
    max_tokens: usize,
    /// Threads for arithmetic [default: as many as suit the model, measured once and remembered]
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    perplexity: f64,
    /// Tokens predicted: the first of each window is given.
    tokens: usize,
    reference_perplexity: Option<f64>,
    /// Mean over tokens of KL(reference ‖ model), in nats.
    kl_divergence: Option<f64>,
    /// The share of tokens for which both think the same one likeliest.
    top1_agreement: Option<f64>,
}

/// Sums over the tokens predicted.
#[derive(Default)]
struct Sums {
    tokens: usize,
    surprise: f64,
    reference_surprise: f64,
    divergence: f64,
    same_top: usize,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if args.window < 2 {
        bail!("--window must be at least 2");
    }
    let text = read_text(&args.text)?;
    let mut model = args.model.open(args.threads, 1, None)?;
    let mut reference = match &args.reference {
        Some(folder) => Some(args.model.open_reference(folder, args.threads)?),
        None => None,
    };
    let mut tokens = model
        .text()
        .encode(&text)
        .with_context(|| args.text.display().to_string())?;
    if args.max_tokens > 0 {
        tokens.truncate(args.max_tokens);
    }
    if tokens.len() < 2 {
        bail!("{} holds fewer than two tokens", args.text.display());
    }
    let window = args.window.min(model.card().context_length);
    let windows = tokens.len().div_ceil(window);
    let mut sums = Sums::default();
    for (index, window) in tokens.chunks(window).enumerate() {
        add_window(&mut sums, window, &mut model, reference.as_mut())?;
        if stderr().is_terminal() {
            eprint!("\rwindow {} of {windows}", index + 1);
        }
    }
    if stderr().is_terminal() {
        eprintln!();
    }
    print(&sums.report(reference.is_some()), args.json)
}

fn add_window(
    sums: &mut Sums,
    tokens: &[u32],
    model: &mut Engine,
    reference: Option<&mut Engine>,
) -> Result<()> {
    // The reference's rows of this window: [tokens, vocab] f32 are held at once.
    let mut rows: Vec<Vec<f32>> = Vec::new();
    if let Some(reference) = reference {
        reference.score(tokens, &mut |_, logits| rows.push(logits.to_vec()))?;
    }
    let mut scored = Ok(());
    model.score(tokens, &mut |position, logits| {
        if let Some(&next) = tokens.get(position + 1)
            && scored.is_ok()
        {
            scored = sums.add(logits, rows.get(position).map(Vec::as_slice), next as usize);
        }
    })?;
    scored
}

impl Sums {
    fn add(&mut self, logits: &[f32], reference: Option<&[f32]>, next: usize) -> Result<()> {
        let norm = log_sum_exp(logits);
        let Some(&next_logit) = logits.get(next) else {
            bail!("token {next} is beyond the model's vocabulary")
        };
        self.tokens += 1;
        self.surprise += norm - f64::from(next_logit);
        let Some(reference) = reference else {
            return Ok(());
        };
        if reference.len() != logits.len() {
            bail!(
                "the reference has {} tokens in its vocabulary, the model {}",
                reference.len(),
                logits.len()
            );
        }
        let reference_norm = log_sum_exp(reference);
        self.reference_surprise += reference_norm - f64::from(reference[next]);
        self.divergence += reference
            .iter()
            .zip(logits)
            .map(|(&r, &l)| {
                let log_p = f64::from(r) - reference_norm;
                log_p.exp() * (log_p - (f64::from(l) - norm))
            })
            .sum::<f64>();
        self.same_top += usize::from(top(reference) == top(logits));
        Ok(())
    }

    fn report(&self, compared: bool) -> Report {
        let n = self.tokens.max(1) as f64;
        Report {
            perplexity: (self.surprise / n).exp(),
            tokens: self.tokens,
            reference_perplexity: compared.then(|| (self.reference_surprise / n).exp()),
            kl_divergence: compared.then_some(self.divergence / n),
            top1_agreement: compared.then_some(self.same_top as f64 / n),
        }
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + logits
        .iter()
        .map(|&l| (f64::from(l) - max).exp())
        .sum::<f64>()
        .ln()
}

fn top(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)))
}

fn print(report: &Report, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(report)?);
        return Ok(());
    }
    println!(
        "perplexity {:.3} over {} tokens",
        report.perplexity, report.tokens
    );
    if let (Some(perplexity), Some(divergence), Some(agreement)) = (
        report.reference_perplexity,
        report.kl_divergence,
        report.top1_agreement,
    ) {
        println!("reference perplexity {perplexity:.3}");
        println!(
            "KL divergence from it {divergence:.5} nats a token, same likeliest token {:.1} %",
            agreement * 100.0
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_does_not_diverge_from_itself_and_does_from_another() {
        let mut sums = Sums::default();
        sums.add(&[1.0, 2.0, 3.0], Some(&[1.0, 2.0, 3.0]), 2)
            .unwrap();
        let report = sums.report(true);
        assert!(report.kl_divergence.unwrap().abs() < 1e-12);
        // p(next) = e³ / (e + e² + e³)
        assert!((report.perplexity - 1.0 / 0.665_240_955_774_821_8).abs() < 1e-9);
        let mut other = Sums::default();
        other.add(&[0.0, 0.0], Some(&[2f32.ln(), 0.0]), 0).unwrap();
        let expected = 2.0 / 3.0 * (4f64 / 3.0).ln() + 1.0 / 3.0 * (2f64 / 3.0).ln();
        assert!((other.report(true).kl_divergence.unwrap() - expected).abs() < 1e-6);
        assert_eq!(other.report(true).top1_agreement, Some(1.0));
    }

    #[test]
    fn another_vocabulary_is_refused() {
        assert!(Sums::default().add(&[0.0; 3], Some(&[0.0; 4]), 0).is_err());
        assert!(Sums::default().add(&[0.0; 3], None, 3).is_err());
    }
}
