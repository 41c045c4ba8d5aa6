//! Every topic name, built and read in this one place, and the rules a reply topic must keep.
//! Knows levels and prefixes; never payloads.

use crate::limits::{SENDER_BYTES_MAX, TOPIC_BYTES_MAX, TOPIC_LEVELS_MAX};
use std::fmt;

/// The id a refusal is answered under when the task has none that can be used.
pub const INVALID_TASK: &str = "_invalid";

/// A gateway's or a pool's topic prefix: whole levels, no wildcard, no space, no leading `$`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base(String);

/// Why a topic can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    #[error("it is empty or has an empty level")]
    Empty,
    #[error("it is longer than {TOPIC_BYTES_MAX} bytes or has more than {TOPIC_LEVELS_MAX} levels")]
    Long,
    #[error("it holds a wildcard, a space, a control character or what is no character")]
    Character,
    #[error("topics beginning with `$` belong to the broker")]
    Dollar,
    #[error("it is not under an allowed prefix")]
    Prefix,
    #[error("it is a task, cancel, command, state, card, health or alarm topic")]
    Own,
    #[error("`pool` is no gateway's name: the topics of pools lie there")]
    Pool,
}

/// What a message that arrived under the base is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inbound<'a> {
    Task { sender: &'a str },
    Cancel { sender: &'a str },
}

impl Base {
    pub fn parse(text: &str) -> Result<Self, TopicError> {
        levels_are_plain(text)?;
        // Room for `/result/{sender}/{task}`.
        if text.len() + 8 + SENDER_BYTES_MAX + 1 + crate::limits::ID_BYTES_MAX > TOPIC_BYTES_MAX {
            return Err(TopicError::Long);
        }
        Ok(Self(text.to_owned()))
    }

    /// `millwright/v1/{site}/{gateway}`.
    pub fn of_gateway(site: &str, gateway: &str) -> Result<Self, TopicError> {
        if gateway == POOL {
            return Err(TopicError::Pool);
        }
        Self::of_levels(site, &[gateway])
    }

    /// `millwright/v1/{site}/pool/{pool}`.
    pub fn of_pool(site: &str, pool: &str) -> Result<Self, TopicError> {
        Self::of_levels(site, &[POOL, pool])
    }

    fn of_levels(site: &str, rest: &[&str]) -> Result<Self, TopicError> {
        if site.contains('/') || rest.iter().any(|level| level.contains('/')) {
            return Err(TopicError::Character);
        }
        Self::parse(&format!("millwright/v1/{site}/{}", rest.join("/")))
    }

    /// Whether it is one that a gateway has by default.
    pub fn is_gateways(&self) -> bool {
        let levels: Vec<&str> = self.0.split('/').collect();
        matches!(levels.as_slice(), ["millwright", "v1", _, _])
    }

    pub fn state(&self) -> String {
        format!("{}/state", self.0)
    }
    pub fn card(&self) -> String {
        format!("{}/card", self.0)
    }
    pub fn health(&self) -> String {
        format!("{}/health", self.0)
    }
    pub fn alarm(&self, name: &str) -> String {
        format!("{}/alarm/{name}", self.0)
    }
    pub fn task(&self, sender: &str) -> String {
        format!("{}/task/{sender}", self.0)
    }
    pub fn cancel(&self, sender: &str) -> String {
        format!("{}/cancel/{sender}", self.0)
    }
    /// The subscriptions of the agent.
    pub fn inbound_filters(&self) -> [String; 2] {
        [self.task("+"), self.cancel("+")]
    }
    /// The subscription of a pool's member to its share of the tasks.
    pub fn shared_filter(&self, pool: &str) -> String {
        format!("$share/{pool}/{}", self.task("+"))
    }
    /// The default reply topic.
    pub fn result(&self, sender: &str, task: &str) -> String {
        format!("{}/result/{sender}/{task}", self.0)
    }
    /// The tree of default reply topics.
    pub fn results(&self) -> String {
        format!("{}/result", self.0)
    }

    /// What `topic` is, if it is one the agent subscribes to and its sender is usable.
    pub fn inbound<'a>(&self, topic: &'a str) -> Option<Inbound<'a>> {
        let rest = topic.strip_prefix(self.0.as_str())?.strip_prefix('/')?;
        let (kind, sender) = rest.split_once('/')?;
        if !sender_is_plain(sender) {
            return None;
        }
        match kind {
            "task" => Some(Inbound::Task { sender }),
            "cancel" => Some(Inbound::Cancel { sender }),
            _ => None,
        }
    }

    /// Whether `topic` is this base or below it.
    pub fn holds(&self, topic: &str) -> bool {
        is_under(topic, &self.0)
    }

    /// Whether one of the two is the other or below it.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.holds(&other.0) || other.holds(&self.0)
    }

    fn owns(&self, topic: &str) -> bool {
        RESERVED
            .iter()
            .any(|kind| is_under(topic, &format!("{}/{kind}", self.0)))
    }
}

