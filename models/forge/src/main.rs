//! The forge's command line: prints, and leaves the work to the library.

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use millwright_engine::bundle::Bundle;
use millwright_forge::Precision;
use millwright_forge::cache::Cache;
use millwright_forge::catalogue::{Catalogue, Entry};
use millwright_forge::convert::{Order, convert};
use millwright_forge::export::{Form, export};
use millwright_forge::like::Like;
use millwright_forge::pull::{is_current, pull, random};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Makes the models that Millwright's agent runs: takes published weights, checks them, and writes a bundle
/// (an ONNX graph, its weights, tokenizer, chat template, licence and a manifest of digests) into a cache.
///
/// The cache is $MILLWRIGHT_CACHE, else $XDG_CACHE_HOME/millwright, else ~/.cache/millwright.
#[derive(Parser)]
#[command(name = "millwright-forge", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bring a model into the cache and print its folder. At once, if it is there.
    ///
    /// Packages come through python3's pip as it is configured on this machine; the digests of all that is
    /// downloaded are checked against the catalogue. Interrupted, it leaves nothing half-written.
    Pull(Model),
    /// Print the folder of a pulled model, or fail if it isn't there.
    Path(Model),
    /// List the models that can be pulled and which are there.
    List,
    /// Make a bundle of your own weights: a Hugging Face folder or a GGUF file, of a llama or a qwen2 model.
    ///
    /// Of a folder it reads config.json, tokenizer.json and safetensors in bf16, f16 or f32, in one file or several,
    /// and the chat template and licence if they are there. What it would get wrong it refuses.
    Convert(Conversion),
    /// Make a model of seeded random weights, to test size and speed: no download, always the same bytes.
    ///
    /// It answers nonsense. The weights go to disk as they are drawn; a 1.5b in int8 takes 1.8 GB there and less
    /// than 100 MB of memory.
    Tiny(Random),
    /// Write a model as other exporters would, to test what reads their files.
    ///
    /// `--form list` says which forms there are. The folder has no manifest; it looks as the exporter's does.
    Export(Export),
}

#[derive(clap::Args)]
struct Model {
    /// A name from `list`, such as smollm2-135m
    name: String,
    /// The first that `list` shows for the model unless given; f32 is what `millwright eval` compares with
    #[arg(long, value_enum)]
    precision: Option<Precision>,
}

#[derive(clap::Args)]
struct Conversion {
    /// A Hugging Face folder or a GGUF file
    source: PathBuf,
    /// The bundle's folder, new or empty
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// q4 is for weights that are four-bit in the source; others lose much by it
    #[arg(long, value_enum, default_value_t = Precision::Int8)]
    precision: Precision,
    /// What the model is called; the source's own name unless given
    #[arg(long)]
    name: Option<String>,
    #[arg(long, default_value = "1")]
    version: String,
    /// Positions that prompt and answer may take; the model's own, but 32768 at most, unless given
    #[arg(long, value_name = "N")]
    context: Option<usize>,
}

#[derive(clap::Args)]
struct Random {
    /// The shape of a real model; 100 thousand weights otherwise
    #[arg(long, value_enum)]
    like: Option<Like>,
    #[arg(long, value_enum, default_value_t = Precision::Int8)]
    precision: Precision,
    /// The bundle's folder, new or empty
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
}

#[derive(clap::Args)]
struct Export {
    /// One of those that `--form list` shows, such as dynamic-int8
    #[arg(long)]
    form: String,
    /// A name from `list`, of which tiny needs no download, or a path: what `convert` takes
    #[arg(long, value_name = "NAME|PATH", default_value = "tiny")]
    model: String,
    /// Add seeded biases to q, k and v of a model that has none
    #[arg(long)]
    bias: bool,
    /// The model's folder, new or empty
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("millwright-forge: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> Result<()> {
    let (cache, catalogue) = (Cache::from_environment()?, Catalogue::built_in()?);
    match command {
        Command::Pull(Model { name, precision }) => {
            let entry = catalogue.find(name)?;
            let precision = entry.precision(*precision)?;
            let began = Instant::now();
            let pulled = pull(&cache, entry, precision)?;
            if pulled.made {
                eprintln!(
                    "{name} {precision}: made in {:.1} s",
                    began.elapsed().as_secs_f32()
                );
            }
            println!("{}", pulled.path.display());
        }
        Command::Path(Model { name, precision }) => {
            let entry = catalogue.find(name)?;
            let precision = entry.precision(*precision)?;
            let path = cache.bundle(name, precision);
            if !is_current(&path, entry) {
                bail!(
                    "{name} {precision} is not in the cache; `cargo forge pull {name} --precision {precision}` brings it"
                );
            }
            println!("{}", path.display());
        }
        Command::List => catalogue
            .models
            .iter()
            .for_each(|entry| list(&cache, entry)),
        Command::Convert(conversion) => {
            let began = Instant::now();
            convert(&Order {
                source: &conversion.source,
                output: &conversion.output,
                precision: conversion.precision,
                name: conversion.name.as_deref(),
                version: &conversion.version,
                context: conversion.context,
            })?;
            eprintln!("made in {:.1} s", began.elapsed().as_secs_f32());
            println!("{}", conversion.output.display());
        }
        Command::Tiny(Random {
            like,
            precision,
            output,
        }) => {
            let began = Instant::now();
            random(output, *like, *precision)?;
            eprintln!("made in {:.1} s", began.elapsed().as_secs_f32());
            println!("{}", output.display());
        }
        Command::Export(Export { form, .. }) if form == "list" => print!("{}", Form::list()),
        Command::Export(Export {
            form,
            model,
            bias,
            output,
        }) => {
            let form = Form::find(form)?;
            let output = output.as_ref();
            let output = output.context("a form is written into a folder; name one with -o DIR")?;
            let began = Instant::now();
            export(&cache, &catalogue, model, form, *bias, output)?;
            eprintln!("made in {:.1} s", began.elapsed().as_secs_f32());
            println!("{}", output.display());
        }
    }
    Ok(())
}

fn list(cache: &Cache, entry: &Entry) {
    println!("{}\n    {} ({})", entry.name, entry.about, entry.licence);
    for precision in &entry.precisions {
        let path = cache.bundle(&entry.name, *precision);
        let state = match Bundle::open(&path) {
            Ok(bundle) if is_current(&path, entry) => {
                let bytes: u64 = bundle.manifest.files.iter().map(|file| file.bytes).sum();
                format!("{:.1} MB at {}", bytes as f64 / 1e6, path.display())
            }
            _ => "not pulled".to_owned(),
        };
        println!("    {precision:<5} {state}");
    }
}
