//! The disk that the state lies on: its room, its kind and its speed. Writes a file of its own, for a moment.

use super::report::Finding;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Synced writes that the disk is judged by, and the time that they may take together.
const WRITES: usize = 15;
const PATIENCE: Duration = Duration::from_secs(5);
/// A disk that syncs this slowly is heard in each answer, or holds the agent up.
const SLOW: Duration = Duration::from_millis(20);
const TOO_SLOW: Duration = Duration::from_millis(200);
/// What journal and log may grow to, beside the packed weights that are reckoned with the model.
const FREE_BYTES_LEAST: u64 = 64 << 20;

/// The disk: its kind, its room and its speed.
pub(super) fn check(state_dir: &Path) -> Vec<Finding> {
    // Before the first start there is none; its disk is that of the folder above.
    let there = state_dir.ancestors().find(|dir| dir.is_dir());
    let Some(dir) = there.map(|dir| {
        if dir.as_os_str().is_empty() {
            Path::new(".")
        } else {
            dir
        }
    }) else {
        return vec![Finding::problem(
            "disk",
            format!("{} can't be made", state_dir.display()),
            "make model.state_dir",
        )];
    };
    let mut all = vec![free(dir)];
    all.extend(kind(
        Path::new("/sys"),
        &fs::read_to_string("/proc/self/mountinfo").unwrap_or_default(),
        dir,
    ));
    all.push(speed(dir));
    all
}

fn free(dir: &Path) -> Finding {
    const CHECK: &str = "disk";
    let place = dir.display();
    match rustix::fs::statvfs(dir) {
        Ok(stat) => {
            let bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
            let says = format!("{} MB are free on the disk of {place}", bytes / 1_000_000);
            if bytes < FREE_BYTES_LEAST {
                return Finding::problem(
                    CHECK,
                    says,
                    "make room: the journal needs some, the packed weights as much as the model",
                );
            }
            Finding::ok(CHECK, says)
        }
        Err(e) => Finding::problem(
            CHECK,
            format!("{place} can't be looked at: {e}"),
            "check model.state_dir",
        ),
    }
}

/// How long the disk takes for what an acceptance waits for.
fn speed(dir: &Path) -> Finding {
    const CHECK: &str = "disk speed";
    match sync_time(dir) {
        Ok(median) => {
            let ms = median.as_secs_f64() * 1e3;
            let says = format!(
                "4 KiB are on disk after {ms:.2} ms (the median of {WRITES}); a task waits for two of these"
            );
            let advice = "expect slow acceptance; a better card, eMMC or an SSD for model.state_dir, or fewer other writers, helps";
            match median {
                t if t >= TOO_SLOW => Finding::warning(CHECK, format!("{says}: very slow"), advice),
                t if t >= SLOW => Finding::warning(CHECK, format!("{says}: slow"), advice),
                _ => Finding::ok(CHECK, says),
            }
        }
        Err(e) => Finding::problem(
            CHECK,
            format!("{} can't be written: {e}", dir.display()),
            "run this as the agent's user or as root; if the agent can't write there either, it will not start",
        ),
    }
}

fn sync_time(dir: &Path) -> io::Result<Duration> {
    let path = dir.join(format!(".doctor-{}", std::process::id()));
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    let written = timings(&mut file);
    fs::remove_file(&path)?;
    let mut timings = written?;
    timings.sort();
    Ok(timings[timings.len() / 2])
}

fn timings(file: &mut File) -> io::Result<Vec<Duration>> {
    let began = Instant::now();
    let mut all = Vec::new();
    while all.is_empty() || (all.len() < WRITES && began.elapsed() < PATIENCE) {
        let at = Instant::now();
        file.write_all(&[0x5a; 4096])?;
        file.sync_data()?;
        all.push(at.elapsed());
    }
    Ok(all)
}

