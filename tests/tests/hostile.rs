//! A hostile or broken broker. Whatever it does, the agent lives, takes no more memory than it may, and answers tasks as
//! soon as a real broker is there in its place.

use millwright_tests::hostile::{Act, CONNACK, Hostile, Peer, length, packet, publish};
use millwright_tests::{Agent, BASE, Broker, Client, Security, Setup, await_some};
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;
use std::time::{Duration, Instant};

/// What an agent may take beyond what it takes with nothing to do: queues (`agent/task/src/limits.rs`) and the nine packets
/// that the MQTT client reads at a time, half a MiB each. Empty properties take 48 bytes for 5 of the packet's, in a vector
/// that doubles: 57 MiB for nine, and what the allocator doesn't give back between two of them.
const MEMORY_KIB: u64 = 112 * 1024;

const PROTOCOL: &str = "breaks the protocol";

struct Case {
    name: &'static str,
    act: Act,
    /// What the log must say of it.
    words: &'static str,
}

impl Case {
    fn says(self, words: &'static str) -> Self {
        Self { words, ..self }
    }
}

fn case(name: &'static str, act: impl Fn(&mut Peer) + Send + Sync + 'static) -> Case {
    Case {
        name,
        act: Arc::new(act),
        words: "",
    }
}

/// After the handshake, sends this and reads what comes until the agent closes.
fn then(name: &'static str, bytes: Vec<u8>) -> Case {
    case(name, move |peer| {
        if peer.subscribed().is_some() {
            peer.drain();
            peer.send(&bytes);
            peer.wait(Duration::from_secs(2));
        }
    })
}

/// The same in the place of CONNACK.
fn instead(name: &'static str, bytes: Vec<u8>) -> Case {
    case(name, move |peer| {
        if peer.connected() {
            peer.send(&bytes);
            peer.wait(Duration::from_secs(2));
        }
    })
}

fn withstand(cases: &[Case], security: Security) {
    let broker = Broker::start(security);
    let hostile = Hostile::before(broker.port);
    let tls = format!("[broker.tls]\nca = '{}'\n", broker.file("ca.pem").display());
    let setup = Setup {
        port: Some(hostile.port),
        // One thread: nothing is measured at the first start.
        model: "threads = 1\nslots = 4".into(),
        broker: if security == Security::Tls {
            tls
        } else {
            String::new()
        },
        ..Setup::default()
    };
    let mut agent = Agent::with(&broker, &setup);
    let mut mes = Client::connect(&broker, "mes");
    mes.await_state("online");
    mes.generate("before", 8);
    assert_eq!(mes.outcome("before")["event"], "done");
    fs::write(format!("/proc/{}/clear_refs", agent.id()), "5").expect("its highest memory");
    let idle = memory_kib(&agent, "VmRSS:");
    for Case { name, act, words } in cases {
        let said = agent.log().matches(words).count();
        hostile.act(Some(Arc::clone(act)));
        await_some(name, || (hostile.ended() > 0).then_some(()));
        assert!(agent.is_running(), "{name}");
        let more = memory_kib(&agent, "VmHWM:").saturating_sub(idle);
        println!("{name}: {more} KiB");
        assert!(more < MEMORY_KIB, "{name}: {more} KiB");
        await_some(&format!("{name}: {words:?}"), || {
            (words.is_empty() || agent.log().matches(words).count() > said).then_some(())
        });
    }
    hostile.act(None);
    mes.generate("after", 8);
    assert_eq!(mes.outcome("after")["event"], "done");
    let log = agent.log();
    for never in ["panicked", "a defect", "planted", "\u{1b}"] {
        assert!(!log.contains(never), "{log}");
    }
    assert!(
        log.lines().all(|line| line.len() < 1000),
        "a line without end"
    );
}

