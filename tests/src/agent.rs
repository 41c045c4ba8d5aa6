//! The agent as a process, with a configuration, a state directory and a log of the test's own.

use crate::{Broker, await_end, end, signal};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use tempfile::TempDir;

/// What the configuration of an agent under test says beyond the least.
#[derive(Default, Clone)]
pub struct Setup {
    /// Default: `gw-1`.
    pub name: Option<String>,
    /// The pool that it is in, if any.
    pub pool: Option<String>,
    /// Default: the tiny model.
    pub bundle: Option<PathBuf>,
    /// Lines for the configuration's sections.
    pub broker: String,
    pub model: String,
    pub tasks: String,
    pub agent: String,
    /// Where the broker is for the agent, if something stands between. Default: the broker's own port.
    pub port: Option<u16>,
    /// Default: a folder of the agent's own.
    pub state_dir: Option<PathBuf>,
    /// Variables of its environment.
    pub env: Vec<(String, String)>,
}

/// A running agent.
pub struct Agent {
    child: Child,
    folder: TempDir,
    env: Vec<(String, String)>,
}

impl Agent {
    pub fn start(broker: &Broker) -> Self {
        Self::with(broker, &Setup::default())
    }

    pub fn with(broker: &Broker, setup: &Setup) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let text = configuration(broker, setup, folder.path());
        fs::write(folder.path().join("agent.toml"), text).expect("the configuration");
        let env = setup.env.clone();
        let child = spawn(folder.path(), &env);
        Self { child, folder, env }
    }

    /// With the `agent.toml` that is in a folder.
    pub fn configured(folder: TempDir) -> Self {
        let child = spawn(folder.path(), &[]);
        Self {
            child,
            folder,
            env: Vec::new(),
        }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its environment from the next [`Self::restart`] on.
    pub fn set_env(&mut self, env: Vec<(String, String)>) {
        self.env = env;
    }

    /// Stops the process where it stands, or lets it go on.
    pub fn freeze(&self, frozen: bool) {
        signal(&self.child, if frozen { "STOP" } else { "CONT" });
    }

    /// Kills it as a power cut would: no farewell.
    pub fn kill(&mut self) {
        signal(&self.child, "KILL");
        await_end("the agent dies", &mut self.child);
    }

    /// Asks it to end, as systemd does.
    pub fn terminate(&self) {
        signal(&self.child, "TERM");
    }

    /// Waits for it to end by itself.
    pub fn ended(&mut self) -> ExitStatus {
        await_end("the agent ends", &mut self.child)
    }

    /// Starts it again with the same configuration and state.
    pub fn restart(&mut self) {
        end(&mut self.child);
        self.child = spawn(self.folder.path(), &self.env);
    }

    pub fn is_running(&mut self) -> bool {
        self.status().is_none()
    }

    /// How it ended, if it has.
    pub fn status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// All it logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_else(|e| e.to_string())
    }

    pub fn log_path(&self) -> PathBuf {
        self.folder.path().join("agent.log")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        end(&mut self.child);
        if std::thread::panicking() {
            eprintln!("--- agent\n{}", self.log());
        }
    }
}

fn configuration(broker: &Broker, setup: &Setup, folder: &Path) -> String {
    let bundle = setup.bundle.clone().unwrap_or_else(bundle);
    let own = || folder.join("state");
    // This machine may be hard pressed by the tests themselves.
    let governor = setup.agent.contains("governor");
    // What the shim gives the agent to read in the place of the kernel's files is the suite's.
    let is_sensing = setup.env.iter().any(|(name, _)| name == "FAULTS_SENSORS");
    let landlock = if is_sensing { "landlock = false" } else { "" };
    let pool = setup
        .pool
        .as_ref()
        .map(|name| format!("[pool]\nname = '{name}'\n"));
    let state_dir = setup.state_dir.clone().unwrap_or_else(own);
    format!(
        "[gateway]\nsite = 'plant'\nname = '{}'\n{}\
         [model]\nbundle = '{}'\nstate_dir = '{}'\n{}\n\
         [tasks]\n{}\n\
         [agent]\nhealth_interval_s = 1\n{}\n{}\n{landlock}\n\
         [broker]\nhost = '127.0.0.1'\nport = {}\nkeep_alive_s = 5\n{}\n",
        setup.name.as_deref().unwrap_or("gw-1"),
        pool.unwrap_or_default(),
        bundle.display(),
        state_dir.display(),
        setup.model,
        setup.tasks,
        setup.agent,
        if governor { "" } else { "governor = false" },
        setup.port.unwrap_or(broker.port),
        setup.broker,
    )
}

fn spawn(folder: &Path, env: &[(String, String)]) -> Child {
    let log = File::options()
        .create(true)
        .append(true)
        .open(folder.join("agent.log"));
    let log = log.expect("the log");
    Command::new(agent_program())
        .args(["agent", "--config"])
        .arg(folder.join("agent.toml"))
        .envs(env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("the log"))
        .stderr(log)
        .spawn()
        .expect("the agent starts")
}

/// The agent's program: the one that was built beside the tests, unless `MILLWRIGHT_TEST_AGENT` names another, as
/// `cross/test` does for ARM.
pub fn agent_program() -> PathBuf {
    std::env::var_os("MILLWRIGHT_TEST_AGENT").map_or_else(|| program("millwright"), PathBuf::from)
}

/// A program of this workspace: cargo puts them beside the folder of the test programs.
pub fn program(name: &str) -> PathBuf {
    let this = std::env::current_exe().expect("this program's path");
    let folder = this.parent().expect("its folder");
    let folder = if folder.ends_with("deps") {
        folder.parent().expect("target/debug")
    } else {
        folder
    };
    let path = folder.join(name);
    assert!(
        path.exists(),
        "{} is not built: run `cargo build --workspace` first, as tests/run does",
        path.display()
    );
    path
}

/// The folder of the tiny seeded model, made at the first call.
pub fn bundle() -> PathBuf {
    // Its own cache, so that a test run changes nothing of the user's; one for all runs, beside the programs.
    let cache = program("millwright-forge").with_file_name("test-models");
    forge(&["pull", "tiny"], Some(&cache))
}

/// The folder of SmolLM2-135M, pulled before the tests.
pub fn real_bundle() -> PathBuf {
    forge(&["path", "smollm2-135m"], None)
}

fn forge(arguments: &[&str], cache: Option<&Path>) -> PathBuf {
    let mut command = Command::new(program("millwright-forge"));
    command.args(arguments);
    if let Some(cache) = cache {
        command.env("MILLWRIGHT_CACHE", cache);
    }
    let output = command.output().expect("the forge starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "millwright-forge {arguments:?}: {said}"
    );
    PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
}