/// What kind of memory the folder lies on, and how worn it says it is.
fn kind(sys: &Path, mounts: &str, dir: &Path) -> Option<Finding> {
    const CHECK: &str = "flash";
    let dir = dir.canonicalize().ok()?;
    let mount = mount(mounts, &dir)?;
    match mount.kind {
        "tmpfs" | "ramfs" => {
            return Some(Finding::problem(
                CHECK,
                format!(
                    "{} is in memory ({}): a power cut loses accepted tasks",
                    dir.display(),
                    mount.kind
                ),
                "put model.state_dir on a disk",
            ));
        }
        "overlay" => {
            return Some(Finding::warning(
                CHECK,
                format!(
                    "{} is a container's own layer: what is kept there goes with the container",
                    dir.display()
                ),
                "mount a volume for model.state_dir",
            ));
        }
        "nfs" | "nfs4" | "cifs" | "9p" => {
            return Some(Finding::warning(
                CHECK,
                format!(
                    "{} is on the network ({}): the journal waits for it, and is lost where it lies about syncs",
                    dir.display(),
                    mount.kind
                ),
                "put model.state_dir on a disk of the box",
            ));
        }
        _ => {}
    }
    // A file system that spans devices has no number of its own: then the mount's source leads there.
    let (major, minor) = mount.device;
    let by_number = sys.join(format!("dev/block/{major}:{minor}"));
    let by_name = mount
        .source
        .strip_prefix("/dev/")
        .map(|name| sys.join("class/block").join(name));
    let device = by_number
        .canonicalize()
        .ok()
        .or_else(|| by_name?.canonicalize().ok())?;
    Some(device_kind(&device))
}

fn device_kind(device: &Path) -> Finding {
    const CHECK: &str = "flash";
    // A partition lies within its disk.
    let disk = if device.join("partition").exists() {
        device.parent().unwrap_or(device)
    } else {
        device
    };
    let name = disk
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let says = |file: &str| {
        fs::read_to_string(disk.join(file))
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let writes = "the journal writes some 84 KB for each task that comes alone, and 0.6 MB in an idle day (tests/cost)";
    if name.starts_with("mmcblk") {
        let is_card = says("device/type") == "SD";
        // In tenths of its life, 1 to 11; two kinds of cells.
        let life = says("device/life_time");
        let worn = life.split_whitespace().filter_map(hex).max();
        let is_near_its_end = hex(&says("device/pre_eol_info")).is_some_and(|state| state > 1);
        if is_near_its_end || worn.is_some_and(|tenths| tenths >= 9) {
            return Finding::warning(
                CHECK,
                format!(
                    "{name} is flash that says it is near the end of its life ({} %)",
                    worn.unwrap_or(10) * 10
                ),
                "replace it, or move model.state_dir",
            );
        }
        if is_card {
            return Finding::warning(
                CHECK,
                format!(
                    "{name} is an SD card: it wears, and some lose what they said was written; {writes}"
                ),
                "use an industrial card, eMMC or an SSD where many tasks come",
            );
        }
        let worn = worn.map_or_else(
            || "it doesn't say how worn it is".into(),
            |tenths| format!("up to {} % worn", tenths * 10),
        );
        return Finding::ok(CHECK, format!("{name} is eMMC, {worn}; {writes}"));
    }
    if name.starts_with("mtd") || name.starts_with("ubi") {
        return Finding::note(CHECK, format!("{name} is raw flash; {writes}"));
    }
    let removable = says("removable") == "1";
    let what = match (says("queue/rotational").as_str(), &name) {
        _ if removable => "a removable disk",
        (_, name) if name.starts_with("nvme") => "an NVMe disk",
        (_, name) if name.starts_with("vd") || name.starts_with("xvd") => "a virtual disk",
        ("1", _) => "a disk that turns, or one that doesn't say what it is",
        _ => "a disk without moving parts",
    };
    let found = format!("{name} is {what}");
    if removable {
        return Finding::warning(CHECK, found, "use a disk that can't be pulled out");
    }
    Finding::ok(CHECK, found)
}

fn hex(text: &str) -> Option<u32> {
    u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
}

/// Where a folder's file system comes from.
#[derive(Debug, PartialEq)]
struct Mount<'a> {
    device: (u32, u32),
    kind: &'a str,
    source: &'a str,
}

