//! What the broker lets this user do on each topic, found by doing it where it disturbs nobody:
//!
//! - It subscribes to tasks and cancels by QoS 0 and beside the agent's session: what comes in the meantime is for the agent.
//!   A pool's tasks are not subscribed to: in the group one would be given to us and lost, and beside it nobody need have the right.
//! - What is retained is left alone: state and card are said again as they are, not retained, and not at all where they are unknown. `health`, `alarm/doctor` and
//!   `result/doctor/check` get a message of our own, that nobody waits for, not retained, good for a second.
//! - MQTT 5 brokers say whether they take a message. Of a subscription mosquitto does not: its ACL grants all, and drops
//!   what may not be read. So a topic that nobody has a right to is tried too; where that is granted, a grant says nothing.

use super::report::Finding;
use crate::broker::{Greeting, Lost, Taken, Visit};
use crate::clock::random;
use crate::config::Config;
use millwright_task::limits::PACKET_BYTES_MAX;
use millwright_task::topic::Base;
use serde_json::Value;

const CHECK: &str = "topics";
/// The sender and the alarm that are ours.
const DOCTOR: &str = "doctor";
const MESSAGE: &[u8] = br#"{"check": "millwright doctor"}"#;

/// What the broker said of itself.
pub(super) fn limits(greeting: &Greeting, config: &Config) -> Vec<Finding> {
    const CHECK: &str = "broker";
    let mut all = Vec::new();
    let mut problem = |says: &str, advice: &str| all.push(Finding::problem(CHECK, says, advice));
    if !greeting.keeps_retained {
        problem(
            "the broker keeps no retained messages: nobody can look up state, card and alarms",
            "allow them (mosquitto: retain_available true)",
        );
    }
    if greeting.qos_max == 0 {
        problem(
            "the broker takes QoS 0 alone: answers would be lost",
            "allow QoS 1 (mosquitto: max_qos 1)",
        );
    }
    if !greeting.has_wildcards {
        problem(
            "the broker takes no wildcards in subscriptions: the agent can't hear all its senders",
            "allow them",
        );
    }
    if config.pool.is_some() && !greeting.shares_subscriptions {
        problem(
            "the broker has no shared subscriptions: the pool gets no tasks",
            "take a broker that has them, or leave the pool",
        );
    }
    let wanted = config.tasks.payload_bytes_max + 4096;
    match greeting.packet_bytes_max {
        Some(most) if (most as usize) < wanted => all.push(Finding::warning(
            CHECK,
            format!("the broker takes packets of at most {most} bytes: larger answers can't be sent, and tasks up to tasks.payload_bytes_max not be received"),
            format!("set its limit to {PACKET_BYTES_MAX} or more (mosquitto: max_packet_size)"),
        )),
        _ if all.is_empty() => {
            let most = greeting.packet_bytes_max.map_or_else(|| "no limit of its own".to_owned(), |most| format!("{most} bytes"));
            all.push(Finding::ok(CHECK, format!("retained messages, QoS {}, packets: {most}", greeting.qos_max)));
        }
        _ => {}
    }
    all
}

/// Whether the user may what the agent needs; and what state is retained, where that can be read. `is_absent`: no agent runs
/// on this machine.
pub(super) async fn rights(
    visit: &mut Visit,
    config: &Config,
    is_absent: bool,
) -> (Vec<Finding>, Option<Value>) {
    let mut tried = Tried::default();
    let lost = tried.all(visit, config, is_absent).await.err();
    let mut all = publications(&tried.said);
    all.extend(subscriptions(&tried, config));
    if let Some(pool) = &config.pool {
        let filter = pool.base.shared_filter(&pool.name);
        let says = format!("whether tasks come on {filter} can't be tried without taking one");
        let advice = "where the broker refuses it, the agent raises the alarm pool";
        all.push(Finding::note(CHECK, says).advising(advice));
    }
    all.extend(tried.foreign.map(|foreign| access(foreign.is_open, config)));
    if let Some(Lost { reason, .. }) = lost {
        all.push(if tried.is_whispering {
            let says = format!("{reason} (over a task of our own, which its rules may forbid)");
            Finding::note(CHECK, says)
        } else {
            let says = format!("{reason} (while the rights on topics were tried)");
            let advice = "look into the broker's log; where it says that a client took over another, it makes client ids of user \
                          names: switch that off";
            Finding::problem(CHECK, says, advice)
        });
    }
    (all, tried.state)
}

