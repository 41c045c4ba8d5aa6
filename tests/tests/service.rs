//! The agent as a service: what it tells systemd, when it is silent, where it logs, how it is confined, and its unit.

use millwright_tests::{Agent, BASE, Broker, Client, Message, Setup, await_some, program};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// systemd's end of the socket.
struct Manager {
    folder: TempDir,
    socket: UnixDatagram,
}

impl Manager {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        Self { folder, socket }
    }

    /// The agent's environment; `watchdog` is in milliseconds.
    fn env(&self, watchdog: u64) -> Vec<(String, String)> {
        let socket = self.folder.path().join("notify").display().to_string();
        let watchdog = (watchdog * 1000).to_string();
        vec![
            ("NOTIFY_SOCKET".into(), socket),
            ("WATCHDOG_USEC".into(), watchdog),
        ]
    }

    /// What is said next, if anything is within `patience`.
    fn hear(&self, patience: Duration) -> Option<String> {
        let mut bytes = [0; 4096];
        self.socket.set_read_timeout(Some(patience)).unwrap();
        match self.socket.recv(&mut bytes) {
            Ok(n) => Some(String::from_utf8(bytes[..n].to_vec()).unwrap()),
            Err(e) if e.kind() == ErrorKind::WouldBlock => None,
            Err(e) => panic!("{e}"),
        }
    }

    /// Waits for something said, and returns it with all that was said before.
    fn await_words(&self, words: &str) -> Vec<String> {
        let mut heard = Vec::new();
        let end = Instant::now() + Duration::from_mins(1);
        while Instant::now() < end {
            heard.extend(self.hear(Duration::from_secs(1)));
            if heard.last().is_some_and(|said| said.contains(words)) {
                return heard;
            }
        }
        panic!("{words:?} was not said, but {heard:#?}");
    }
}

#[test]
fn systemd_hears_that_the_agent_serves_how_it_is_and_that_it_stops() {
    let manager = Manager::new();
    let mut broker = Broker::open();
    let setup = Setup {
        env: manager.env(1000),
        agent: "drain_grace_s = 70".into(),
        ..Setup::default()
    };
    let mut agent = Agent::with(&broker, &setup);
    let before = manager.await_words("READY=1\n");
    assert!(!before.iter().any(|said| said.contains("WATCHDOG")));
    manager.await_words("WATCHDOG=1\n");
    manager.await_words("STATUS=serving, model tiny");
    broker.stop();
    manager.await_words("; not connected to the broker\n");
    // The broker's absence is no hang.
    manager.await_words("WATCHDOG=1\n");
    agent.terminate();
    let stopping = manager.await_words("STOPPING=1\n");
    assert!(
        stopping
            .last()
            .unwrap()
            .contains("EXTEND_TIMEOUT_USEC=100000000\n")
    );
    assert!(agent.ended().success());
}

#[test]
fn a_file_that_can_not_be_read_to_its_end_holds_nothing_up() {
    let manager = Manager::new();
    let broker = Broker::open();
    let password = manager.folder.path().join("password");
    fs::write(&password, "secret").unwrap();
    let setup = Setup {
        env: manager.env(1000),
        broker: format!("user = 'gw'\npassword_file = '{}'", password.display()),
        ..Setup::default()
    };
    let mut agent = Agent::with(&broker, &setup);
    let mut mes = Client::connect(&broker, "mes");
    mes.subscribe(&format!("{BASE}/alarm/#"));
    mes.await_state("online");
    let certificate = |m: &Message| m.topic.ends_with("/alarm/certificate");
    mes.next("none yet", certificate);
    let pipe = manager.folder.path().join("pipe");
    let hang = |mes: &mut Client| {
        let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        let seen_by = manager.folder.path().join("seen-by");
        fs::hard_link(&pipe, seen_by).unwrap();
        fs::rename(&pipe, &password).unwrap();
        mes.next("the alarm", |m| {
            certificate(m)
                && m.json()["raised"] == true
                && String::from_utf8_lossy(&m.payload).contains("the disk has not answered")
        });
    };
    hang(&mut mes);
    while manager.hear(Duration::from_millis(10)).is_some() {}
    manager.await_words("WATCHDOG=1\n");
    mes.generate("meanwhile", 8);
    assert_eq!(mes.outcome("meanwhile")["event"], "done");

    // Who waits for the pipe is let go on, and the next look finds a file.
    let new = manager.folder.path().join("new");
    fs::write(&new, "secret").unwrap();
    fs::rename(&new, &password).unwrap();
    let seen_by = manager.folder.path().join("seen-by");
    fs::write(&seen_by, "secret").unwrap();
    fs::remove_file(&seen_by).unwrap();
    mes.next("its end", |m| certificate(m) && m.json()["raised"] == false);

    hang(&mut mes);
    agent.terminate();
    assert!(agent.ended().success());
}