fn memory_kib(agent: &Agent, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.id())).expect("its status");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .expect("the field");
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// An agent waits longer after each lost connection, so each has only two of them to withstand.
fn withstand_all(cases: &[Case], security: Security) {
    scope(|scope| {
        for pair in cases.chunks(2) {
            scope.spawn(move || withstand(pair, security));
        }
    });
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 7_u64;
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

fn topic() -> Vec<u8> {
    format!("{BASE}/task/evil").into_bytes()
}

#[test]
fn packets_that_are_none_or_lie_about_their_length() {
    const HUGE: [u8; 5] = [0x30, 0xff, 0xff, 0xff, 0x7f];
    let large = publish(&topic(), None, &[], &vec![b'x'; 1 << 20]);
    withstand_all(
        &[
            instead("garbage", noise(100_000)),
            then("garbage after the handshake", noise(100_000)),
            instead(
                "another protocol",
                b"HTTP/1.1 400 Bad Request\r\n\r\n".into(),
            ),
            instead(
                "a CONNACK of 256 MiB",
                [0x20, 0xff, 0xff, 0xff, 0x7f].into(),
            ),
            then("a PUBLISH of 256 MiB", HUGE.into()),
            then(
                "a length that has no end",
                [0x30, 0xff, 0xff, 0xff, 0xff, 0xff].into(),
            ),
            then("a packet larger than allowed", large),
            // Until the agent has had enough of it.
            case("half a MiB byte by byte", |peer| {
                if peer.subscribed().is_some() {
                    peer.drain();
                    peer.send(&[&[0x30][..], &length(500_000)].concat());
                    peer.dribble(&[0; 250], Duration::from_millis(100));
                }
            })
            .says("went silent"),
            case("CONNACK byte by byte", |peer| {
                if peer.connected() {
                    peer.dribble(&CONNACK, Duration::from_secs(4));
                }
            })
            .says("does not answer"),
            case("closed at once", |_| {}),
            instead(
                "a packet before CONNACK",
                publish(&topic(), None, &[], b"planted"),
            )
            .says(PROTOCOL),
            then("DISCONNECT with a long reason", {
                let reason = [&[31, 0xff, 0x00][..], &vec![0x1b; 0xff00]].concat();
                let body = [&[0x8b][..], &length(reason.len()), &reason].concat();
                packet(0xe0, &body)
            })
            .says("ended the connection"),
        ],
        Security::Open,
    );
}

#[test]
fn acknowledgements_that_nobody_asked_for() {
    let ids = |kind: u8| {
        let packets =
            [0, 1, 2, 16, 17, 999, u16::MAX].map(|id: u16| packet(kind, &id.to_be_bytes()));
        packets.concat()
    };
    let suback = |name, codes: Vec<u8>, offset: u8| {
        case(name, move |peer| {
            if let Some([high, low]) = peer.subscribing() {
                let head = [high, low.wrapping_add(offset), 0];
                peer.send(&packet(0x90, &[&head[..], &codes].concat()));
                peer.wait(Duration::from_secs(2));
            }
        })
    };
    withstand_all(
        &[
            then("PUBACK", ids(0x40)),
            case("PUBACK twice, and with reasons", |peer| {
                peer.subscribed();
                for reason in [0x87, 0x97, 0x10, 0x99] {
                    if let Some([high, low]) = peer.published() {
                        peer.send(&packet(0x40, &[high, low, reason, 0]));
                    }
                }
                if let Some(id) = peer.published() {
                    peer.send(&packet(0x40, &id));
                    peer.send(&packet(0x40, &id));
                }
                peer.wait(Duration::from_secs(2));
            }),
            then(
                "PUBACK of a reason that there is not",
                packet(0x40, &[0, 1, 0x42, 0]),
            ),
            case("PUBREC for QoS 1", |peer| {
                peer.subscribed();
                if let Some(id) = peer.published() {
                    peer.send(&packet(0x50, &id));
                    peer.send(&packet(0x70, &id));
                }
                peer.wait(Duration::from_secs(2));
            })
            .says(PROTOCOL),
            then("PUBREL", ids(0x62)),
            then("PUBCOMP", ids(0x70)),
            then("UNSUBACK", packet(0xb0, &[0, 1, 0, 0])).says(PROTOCOL),
            then(
                "what a client says",
                packet(0x82, &[0, 1, 0, 0, 1, b'#', 0]),
            ),
            suback("SUBACK of too few", vec![1], 0).says(PROTOCOL),
            suback("SUBACK of too many", vec![1; 100_000], 0).says(PROTOCOL),
            suback("SUBACK of another", vec![1, 1], 1).says(PROTOCOL),
            suback("SUBACK that refuses", vec![0x87, 0x87], 0).says("refuses the subscription"),
            then("CONNACK without end", CONNACK.repeat(10_000)).says(PROTOCOL),
            instead("a receive maximum of 0", packet(0x20, &[0, 0, 3, 33, 0, 0])).says(PROTOCOL),
            instead(
                "packets of one byte",
                packet(0x20, &[0, 0, 5, 39, 0, 0, 0, 1]),
            ),
        ],
        Security::Open,
    );
}

#[test]
fn what_a_broker_says_does_not_outlive_its_connection() {
    let broker = Broker::open();
    let hostile = Hostile::before(broker.port);
    let setup = Setup {
        port: Some(hostile.port),
        ..Setup::default()
    };
    // Keep-alive 0, session expiry 0.
    let forbids = packet(0x20, &[0, 0, 8, 19, 0, 0, 17, 0, 0, 0, 0]);
    let lasted = Arc::new(AtomicBool::new(false));
    let noted = Arc::clone(&lasted);
    hostile.act(Some(Arc::new(move |peer| {
        if peer.connected() {
            peer.send(&forbids);
            let began = Instant::now();
            peer.wait(Duration::from_secs(2));
            noted.store(began.elapsed() >= Duration::from_secs(2), Ordering::SeqCst);
        }
    })));
    let agent = Agent::with(&broker, &setup);
    let mut mes = Client::connect(&broker, "mes");
    await_some("a strange CONNACK", || (hostile.ended() > 0).then_some(()));
    assert!(lasted.load(Ordering::SeqCst), "{}", agent.log());
    hostile.act(None);
    mes.await_state("online");
    // A session that ended with the connection would lose this.
    hostile.act(Some(Arc::new(|_| {})));
    await_some("a lost connection", || (hostile.ended() > 0).then_some(()));
    mes.generate("meanwhile", 8);
    hostile.act(None);
    assert_eq!(mes.outcome("meanwhile")["event"], "done");
}

/// A packet id.
fn id(n: usize) -> u16 {
    (n % 65_535) as u16 + 1
}

#[test]
fn floods() {
    let flood = |name, message: fn(usize) -> Vec<u8>, times: usize| {
        case(name, move |peer| {
            if peer.subscribed().is_some() {
                peer.drain();
                for n in 0..times {
                    if !peer.send(&message(n)) {
                        break;
                    }
                }
                peer.wait(Duration::from_secs(1));
            }
        })
    };
    withstand_all(
        &[
            flood(
                "QoS 0",
                |_| publish(&topic(), None, &[], &[b'{'; 1000]),
                50_000,
            ),
            flood(
                "QoS 0, large",
                |_| publish(&topic(), None, &[], &vec![b'['; 400_000]),
                200,
            ),
            flood(
                "QoS 1 beyond the receive maximum",
                |n| publish(&topic(), Some(id(n)), &[], b"{}"),
                60_000,
            ),
            flood(
                "QoS 1, large",
                |n| publish(&topic(), Some(id(n)), &[], &vec![b'['; 400_000]),
                200,
            ),
            flood(
                "good tasks",
                |n| {
                    let prompt = "pump ".repeat(2000);
                    let task = format!(
                        "{{\"id\":\"t-{n}\",\"kind\":\"generate\",\"prompt\":\"{prompt}\"}}"
                    );
                    publish(&topic(), Some(id(n)), &[], task.as_bytes())
                },
                1000,
            ),
            flood(
                "user properties",
                |n| {
                    publish(
                        &topic(),
                        Some(id(n)),
                        &[38, 0, 0, 0, 0].repeat(100_000),
                        b"{}",
                    )
                },
                60,
            ),
            flood(
                "subscription identifiers",
                |n| publish(&topic(), Some(id(n)), &[11, 1].repeat(200_000), b"{}"),
                60,
            ),
            // A small one keeps the buffer that a large one needed.
            flood(
                "a small one behind each large one",
                |n| {
                    [
                        publish(&topic(), None, &[], &vec![b'['; 500_000]),
                        publish(&topic(), Some(id(n)), &[], b"{}"),
                    ]
                    .concat()
                },
                200,
            ),
        ],
        Security::Open,
    );
}

#[test]
fn topics_and_properties_that_no_broker_may_send() {
    let with = |name, topic: &[u8], properties: Vec<u8>| {
        then(name, publish(topic, Some(1), &properties, b"{}"))
    };
    let base = topic();
    let task = |properties| publish(&base, Some(1), properties, b"{}");
    let long = [&base[..], &vec![b'x'; 60_000]].concat();
    withstand_all(
        &[
            then("a topic alias", publish(b"", None, &[35, 0, 9], b"{}")).says(PROTOCOL),
            case("topic aliases without end", |peer| {
                peer.subscribed();
                peer.drain();
                for alias in 1..=1000_u16 {
                    let alias = [&[35][..], &alias.to_be_bytes()].concat();
                    if !peer.send(&publish(&topic(), None, &alias, &vec![b'x'; 400_000])) {
                        break;
                    }
                }
            }),
            then("QoS 2", packet(0x34, &[0, 1, b'a', 0, 1, 0])).says(PROTOCOL),
            then("QoS 3", packet(0x36, &[0, 1, b'a', 0, 1, 0])),
            with("a topic that is not UTF-8", b"\xff\xfe/task/x", vec![]),
            then("topics that are none", {
                let topics: [&[u8]; 6] = [b"$SYS/x", b"#", b"+/task/+", b"a\0b", b"\x1b[2J", &long];
                topics
                    .map(|topic| publish(topic, None, &[], b"{}"))
                    .concat()
            }),
            with("an empty topic", b"", vec![]).says(PROTOCOL),
            with("a packet id of 0", b"a", vec![2, 0, 0]),
            then(
                "properties twice",
                task(&[1, 1, 1, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0, 1]),
            ),
            then("a property that there is not", task(&[99, 0])),
            then("a property that goes beyond", task(&[38, 0xff, 0xff])),
            then("properties of another packet", task(&[33, 0, 1])),
        ],
        Security::Open,
    );
}

#[test]
fn tls_that_is_none_or_breaks_off() {
    let bytes = |name, bytes: Vec<u8>| {
        case(name, move |peer: &mut Peer| {
            peer.send(&bytes);
            peer.wait(Duration::from_secs(2));
        })
    };
    let cut = |name, limit| case(name, move |peer: &mut Peer| peer.pass_on(Some(limit)));
    let record = [&[0x16, 3, 3, 0x40, 0][..], &noise(0x4000)].concat();
    withstand_all(
        &[
            bytes("garbage", noise(100_000)),
            bytes("MQTT without TLS", CONNACK.to_vec()),
            bytes("a record of noise", record),
            bytes("an alert", vec![0x15, 3, 3, 0, 2, 2, 40]),
            cut("cut in the first record", 3),
            cut("cut in the server's hello", 60),
            cut("cut in its certificate", 600),
            case("never answers", |peer: &mut Peer| {
                peer.wait(Duration::from_secs(15));
            }),
        ],
        Security::Tls,
    );
}