/// What the broker let us do, until all was tried or the connection ended.
#[derive(Default)]
struct Tried {
    granted: Vec<(String, bool)>,
    /// Whether it was taken; `None` where there was nothing true to say.
    said: Vec<(String, Option<Taken>)>,
    state: Option<Value>,
    is_whispering: bool,
    /// Of the gateway's own filters: whether a message came that was sent to ourselves.
    heard: Vec<bool>,
    foreign: Option<Foreign>,
}

/// What the broker makes of a topic that nobody has a right to.
#[derive(Clone, Copy)]
struct Foreign {
    is_granted: bool,
    is_open: bool,
}

impl Tried {
    async fn all(
        &mut self,
        visit: &mut Visit,
        config: &Config,
        is_absent: bool,
    ) -> Result<(), Lost> {
        let own = &config.base;
        let mut filters: Vec<String> = own.inbound_filters().into();
        filters.extend(config.pool.iter().map(|pool| pool.base.cancel("+")));
        for filter in filters {
            let is = visit.subscribe(&filter, false).await?;
            self.granted.push((filter, is));
        }
        let result = |base: &Base| base.result(DOCTOR, "check");
        let mut ours = vec![result(own), own.alarm(DOCTOR), own.health()];
        ours.extend(config.pool.iter().map(|pool| result(&pool.base)));
        for topic in ours {
            let taken = visit.publish(&topic, MESSAGE).await?;
            self.said.push((topic, Some(taken)));
        }
        for topic in [own.state(), own.card()] {
            let known = if visit.subscribe(&topic, true).await? {
                visit.hear(&topic).await?
            } else {
                None
            };
            let taken = match &known {
                Some(message) => Some(visit.publish(&topic, &message.payload).await?),
                None => None,
            };
            if topic == own.state() {
                self.state = known.and_then(|m| serde_json::from_slice(&m.payload).ok());
            }
            self.said.push((topic, taken));
        }
        // Where no agent hears them, messages to ourselves show that they arrive.
        let is_offline = |state: &Value| state["state"] == "offline";
        if is_absent && self.state.as_ref().is_none_or(is_offline) {
            self.is_whispering = true;
            for topic in [own.task(DOCTOR), own.cancel(DOCTOR)] {
                let is_heard =
                    visit.whisper(&topic, MESSAGE) && visit.hear(&topic).await?.is_some();
                self.heard.push(is_heard);
            }
            self.is_whispering = false;
        }
        self.foreign = Some(foreign(visit).await);
        Ok(())
    }

    /// Whether a grant says anything at this broker.
    fn grants_mean_something(&self) -> bool {
        self.foreign
            .is_some_and(|foreign| !foreign.is_granted || foreign.is_open)
    }
}

/// Comes last, since some brokers end the connection over it.
async fn foreign(visit: &mut Visit) -> Foreign {
    let topic = format!("millwright-doctor/{:016x}", random());
    let granted = visit.subscribe(&topic, false).await;
    let is_granted = granted == Ok(true);
    let is_taken = granted.is_ok() && visit.publish(&topic, MESSAGE).await == Ok(Taken::Yes);
    let is_open = is_taken && is_granted && visit.hear(&topic).await.is_ok_and(|m| m.is_some());
    Foreign {
        is_granted,
        is_open,
    }
}

fn publications(said: &[(String, Option<Taken>)]) -> Vec<Finding> {
    let mut all = Vec::new();
    let mut fine = Vec::new();
    for (topic, taken) in said {
        match taken {
            Some(Taken::Yes) => fine.push(topic.as_str()),
            Some(Taken::Forbidden) => all.push(Finding::problem(
                CHECK,
                format!("the broker forbids publishing on {topic}"),
                format!("give the gateway's user write rights there (mosquitto: topic write {})", rule(topic)),
            )),
            Some(Taken::Refused(why)) => all.push(Finding::problem(
                CHECK,
                format!("the broker refuses a message on {topic}: {why:?}"),
                "look into the broker's log",
            )),
            None => all.push(
                Finding::note(CHECK, format!("whether {topic} may be published can't be told: nothing retained can be read there that could be said again"))
                    .advising(format!("mosquitto's rules must have: topic write {topic}")),
            ),
        }
    }
    if !fine.is_empty() {
        all.insert(
            0,
            Finding::ok(CHECK, format!("may publish: {}", fine.join(", "))),
        );
    }
    all
}

/// What an access rule would have for a topic that we tried.
fn rule(topic: &str) -> String {
    topic
        .replace("/alarm/doctor", "/alarm/+")
        .replace("/result/doctor/check", "/result/#")
}

