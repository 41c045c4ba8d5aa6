//! A pool of gateways on a real broker, with the tiny model: work spreads, and whatever becomes of a member, each requester
//! that keeps its side of the promise has one outcome.

use millwright_tests::faults::{ENOSPC, Field, Shim};
use millwright_tests::{Agent, Broker, Client, Keeps, Setup, program};
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

const POOL: &str = "millwright/v1/plant/pool/line3";
/// Tasks on a gateway's own topic that keep it busy for the better part of a second, and are gone before a pool's.
const BACKLOG: usize = 250;
/// Requesters at the same time, and the tasks of each.
const REQUESTERS: usize = 6;
const TASKS: usize = 3;

fn base(name: &str) -> String {
    format!("millwright/v1/plant/{name}")
}

fn member(broker: &Broker, name: &str, setup: Setup) -> Agent {
    let setup = Setup {
        name: Some(name.into()),
        pool: Some("line3".into()),
        model: "slots = 1\nthreads = 1".into(),
        tasks: "queue_max = 256\nsender_queue_max = 256".into(),
        ..setup
    };
    Agent::with(broker, &setup)
}

/// Waits until a gateway says whether it takes the pool's tasks. Health is not retained: what comes is news.
fn await_taking(broker: &Broker, name: &str, taking: bool) {
    let mut console = Client::at(broker, "console", &base(name));
    console.subscribe(&format!("{}/health", base(name)));
    console.next(&format!("{name} with taking {taking}"), |m| {
        m.topic.ends_with("/health") && m.json()["pools"][0]["taking"] == taking
    });
}

fn small(id: &str) -> Value {
    json!({ "id": id, "kind": "generate", "prompt": "The pump", "max_tokens": 8, "priority": 0 })
}

fn gateway(event: &Value) -> String {
    event["gateway"].as_str().expect("a gateway").into()
}

/// A broker, members that take the pool's tasks, and one who sees all that is said of them.
struct Plant {
    broker: Broker,
    agents: Vec<(String, Agent)>,
    witness: Client,
    /// All events so far.
    seen: Vec<Value>,
}

impl Plant {
    fn start(count: usize) -> Self {
        let broker = Broker::open();
        let start = |n| {
            let name = format!("gw-{n}");
            let agent = member(&broker, &name, Setup::default());
            (name, agent)
        };
        let agents: Vec<_> = (1..=count).map(start).collect();
        for (name, _) in &agents {
            await_taking(&broker, name, true);
        }
        Self {
            witness: witness(&broker),
            broker,
            agents,
            seen: Vec::new(),
        }
    }

    fn agent(&mut self, name: &str) -> &mut Agent {
        let found = self.agents.iter_mut().find(|(known, _)| known == name);
        &mut found.expect("such a member").1
    }

    /// The next event of a task that is the pool's.
    fn next(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            let event = self.witness.next(what, |_| true).json();
            self.seen.push(event.clone());
            if wanted(&event) {
                return event;
            }
        }
    }

    /// All events, once nothing has come for a while.
    fn events(&mut self) -> &[Value] {
        while let Some(message) = self.witness.next_within(Duration::from_secs(1), |_| true) {
            self.seen.push(message.json());
        }
        &self.seen
    }

    /// Keeps a gateway busy with what is more urgent than the pool's tasks.
    fn burden(&self, name: &str, round: usize) {
        let backlog = Client::at(&self.broker, "backlog", &base(name));
        for n in 0..BACKLOG {
            backlog.task(&json!({
                "id": format!("{name}-{round}-{n}"), "kind": "generate", "prompt": "x", "max_tokens": 240,
                "priority": 9,
            }));
        }
        // Its thread writes what was handed over.
        let last = format!("{name}-{round}-{}", BACKLOG - 1);
        let mut backlog = backlog;
        backlog.event(&last, "accepted");
    }

    /// Requesters that are connected and begin together.
    fn requesters(&self, round: usize) -> (Arc<Barrier>, Vec<JoinHandle<Vec<Value>>>) {
        let barrier = Arc::new(Barrier::new(REQUESTERS + 1));
        let requester = |n: usize| {
            let mut client = Client::at(&self.broker, &format!("mes-{n}"), POOL);
            let go = Arc::clone(&barrier);
            std::thread::spawn(move || {
                go.wait();
                let task = |k: usize| small(&format!("t-{round}-{n}-{k}"));
                (0..TASKS).map(|k| client.insist(&task(k))).collect()
            })
        };
        let threads = (0..REQUESTERS).map(requester).collect();
        (barrier, threads)
    }
}

fn witness(broker: &Broker) -> Client {
    let witness = Client::at(broker, "witness", POOL);
    witness.subscribe(&format!("{POOL}/result/#"));
    witness
}

