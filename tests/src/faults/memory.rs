//! An agent that takes more memory than its unit lets it have (`MemoryMax=`): the kernel kills it. Made by a control group with
//! next to no room, into which the running agent is put.

use super::stage::{Plant, Stage};
use super::{Case, Finding, Ran, Scale};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(super) fn cases() -> Vec<Case> {
    vec![Case::new("agent", "over its unit's memory", limited)]
}

/// A control group with a bound on memory, of either version; it goes when dropped.
struct Group {
    folder: PathBuf,
}

impl Group {
    /// For what a process takes from when it is in the group on: what it has by then is counted elsewhere.
    const ROOM: &str = "262144";
    /// Where groups are made, and the file of the bound.
    const VERSIONS: [(&str, &str); 2] = [
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ];

    fn new() -> Result<Self, String> {
        let name = format!("millwright-faults-{}", std::process::id());
        let made = |(root, bound): (&str, &str)| -> Result<Self, String> {
            let folder = Path::new(root).join(&name);
            fs::create_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
            let group = Self { folder };
            group.write(bound, Self::ROOM)?;
            // Where there is swap, it would only be slow.
            let _ = group.write("memory.swappiness", "0");
            let _ = group.write("memory.swap.max", "0");
            Ok(group)
        };
        let mut why = Vec::new();
        for version in Self::VERSIONS {
            match made(version) {
                Ok(group) => return Ok(group),
                Err(e) => why.push(e),
            }
        }
        Err(format!("no control group of our own: {}", why.join("; ")))
    }

    fn take(&self, pid: u32) -> Result<(), String> {
        self.write("cgroup.procs", &pid.to_string())
    }

    fn write(&self, file: &str, value: &str) -> Result<(), String> {
        let path = self.folder.join(file);
        fs::write(&path, value).map_err(|e| format!("{}: {e}", path.display()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}

fn limited(scale: Scale) -> Finding {
    const SIGKILL: i32 = 9;
    let group = match Group::new() {
        Ok(group) => group,
        Err(why) => return Finding::Skipped(why),
    };
    let (mut killed, wanted) = (0, scale.pick(3, 50));
    let mut stage = Stage::start(Plant::new(scale.seed));
    for _ in 0..wanted {
        stage.await_progress(20);
        if let Err(why) = group.take(stage.agent.id()) {
            if stage.agent.is_running() {
                return Finding::Skipped(why);
            }
            // It may be gone only in the group.
            stage.left += 1;
            break;
        }
        killed += usize::from(stage.dies_within(Duration::from_secs(20), SIGKILL));
        stage.restart_agent();
    }
    Finding::Ran(Ran::of(stage, killed, ""))
}
