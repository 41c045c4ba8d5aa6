//! A broker of one's own and a model without weights: it "answers" with the words of the prompt, one per
//! step, over and over until max_tokens.

use millwright::app::{self, Mind};
use millwright::card::Model;
use millwright::config::Config;
use millwright::loader::Outcome;
use millwright::worker::{Brain, Load, Prepare, Work};
use millwright_engine::{Completion, Event, Finish, Prompt, Reads, Request, RequestError};
use millwright_task::pressure::Level;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{Receiver, channel};
use tokio::sync::oneshot;

pub(crate) const BASE: &str = "millwright/v1/test/gw";

/// mosquitto on a free loopback port, gone when dropped.
pub(crate) struct Broker {
    child: Child,
    pub(crate) port: u16,
    dir: tempfile::TempDir,
}

impl Broker {
    pub(crate) fn start() -> Self {
        let port = free_port();
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("mosquitto.conf");
        std::fs::write(
            &config,
            format!("listener {port} 127.0.0.1\nallow_anonymous true\n"),
        )
        .unwrap();
        Self {
            child: spawn(&dir, port),
            port,
            dir,
        }
    }

    /// Ends it without a goodbye and starts it anew on the same port.
    pub(crate) fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn(&self.dir, self.port);
    }
}

/// A port that no other test of this process was given: the system hands a free one out twice.
fn free_port() -> u16 {
    static GIVEN: Mutex<Vec<u16>> = Mutex::new(Vec::new());
    let mut given = GIVEN.lock().unwrap();
    loop {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        if !given.contains(&port) {
            given.push(port);
            return port;
        }
    }
}

fn spawn(dir: &tempfile::TempDir, port: u16) -> Child {
    let path = [
        "/usr/sbin/mosquitto",
        "/usr/bin/mosquitto",
        "/usr/local/sbin/mosquitto",
    ];
    let program = path
        .into_iter()
        .find(|p| std::path::Path::new(p).exists())
        .expect("mosquitto is installed");
    let child = Command::new(program)
        .arg("-c")
        .arg(dir.path().join("mosquitto.conf"))
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the broker", || {
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    child
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !ready() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Lines of `mosquitto_sub -v` below the base.
pub(crate) struct Listener {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Listener {
    pub(crate) fn start(port: u16) -> Self {
        Self::to(
            port,
            &[&format!("{BASE}/result/#"), &format!("{BASE}/state")],
        )
    }

    /// Of other topics.
    pub(crate) fn to(port: u16, filters: &[&str]) -> Self {
        let mut child = Command::new("mosquitto_sub")
            .args(["-p", &port.to_string(), "-q", "1", "-v"])
            .args(filters.iter().flat_map(|filter| ["-t", filter]))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (tx, lines) = mpsc::channel();
        std::thread::spawn(move || {
            out.lines()
                .map_while(Result::ok)
                .try_for_each(|l| tx.send(l))
        });
        Self { child, lines }
    }

    /// The next event called `name` (or state), skipping others.
    pub(crate) fn expect(&self, name: &str) -> Value {
        self.expect_that(name, |json| json["event"] == name || json["state"] == name)
    }

    /// The next message that `wanted` picks, skipping others.
    pub(crate) fn expect_that(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            let json = self.event();
            if wanted(&json) {
                return json;
            }
        }
        panic!("no {what} came")
    }

    /// The next event or state.
    pub(crate) fn event(&self) -> Value {
        let line = self.lines.recv_timeout(Duration::from_secs(20));
        let line = line.expect("something is said");
        serde_json::from_str(line.split_once(' ').unwrap().1).unwrap()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn publish(port: u16, kind: &str, payload: &str, more: &[&str]) {
    publish_at(BASE, port, kind, payload, more);
}

/// For another gateway, or a pool.
pub(crate) fn publish_at(base: &str, port: u16, kind: &str, payload: &str, more: &[&str]) {
    let topic = format!("{base}/{kind}/mes");
    let port = port.to_string();
    let args = [
        "-p", &port, "-q", "1", "-V", "mqttv5", "-t", &topic, "-m", payload,
    ];
    assert!(
        Command::new("mosquitto_pub")
            .args(args)
            .args(more)
            .status()
            .unwrap()
            .success()
    );
}

/// An agent with the stand-in model; stopped by its drain.
pub(crate) struct Agent {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<anyhow::Result<()>>>,
    _state: Option<tempfile::TempDir>,
}

impl Agent {
    pub(crate) fn start(port: u16, step: Duration) -> Self {
        let state = tempfile::tempdir().unwrap();
        let agent = Self::start_in(state.path(), port, step);
        Self {
            _state: Some(state),
            ..agent
        }
    }

    /// With a state directory that may be another agent's of before.
    pub(crate) fn start_in(state: &Path, port: u16, step: Duration) -> Self {
        Self::start_as("gw", "drain_grace_s=1", state, port, step)
    }

    /// Under another name, and with more lines at the end of its configuration.
    pub(crate) fn start_as(
        name: &str,
        more: &str,
        state: &Path,
        port: u16,
        step: Duration,
    ) -> Self {
        let (minds, models) = channel(1);
        assert!(minds.try_send(Ok(mind(step))).is_ok());
        Self::start_with(models, name, more, state, port)
    }

    /// With a model that comes, or doesn't, when it is sent.
    pub(crate) fn start_with(
        models: Receiver<Outcome<Mind<Parrot, Words>>>,
        name: &str,
        more: &str,
        state: &Path,
        port: u16,
    ) -> Self {
        let text = format!(
            "[gateway]\nsite='test'\nname='{name}'\n[broker]\nhost='127.0.0.1'\nport={port}\nkeep_alive_s=5\n\
             [model]\nbundle='none'\nstate_dir='{}'\n[tasks]\nqueue_max=2\n[agent]\nhealth_interval_s=1\ngovernor=false\n{more}\n",
            state.display()
        );
        let config = Config::parse(&text).unwrap();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(app::run(config, models, async {
                let _ = stopped.await;
            }))
        });
        Self {
            stop: Some(stop),
            thread: Some(thread),
            _state: None,
        }
    }

    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        self.stop.take().unwrap().send(()).unwrap();
        self.thread.take().unwrap().join().unwrap()
    }
}