fn is_outcome(event: &Value) -> bool {
    let outcomes = ["done", "failed", "cancelled", "expired"];
    outcomes.iter().any(|name| event["event"] == *name)
}

/// Each gateway has at most one outcome for a task, whoever else has one.
#[track_caller]
fn judge(events: &[Value]) {
    let mut outcomes: HashMap<[String; 3], HashSet<String>> = HashMap::new();
    for event in events.iter().filter(|event| is_outcome(event)) {
        let key = ["gateway", "sender", "task"].map(|field| event[field].to_string());
        outcomes.entry(key).or_default().insert(event.to_string());
    }
    for (key, said) in outcomes {
        assert_eq!(said.len(), 1, "{key:?}: {said:#?}");
    }
}

#[test]
fn work_spreads_over_all_members_and_each_task_is_run_once() {
    let mut plant = Plant::start(3);
    let mut mes = Client::at(&plant.broker, "mes", POOL);
    let mut gateways = BTreeSet::new();
    for n in 0..12 {
        let done = mes.insist(&small(&format!("t-{n}")));
        assert_eq!(done["event"], "done", "{done}");
        gateways.insert(gateway(&done));
    }
    assert_eq!(gateways.len(), 3, "{gateways:?}");
    // A member that was slow to accept ran it too: by the rule of who resends.
    let outcomes = plant.events().iter().filter(|e| is_outcome(e)).count();
    assert!((12..=14).contains(&outcomes), "{outcomes}");
    let accepted = plant.seen.iter().filter(|e| e["event"] == "accepted");
    for event in accepted {
        assert_eq!(event["base"], base(&gateway(event)).as_str(), "{event}");
    }
    let mut console = Client::at(&plant.broker, "console", &base("gw-2"));
    let card = console.next("the card", |m| m.topic.ends_with("/card"));
    let pool = json!([{ "name": "line3", "base": POOL }]);
    assert_eq!(card.json()["pools"], pool);
}

/// Requesters at work, something happens to a member that has tasks of theirs, and is undone.
fn survives(happens: impl Fn(&mut Agent), undone: impl Fn(&mut Agent)) {
    let mut plant = Plant::start(3);
    for round in 0..5 {
        let (go, threads) = plant.requesters(round);
        plant.burden("gw-2", round);
        go.wait();
        plant.next("gw-2 accepts", |e| {
            e["event"] == "accepted" && e["gateway"] == "gw-2"
        });
        happens(plant.agent("gw-2"));
        let outcomes: Vec<Value> = threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("each task has an outcome"))
            .collect();
        assert_eq!(outcomes.len(), REQUESTERS * TASKS);
        for outcome in &outcomes {
            assert_eq!(outcome["event"], "done", "{outcome}");
        }
        undone(plant.agent("gw-2"));
        await_taking(&plant.broker, "gw-2", true);
        judge(plant.events());
        // It was in the middle of a task of which another made the first answer.
        let has_left = |outcome: &Value| {
            let was_its = |e: &Value| {
                e["event"] == "accepted" && e["gateway"] == "gw-2" && e["task"] == outcome["task"]
            };
            outcome["gateway"] != "gw-2" && plant.seen.iter().any(was_its)
        };
        if outcomes.iter().any(has_left) {
            return;
        }
    }
    panic!("it never happened in the middle of a task");
}

#[test]
fn a_task_of_a_member_that_is_killed_is_answered_by_another() {
    survives(Agent::kill, Agent::restart);
}

#[test]
fn a_task_of_a_member_that_is_frozen_is_answered_by_another() {
    survives(|agent| agent.freeze(true), |agent| agent.freeze(false));
}

#[test]
fn a_task_of_a_member_that_is_shut_down_is_answered_by_another() {
    let drain = |agent: &mut Agent| {
        agent.terminate();
        assert!(agent.ended().success(), "{}", agent.log());
    };
    survives(drain, Agent::restart);
}

#[test]
fn a_cancel_that_overtakes_its_task_is_remembered_by_all_and_answered_by_none() {
    let mut plant = Plant::start(3);
    let mut mes = Client::at(&plant.broker, "mes", POOL);
    let ids: Vec<_> = (0..6).map(|n| format!("later-{n}")).collect();
    for id in &ids {
        mes.cancel(id);
    }
    // The pool's tasks come over another connection than its cancels: once a member has answered what came behind these,
    // it has read them. The broker's word on a subscription says that it has passed them on.
    mes.subscribe("passed/on");
    for (name, _) in &plant.agents {
        let done = Client::at(&plant.broker, "mes", &base(name)).insist(&small("behind"));
        assert_eq!(done["event"], "done", "{done}");
    }
    let mut gateways = BTreeSet::new();
    for id in &ids {
        let outcome = mes.insist(&small(id));
        assert_eq!(outcome["event"], "cancelled", "{outcome}");
        gateways.insert(gateway(&outcome));
    }
    assert_eq!(gateways.len(), 3, "{gateways:?}");
    // Who has none of it says nothing; who remembers its end says so.
    mes.cancel(&ids[0]);
    plant.next("a reply", |e| e["event"] == "already_final");
    let unknown = |e: &&Value| e["event"] == "unknown";
    assert_eq!(plant.events().iter().find(unknown), None);
}

