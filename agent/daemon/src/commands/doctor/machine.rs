//! The machine: sensors, clock, and whether an agent runs on it. Changes nothing.

use super::report::Finding;
use crate::clock::{Clock, Trust};
use crate::probe::Probe;
use millwright_task::calendar;
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Whether the sensors are there that the agent steps back by.
pub(super) fn sensors(state_dir: &Path, limit: Option<f32>) -> Vec<Finding> {
    const CHECK: &str = "sensors";
    let reading = Probe::new(state_dir).look().reading(limit);
    let mut all = Vec::new();
    match reading.temperature {
        Some((degrees, limit)) if degrees >= limit - 10.0 => all.push(Finding::warning(
            CHECK,
            format!("the processor has {degrees:.0} °C and throttles at {limit:.0}: the agent takes less of it already"),
            "cool the box",
        )),
        Some((degrees, limit)) => all.push(Finding::ok(
            CHECK,
            format!("the processor has {degrees:.0} °C; the agent takes less of it from {:.0} on", limit - 10.0),
        )),
        None => all.push(
            Finding::note(CHECK, "no temperature of the processor: the agent can't step back before it is too hot")
                .advising("expected on a virtual machine; on a board, load the kernel's thermal driver"),
        ),
    }
    match reading.throttling {
        Some(now) => all.push(Finding::ok(
            CHECK,
            format!("the firmware tells throttling; now: {now:?}").to_lowercase(),
        )),
        None => all.push(Finding::note(
            CHECK,
            "no firmware here tells throttling or a weak supply (only the Raspberry Pi's does)",
        )),
    }
    all
}

/// Whether the clock is right, or is at least kept so by something.
pub(super) fn clock(trust: Trust) -> Finding {
    const CHECK: &str = "clock";
    const TIMESYNC: &str = "/run/systemd/timesync";
    let now = Clock::new(trust, None).now();
    let at = calendar::format(now.wall_ms);
    let sync = "have the clock synchronised (systemd-timesyncd, chrony, PTP): deadlines by the clock are refused without, \
                and certificates judged by the program's build date";
    match (trust, now.synced) {
        (Trust::Synced, _) => Finding::note(CHECK, format!("{at}, believed because agent.clock says so")),
        (Trust::Unsynced, _) => Finding::note(CHECK, format!("{at}, not believed because agent.clock says so")),
        (Trust::Auto, false) => Finding::warning(CHECK, format!("{at}, which is not synchronised"), sync),
        (Trust::Auto, true) if Path::new(TIMESYNC).is_dir() => {
            Finding::ok(CHECK, format!("{at}, synchronised by systemd-timesyncd"))
        }
        (Trust::Auto, true) => Finding::note(
            CHECK,
            format!("{at}, which is plausible and so believed; there is no systemd-timesyncd that says more"),
        )
        .advising("make sure that something keeps it right (chronyc tracking, ptp4l), or set agent.clock"),
    }
}

/// Whether an agent runs on this machine with this state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Agent {
    /// As this process.
    Runs(u32),
    Absent,
    /// The journal, or who holds it, can't be seen.
    Unknown,
}

/// The process that holds the journal, as far as the kernel shows it: the file itself is not opened.
pub(super) fn agent(state_dir: &Path) -> Agent {
    match state_dir.join("journal.redb").metadata() {
        Ok(data) => {
            fs::read_to_string("/proc/locks").map_or(Agent::Unknown, |locks| holder(&locks, &data))
        }
        Err(e) if e.kind() == ErrorKind::NotFound => Agent::Absent,
        Err(_) => Agent::Unknown,
    }
}

fn holder(locks: &str, file: &Metadata) -> Agent {
    let (major, minor) = (rustix::fs::major(file.dev()), rustix::fs::minor(file.dev()));
    let (device, inode) = (format!("{major:02x}:{minor:02x}"), file.ino().to_string());
    let mut found = Agent::Absent;
    for line in locks.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let mut pairs = words.windows(2);
        let Some((pid, on)) = pairs.find_map(|pair| {
            let (on, number) = pair[1].rsplit_once(':')?;
            (on.contains(':') && number == inode).then_some((pair[0], on))
        }) else {
            continue;
        };
        found = match pid.parse().ok() {
            Some(pid) if on == device => return Agent::Runs(pid),
            // A file system that spans devices, as btrfs does, shows the file under another number than the lock.
            _ => Agent::Unknown,
        };
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn who_holds_the_journal_is_read_off_the_kernels_locks() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(agent(dir.path()), Agent::Absent);
        let path = dir.path().join("journal.redb");
        let file = File::create(&path).unwrap();
        assert_eq!(agent(dir.path()), Agent::Absent);
        file.lock().unwrap();
        assert_eq!(agent(dir.path()), Agent::Runs(std::process::id()));
        drop(file);
        let data = path.metadata().unwrap();
        let of = |locks: &str| holder(locks, &data);
        assert_eq!(of("nonsense\n1: FLOCK\n"), Agent::Absent);
        let elsewhere = format!("1: FLOCK  ADVISORY  WRITE 7 fe:ee:{} 0 EOF\n", data.ino());
        assert_eq!(of(&elsewhere), Agent::Unknown);
        // Below a file there is nothing, and that is another error than absence.
        assert_eq!(agent(&path), Agent::Unknown);
    }
}