/// The level below a site where pools lie.
const POOL: &str = "pool";

/// The levels below a base that carry no answers.
const RESERVED: [&str; 7] = [
    "task", "cancel", "command", "state", "card", "health", "alarm",
];

/// Whether `topic` is a reserved one of any gateway or pool with the default base.
fn is_reserved_by_default(topic: &str) -> bool {
    let levels: Vec<&str> = topic.splitn(7, '/').collect();
    match levels.as_slice() {
        ["millwright", "v1", _, POOL, _, kind, ..] | ["millwright", "v1", _, _, kind, ..] => {
            RESERVED.contains(kind)
        }
        _ => false,
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether `sender` is one topic level that can be printed and answered. A pool's name is one too.
pub fn sender_is_plain(sender: &str) -> bool {
    !sender.is_empty()
        && sender.len() <= SENDER_BYTES_MAX
        && !sender.contains('/')
        && levels_are_plain(sender).is_ok()
}

/// Where answers may go.
#[derive(Debug, Clone)]
pub struct ReplyRules {
    base: Base,
    /// Another base that is ours.
    beside: Option<Base>,
    prefixes: Vec<String>,
}

impl ReplyRules {
    /// `prefixes` are whole-level prefixes; none means the base's result tree alone.
    pub fn new(base: Base, prefixes: &[String]) -> Result<Self, TopicError> {
        for prefix in prefixes {
            levels_are_plain(prefix)?;
        }
        let prefixes = if prefixes.is_empty() {
            vec![base.results()]
        } else {
            prefixes.to_vec()
        };
        Ok(Self {
            base,
            beside: None,
            prefixes,
        })
    }

    /// The same, where a gateway also has the topics of `other`: they are its own, and its result tree is kept as well.
    #[must_use]
    pub fn beside(self, other: Base) -> Self {
        Self {
            beside: Some(other),
            ..self
        }
    }

    /// Whether an answer to `sender` may be published to `topic`. The result tree is open to each sender below its
    /// own level only: nobody speaks in another's place.
    pub fn check(&self, sender: &str, topic: &str) -> Result<(), TopicError> {
        levels_are_plain(topic)?;
        if is_reserved_by_default(topic) {
            return Err(TopicError::Own);
        }
        for base in std::iter::once(&self.base).chain(&self.beside) {
            if base.owns(topic) {
                return Err(TopicError::Own);
            }
            let results = base.results();
            if is_under(topic, &results) && !is_under(topic, &format!("{results}/{sender}")) {
                return Err(TopicError::Prefix);
            }
        }
        // Strictly below the prefix: the prefix itself is the root of everyone's answers.
        if !self
            .prefixes
            .iter()
            .any(|p| topic != p && is_under(topic, p))
        {
            return Err(TopicError::Prefix);
        }
        Ok(())
    }
}

/// Whether `topic` is `prefix` or below it, by whole levels.
fn is_under(topic: &str, prefix: &str) -> bool {
    topic
        .strip_prefix(prefix)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn levels_are_plain(topic: &str) -> Result<(), TopicError> {
    if topic.split('/').any(str::is_empty) {
        return Err(TopicError::Empty);
    }
    if topic.len() > TOPIC_BYTES_MAX || topic.split('/').count() > TOPIC_LEVELS_MAX {
        return Err(TopicError::Long);
    }
    if topic.starts_with('$') {
        return Err(TopicError::Dollar);
    }
    if topic.chars().any(|c| {
        matches!(c, '+' | '#') || c.is_whitespace() || c.is_control() || is_no_character(c)
    }) {
        return Err(TopicError::Character);
    }
    Ok(())
}

/// Unicode's noncharacters, for which a broker may end the connection (MQTT 5, 1.5.4).
fn is_no_character(c: char) -> bool {
    matches!(c, '\u{fdd0}'..='\u{fdef}') || u32::from(c) & 0xfffe == 0xfffe
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn base() -> Base {
        Base::of_gateway("hamburg", "gw-07").unwrap()
    }

    #[test]
    fn inbound_topics_name_their_sender() {
        let base = base();
        assert_eq!(
            base.inbound("millwright/v1/hamburg/gw-07/task/mes"),
            Some(Inbound::Task { sender: "mes" })
        );
        assert_eq!(
            base.inbound("millwright/v1/hamburg/gw-07/cancel/mes"),
            Some(Inbound::Cancel { sender: "mes" })
        );
        for topic in [
            "millwright/v1/hamburg/gw-07/task/",
            "millwright/v1/hamburg/gw-07/task/a/b",
            "millwright/v1/hamburg/gw-070/task/mes",
            "millwright/v1/hamburg/gw-07/task/a b",
            "millwright/v1/hamburg/gw-07/command/mes",
            "task/mes",
        ] {
            assert_eq!(base.inbound(topic), None, "{topic}");
        }
    }

    #[test]
    fn replies_stay_under_their_prefix() {
        let rules = ReplyRules::new(base(), &[]).unwrap();
        let ok = |t: &str| rules.check("mes", t);
        assert_eq!(ok("millwright/v1/hamburg/gw-07/result/mes/7"), Ok(()));
        assert_eq!(
            ok("millwright/v1/hamburg/gw-07/result"),
            Err(TopicError::Prefix)
        );
        assert_eq!(
            ok("millwright/v1/hamburg/gw-07/results/mes"),
            Err(TopicError::Prefix)
        );
        assert_eq!(
            ok("millwright/v1/hamburg/gw-08/result/mes"),
            Err(TopicError::Prefix)
        );
        assert_eq!(
            ok("millwright/v1/hamburg/gw-07/result/+"),
            Err(TopicError::Character)
        );
        assert_eq!(
            ok("millwright/v1/hamburg/gw-07/result/hmi/7"),
            Err(TopicError::Prefix)
        );
        assert_eq!(ok("$SYS/broker"), Err(TopicError::Dollar));
        // Brokers end the connection over these, so one such answer would be sent for ever.
        for c in ['\u{ffff}', '\u{fdd0}', '\u{1fffe}', '\u{10ffff}'] {
            let topic = format!("millwright/v1/hamburg/gw-07/result/mes/{c}");
            assert_eq!(ok(&topic), Err(TopicError::Character));
        }
        let deep = |more: usize| {
            format!(
                "millwright/v1/hamburg/gw-07/result/mes{}",
                "/a".repeat(more)
            )
        };
        assert_eq!(ok(&deep(TOPIC_LEVELS_MAX - 6)), Ok(()));
        assert_eq!(ok(&deep(TOPIC_LEVELS_MAX - 5)), Err(TopicError::Long));
        assert_eq!(ok(""), Err(TopicError::Empty));
        assert_eq!(ok("a//b"), Err(TopicError::Empty));
    }

    #[test]
    fn a_wide_prefix_does_not_open_the_own_topics() {
        let rules = ReplyRules::new(base(), &["millwright".into(), "acme/mes".into()]).unwrap();
        assert_eq!(rules.check("mes", "acme/mes/answers"), Ok(()));
        assert_eq!(
            rules.check("mes", "millwright/v1/hamburg/gw-07/state"),
            Err(TopicError::Own)
        );
        assert_eq!(
            rules.check("mes", "millwright/v1/hamburg/gw-07/task/mes"),
            Err(TopicError::Own)
        );
        assert_eq!(
            rules.check("mes", "millwright/v1/hamburg/gw-07/command/mes"),
            Err(TopicError::Own)
        );
        assert_eq!(
            rules.check("mes", "millwright/v1/hamburg/gw-08/cancel/mes"),
            Err(TopicError::Own)
        );
        assert_eq!(
            rules.check("mes", "millwright/v1/hamburg/pool/line3/task/mes"),
            Err(TopicError::Own)
        );
    }

    #[test]
    fn a_pool_has_topics_beside_the_gateways() {
        let pool = Base::of_pool("hamburg", "line3").unwrap();
        assert_eq!(pool.to_string(), "millwright/v1/hamburg/pool/line3");
        assert_eq!(
            pool.shared_filter("line3"),
            "$share/line3/millwright/v1/hamburg/pool/line3/task/+"
        );
        let task = "millwright/v1/hamburg/pool/line3/task/mes";
        assert_eq!(pool.inbound(task), Some(Inbound::Task { sender: "mes" }));
        assert_eq!(base().inbound(task), None);
        assert_eq!(Base::of_pool("hamburg", "a/b"), Err(TopicError::Character));
        assert_eq!(Base::of_gateway("hamburg", "pool"), Err(TopicError::Pool));
        assert!(pool.holds(task) && !pool.holds("millwright/v1/hamburg/pool/line30/task/mes"));
        let overlaps =
            |a: &str, b: &str| Base::parse(a).unwrap().overlaps(&Base::parse(b).unwrap());
        assert!(overlaps("a/b", "a/b") && overlaps("a", "a/b") && overlaps("a/b", "a"));
        assert!(!overlaps("a/b", "a/bc"));
    }

    #[test]
    fn a_pools_answers_stay_in_its_tree_and_out_of_both_bases_own_topics() {
        let pool = Base::parse("acme/pool/line3").unwrap();
        let rules = ReplyRules::new(pool.clone(), &[]).unwrap().beside(base());
        let check = |topic: &str| rules.check("mes", topic);
        assert_eq!(check("acme/pool/line3/result/mes/7"), Ok(()));
        assert_eq!(
            check("acme/pool/line3/result/hmi/7"),
            Err(TopicError::Prefix)
        );
        assert_eq!(check("acme/pool/line3/task/mes"), Err(TopicError::Own));
        assert_eq!(check("acme/pool/line3/cancel/mes"), Err(TopicError::Own));
        assert_eq!(
            check("millwright/v1/hamburg/gw-07/result/mes/7"),
            Err(TopicError::Prefix)
        );
        // The gateway's own rules, with a prefix that is wide: the pool's topics are closed, its tree is kept.
        let rules = ReplyRules::new(base(), &["acme".into()])
            .unwrap()
            .beside(pool);
        let check = |topic: &str| rules.check("mes", topic);
        assert_eq!(check("acme/pool/line3/task/mes"), Err(TopicError::Own));
        assert_eq!(
            check("acme/pool/line3/result/hmi/7"),
            Err(TopicError::Prefix)
        );
        assert_eq!(check("acme/pool/line3/result/mes/7"), Ok(()));
    }

    #[test]
    fn bases_are_whole_plain_levels() {
        for bad in ["", "/a", "a/", "a/+/b", "a b", "$share/x", "a\u{7}"] {
            assert!(Base::parse(bad).is_err(), "{bad:?}");
        }
        assert!(Base::of_gateway("a/b", "c").is_err());
        assert!(Base::parse("acme/hamburg/bottling/line3/edge/gw-07").is_ok());
    }

    proptest! {
        #[test]
        fn an_allowed_reply_is_never_an_inbound_topic(topic in "[a-z/+#$ ]{0,40}") {
            let rules = ReplyRules::new(Base::parse("a").unwrap(), &["a".into()]).unwrap();
            if rules.check("mes", &topic).is_ok() {
                prop_assert!(Base::parse("a").unwrap().inbound(&topic).is_none());
            }
        }
    }
}