/// Of `/proc/self/mountinfo`, the line of the innermost mount that holds a path; the later one lies above.
fn mount<'a>(mountinfo: &'a str, path: &Path) -> Option<Mount<'a>> {
    let lines = mountinfo.lines().filter_map(|line| {
        let (front, back) = line.split_once(" - ")?;
        let mut front = front.split(' ').skip(2);
        let (major, minor) = front.next()?.split_once(':')?;
        // Spaces in it are written so.
        let at = front.nth(1)?.replace("\\040", " ");
        let mut back = back.split(' ');
        let mount = Mount {
            device: (major.parse().ok()?, minor.parse().ok()?),
            kind: back.next()?,
            source: back.next()?,
        };
        path.starts_with(&at).then_some((at.len(), mount))
    });
    lines
        .max_by_key(|(length, _)| *length)
        .map(|(_, mount)| mount)
}

#[cfg(test)]
mod tests {
    use super::super::report::Level;
    use super::*;

    const MOUNTS: &str = "22 1 179:2 / / rw,relatime - ext4 /dev/mmcblk0p2 rw\n\
        30 22 0:20 / /run rw - tmpfs tmpfs rw\n\
        31 22 0:44 / /var/lib/my\\040state rw - btrfs /dev/sda1 rw\n";

    #[test]
    fn the_innermost_mount_counts() {
        let of = |path: &str| mount(MOUNTS, Path::new(path)).unwrap().source;
        assert_eq!(of("/var/lib/millwright"), "/dev/mmcblk0p2");
        assert_eq!(of("/run/x"), "tmpfs");
        assert_eq!(of("/var/lib/my state/x"), "/dev/sda1");
        assert_eq!(mount("", Path::new("/")), None);
        assert_eq!(
            mount("1 2 x:y / / rw - ext4 /dev/sda1", Path::new("/")),
            None
        );
    }

    /// As the kernel shows a disk, and a partition of it.
    fn disk_of(name: &str, files: &[(&str, &str)]) -> Finding {
        let sys = tempfile::tempdir().unwrap();
        let disk = sys.path().join(name);
        let partition = disk.join(format!("{name}p2"));
        fs::create_dir_all(&partition).unwrap();
        fs::write(partition.join("partition"), "2\n").unwrap();
        for (file, text) in files {
            let path = disk.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        device_kind(&partition)
    }

    #[test]
    fn flash_is_told_from_disks_and_worn_flash_from_new() {
        let level = |name, files: &[_]| disk_of(name, files).level;
        assert_eq!(level("mmcblk0", &[("device/type", "SD\n")]), Level::Warning);
        let emmc = ("device/type", "MMC\n");
        assert_eq!(level("mmcblk0", &[emmc]), Level::Ok);
        assert_eq!(
            level("mmcblk0", &[emmc, ("device/life_time", "0x01 0x02\n")]),
            Level::Ok
        );
        assert_eq!(
            level("mmcblk0", &[emmc, ("device/life_time", "0x01 0x0a\n")]),
            Level::Warning
        );
        assert_eq!(
            level("mmcblk0", &[emmc, ("device/pre_eol_info", "0x02\n")]),
            Level::Warning
        );
        let found = disk_of("nvme0n1", &[("queue/rotational", "0\n")]);
        assert!(
            found.level == Level::Ok && found.says.contains("nvme0n1 is an NVMe disk"),
            "{found:?}"
        );
        assert_eq!(level("sda", &[("removable", "1\n")]), Level::Warning);
        assert!(
            disk_of("sda", &[("queue/rotational", "1")])
                .says
                .contains("turns")
        );
    }

    #[test]
    fn state_in_memory_is_a_problem() {
        let found = kind(
            Path::new("/sys"),
            "1 0 0:20 / / rw - tmpfs tmpfs rw",
            Path::new("/"),
        );
        assert_eq!(found.unwrap().level, Level::Problem);
        let layer = kind(
            Path::new("/sys"),
            "1 0 0:20 / / rw - overlay overlay rw",
            Path::new("/"),
        );
        assert_eq!(layer.unwrap().level, Level::Warning);
    }

    #[test]
    fn a_disk_is_measured_and_left_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        assert!(sync_time(dir.path()).unwrap() > Duration::ZERO);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(speed(Path::new("/proc")).level, Level::Problem);
    }
}