#[test]
fn each_thread_is_confined() {
    let broker = Broker::open();
    let agent = Agent::start(&broker);
    await_some("it serves", || {
        agent.log().contains("connected").then_some(())
    });
    if !agent.log().contains("Landlock confines: ") {
        eprintln!("this kernel has no Landlock, and the log says so");
        assert!(agent.log().contains("confines nothing"));
        return;
    }
    let mut threads = 0;
    for thread in fs::read_dir(format!("/proc/{}/task", agent.id())).unwrap() {
        // Landlock asks for it first, and it is the thread's own too.
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
        threads += 1;
    }
    assert!(threads > 3, "{threads}");
}

#[test]
fn it_is_not_confined_where_the_configuration_says_so() {
    let broker = Broker::open();
    let setup = Setup {
        agent: "landlock = false".into(),
        ..Setup::default()
    };
    let agent = Agent::with(&broker, &setup);
    await_some("it serves", || {
        agent.log().contains("connected").then_some(())
    });
    assert!(!agent.log().contains("Landlock"));
}

/// Without a journal to send to, as in a container that passes the variable on.
#[test]
fn a_log_that_systemd_reads_has_no_times_and_no_colours() {
    if Path::new("/run/systemd/journal/socket").exists() {
        eprintln!("skipped: this machine has a journal, which would get it");
        return;
    }
    let broker = Broker::open();
    let mut agent = Agent::start(&broker);
    await_some("it serves", || {
        agent.log().contains("connected").then_some(())
    });
    let with_times = agent.log();
    assert!(
        with_times.lines().all(|line| line.starts_with("20")),
        "{with_times}"
    );
    let log = fs::metadata(agent.log_path()).unwrap();
    let stream = |inode: u64| vec![("JOURNAL_STREAM".into(), format!("{}:{inode}", log.dev()))];
    agent.set_env(stream(log.ino()));
    agent.restart();
    let new = |agent: &Agent| agent.log().split_off(with_times.len());
    let plain = await_some("it serves again", || {
        let new = new(&agent);
        new.contains("connected to the broker").then_some(new)
    });
    let plain = plain.split_once(" INFO ").unwrap().1;
    assert!(
        !plain.contains('\u{1b}') && !plain.contains("Z  INFO"),
        "{plain}"
    );
    // Of another file's the variable says nothing.
    let length = agent.log().len();
    agent.set_env(stream(log.ino() + 1));
    agent.restart();
    await_some("it serves with times", || {
        agent
            .log()
            .split_off(length)
            .contains("Z  INFO")
            .then_some(())
    });
}

fn unit() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd/millwright.service")
}

/// `systemd-analyze`'s words, or `None` where it isn't there.
fn analyze(arguments: &[&str], unit: &Path) -> Option<(bool, String)> {
    let output = Command::new("systemd-analyze")
        // It draws and colours by these.
        .env("LC_ALL", "C.UTF-8")
        .env("TERM", "xterm")
        .env("SYSTEMD_EMOJI", "1")
        .args(arguments)
        .args(Some(unit).filter(|unit| unit.is_file()))
        .output();
    let Ok(output) = output else {
        eprintln!("skipped: there is no systemd-analyze on this machine");
        return None;
    };
    let words = [output.stdout, output.stderr].concat();
    Some((
        output.status.success(),
        String::from_utf8_lossy(&words).into_owned(),
    ))
}

#[test]
fn the_unit_is_one_that_systemd_understands() {
    let folder = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(unit()).unwrap();
    let here = text.replace(
        "/usr/bin/millwright",
        &program("millwright").display().to_string(),
    );
    assert_ne!(text, here);
    let copy = folder.path().join("millwright.service");
    fs::write(&copy, here).unwrap();
    let Some((is_good, words)) = analyze(&["verify", "--man=no"], &copy) else {
        return;
    };
    // What it warns of, and ignores, is no error to it.
    assert!(is_good && !words.contains("millwright.service:"), "{words}");
}

#[test]
fn the_unit_is_confined_and_its_documented_exposure_is_what_systemd_says() {
    let Some((is_good, words)) = analyze(&["security", "--offline=yes", "--threshold=15"], &unit())
    else {
        return;
    };
    assert!(is_good, "{words}");
    let version = analyze(&["--version"], Path::new("")).map(|(_, words)| words);
    if !version.is_some_and(|version| version.starts_with("systemd 252 ")) {
        eprintln!("the documentation has the words of systemd 252, which this is not");
        return;
    }
    let readme = fs::read_to_string(unit().with_file_name("README.md")).unwrap();
    for line in words.lines() {
        assert!(
            readme.contains(line.trim_end()),
            "not in deploy/systemd/README.md: {line}"
        );
    }
}