pub(crate) fn mind(step: Duration) -> Mind<Parrot, Words> {
    let model = Model {
        name: "parrot".into(),
        version: "1".into(),
        precision: "none".into(),
        digest: "0".into(),
        exact: true,
        context_length: 1000,
        chat: false,
        kernel: "none".into(),
        decode_threads: 1,
        prefill_threads: 1,
        read_bytes_per_s: None,
        plan: "none".into(),
        notes: vec![],
    };
    Mind {
        model,
        brain: Parrot {
            step,
            running: vec![],
            next: 0,
        },
        preparer: Words,
        slots: 1,
    }
}

pub(crate) struct Words;
/// Words to say again and again, how many, and what was said of them before.
pub(crate) struct Lines(Vec<String>, usize, String, usize);

impl Work for Lines {
    fn prompt_tokens(&self) -> usize {
        self.0.len()
    }
    fn tokens_max(&self) -> usize {
        self.0.len() + self.1
    }
    fn kv_tokens(&self) -> usize {
        self.tokens_max()
    }
}

impl Prepare for Words {
    type Work = Lines;
    fn prepare(&self, request: Request) -> Result<Lines, RequestError> {
        match request.prompt {
            Prompt::Text(text) => Ok(Lines(
                text.split_inclusive(' ').map(str::to_owned).collect(),
                request.max_tokens,
                String::new(),
                0,
            )),
            Prompt::Chat(_) | Prompt::Tokens(_) => Err(RequestError::NoTemplate),
        }
    }
}

pub(crate) struct Parrot {
    step: Duration,
    running: Vec<(u32, Lines)>,
    next: u32,
}

fn completion(work: &Lines, finish: Finish) -> Completion {
    let Lines(words, _, text, tokens) = work;
    Completion {
        text: text.clone(),
        tokens: vec![0; *tokens],
        finish,
        prompt_tokens: words.len(),
        prefill: Duration::from_millis(1),
        decode: Duration::from_millis(*tokens as u64),
    }
}

impl Parrot {
    fn take(&mut self, slot: u32) -> Lines {
        let mut running = self.running.iter();
        let at = running.position(|r| r.0 == slot).expect("a running slot");
        self.running.remove(at).1
    }
}

impl Brain for Parrot {
    type Work = Lines;
    type Slot = u32;
    fn start(&mut self, work: Lines) -> Result<u32, Lines> {
        self.next += 1;
        self.running.push((self.next, work));
        Ok(self.next)
    }
    fn step(&mut self) -> Result<Vec<(u32, Event)>, String> {
        std::thread::sleep(self.step);
        let mut events = vec![];
        self.running.retain_mut(|(slot, work)| {
            let Lines(words, most, text, tokens) = work;
            if *tokens == 0 {
                events.push((*slot, Event::Started));
            }
            let word = words[*tokens % words.len()].clone();
            text.push_str(&word);
            *tokens += 1;
            events.push((*slot, Event::Text(word)));
            if *tokens < *most {
                return true;
            }
            events.push((*slot, Event::Done(completion(work, Finish::Length))));
            false
        });
        Ok(events)
    }
    fn cancel(&mut self, slot: u32) -> Completion {
        completion(&self.take(slot), Finish::Cancelled)
    }
    fn suspend(&mut self, slot: u32) -> (Lines, Completion) {
        let work = self.take(slot);
        let partial = completion(&work, Finish::Cancelled);
        (work, partial)
    }
    fn ease(&mut self, _: Level) {}
    fn is_idle(&self) -> bool {
        self.running.is_empty()
    }
    fn load(&self) -> Load {
        Load {
            kv_tokens_used: 0,
            kv_tokens_max: 100_000,
            reads: Reads::default(),
        }
    }
}
