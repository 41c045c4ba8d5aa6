//! `millwright init`: from a few answers to a commented configuration that works. Secrets are named by their files and never
//! read into it.

mod broker;
mod questions;
pub(super) mod text;

use super::{credentials, doctor, enroll, files};
use crate::broker::Visit;
use crate::config::Config;
use anyhow::{Context, Result, ensure};
use broker::{Broker, Given};
use millwright_engine::bundle::Bundle;
use millwright_task::topic::Base;
use millwright_task::wire::printable;
use questions::{Question, Questions};
use std::io::{BufRead, IsTerminal, Write, stderr, stdin};
use std::path::{Path, PathBuf};
use text::{entry, filled, path_entry};

/// Where the package has models and state.
const MODELS: &str = "/var/lib/millwright/models";
const STATE: &str = "/var/lib/millwright/state";
/// Starts the agent where there is no systemd.
const INIT_SCRIPT: &str = "/etc/init.d/millwright";
/// The service's group, which may read the configuration.
const GROUP: &str = "millwright";

#[derive(Debug, clap::Args)]
#[allow(clippy::struct_excessive_bools)] // they are flags of a command line
pub struct Args {
    /// The configuration to write
    #[arg(long, value_name = "FILE", default_value = doctor::CONFIG)]
    config: PathBuf,
    /// Replace a configuration that is there; what else was set in it goes back to the defaults
    #[arg(long)]
    force: bool,
    /// Ask nothing: take flags and defaults. So it is without a terminal, too
    #[arg(long, short)]
    yes: bool,
    /// Don't try the connection to the broker
    #[arg(long)]
    offline: bool,
    /// Make a key for the client certificate and a request for it. Everything else is written as if the certificate were
    /// there; the connection is tried by `millwright doctor`, once it is
    #[arg(long)]
    enroll_csr: bool,
    /// Where the gateway is: one level of its topics
    #[arg(long, value_name = "NAME", help_heading = "Answers")]
    site: Option<String>,
    /// What the gateway is called: one level of its topics [default: the machine's name]
    #[arg(long, value_name = "NAME", help_heading = "Answers")]
    name: Option<String>,
    /// The broker's name or address; with TLS, its certificate must be issued for it
    #[arg(long, value_name = "HOST", help_heading = "Answers")]
    host: Option<String>,
    /// The broker's port [default: 8883 with TLS, else 1883]
    #[arg(long, value_name = "PORT", help_heading = "Answers")]
    port: Option<String>,
    /// Connect by TLS and trust this CA (PEM)
    #[arg(long, value_name = "FILE", help_heading = "Answers")]
    ca: Option<String>,
    /// The client certificate (PEM), where the broker wants one
    #[arg(long, value_name = "FILE", help_heading = "Answers")]
    cert: Option<String>,
    /// The client certificate's key (PEM)
    #[arg(long, value_name = "FILE", help_heading = "Answers")]
    key: Option<String>,
    /// Allow a broker on another machine without TLS: passwords and prompts cross the network in the clear
    #[arg(long, help_heading = "Answers", conflicts_with_all = ["ca", "enroll_csr"])]
    plaintext: bool,
    /// The broker user
    #[arg(long, value_name = "NAME", help_heading = "Answers")]
    user: Option<String>,
    /// The file that holds the user's password
    #[arg(long, value_name = "FILE", help_heading = "Answers")]
    password_file: Option<String>,
    /// The model's folder [default: the one below /var/lib/millwright/models, where there is one alone]
    #[arg(long, value_name = "DIR", help_heading = "Answers")]
    model: Option<String>,
    /// Where the agent keeps journal and packed weights; it is made at the first start
    #[arg(long, value_name = "DIR", default_value = STATE, help_heading = "Answers")]
    state_dir: String,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let place = args.config.display().to_string();
    ensure!(
        args.force || !args.config.exists(),
        "{place} is there already: look at it with `millwright doctor --config {place}`, or replace it with --force"
    );
    files::writable(&args.config)?;
    let is_replaced = args.config.exists();
    let is_asking = !args.yes && stdin().is_terminal() && stderr().is_terminal();
    let mut questions = Questions::new(stdin().lock(), stderr(), is_asking);
    questions.say("What is in [brackets] is taken where nothing is typed.\n")?;
    let mut answers = Answers::ask(args, &mut questions)?;
    if !args.offline && !args.enroll_csr {
        answers.try_out(&mut questions)?;
    }
    let requested = args.enroll_csr.then(|| answers.enroll()).transpose()?;
    files::folder_of(&args.config, 0o755)?;
    files::write(
        &args.config,
        &answers.text(true)?,
        0o640,
        files::group(GROUP),
        args.force,
    )?;
    println!("{place} is written; it explains every key.\n");
    let start = start(&args.config, is_replaced);
    if let Some(advice) = requested {
        print!("{advice}4. millwright doctor --config {place}\n5. start it: {start}\n");
        return Ok(());
    }
    doctor::after(&args.config, args.offline)?;
    println!("\nStart it: {start}");
    Ok(())
}

/// How the agent is started with a configuration; where that replaced another, an agent may run with the old one.
fn start(config: &Path, is_replaced: bool) -> String {
    let has = |path: &str| Path::new(path).exists();
    let is_units = credentials::is_the_units(config);
    match (is_units, is_replaced) {
        (true, false) if has("/run/systemd/system") => "systemctl enable --now millwright".into(),
        (true, true) if has("/run/systemd/system") => {
            "systemctl enable millwright && systemctl restart millwright".into()
        }
        (true, false) if has(INIT_SCRIPT) => format!("{INIT_SCRIPT} start"),
        (true, true) if has(INIT_SCRIPT) => format!("{INIT_SCRIPT} restart"),
        _ => format!("millwright agent --config {}", config.display()),
    }
}

