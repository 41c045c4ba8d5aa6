//! The one place where time and chance are read. Everything below takes them as arguments.

use millwright_task::Now;
use rustix::time::{ClockId, clock_gettime};
use serde::Deserialize;
use std::path::Path;
use std::time::{Duration, SystemTime};

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
}

impl Clock {
    pub fn new(trust: Trust) -> Self {
        let boot_id =
            std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            trust,
            boot_id: boot_id.trim().to_owned(),
        }
    }

    /// Changes with every boot of the machine; empty where the kernel doesn't say.
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    pub fn now(&self) -> Now {
        let boot = clock_gettime(ClockId::Boottime);
        let wall = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Now {
            boot: Duration::new(boot.tv_sec.unsigned_abs(), boot.tv_nsec as u32),
            wall_ms: wall.as_millis() as u64,
            synced: self.synced(wall),
        }
    }

    fn synced(&self, wall: Duration) -> bool {
        const TIMESYNC: &str = "/run/systemd/timesync";
        // No machine runs this before it was written: a clock before that has lost its battery.
        const PLAUSIBLE: Duration = Duration::from_secs(1_790_000_000);
        match self.trust {
            Trust::Synced => true,
            Trust::Unsynced => false,
            Trust::Auto if Path::new(TIMESYNC).is_dir() => {
                Path::new(TIMESYNC).join("synchronized").exists()
            }
            Trust::Auto => wall > PLAUSIBLE,
        }
    }
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

    #[test]
    fn clocks_move_and_trust_is_obeyed() {
        let clock = Clock::new(Trust::Unsynced);
        let (a, b) = (clock.now(), clock.now());
        assert!(b.boot >= a.boot && a.wall_ms > 1_700_000_000_000 && !a.synced);
        assert!(Clock::new(Trust::Synced).now().synced);
        assert_ne!(random(), random());
    }
}