fn subscriptions(tried: &Tried, config: &Config) -> Vec<Finding> {
    let mut all = Vec::new();
    let (mut fine, mut open) = (Vec::new(), Vec::new());
    for (n, (filter, is)) in tried.granted.iter().enumerate() {
        if !is {
            all.push(Finding::problem(
                CHECK,
                format!("the broker refuses the subscription to {filter}"),
                "give the gateway's user read rights there",
            ));
        } else if tried.grants_mean_something() || tried.heard.get(n) == Some(&true) {
            fine.push(filter.as_str());
        } else {
            open.push(filter.as_str());
        }
    }
    if !fine.is_empty() {
        all.push(Finding::ok(
            CHECK,
            format!("may subscribe: {}", fine.join(", ")),
        ));
    }
    if !open.is_empty() {
        let says = format!(
            "whether messages come on {} can't be told: this broker grants what its rules then drop",
            open.join(", ")
        );
        let rules: Vec<_> = open
            .iter()
            .map(|filter| format!("topic read {filter}"))
            .collect();
        let advice = format!(
            "mosquitto's rules must have: {}; to be sure, start the agent and send a task: millwright ask --to {} …",
            rules.join(", "),
            config.base
        );
        all.push(Finding::note(CHECK, says).advising(advice));
    }
    all
}

fn access(is_open: bool, config: &Config) -> Finding {
    if !is_open {
        return Finding::ok(
            CHECK,
            "the broker's rules keep this user from foreign topics",
        );
    }
    let says = "this user may publish and read on any topic: where that holds for all, everybody can read prompts and answers, \
                and send tasks in another's name";
    let advice = "give the broker access rules (deploy/mosquitto has them)";
    if crate::config::is_loopback(&config.broker.host) {
        return Finding::note(CHECK, says).advising(format!("for more than a trial, {advice}"));
    }
    Finding::warning(CHECK, says, advice)
}

#[cfg(test)]
mod tests {
    use super::super::report::Level;
    use super::*;

    fn config(more: &str) -> Config {
        let text = "[gateway]\nsite = 'hamburg'\nname = 'gw-07'\n[broker]\nhost = '127.0.0.1'\n[model]\nbundle = 'm'\nstate_dir = 's'\n";
        Config::parse(&format!("{text}{more}")).unwrap()
    }

    fn greeting() -> Greeting {
        Greeting {
            packet_bytes_max: None,
            qos_max: 2,
            keeps_retained: true,
            has_wildcards: true,
            shares_subscriptions: true,
        }
    }

    #[test]
    fn a_brokers_limits_are_judged_by_what_the_agent_needs() {
        let level = |greeting: &Greeting| limits(greeting, &config("")).last().unwrap().level;
        let with = |change: fn(&mut Greeting)| {
            let mut greeting = greeting();
            change(&mut greeting);
            greeting
        };
        assert_eq!(level(&greeting()), Level::Ok);
        assert_eq!(level(&with(|g| g.keeps_retained = false)), Level::Problem);
        assert_eq!(level(&with(|g| g.qos_max = 0)), Level::Problem);
        assert_eq!(level(&with(|g| g.has_wildcards = false)), Level::Problem);
        assert_eq!(
            level(&with(|g| g.packet_bytes_max = Some(1 << 20))),
            Level::Ok
        );
        assert_eq!(
            level(&with(|g| g.packet_bytes_max = Some(65_536))),
            Level::Warning
        );
        // It matters to a pool's member alone.
        let unshared = with(|g| g.shares_subscriptions = false);
        assert_eq!(level(&unshared), Level::Ok);
        let member = limits(&unshared, &config("[pool]\nname = 'pumps'\n"));
        assert_eq!(member.last().unwrap().level, Level::Problem);
    }

    #[test]
    fn a_grant_is_believed_where_the_broker_also_refuses() {
        let levels = |is_granted, foreign, heard: &[bool]| {
            let tried = Tried {
                granted: ["b/task/+", "b/cancel/+"]
                    .map(|f| (f.to_owned(), is_granted))
                    .into(),
                foreign,
                heard: heard.to_vec(),
                ..Tried::default()
            };
            let all = subscriptions(&tried, &config(""));
            all.iter().map(|f| f.level).collect::<Vec<_>>()
        };
        let foreign = |is_granted, is_open| {
            Some(Foreign {
                is_granted,
                is_open,
            })
        };
        assert_eq!(levels(true, foreign(false, false), &[]), [Level::Ok]);
        assert_eq!(levels(true, foreign(true, true), &[]), [Level::Ok]);
        assert_eq!(levels(true, foreign(true, false), &[]), [Level::Note]);
        assert_eq!(levels(true, None, &[]), [Level::Note]);
        assert_eq!(
            levels(true, foreign(true, false), &[true, false]),
            [Level::Ok, Level::Note]
        );
        assert_eq!(levels(false, None, &[]), [Level::Problem; 2]);
    }
}