#[test]
fn a_member_that_can_not_write_its_journal_leaves_the_pool_until_it_can() {
    let state = tempfile::tempdir().unwrap();
    let shim = Shim::new(state.path()).expect("the shim compiles");
    let mut plant = Plant::start(1);
    let setup = Setup {
        state_dir: Some(state.path().to_owned()),
        env: shim.env(false),
        ..Setup::default()
    };
    let _ill = member(&plant.broker, "gw-9", setup);
    await_taking(&plant.broker, "gw-9", true);
    shim.set(Field::WriteErrno, ENOSPC);
    shim.set(Field::WriteFails, 100);
    let mut mes = Client::at(&plant.broker, "mes", POOL);
    // It learns of it with the first task that comes: this one is not answered there.
    for n in 0..2 {
        let done = mes.insist(&small(&format!("first-{n}")));
        assert_eq!(gateway(&done), "gw-1");
    }
    await_taking(&plant.broker, "gw-9", false);
    plant.events();
    plant.seen.clear();
    for n in 0..8 {
        let done = mes.insist(&small(&format!("then-{n}")));
        assert_eq!(done["event"], "done", "{done}");
    }
    for event in plant.events() {
        assert_eq!(gateway(event), "gw-1", "{event}");
    }
    shim.set(Field::WriteFails, 0);
    await_taking(&plant.broker, "gw-9", true);
    let back = (0..4).map(|n| mes.insist(&small(&format!("back-{n}"))));
    let gateways: BTreeSet<_> = back.map(|done| gateway(&done)).collect();
    assert_eq!(gateways.len(), 2, "{gateways:?}");
    judge(plant.events());
}

#[test]
fn a_pool_that_the_broker_refuses_raises_the_alarm_that_says_so() {
    // mosquitto's file of access rules lets everybody subscribe to anything; this plugin does not.
    let libraries = fs::read_dir("/usr/lib").unwrap().filter_map(Result::ok);
    let plugin = libraries
        .map(|entry| entry.path().join("mosquitto_dynamic_security.so"))
        .find(|path| path.exists())
        .expect("Debian's mosquitto has the plugin");
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules.json");
    let all = [
        "publishClientSend",
        "publishClientReceive",
        "subscribe",
        "unsubscribe",
    ];
    let all: serde_json::Map<_, _> = all
        .iter()
        .map(|what| ((*what).to_owned(), true.into()))
        .collect();
    let refused = json!({
        "acltype": "subscribePattern", "topic": format!("{POOL}/cancel/#"), "priority": 0, "allow": false,
    });
    let text = json!({
        "defaultACLAccess": all, "clients": [], "anonymousGroup": "anybody",
        "groups": [{ "groupname": "anybody", "roles": [{ "rolename": "anybody" }] }],
        "roles": [{ "rolename": "anybody", "acls": [refused] }],
    });
    fs::write(&rules, text.to_string()).unwrap();
    let lines = format!(
        "plugin {}\nplugin_opt_config_file {}\n",
        plugin.display(),
        rules.display()
    );
    let broker = Broker::quiet(Keeps::Nothing, &lines);
    let _agent = member(&broker, "gw-1", Setup::default());
    let mut console = Client::at(&broker, "console", &base("gw-1"));
    console.subscribe(&format!("{}/alarm/#", base("gw-1")));
    let alarm = console.next("the alarm", |m| {
        m.topic.ends_with("/alarm/subscription") && m.json()["raised"] == true
    });
    let reason = alarm.json()["reason"].to_string();
    assert!(
        reason.contains("the pool line3") && reason.contains(POOL),
        "{reason}"
    );
    assert!(!reason.contains("gw-1"), "{reason}");
    // By its own topic it is there; of the pool it takes nothing, though this mosquitto lets it join.
    await_taking(&broker, "gw-1", false);
    let mut mes = Client::at(&broker, "mes", POOL);
    mes.task(&small("pools"));
    let answer = mes.next_within(Duration::from_secs(1), |m| m.topic.ends_with("/pools"));
    assert!(answer.is_none(), "{answer:?}");
    console.generate("own", 4);
    assert_eq!(console.outcome("own")["event"], "done");
    console.await_state("online");
}

