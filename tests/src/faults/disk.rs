//! What can happen to the disk below the agent's state: full, read-only, failing, and cut off from power in the middle
//! of a write. A full and a read-only file system are real ones (a small tmpfs); the rest is the shim's.

use super::chance::Chance;
use super::shim::{EIO, ENOSPC, EROFS, Field, Shim};
use super::stage::{Plant, Stage};
use super::{Case, Finding, Ran, Scale};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

pub(super) fn cases() -> Vec<Case> {
    let failing = [
        ("fsync fails (EIO)", Field::FsyncFails, EIO),
        ("writes fail (EIO)", Field::WriteFails, EIO),
        ("writes fail (ENOSPC)", Field::WriteFails, ENOSPC),
        ("turns read-only (EROFS)", Field::WriteFails, EROFS),
        ("short writes", Field::WriteShort, 0),
        ("torn write, then killed", Field::WriteTorn, 0),
    ];
    let mut all = vec![
        Case::new("disk", "full file system", full),
        Case::new("disk", "read-only at the start", read_only),
    ];
    for (name, field, errno) in failing {
        let run = move |scale| fails(scale, field, errno);
        all.push(Case::new("disk", name, run));
    }
    let lost = "power cut: unsynced writes lost";
    all.push(Case::new("disk", lost, |s| power_cuts(s, true)));
    let once = "power cut, nobody resends";
    all.push(Case::new("disk", once, |s| power_cuts(s, false)));
    all
}

/// A tmpfs of its own, unmounted when dropped.
struct Mount {
    folder: TempDir,
}

impl Mount {
    fn new(mebibytes: usize) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let mount = Self { folder };
        mount.mount(&format!("size={mebibytes}m"))?;
        Ok(mount)
    }

    fn mount(&self, options: &str) -> Result<(), String> {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", options, "tmpfs"]);
        let output = command.arg(self.path()).output();
        let output = output.map_err(|e| format!("mount: {e}"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Takes all the room that is left.
    fn fill(&self) -> PathBuf {
        let path = self.path().join("ballast");
        let mut file = File::create(&path).expect("the ballast");
        for size in [1 << 16, 1 << 10, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
        path
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // An agent that still runs holds it; it goes with the last.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

fn plant(scale: Scale, state: &Path) -> Plant {
    let mut plant = Plant::new(scale.seed);
    plant.setup.state_dir = Some(state.to_owned());
    plant
}

/// The agent left, as it may on such a disk.
fn left(stage: &mut Stage) -> String {
    stage.may_leave = true;
    match stage.left {
        0 => String::new(),
        times => format!("the agent left {times} times and was started again"),
    }
}

fn full(scale: Scale) -> Finding {
    let mount = match Mount::new(24) {
        Ok(mount) => mount,
        Err(why) => return Finding::Skipped(why),
    };
    let mut stage = Stage::start(plant(scale, &mount.path().join("state")));
    let times = scale.pick(2, 20);
    for _ in 0..times {
        stage.await_progress(20);
        let ballast = mount.fill();
        stage.nurse(Duration::from_secs(2));
        fs::remove_file(ballast).expect("the ballast");
        stage.nurse(Duration::from_millis(500));
    }
    stage.nurse(Duration::from_secs(1));
    let note = left(&mut stage);
    Finding::Ran(Ran::of(stage, times, note))
}

/// The kernel remounts nothing read-only that is open for writing, so it is so when the agent comes back.
fn read_only(scale: Scale) -> Finding {
    let mount = match Mount::new(24) {
        Ok(mount) => mount,
        Err(why) => return Finding::Skipped(why),
    };
    let mut stage = Stage::start(plant(scale, &mount.path().join("state")));
    let times = scale.pick(2, 20);
    for _ in 0..times {
        stage.await_progress(20);
        stage.kill_agent();
        mount.mount("remount,ro").expect("remounting");
        stage.restart_agent();
        stage.nurse(Duration::from_millis(1500));
        // What it holds open for reading does not matter to the way back.
        mount.mount("remount,rw").expect("remounting");
        stage.nurse(Duration::from_millis(500));
    }
    stage.nurse(Duration::from_secs(1));
    let note = left(&mut stage);
    Finding::Ran(Ran::of(stage, times, note))
}

/// A stage whose agent runs on the shim. Its state was made before without it: the packed model is not meant here.
fn shimmed(plant: Plant, state: &Path, undo: bool) -> Result<(Stage, Shim), Box<Finding>> {
    let shim = Shim::new(state).map_err(|why| Box::new(Finding::Skipped(why)))?;
    let mut stage = Stage::start(plant);
    stage.kill_agent();
    stage.agent.set_env(shim.env(undo));
    stage.restart_agent();
    stage.await_progress(10);
    if shim.get(Field::DiskCalls) == 0 {
        let why = "the agent writes nothing below its state folder while it works";
        return Err(Box::new(Finding::Ran(Ran::of(stage, 0, why))));
    }
    Ok((stage, shim))
}

fn fails(scale: Scale, field: Field, errno: i64) -> Finding {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (mut stage, shim) = match shimmed(plant(scale, folder.path()), folder.path(), false) {
        Ok(both) => both,
        Err(finding) => return *finding,
    };
    shim.set(Field::WriteErrno, errno);
    for percent in [2, 30, 100].repeat(scale.pick(1, 20)) {
        shim.set(field, percent);
        stage.nurse(Duration::from_millis(800));
        shim.set(field, 0);
        stage.nurse(Duration::from_millis(400));
    }
    stage.nurse(Duration::from_secs(1));
    let times = shim.get(Field::Injected) as usize;
    let note = left(&mut stage);
    Finding::Ran(Ran::of(stage, times, note))
}

fn power_cuts(scale: Scale, resends: bool) -> Finding {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut plant = plant(scale, folder.path());
    plant.load.resends = resends;
    let (mut stage, shim) = match shimmed(plant, folder.path(), true) {
        Ok(both) => both,
        Err(finding) => return *finding,
    };
    let mut chance = Chance::new(scale.seed);
    let (times, mut lost) = (scale.pick(6, 200), 0);
    for round in 0..times {
        std::thread::sleep(chance.millis(100, 600));
        // Every other time in the middle of a commit: at a random time most is synced.
        let torn = round % 2 == 0;
        shim.set(Field::WriteTorn, if torn { 10 } else { 0 });
        stage.await_death(Duration::from_secs(if torn { 2 } else { 0 }));
        shim.set(Field::WriteTorn, 0);
        lost += shim.power_cut(&mut chance);
        stage.restart_agent();
    }
    let note = format!("{lost} writes lost");
    Finding::Ran(Ran::of(stage, times, note))
}
