//! What the broker lets this user do on each topic, found by doing it where it disturbs nobody:
//!
//! - It subscribes to tasks and cancels by QoS 0 and beside the agent's session: what comes in the meantime is for the agent.
//!   A pool's tasks are subscribed to without `$share`, or a task would be given to us and lost.
//! - What is retained is left alone: state and card are said again as they are, not retained. `health`, `alarm/doctor` and
//!   `result/doctor/check` get a message of our own, that nobody waits for, not retained, good for a second.
//! - MQTT 5 brokers say whether they take a message. Of a subscription mosquitto does not: its ACL grants all, and drops
//!   what may not be read. So a topic that nobody has a right to is tried too; where that is granted, a grant says nothing.

use super::report::Finding;
use crate::broker::{Greeting, Lost, Taken, Visit};
use crate::card::{self, State};
use crate::clock::random;
use crate::config::Config;
use millwright_task::limits::PACKET_BYTES_MAX;
use millwright_task::topic::Base;

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

/// Whether the user may what the agent needs. `is_running`: the agent runs on this machine.
pub(super) async fn rights(
    visit: &mut Visit,
    config: &Config,
    is_running: bool,
) -> Result<Vec<Finding>, Lost> {
    let own = &config.base;
    let mut granted = Vec::new();
    let mut filters: Vec<String> = own.inbound_filters().into();
    if let Some(pool) = &config.pool {
        filters.extend(pool.base.inbound_filters());
    }
    for filter in filters {
        let is = visit.subscribe(&filter, false).await?;
        granted.push((filter, is));
    }
    let mut said = Vec::new();
    let result = |base: &Base| base.result(DOCTOR, "check");
    let mut ours = vec![result(own), own.alarm(DOCTOR), own.health()];
    ours.extend(config.pool.iter().map(|pool| result(&pool.base)));
    for topic in ours {
        let taken = visit.publish(&topic, MESSAGE).await?;
        said.push((topic, Some(taken)));
    }
    let state = card::state(config, State::Offline, "not started yet", "", None);
    for (topic, first) in [(own.state(), state.as_slice()), (own.card(), MESSAGE)] {
        let taken = say_again(visit, &topic, first, is_running).await?;
        said.push((topic, taken));
    }
    // Where no agent hears them, messages to ourselves show that they arrive.
    let mut heard = Vec::new();
    if !is_running {
        for topic in [own.task(DOCTOR), own.cancel(DOCTOR)] {
            heard.push(visit.whisper(&topic, MESSAGE) && visit.hear(&topic).await?.is_some());
        }
    }
    // Last, since some brokers end the connection over it.
    let foreign = format!("millwright-doctor/{:016x}", random());
    let is_foreign_granted = visit.subscribe(&foreign, false).await;
    let is_foreign_taken = match is_foreign_granted {
        Ok(_) => visit
            .publish(&foreign, MESSAGE)
            .await
            .is_ok_and(|taken| taken == Taken::Yes),
        Err(_) => false,
    };
    let is_open = is_foreign_taken
        && is_foreign_granted == Ok(true)
        && visit.hear(&foreign).await.is_ok_and(|m| m.is_some());
    let grants = Grants {
        mean_something: is_foreign_granted != Ok(true) || is_open,
        heard,
    };
    let mut all = publications(&said);
    all.extend(subscriptions(&granted, &grants, config));
    all.push(access(is_open, config));
    Ok(all)
}

/// Says a retained message once more as it is, or where there is none and no agent could have said it, `first`.
async fn say_again(
    visit: &mut Visit,
    topic: &str,
    first: &[u8],
    is_running: bool,
) -> Result<Option<Taken>, Lost> {
    let known = if visit.subscribe(topic, true).await? {
        visit.hear(topic).await?
    } else {
        None
    };
    match known {
        Some(message) => visit.publish(topic, &message.payload).await.map(Some),
        None if !is_running => visit.publish(topic, first).await.map(Some),
        None => Ok(None),
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
                Finding::note(CHECK, format!("whether {topic} may be published can't be told: the agent runs, and what it said there can't be read"))
                    .advising("give the user read rights there too, or run this with the agent stopped"),
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

/// What a granted subscription is worth.
struct Grants {
    mean_something: bool,
    /// Of the gateway's own filters: whether a message came that was sent to ourselves.
    heard: Vec<bool>,
}

fn subscriptions(granted: &[(String, bool)], grants: &Grants, config: &Config) -> Vec<Finding> {
    let mut all = Vec::new();
    let (mut fine, mut open) = (Vec::new(), Vec::new());
    for (n, (filter, is)) in granted.iter().enumerate() {
        if !is {
            all.push(Finding::problem(
                CHECK,
                format!("the broker refuses the subscription to {filter}"),
                "give the gateway's user read rights there",
            ));
        } else if grants.mean_something || grants.heard.get(n) == Some(&true) {
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
        let granted = [
            ("b/task/+".to_owned(), true),
            ("b/cancel/+".to_owned(), true),
        ];
        let levels = |mean_something, heard: &[bool]| {
            let grants = Grants {
                mean_something,
                heard: heard.to_vec(),
            };
            let all = subscriptions(&granted, &grants, &config(""));
            all.iter().map(|f| f.level).collect::<Vec<_>>()
        };
        assert_eq!(levels(true, &[]), [Level::Ok]);
        assert_eq!(levels(false, &[]), [Level::Note]);
        assert_eq!(levels(false, &[true, false]), [Level::Ok, Level::Note]);
        let refused = [("b/task/+".to_owned(), false)];
        let grants = Grants {
            mean_something: false,
            heard: vec![],
        };
        assert_eq!(
            subscriptions(&refused, &grants, &config(""))[0].level,
            Level::Problem
        );
    }
}