/// Runs `millwright ask` to the pool; gives it the tiny model's kind of task.
fn ask(broker: &Broker, id: &str, more: &[&str]) -> Command {
    let mut command = Command::new(program("millwright"));
    command
        .args(["ask", "--broker", &format!("127.0.0.1:{}", broker.port)])
        .args(["--pool", POOL, "--raw", "--json", "--max-tokens", "8"])
        .args(["--priority", "0", "--id", id, "the pump"])
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// The answer, and what was said beside it.
#[track_caller]
fn answer(output: &Output) -> (Value, String) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let event: Value = serde_json::from_slice(&output.stdout).expect("an event");
    assert_eq!(event["event"], "done", "{event}");
    (event, said)
}

#[test]
fn ask_goes_to_another_member_when_one_does_not_accept() {
    let plant = Plant::start(2);
    plant.agents[0].1.freeze(true);
    let mut said = String::new();
    for id in ["a", "b"] {
        let output = ask(&plant.broker, id, &["--accept-within", "1"]).output();
        let (event, more) = answer(&output.unwrap());
        assert_eq!(gateway(&event), "gw-2");
        said += &more;
    }
    // The broker gives in turn: one of the two went to the frozen one first.
    assert!(said.contains("no member accepted it yet"), "{said}");
}

#[test]
fn ask_goes_to_another_member_when_the_one_that_accepted_goes_offline() {
    let mut plant = Plant::start(2);
    for round in 0..5 {
        plant.burden("gw-1", round);
        plant.burden("gw-2", round);
        let id = format!("a-{round}");
        let asked = ask(&plant.broker, &id, &[]).spawn().unwrap();
        let accepted = plant.next("somebody accepts", |e| {
            e["task"] == id.as_str() && e["event"] == "accepted"
        });
        let holder = gateway(&accepted);
        plant.agent(&holder).kill();
        let (event, said) = answer(&asked.wait_with_output().unwrap());
        plant.agent(&holder).restart();
        await_taking(&plant.broker, &holder, true);
        if gateway(&event) != holder {
            let words = format!("{holder} is offline; sent again to the pool");
            assert!(said.contains(&words), "{said}");
            return;
        }
    }
    panic!("each time the answer was there before the kill");
}

/// Forwards to a broker what comes to a port of its own, but for the pool's connection while that is barred.
#[derive(Clone, Default)]
struct Gate {
    is_barred: Arc<AtomicBool>,
    passed: Arc<Mutex<Vec<TcpStream>>>,
}

impl Gate {
    fn open(&self, broker: u16) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let gate = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let gate = gate.clone();
                std::thread::spawn(move || gate.forward(stream, broker));
            }
        });
        port
    }

    fn forward(&self, mut from: TcpStream, broker: u16) -> std::io::Result<()> {
        let mut first = vec![0; 4096];
        let length = from.read(&mut first)?;
        first.truncate(length);
        let is_pools = first.windows(5).any(|bytes| bytes == b"-pool");
        if is_pools && self.is_barred.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut to = TcpStream::connect(("127.0.0.1", broker))?;
        to.write_all(&first)?;
        if is_pools {
            self.passed.lock().unwrap().push(from.try_clone()?);
        }
        let (mut back_from, mut back_to) = (to.try_clone()?, from.try_clone()?);
        std::thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
        std::io::copy(&mut from, &mut to)?;
        to.shutdown(Shutdown::Both)
    }

    fn bar(&self, barred: bool) {
        self.is_barred.store(barred, Ordering::SeqCst);
        for stream in self.passed.lock().unwrap().drain(..) {
            // It may be gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

#[test]
fn a_pools_connection_that_is_lost_for_long_raises_an_alarm_until_it_is_back() {
    let broker = Broker::open();
    let gate = Gate::default();
    let setup = Setup {
        port: Some(gate.open(broker.port)),
        ..Setup::default()
    };
    let _agent = member(&broker, "gw-1", setup);
    await_taking(&broker, "gw-1", true);
    let mut console = Client::at(&broker, "console", &base("gw-1"));
    console.subscribe(&format!("{}/alarm/pool", base("gw-1")));
    // The one that is retained.
    console.next("the alarm, not raised", |m| {
        m.topic.ends_with("/alarm/pool") && m.json()["raised"] == false
    });
    gate.bar(true);
    let alarm = console
        .next("the alarm", |m| m.topic.ends_with("/alarm/pool"))
        .json();
    assert_eq!(alarm["raised"], true, "{alarm}");
    assert!(
        alarm["reason"].to_string().contains("the pool line3"),
        "{alarm}"
    );
    await_taking(&broker, "gw-1", false);
    // By its own topic it is there all the while.
    console.generate("own", 4);
    assert_eq!(console.outcome("own")["event"], "done");
    gate.bar(false);
    let alarm = console
        .next("its end", |m| m.topic.ends_with("/alarm/pool"))
        .json();
    assert_eq!(alarm["raised"], false, "{alarm}");
    await_taking(&broker, "gw-1", true);
}
