//! How the machine is. Reads sensors; a sensor that isn't there is null, never 0. Judges nothing.

use millwright_task::pressure::Reading;
use serde::Serialize;
use std::path::{Path, PathBuf};
use sysinfo::{
    Component, Components, Disk, Disks, Networks, ProcessRefreshKind, ProcessesToUpdate, System,
    get_current_pid,
};

/// Where a Raspberry Pi's firmware says whether it throttles.
const THROTTLED: &str = "/sys/devices/platform/soc/soc:firmware/get_throttled";

/// °C at which a board is taken to throttle that doesn't say it.
const TEMPERATURE_LIMIT: f32 = 85.0;

/// One look at the machine. Bytes are bytes, temperatures °C, times seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    /// Of all cores together, 0–100; null in the first sample, which has nothing to compare with.
    cpu_percent: Option<f32>,
    load: Option<[f64; 3]>,
    memory_used: Option<u64>,
    memory_available: Option<u64>,
    agent_memory: Option<u64>,
    swap_used: Option<u64>,
    disk_free: Option<u64>,
    temperature: Option<f32>,
    temperature_limit: Option<f32>,
    throttling_now: Option<bool>,
    throttling_since_boot: Option<bool>,
    pressure: Pressure,
    uptime_s: Option<u64>,
    network_received: Option<u64>,
    network_sent: Option<u64>,
}

impl Machine {
    /// What may make the agent step back. `limit` is the board's, where it is configured.
    pub fn reading(&self, limit: Option<f32>) -> Reading {
        let limit = limit
            .or(self.temperature_limit)
            .unwrap_or(TEMPERATURE_LIMIT);
        let memory = self.memory_available.zip(self.memory_used);
        Reading {
            temperature: self.temperature.map(|degrees| (degrees, limit)),
            throttling: self.throttling_now,
            memory_available: memory
                .map(|(free, used)| free as f32 / (free.saturating_add(used)).max(1) as f32),
            memory_stall: self.pressure.memory,
            io_stall: self.pressure.io,
        }
    }
}

/// Pressure stall: the share of the last ten seconds in which some task waited, in percent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Pressure {
    cpu: Option<f32>,
    memory: Option<f32>,
    io: Option<f32>,
}

/// The sensors.
pub struct Probe {
    system: Option<System>,
    components: Option<Components>,
    networks: Option<Networks>,
    disks: Option<Disks>,
    /// The disk that matters is the one that holds this.
    state_dir: PathBuf,
    first: bool,
}

impl Probe {
    pub fn new(state_dir: &Path) -> Self {
        Self {
            system: System::new().ok(),
            components: Components::new_with_refreshed_list().ok(),
            networks: Networks::new_with_refreshed_list().ok(),
            disks: Disks::new_with_refreshed_list().ok(),
            state_dir: state_dir
                .canonicalize()
                .unwrap_or_else(|_| PathBuf::from("/")),
            first: true,
        }
    }

    /// Looks now. Takes some milliseconds: call it away from the tasks.
    pub fn look(&mut self) -> Machine {
        if let Some(system) = &mut self.system {
            system.refresh_cpu_usage();
            system.refresh_memory();
        }
        self.components.iter_mut().for_each(|c| c.refresh(false));
        self.networks.iter_mut().for_each(|n| n.refresh(false));
        self.disks.iter_mut().for_each(|d| d.refresh(false));
        let agent_memory = self.own_memory();
        let first = std::mem::take(&mut self.first);
        let throttled = throttled(&read(THROTTLED));
        let warm = |c: &&Component| c.temperature().is_some_and(f32::is_finite);
        let degrees = |c: &Component| c.temperature().unwrap_or_default();
        let components = self.components.iter().flat_map(|list| list.iter());
        let hottest = components
            .filter(warm)
            .max_by(|a, b| degrees(a).total_cmp(&degrees(b)));
        let networks = || self.networks.iter().flat_map(|list| list.iter());
        let wires = || networks().filter(|(name, _)| *name != "lo").map(|(_, n)| n);
        let wired = wires().next().is_some();
        let system = self.system.as_ref();
        Machine {
            cpu_percent: system
                .filter(|_| !first)
                .map(|s| round(s.global_cpu_usage())),
            load: System::load_average()
                .ok()
                .map(|l| [l.one, l.five, l.fifteen]),
            memory_used: system.map(System::used_memory),
            memory_available: system.map(System::available_memory),
            agent_memory,
            swap_used: system.map(System::used_swap),
            disk_free: self.disk_free(),
            temperature: hottest.and_then(sysinfo::Component::temperature).map(round),
            temperature_limit: hottest
                .and_then(sysinfo::Component::critical)
                .filter(|t| t.is_finite())
                .map(round),
            throttling_now: throttled.map(|bits| bits & 0xf != 0),
            throttling_since_boot: throttled.map(|bits| bits & 0xf_0000 != 0),
            pressure: Pressure {
                cpu: pressure(&read("/proc/pressure/cpu")),
                memory: pressure(&read("/proc/pressure/memory")),
                io: pressure(&read("/proc/pressure/io")),
            },
            uptime_s: System::uptime().ok(),
            network_received: wired
                .then(|| wires().map(sysinfo::NetworkData::total_received).sum()),
            network_sent: wired.then(|| wires().map(sysinfo::NetworkData::total_transmitted).sum()),
        }
    }

    fn own_memory(&mut self) -> Option<u64> {
        let (pid, system) = (get_current_pid().ok()?, self.system.as_mut()?);
        let what = ProcessRefreshKind::nothing().with_memory();
        system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, what);
        system.process(pid).map(sysinfo::Process::memory)
    }

    fn disk_free(&self) -> Option<u64> {
        let holds = |d: &&Disk| self.state_dir.starts_with(d.mount_point());
        let depth = |d: &&Disk| d.mount_point().as_os_str().len();
        let disks = self.disks.iter().flat_map(|list| list.iter());
        disks
            .filter(holds)
            .max_by_key(depth)
            .map(Disk::available_space)
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// `some avg10=1.23 avg60=…` of a pressure file.
fn pressure(text: &str) -> Option<f32> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    some.split(' ')
        .find_map(|field| field.strip_prefix("avg10="))?
        .parse()
        .ok()
}

/// The firmware's bits: 0–3 are now, 16–19 since boot (under-voltage, capped, throttled, soft limit).
fn throttled(text: &str) -> Option<u32> {
    let text = text.trim();
    u32::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
}

fn round(x: f32) -> f32 {
    (x * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sensor_files_are_read_and_absent_ones_are_null() {
        let text = "some avg10=1.25 avg60=0.50 avg300=0.10 total=9\nfull avg10=9.00 avg60=0 avg300=0 total=0\n";
        assert_eq!(pressure(text), Some(1.25));
        assert_eq!((pressure(""), pressure("some total=3")), (None, None));
        assert_eq!(
            (throttled("50005\n"), throttled("0x4"), throttled("")),
            (Some(0x50005), Some(4), None)
        );
    }

    #[test]
    fn this_machine_can_be_looked_at() {
        let mut probe = Probe::new(Path::new("/"));
        let machine = probe.look();
        assert_eq!(machine.cpu_percent, None);
        assert!(
            machine.memory_available.is_some_and(|bytes| bytes > 0)
                && machine.agent_memory.is_some_and(|bytes| bytes > 0)
        );
        assert!(probe.look().cpu_percent.is_some());
    }
}
