//! The one place where time and chance are read. Everything below takes them as arguments.

use crate::journal::Stamp;
use millwright_task::Now;
use rustix::time::{ClockId, clock_gettime};
use serde::Deserialize;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// When this program was made: no clock before that is right. `cross/build` sets it; else it is a date in the
/// source, so that the same source makes the same program.
const BUILT: Duration = Duration::from_secs(later(1_790_000_000, option_env!("MILLWRIGHT_BUILT")));

/// The last wall time that was believed, in milliseconds: this clock's, or the journal's before that was; 0 if none was.
static BELIEVED_MS: AtomicU64 = AtomicU64::new(0);

const fn later(date: u64, seconds: Option<&str>) -> u64 {
    match seconds {
        Some(text) => match u64::from_str_radix(text, 10) {
            Ok(seconds) if seconds > date => seconds,
            _ => date,
        },
        None => date,
    }
}

/// What certificates are judged by: the latest of the wall clock, the journal's last write and the program's making. A
/// board without a battery wakes up in 1970, when no certificate was valid yet.
pub fn latest() -> Duration {
    let wall = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let journaled = Duration::from_millis(BELIEVED_MS.load(Ordering::Relaxed));
    wall.max(journaled).max(BUILT)
}

/// Whether the wall clock is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trust {
    /// By systemd-timesyncd's marker where that service runs, else by whether the time is plausible.
    #[default]
    Auto,
    Synced,
    Unsynced,
}

/// Reads the machine's clocks.
#[derive(Debug, Clone)]
pub struct Clock {
    trust: Trust,
    boot_id: String,
    /// The boot-time clock when this was made, and the gateway's own time then.
    began: Duration,
    own: Duration,
}

impl Clock {
    /// The gateway's own time begins, or goes on from where the journal was last written: by the boot-time clock in the
    /// same boot, by the wall clock over a reboot. Where that was not to be believed, the time in between counts as none.
    pub fn new(trust: Trust, last: Option<&Stamp>) -> Self {
        let boot_id =
            std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let mut clock = Self {
            trust,
            boot_id: boot_id.trim().to_owned(),
            began: boot_time(),
            own: Duration::ZERO,
        };
        if let Some(last) = last {
            BELIEVED_MS.store(last.wall_ms, Ordering::Relaxed);
            let now = clock.stamp();
            let passed = if last.boot_id == now.boot_id && !now.boot_id.is_empty() {
                now.boot_ms.saturating_sub(last.boot_ms)
            } else if last.synced && now.synced {
                now.wall_ms.saturating_sub(last.wall_ms)
            } else {
                0
            };
            clock.own = Duration::from_millis(last.own_ms.saturating_add(passed));
        }
        clock
    }

    /// Changes with every boot of the machine; empty where the kernel doesn't say.
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    pub fn now(&self) -> Now {
        let wall = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let (wall_ms, synced) = (wall.as_millis() as u64, self.synced(wall));
        if synced {
            BELIEVED_MS.store(wall_ms, Ordering::Relaxed);
        }
        Now {
            own: self.own + boot_time().saturating_sub(self.began),
            wall_ms,
            synced,
        }
    }

    /// The moment by all clocks.
    fn stamp(&self) -> Stamp {
        let now = self.now();
        Stamp {
            boot_id: self.boot_id.clone(),
            boot_ms: boot_time().as_millis() as u64,
            own_ms: now.own.as_millis() as u64,
            wall_ms: now.wall_ms,
            synced: now.synced,
        }
    }

    /// The same, for the journal. A wall clock that is not believed leaves the last one that was.
    pub fn journal(&self) -> Stamp {
        let mut stamp = self.stamp();
        if !stamp.synced {
            stamp.wall_ms = BELIEVED_MS.load(Ordering::Relaxed);
        }
        stamp
    }

    fn synced(&self, wall: Duration) -> bool {
        match self.trust {
            Trust::Synced => true,
            Trust::Unsynced => false,
            // A clock from before has lost its battery.
            Trust::Auto => timesync().unwrap_or(wall > BUILT),
        }
    }
}