/// Everything that is asked.
struct Answers {
    site: String,
    name: String,
    broker: Broker,
    model: PathBuf,
    state_dir: PathBuf,
}

impl Answers {
    fn ask<R: BufRead, W: Write>(args: &Args, questions: &mut Questions<R, W>) -> Result<Self> {
        let site = questions.ask(
            &needed("site", "Site: where the gateway is", args.site.as_ref()),
            |text| {
                Base::of_gateway(text, "x")
                    .map_err(|e| anyhow::anyhow!("it makes no level of a topic: {e}"))?;
                Ok(text.to_owned())
            },
        )?;
        let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let machine = Some(machine.trim().to_owned()).filter(|name| !name.is_empty());
        let question = optional(
            "name",
            "Gateway: what it is called there",
            args.name.as_ref(),
            machine,
        );
        let name = questions.ask(&question, |text| {
            Base::of_gateway(&site, text)
                .map_err(|e| anyhow::anyhow!("it makes no level of a topic: {e}"))?;
            Ok(text.to_owned())
        })?;
        let given = Given {
            host: args.host.clone(),
            port: args.port.clone(),
            ca: args.ca.clone(),
            cert: args.cert.clone(),
            key: args.key.clone(),
            plaintext: args.plaintext,
            user: args.user.clone(),
            password: args.password_file.clone(),
            enrolls: args.enroll_csr,
            folder: args.config.parent().map(Path::to_owned).unwrap_or_default(),
            is_units: credentials::is_the_units(&args.config),
            is_offered: false,
        };
        let broker = Broker::ask(&given, questions)?;
        let found = only_folder(Path::new(MODELS));
        let question = optional("model", "Model's folder", args.model.as_ref(), found);
        let model = questions.ask(&question, |text| {
            let path = absolute(text)?;
            Bundle::open(&path)?;
            Ok(path)
        })?;
        text::plain(&args.state_dir).context("--state-dir")?;
        Ok(Self {
            site,
            name,
            broker,
            model,
            state_dir: absolute(&args.state_dir)?,
        })
    }

    /// The configuration. As it is to be written, it names secrets as the unit gets them; else as they can be read now,
    /// and a certificate that is still to be signed is left out.
    fn text(&self, is_final: bool) -> Result<String> {
        let mut entries = vec![
            entry("gateway", "site", self.site.as_str()),
            entry("gateway", "name", self.name.as_str()),
            path_entry("model", "bundle", &self.model)?,
            path_entry("model", "state_dir", &self.state_dir)?,
        ];
        entries.extend(self.broker.entries(is_final)?);
        filled(&entries)
    }

    /// Tries to connect, and again with other answers as long as somebody gives them.
    fn try_out<R: BufRead, W: Write>(&mut self, questions: &mut Questions<R, W>) -> Result<()> {
        loop {
            questions.say(&format!("\nConnecting to {}…", self.broker.place()))?;
            let Err(e) = self.connect() else {
                return questions.say("  The broker takes us.");
            };
            if !questions.is_asking() {
                return Err(e.context(
                    "the connection was tried (--offline leaves that out) and nothing was written",
                ));
            }
            questions.say(&format!("  {e:#}"))?;
            let change = "Change the answers about the broker? (n writes them as they are)";
            if !questions.confirm(change, true)? {
                return Ok(());
            }
            self.broker = Broker::ask(&self.broker.given(), questions)?;
        }
    }

    /// Tries them as the agent would.
    fn connect(&self) -> Result<()> {
        let config = Config::parse(&self.text(false)?)?;
        let outcome = super::block_on(async {
            let (visit, _) = Visit::begin(&config.broker, "init").await?;
            visit.end().await;
            Ok(())
        })?;
        outcome.map_err(|lost: crate::broker::Lost| anyhow::anyhow!(lost.reason))
    }

    /// Key and request, and what to do with it.
    fn enroll(&self) -> Result<String> {
        let tls = self
            .broker
            .tls
            .as_ref()
            .and_then(|tls| tls.cert.as_ref().zip(tls.key.as_ref()));
        let (cert, key) = tls.context("--enroll-csr needs TLS: --ca FILE")?;
        let ca = self
            .broker
            .tls
            .as_ref()
            .map(|tls| tls.ca.display().to_string());
        // Before anything is made: the rest must be right.
        Config::parse(&self.text(false)?)?;
        let name = self.broker.user.as_deref().unwrap_or(&self.name);
        let request = enroll::request(name, key)?;
        let csr = cert.with_extension("csr");
        enroll::write(&csr, &request)?;
        let advice = enroll::advice(name, key, &csr, cert, request.is_new);
        let ca = ca.unwrap_or_default();
        Ok(format!(
            "{advice}3. the broker's CA must be in {ca}, if it isn't yet\n"
        ))
    }
}

fn needed<'a>(flag: &'a str, text: &'a str, given: Option<&String>) -> Question<'a> {
    Question {
        flag,
        text,
        given: given.cloned(),
        default: None,
        is_optional: false,
    }
}

fn optional<'a>(
    flag: &'a str,
    text: &'a str,
    given: Option<&String>,
    default: Option<String>,
) -> Question<'a> {
    Question {
        flag,
        text,
        given: given.cloned(),
        default,
        is_optional: true,
    }
}

/// The agent may be started from another folder.
fn absolute(text: &str) -> Result<PathBuf> {
    std::path::absolute(text).with_context(|| format!("{} is no path", printable(text)))
}

/// A folder's only folder.
fn only_folder(folder: &Path) -> Option<String> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let mut folders = entries.filter(|entry| entry.path().is_dir()).take(2);
    let only = folders.next()?;
    folders
        .next()
        .is_none()
        .then(|| only.path().display().to_string())
}
