//! The programs a plant would run: builds them with cargo, starts them, stops them. Knows no MQTT.

use crate::{GATEWAY, SITE};
use anyhow::{Context, Error, Result, anyhow, bail};
use std::ffi::OsString;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use tokio::process::Child;
use tokio::time::timeout;

/// The agent drains within its grace period; then it is killed.
const STOP_WITHIN: Duration = Duration::from_secs(15);
/// Lines of the agent's log shown when it dies.
const LOG_LINES: usize = 12;

/// Where the built programs lie.
pub(crate) struct Programs {
    pub(crate) millwright: PathBuf,
    forge: PathBuf,
}

impl Programs {
    /// Builds both beside this program, with the same profile, so that dependencies are built once.
    pub(crate) fn build() -> Result<Self> {
        let here = std::env::current_exe().context("asking for this program's path")?;
        let folder = here.parent().context("this program lies in no folder")?;
        let profile = match folder.file_name().and_then(|name| name.to_str()) {
            Some("debug") | None => "dev",
            Some(profile) => profile,
        };
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        let mut build = Command::new(&cargo);
        // What `cargo run` says of this crate would make build scripts that look at it run again, here and at the
        // next build.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
                build.env_remove(&*name);
            }
        }
        let status = build
            .args(["build", "--profile", profile, "--manifest-path"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml"))
            .args(["-p", "millwright", "-p", "millwright-forge", "--target-dir"])
            .arg(folder.parent().unwrap_or(folder))
            .status()
            .with_context(|| format!("{} can't be started", cargo.to_string_lossy()))?;
        if !status.success() {
            bail!("cargo could not build the agent and the forge; its messages are above");
        }
        let program = |name: &str| folder.join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
        Ok(Self {
            millwright: program("millwright"),
            forge: program("millwright-forge"),
        })
    }

    /// Brings a model into the cache, unless it is there, and returns its folder.
    pub(crate) fn pull(&self, model: &str) -> Result<PathBuf> {
        let output = Command::new(&self.forge)
            .args(["pull", model])
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("{} can't be started", self.forge.display()))?;
        if !output.status.success() {
            bail!("there is no model {model} to run; the forge's reason is above");
        }
        let folder = String::from_utf8(output.stdout).context("the forge's answer")?;
        Ok(PathBuf::from(folder.trim()))
    }
}

/// A running agent with a configuration, a state directory and a log of its own, gone when dropped.
pub(crate) struct Agent {
    child: Child,
    folder: TempDir,
}

impl Agent {
    pub(crate) fn start(programs: &Programs, bundle: &Path, broker: SocketAddr) -> Result<Self> {
        let folder = tempfile::tempdir().context("making a temporary folder")?;
        let config = folder.path().join("agent.toml");
        fs::write(&config, configuration(bundle, folder.path(), broker))
            .with_context(|| format!("writing {}", config.display()))?;
        let log = File::create(folder.path().join("agent.log")).context("making the log")?;
        let child = tokio::process::Command::new(&programs.millwright)
            .args(["agent", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("sharing the log")?)
            .stderr(log)
            // Ctrl-C is for the demo; it stops the agent in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{} can't be started", programs.millwright.display()))?;
        Ok(Self { child, folder })
    }

    /// Waits until the agent ends by itself, and says what it said last.
    pub(crate) async fn died(&mut self) -> Error {
        let status = match self.child.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let log = fs::read_to_string(self.folder.path().join("agent.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let last = &lines[lines.len().saturating_sub(LOG_LINES)..];
        anyhow!(
            "the agent ended ({status}); its last words:\n{}",
            last.join("\n")
        )
    }

    /// Asks the agent to end, as systemd would, and waits for it.
    pub(crate) async fn stop(mut self) {
        let Some(id) = self.child.id() else { return };
        let asked = Command::new("kill")
            .args(["-TERM", &id.to_string()])
            .status();
        let asked = asked.is_ok_and(|status| status.success());
        if !asked || timeout(STOP_WITHIN, self.child.wait()).await.is_err() {
            // Nothing is lost: its state directory goes with it.
            let _ = self.child.kill().await;
        }
    }
}

fn configuration(bundle: &Path, folder: &Path, broker: SocketAddr) -> String {
    let quoted = |path: &Path| format!("{:?}", path.display().to_string());
    format!(
        "[gateway]\nsite = \"{SITE}\"\nname = \"{GATEWAY}\"\n\n\
         [broker]\nhost = \"{}\"\nport = {}\n\n\
         [model]\nbundle = {}\nstate_dir = {}\n\n\
         [agent]\nhealth_interval_s = 1\n",
        broker.ip(),
        broker.port(),
        quoted(bundle),
        quoted(&folder.join("state")),
    )
}
