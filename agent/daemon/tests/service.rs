//! That the watchdog starves when the model hangs, with a process of its own, for what it tells systemd goes by its environment.

#[allow(dead_code)] // each program of tests uses its part
mod common;

use common::{Agent, Broker, Listener, publish};
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PORT: &str = "MILLWRIGHT_TEST_PORT";
/// Its half is what each loop has, and twice it a step.
const WATCHDOG: Duration = Duration::from_millis(400);

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_step_that_does_not_end_starves_the_watchdog() {
    let broker = Broker::start();
    let listener = Listener::start(broker.port);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let hear = || {
        let mut bytes = [0; 4096];
        let n = socket.recv(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes[..n]).into_owned())
    };
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "an_agent_whose_steps_do_not_end", "--ignored"])
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string())
        .env(PORT, broker.port.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let _child = Process(child);
    listener.expect("online");
    // An idle model is no hang, for longer than a step may take.
    let idle_until = Instant::now() + 4 * WATCHDOG;
    while Instant::now() < idle_until {
        hear().expect("the watchdog is fed while there is nothing to do");
    }
    let task = r#"{"id": "a", "kind": "generate", "prompt": "check ", "max_tokens": 2}"#;
    publish(broker.port, "task", task, &[]);
    listener.expect("accepted");
    let end = Instant::now() + Duration::from_secs(30);
    while let Some(said) = hear() {
        assert!(
            Instant::now() < end,
            "the watchdog is fed all the same: {said}"
        );
    }
}

#[test]
#[ignore = "the other test runs it, in a process of its own"]
fn an_agent_whose_steps_do_not_end() {
    let port = std::env::var(PORT).unwrap().parse().unwrap();
    let _agent = Agent::start(port, Duration::from_hours(1));
    std::thread::sleep(Duration::from_hours(1));
}
