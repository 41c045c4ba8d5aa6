//! `[pool]`: the pool that a gateway is in, checked beside the gateway's own topics.

use super::Gateway;
use crate::broker::Settings;
use anyhow::{Context, Result, ensure};
use millwright_task::topic::{Base, ReplyRules, sender_is_plain};
use serde::Deserialize;
use std::time::Duration;

/// The pool that this gateway is in.
#[derive(Debug, Clone)]
pub struct Pool {
    pub name: String,
    pub base: Base,
    /// Where answers to the pool's tasks may go.
    pub reply_rules: ReplyRules,
    /// The pool's own connection.
    pub broker: Settings,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawPool {
    name: String,
    base: Option<String>,
}

impl RawPool {
    pub(super) fn check(
        self,
        gateway: &Gateway,
        own: &Base,
        prefixes: &[String],
        broker: &Settings,
    ) -> Result<Pool> {
        let name = self.name;
        ensure!(
            sender_is_plain(&name),
            "pool.name must be one topic level without space, + or #"
        );
        ensure!(
            name != gateway.name,
            "pool.name is the gateway's own name: a pool needs another"
        );
        let base = match &self.base {
            Some(base) => Base::parse(base),
            None => Base::of_pool(&gateway.site, &name),
        };
        let base = base
            .map_err(|e| anyhow::anyhow!("pool.base, or site and name, don't make a topic: {e}"))?;
        ensure!(
            !base.overlaps(own),
            "pool.base {base} and the gateway's base {own} must not lie within each other"
        );
        ensure!(
            !base.is_gateways(),
            "pool.base {base} is a gateway's default base, whose tasks the pool would take"
        );
        let reply_rules = ReplyRules::new(base.clone(), prefixes)
            .context("tasks.reply_prefixes")?
            .beside(own.clone());
        // A dead member holds nothing back: its session ends with it. And its death is told by the other connection.
        let broker = Settings {
            client_id: format!("{}-pool", broker.client_id),
            session_expiry: Duration::ZERO,
            will: None,
            ..broker.clone()
        };
        Ok(Pool {
            name,
            base,
            reply_rules,
            broker,
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;
    use std::time::Duration;

    const SMALL: &str = "[gateway]\nsite = 'hamburg'\nname = 'gw-07'\n[broker]\nhost = '127.0.0.1'\n[model]\nbundle = 'm'\nstate_dir = 's'\n[pool]\n";

    #[track_caller]
    fn fails(lines: &str, word: &str) {
        let error = Config::parse(&format!("{SMALL}{lines}")).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(word), "{word}: {error}");
    }

    #[test]
    fn a_pool_has_a_base_and_a_connection_of_its_own() {
        let config = Config::parse(&format!("{SMALL}name = 'line3'")).unwrap();
        let pool = config.pool.unwrap();
        assert_eq!(pool.base.to_string(), "millwright/v1/hamburg/pool/line3");
        assert_eq!(
            (pool.broker.client_id.as_str(), pool.broker.session_expiry),
            ("millwright-hamburg-gw-07-pool", Duration::ZERO)
        );
        assert!(config.broker.session_expiry > Duration::ZERO);
        let answer = "millwright/v1/hamburg/pool/line3/result/mes/7";
        assert!(pool.reply_rules.check("mes", answer).is_ok());
        assert!(config.reply_rules.check("mes", answer).is_err());
        let named = Config::parse(&format!("{SMALL}name = 'line3'\nbase = 'acme/line3'")).unwrap();
        assert_eq!(named.pool.unwrap().base.to_string(), "acme/line3");
    }

    #[test]
    fn what_makes_no_pool_is_named() {
        for name in ["", "a/b", "a b", "+", "$share/x"] {
            fails(&format!("name = '{name}'"), "pool.name");
        }
        fails(&format!("name = '{}'", "x".repeat(129)), "pool.name");
        fails("name = 'gw-07'", "gateway's own name");
        fails("base = 'a'", "name");
        fails("name = 'p'\nbase = 'a/#'", "pool.base");
        fails("name = 'p'\nmembers = 3", "members");
        for base in [
            "millwright/v1/hamburg/gw-07",
            "millwright/v1/hamburg/gw-07/p",
            "millwright",
        ] {
            fails(&format!("name = 'p'\nbase = '{base}'"), "within each other");
        }
        fails(
            "name = 'p'\nbase = 'millwright/v1/hamburg/gw-08'",
            "a gateway's default base",
        );
        // The pools' level is no gateway's.
        let error = Config::parse(&SMALL.replace("gw-07", "pool").replace("[pool]\n", ""));
        assert!(format!("{:#}", error.unwrap_err()).contains("no gateway's name"));
    }
}