/// Whether systemd-timesyncd has set the clock, where that service runs. Looked up once a second: the time is asked for
/// many times a task, and the look at files took a fifth of the agent's processor time.
fn timesync() -> Option<bool> {
    const FOLDER: &str = "/run/systemd/timesync";
    /// In which second of the boot-time clock it was looked up last, and the answer.
    static FOUND: Mutex<Option<(u64, Option<bool>)>> = Mutex::new(None);

    let second = boot_time().as_secs();
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((at, answer)) = *found
        && at == second
    {
        return answer;
    }
    let folder = Path::new(FOLDER);
    let answer = folder
        .is_dir()
        .then(|| folder.join("synchronized").exists());
    *found = Some((second, answer));
    answer
}

/// Time since the machine booted, suspend included.
fn boot_time() -> Duration {
    let boot = clock_gettime(ClockId::Boottime);
    Duration::new(boot.tv_sec.unsigned_abs(), boot.tv_nsec as u32)
}

/// 64 random bits from the kernel.
pub fn random() -> u64 {
    let mut bytes = [0u8; 8];
    // It can only fail before the kernel's pool was ever seeded; jitter and ids then fall back to the clock.
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(8) => u64::from_le_bytes(bytes),
        _ => clock_gettime(ClockId::Boottime).tv_nsec as u64 ^ u64::from(std::process::id()) << 32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is believed is the process's, so tests of it take turns.
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

    fn turn() -> std::sync::MutexGuard<'static, ()> {
        TURN.lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[test]
    fn clocks_move_and_trust_is_obeyed() {
        let _turn = turn();
        let clock = Clock::new(Trust::Unsynced, None);
        let (a, b) = (clock.now(), clock.now());
        assert!(b.own >= a.own && a.wall_ms > 1_700_000_000_000 && !a.synced);
        assert!(Clock::new(Trust::Synced, None).now().synced);
        assert_ne!(random(), random());
    }

    #[test]
    fn certificates_are_judged_by_the_latest_time_that_is_known() {
        let _turn = turn();
        let at = |seconds| later(1_790_000_000, seconds);
        assert_eq!(at(None), 1_790_000_000);
        assert_eq!(at(Some("1800000000")), 1_800_000_000);
        for text in ["1", "", "yesterday", "-1"] {
            assert_eq!(at(Some(text)), 1_790_000_000, "{text}");
        }
        let wall = SystemTime::UNIX_EPOCH.elapsed().unwrap();
        assert!(latest() >= wall.max(BUILT));
        // A believed clock replaces what the journal said; another keeps it.
        let ahead = wall.as_millis() as u64 + 3_600_000;
        let last = Stamp {
            wall_ms: ahead,
            ..Clock::new(Trust::Synced, None).stamp()
        };
        let unsynced = Clock::new(Trust::Unsynced, Some(&last));
        assert_eq!(latest(), Duration::from_millis(ahead));
        assert_eq!(unsynced.journal().wall_ms, ahead);
        // At once, not only when the journal is next written: nothing may connect until then.
        assert!(Clock::new(Trust::Synced, Some(&last)).now().wall_ms < ahead);
        assert!(latest() < Duration::from_millis(ahead));
    }

    #[test]
    fn own_time_goes_on_over_restarts_and_reboots() {
        let _turn = turn();
        let hour = 3_600_000;
        let here = Clock::new(Trust::Synced, None).stamp();
        let at = |boot_id: &str, boot_ms, wall_ms, synced| Stamp {
            boot_id: boot_id.into(),
            boot_ms,
            own_ms: 100 * hour,
            wall_ms,
            synced,
        };
        let (same, boot, wall) = (here.boot_id.as_str(), here.boot_ms, here.wall_ms);
        let cases = [
            // The process was away for an hour, whatever the wall clock says.
            (
                at(same, boot.saturating_sub(hour), 0, false),
                boot.min(hour),
            ),
            (at(same, boot, wall + 5 * hour, true), 0),
            // The machine was off for an hour, if both its clocks can be believed.
            (at("other", 7 * hour, wall - hour, true), hour),
            (at("other", 7 * hour, wall - hour, false), 0),
            // A wall clock that went backwards.
            (at("other", 7 * hour, wall + hour, true), 0),
        ];
        for (last, passed) in cases {
            let own = Clock::new(Trust::Synced, Some(&last)).now().own.as_millis() as u64;
            let expected = 100 * hour + passed;
            let about = expected..expected + 60_000;
            assert!(about.contains(&own), "{last:?}: {own} is not {expected}");
        }
        let last = at("other", 0, wall - hour, true);
        let own = Clock::new(Trust::Unsynced, Some(&last)).now().own;
        assert!(own < Duration::from_millis(101 * hour));
    }
}
