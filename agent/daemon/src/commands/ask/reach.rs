//! Where a question goes: the broker, and the gateway or the pool.

use super::Args;
use crate::broker::{Access, Files, Settings, tls};
use crate::clock::random;
use crate::config::{Config, is_loopback};
use anyhow::{Context, Result, bail, ensure};
use millwright_task::topic::Base;
use std::time::Duration;

/// The connection, and the gateway or the pool.
pub(super) fn reach(args: &Args) -> Result<(Settings, Base)> {
    let config = args.config.as_deref().map(Config::read).transpose()?;
    let mut settings = match &config {
        Some(config) => config.broker.clone(),
        None => direct(args)?,
    };
    settings.client_id = format!("millwright-ask-{:016x}", random());
    settings.session_expiry = Duration::ZERO;
    let base = match (&args.to, &args.pool, &config) {
        (Some(text), ..) => Base::parse(text).context("--to is no base topic")?,
        (None, Some(pool), config) => pool_base(pool, config.as_ref())?,
        (None, None, Some(config)) => config.base.clone(),
        (None, None, None) => {
            bail!("say which gateway: --to BASE, --config FILE, or --pool BASE for a pool")
        }
    };
    Ok((settings, base))
}

fn pool_base(pool: &str, config: Option<&Config>) -> Result<Base> {
    if pool.contains('/') {
        return Base::parse(pool).context("--pool is no base topic");
    }
    let config = config.context(
        "a pool's name needs --config FILE, which says the site; without it give the pool's base topic",
    )?;
    match &config.pool {
        Some(own) if own.name == pool => Ok(own.base.clone()),
        _ => Base::of_pool(&config.gateway.site, pool).context("--pool is no pool's name"),
    }
}

fn direct(args: &Args) -> Result<Settings> {
    let place = args.broker.as_deref().unwrap_or("127.0.0.1:1883");
    let (host, port) = place
        .rsplit_once(':')
        .with_context(|| format!("--broker must be HOST:PORT, not {place}"))?;
    let port = port
        .parse()
        .with_context(|| format!("--broker names no port: {place}"))?;
    let tls = args.ca.clone().map(|ca| tls::Files {
        ca,
        cert: args.cert.clone(),
        key: args.key.clone(),
    });
    let access = Access::read(Files {
        tls,
        user: args.user.clone(),
        password: args.password_file.clone(),
    })?;
    ensure!(
        access.has_tls() || args.plaintext || is_loopback(host),
        "{host} is another machine: give --ca FILE for TLS, or --plaintext if that is meant"
    );
    Ok(Settings {
        host: host.to_owned(),
        port,
        access,
        client_id: String::new(),
        keep_alive: Duration::from_secs(10),
        session_expiry: Duration::ZERO,
        will: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_named_by_its_base_or_beside_a_configuration() {
        let text = |more: &str| {
            format!(
                "[gateway]\nsite = 'hamburg'\nname = 'gw-07'\n[broker]\nhost = '127.0.0.1'\n\
                 [model]\nbundle = 'm'\nstate_dir = 's'\n{more}"
            )
        };
        let config = |more: &str| Config::parse(&text(more)).unwrap();
        let (none, own) = (
            config(""),
            config("[pool]\nname = 'pumps'\nbase = 'acme/pumps'"),
        );
        let base = |pool: &str, config| pool_base(pool, config).map(|base| base.to_string());
        assert_eq!(base("acme/pumps", None).unwrap(), "acme/pumps");
        let default = "millwright/v1/hamburg/pool/pumps";
        assert_eq!(base("pumps", Some(&none)).unwrap(), default);
        assert_eq!(base("pumps", Some(&own)).unwrap(), "acme/pumps");
        let other = "millwright/v1/hamburg/pool/presses";
        assert_eq!(base("presses", Some(&own)).unwrap(), other);
        assert!(base("pumps", None).is_err() && base("a/#", None).is_err());
        assert!(base("a b", Some(&none)).is_err());
    }
}
