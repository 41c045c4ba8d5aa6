//! How the machine is. Reads sensors; a sensor that isn't there is null, never 0. Judges nothing.

use millwright_task::pressure::{Reading, Throttling};
use serde::Serialize;
use std::path::{Path, PathBuf};
use sysinfo::{
    Component, Components, Disk, Disks, Networks, ProcessRefreshKind, ProcessesToUpdate, System,
    get_current_pid,
};

/// Where a Raspberry Pi's firmware says whether it throttles: up to the 4, and the 5.
const THROTTLED: [&str; 2] = [
    "/sys/devices/platform/soc/soc:firmware/get_throttled",
    "/sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled",
];
/// Parts of the names of sensors that are a processor's. Others may be hot, or float, without any harm to it.
const PROCESSORS: [&str; 8] = [
    "coretemp", "k10temp", "zenpower", "cpu", "soc", "package", "tctl", "core",
];
/// °C at which a processor is taken to throttle that doesn't say it; and at most on ARM, where the critical point that the
/// kernel names is where it switches off.
const TEMPERATURE_LIMIT: f32 = if cfg!(target_arch = "x86_64") {
    95.0
} else {
    85.0
};
/// What a sensor of a processor can say; others are not connected, or have no limit.
const TEMPERATURES: std::ops::Range<f32> = -40.0..125.0;
const LIMITS: std::ops::RangeInclusive<f32> = 40.0..=150.0;

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
    /// The processor's alone, and its limit.
    #[serde(skip)]
    processor: Option<(f32, Option<f32>)>,
    #[serde(skip)]
    throttled: Option<u32>,
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
        let limited = |(degrees, own): (f32, Option<f32>)| {
            let own = own.filter(|own| LIMITS.contains(own));
            let own = own.filter(|own| cfg!(target_arch = "x86_64") || *own < TEMPERATURE_LIMIT);
            (degrees, limit.or(own).unwrap_or(TEMPERATURE_LIMIT))
        };
        let memory = self.memory_available.zip(self.memory_used);
        let memory = memory.map(|(free, used)| (free, free.saturating_add(used)));
        Reading {
            temperature: self.processor.map(limited),
            throttling: self.throttled.map(throttling),
            memory: memory.filter(|(_, all)| *all > 0),
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
        let throttled = THROTTLED.iter().find_map(|path| throttled(&read(path)));
        let warm = |c: &&Component| c.temperature().is_some_and(f32::is_finite);
        let degrees = |c: &Component| c.temperature().unwrap_or_default();
        let components = self.components.iter().flat_map(|list| list.iter());
        let warm: Vec<_> = components.filter(warm).collect();
        let hotter = |a: &&&Component, b: &&&Component| degrees(a).total_cmp(&degrees(b));
        let hottest = warm.iter().max_by(hotter);
        let processors = warm.iter().filter(|c| is_processor(c.label(), degrees(c)));
        let processor = processors.max_by(hotter);
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
            temperature: hottest.and_then(|c| c.temperature()).map(round),
            temperature_limit: hottest
                .and_then(|c| c.critical())
                .filter(|t| t.is_finite())
                .map(round),
            processor: processor.map(|c| (degrees(c), c.critical())),
            throttled,
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

fn throttling(bits: u32) -> Throttling {
    match bits & 0xf {
        0 => Throttling::None,
        // Under-voltage, the soft limit.
        now if now & 0b0110 == 0 => Throttling::Warned,
        _ => Throttling::Held,
    }
}

fn is_processor(label: &str, degrees: f32) -> bool {
    let label = label.to_lowercase();
    TEMPERATURES.contains(&degrees) && PROCESSORS.iter().any(|name| label.contains(name))
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
    fn what_is_no_processor_or_no_temperature_is_not_judged() {
        for label in [
            "coretemp Package id 0",
            "k10temp Tctl",
            "cpu_thermal temp1",
            "soc-thermal",
        ] {
            assert!(is_processor(label, 60.0), "{label}");
        }
        for (label, degrees) in [
            ("nvme Composite", 80.0),
            ("iwlwifi_1 temp1", 90.0),
            ("coretemp Core 0", 127.0),
            ("cpu_thermal", f32::NAN),
        ] {
            assert!(!is_processor(label, degrees), "{label}");
        }
        let mut machine = Probe::new(Path::new("/")).look();
        let mut limit = |own, configured| {
            machine.processor = Some((60.0, own));
            machine
                .reading(configured)
                .temperature
                .map(|(_, limit)| limit)
        };
        let odd = [
            None,
            Some(-273.15),
            Some(0.0),
            Some(65261.85),
            Some(f32::NAN),
        ];
        assert!(
            odd.iter()
                .all(|own| limit(*own, None) == Some(TEMPERATURE_LIMIT))
        );
        assert_eq!(limit(Some(80.0), None), Some(80.0));
        assert_eq!(limit(Some(80.0), Some(70.0)), Some(70.0));
        (machine.memory_available, machine.memory_used) = (Some(0), Some(0));
        assert_eq!(machine.reading(None).memory, None);
    }

    #[test]
    fn the_firmwares_bits_are_told_apart() {
        for (bits, wanted) in [
            (0, Throttling::None),
            (0xf_0000, Throttling::None),
            (1, Throttling::Warned),
            (8, Throttling::Warned),
            (2, Throttling::Held),
            (5, Throttling::Held),
        ] {
            assert_eq!(throttling(bits), wanted, "{bits:x}");
        }
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
