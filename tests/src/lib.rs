//! What the whole-system tests stand on: a mosquitto, an agent process and an MQTT client per test, each gone
//! when dropped, also when the test panics. Only the outside of the agent is used: its command line, its
//! configuration, topics and JSON.

#![forbid(unsafe_code)]

mod agent;
pub mod authority;
mod broker;
mod client;
pub mod cost;
pub mod faults;
pub mod gateway;
pub mod hostile;
pub mod plant;
mod process;

pub use agent::{Agent, Setup, agent_program, bundle, program, real_bundle};
pub use broker::{Broker, Keeps, Security};
pub use client::{Client, Message, Outgoing};

use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// Everything that should happen soon happens within this, on a busy machine too.
pub const SOON: Duration = Duration::from_secs(30);
/// `{base}` of the agent under test.
pub const BASE: &str = "millwright/v1/plant/gw-1";

/// Asks again until there is an answer, or panics naming what did not come.
pub fn await_some<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: not within {SOON:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a signal (`TERM`, `KILL`, `STOP`) to a process.
fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(child.id().to_string())
        .status();
    assert!(
        sent.is_ok_and(|status| status.success()),
        "kill -{name} failed"
    );
}

/// Waits for a process to end by itself.
fn await_end(what: &str, child: &mut Child) -> ExitStatus {
    await_some(what, || {
        child.try_wait().expect("a child can be waited for")
    })
}

/// Ends a process for good.
fn end(child: &mut Child) {
    // It may have ended by itself.
    let _ = child.kill();
    let _ = child.wait();
}

/// Runs a command that must succeed.
fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}; run tests/run, which installs it"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}
