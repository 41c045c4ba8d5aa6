//! Where the log goes: to the journal with levels and fields where systemd has the process's stderr on it, else to stderr.

use std::io::IsTerminal;
use std::os::unix::fs::MetadataExt;
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// `MILLWRIGHT_LOG` says how much is logged, else `level`.
pub(crate) fn start(level: &str) {
    let asked = std::env::var("MILLWRIGHT_LOG").unwrap_or_else(|_| level.into());
    let filter = EnvFilter::new(filter(&asked));
    let is_journal = is_journal();
    let journal = is_journal.then(tracing_journald::layer);
    if let Some(Ok(journal)) = journal {
        // As other daemons do it: journald's "notice" is for more than the usual.
        let levels = PriorityMappings {
            info: Priority::Informational,
            debug: Priority::Debug,
            ..PriorityMappings::new()
        };
        let journal = journal
            .with_syslog_identifier("millwright".into())
            .with_field_prefix(Some("MILLWRIGHT".into()))
            .with_priority_mappings(levels);
        tracing_subscriber::registry()
            .with(filter)
            .with(journal)
            .init();
        return;
    }
    let stderr = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    if is_journal {
        // It has a time of its own.
        stderr.without_time().init();
    } else {
        stderr.init();
    }
}

/// Whether stderr is what systemd made of it: `JOURNAL_STREAM` outlives a redirection.
fn is_journal() -> bool {
    let stream = std::env::var("JOURNAL_STREAM");
    let stderr = std::fs::metadata("/proc/self/fd/2");
    stream.is_ok_and(|stream| {
        stderr.is_ok_and(|file| stream == format!("{}:{}", file.dev(), file.ino()))
    })
}

/// A level is that of our own crates: libraries log what passes through them. Who wants more of one names it, as
/// `RUST_LOG` does elsewhere (`debug,rustls=debug`). The MQTT client's own warnings repeat what we say better, and tract
/// warns of each opset that it was not tested with.
fn filter(asked: &str) -> String {
    const LIBRARIES: &str = "warn,rumqttc=off,tract_onnx=error";
    let asked = asked.split(',').map(|part| {
        let is_level = part.trim().parse::<LevelFilter>().is_ok();
        // All of our crates begin so.
        let own = if is_level { "millwright=" } else { "" };
        format!(",{own}{}", part.trim())
    });
    asked.fold(LIBRARIES.to_owned(), |all, part| all + &part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_that_of_our_own_crates() {
        let libraries = "warn,rumqttc=off,tract_onnx=error";
        assert_eq!(filter("info"), format!("{libraries},millwright=info"));
        assert_eq!(filter("TRACE"), format!("{libraries},millwright=TRACE"));
        assert_eq!(
            filter("debug, rustls=trace"),
            format!("{libraries},millwright=debug,rustls=trace")
        );
        assert_eq!(
            filter("warn,millwright_engine::guard=info"),
            format!("{libraries},millwright=warn,millwright_engine::guard=info")
        );
    }
}
