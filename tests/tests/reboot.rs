//! A machine that went off and came up again, as its kernel and its clock tell it: what was accepted goes on, expires, or is
//! still known, by the rules of the gateway's own time.

use millwright_tests::faults::{Field, Shim};
use millwright_tests::{Agent, Broker, Client, Setup};
use serde_json::{Value, json};
use std::process::Command;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const HOUR: i64 = 3600;
/// The largest deadline that the gateway is told to allow.
const HOURS_MS: u64 = 2 * 3_600_000;

/// A gateway whose machine can be switched off.
struct Machine {
    shim: Shim,
    agent: Agent,
    boots: u32,
    off: i64,
    _folder: tempfile::TempDir,
}

impl Machine {
    fn new(broker: &Broker, clock: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shim = Shim::new(&folder.path().canonicalize().unwrap()).unwrap();
        shim.sense(BOOT_ID, "first\n");
        let setup = Setup {
            env: shim.env(false),
            // Slow, so that there is time to switch it off.
            model: "slots = 1\nthreads = 1\nkernel = 'scalar'".into(),
            agent: format!("clock = '{clock}'"),
            tasks: "queue_max = 240\nsender_queue_max = 240\ndeadline_max_s = 7200".into(),
            ..Setup::default()
        };
        Self {
            agent: Agent::with(broker, &setup),
            shim,
            boots: 0,
            off: 0,
            _folder: folder,
        }
    }

    /// Power goes, and comes back so many seconds later.
    fn off_for(&mut self, seconds: i64) {
        self.agent.kill();
        self.boots += 1;
        self.off += seconds;
        self.shim.sense(BOOT_ID, &format!("boot-{}\n", self.boots));
        self.shim.set(Field::ClockOffset, self.off);
        self.agent.restart();
    }
}

/// Gives it more to do than it does before the power goes.
fn occupy(mes: &mut Client) {
    let hours = json!({"deadline_ms": HOURS_MS});
    (0..200).for_each(|n| mes.task(&long(&format!("busy-{n}"), &hours)));
    mes.event("busy-0", "started");
}

/// A task of many tokens.
fn long(id: &str, more: &Value) -> Value {
    let mut task = json!({"id": id, "kind": "generate", "prompt": "x", "max_tokens": 200});
    task.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    task
}

/// A gateway that was switched off for an hour with three tasks accepted; what became of them.
fn three_over_an_hour(clock: &str) -> [Value; 3] {
    let broker = Broker::open();
    let mut machine = Machine::new(&broker, clock);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    occupy(&mut mes);
    mes.task(&long("long", &json!({"deadline_ms": HOURS_MS})));
    mes.event("long", "accepted");
    mes.task(&long("short", &json!({"deadline_ms": 600_000})));
    mes.event("short", "accepted");
    machine.off_for(HOUR);
    ["busy-0", "long", "short"].map(|id| mes.outcome(id))
}

#[test]
fn over_a_reboot_a_clock_that_is_set_counts_the_time_without_power() {
    let ended = three_over_an_hour("synced").map(|event| event["event"].clone());
    assert_eq!(ended, ["done", "done", "expired"]);
}

#[test]
fn over_a_reboot_a_clock_that_is_not_set_counts_none() {
    let ended = three_over_an_hour("unsynced").map(|event| event["event"].clone());
    assert_eq!(ended, ["done", "done", "done"]);
}

#[test]
fn what_had_ended_is_known_after_the_reboot_until_its_window_closes() {
    let broker = Broker::open();
    let mut machine = Machine::new(&broker, "synced");
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    mes.generate("a", 4);
    let done = mes.outcome("a");
    machine.off_for(HOUR);
    mes.generate("a", 4);
    assert_eq!(mes.outcome("a"), done);
    machine.off_for(24 * HOUR);
    mes.generate("a", 4);
    // The answer of before may have been sent again at each start.
    mes.next("another run", |m| {
        m.topic.ends_with("/mes/a") && m.json()["run"] != done["run"]
    });
}

#[test]
fn an_absolute_deadline_is_kept_over_the_reboot_and_needs_a_set_clock() {
    let broker = Broker::open();
    let mut machine = Machine::new(&broker, "synced");
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    occupy(&mut mes);
    let date = Command::new("date")
        .args(["-u", "-d", "30 minutes", "+%FT%TZ"])
        .output()
        .unwrap();
    let at = String::from_utf8(date.stdout).unwrap().trim().to_owned();
    mes.task(&long("absolute", &json!({"expires_at": at})));
    mes.event("absolute", "accepted");
    machine.off_for(HOUR);
    assert_eq!(mes.outcome("absolute")["event"], "expired");

    let broker = Broker::open();
    let _machine = Machine::new(&broker, "unsynced");
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    mes.task(&long("absolute", &json!({"expires_at": at})));
    assert_eq!(mes.outcome("absolute")["code"], "clock_unsynced");
}
