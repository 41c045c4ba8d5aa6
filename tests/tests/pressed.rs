//! A machine that is hard pressed, as its kernel tells it: the agent steps back before harm comes, and says so.

use millwright_tests::faults::Shim;
use millwright_tests::{Agent, BASE, Broker, Client, Setup};
use serde_json::json;

fn stalled(percent: u32) -> String {
    format!(
        "some avg10={percent}.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    )
}

#[test]
fn a_hard_pressed_gateway_says_so_and_takes_less() {
    let folder = tempfile::tempdir().unwrap();
    let shim = Shim::new(&folder.path().canonicalize().unwrap()).unwrap();
    for sensor in ["memory", "io"] {
        shim.sense(&format!("/proc/pressure/{sensor}"), &stalled(0));
    }
    shim.sense(
        "/proc/meminfo",
        "MemTotal: 8000000 kB\nMemFree: 7000000 kB\nMemAvailable: 7000000 kB\n",
    );
    let broker = Broker::open();
    let setup = Setup {
        env: shim.env(false),
        // Whatever this machine's own sensors say.
        agent: "governor = true\ntemperature_limit_c = 150".into(),
        ..Setup::default()
    };
    let _agent = Agent::with(&broker, &setup);
    let mut mes = Client::connect(&broker, "mes");
    let state = mes.await_state("online");
    assert_eq!(state["reason"], "");
    mes.subscribe(&format!("{BASE}/alarm/stall"));
    mes.generate("easy", 4);
    assert_eq!(mes.outcome("easy")["event"], "done");

    shim.sense("/proc/pressure/memory", &stalled(45));
    let state = mes.await_state("degraded");
    assert_eq!(
        state["reason"],
        "strained: programs wait for memory 45 % and for the disk 0 % of the time"
    );
    let alarm = |mes: &mut Client| {
        let topic = format!("{BASE}/alarm/stall");
        mes.next("the alarm", move |m| {
            m.topic == topic && m.json()["raised"] == true
        })
    };
    assert!(
        alarm(&mut mes).json()["reason"]
            .as_str()
            .unwrap()
            .contains("45 %")
    );
    let task = |id: &str, priority: u8| json!({"id": id, "kind": "generate", "prompt": "x", "max_tokens": 4, "priority": priority});
    mes.task(&task("low", 4));
    let refused = mes.outcome("low");
    assert_eq!(
        (&refused["event"], &refused["code"]),
        (&json!("rejected"), &json!("busy"))
    );
    assert!(
        refused["retry_after_ms"].as_u64().unwrap() >= 1000,
        "{refused}"
    );
    mes.task(&task("usual", 5));
    assert_eq!(mes.outcome("usual")["event"], "done");

    shim.sense("/proc/pressure/memory", &stalled(90));
    mes.next("the state", |m| {
        m.topic == format!("{BASE}/state") && m.json()["reason"].to_string().contains("critical")
    });
    mes.task(&task("high", 9));
    assert_eq!(mes.outcome("high")["code"], "busy");
    // What had ended is still answered.
    mes.task(&task("usual", 5));
    assert_eq!(mes.outcome("usual")["event"], "done");
}
