//! What the process may still touch, by Landlock where the kernel has it: files below a few folders, and two ports. It can't be
//! taken back, and holds for the calling thread and those that it starts. The unit (deploy/systemd) confines it
//! further; this holds where there is no systemd, too.

use crate::config::Config;
use anyhow::{Context, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, NetPort,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus,
    make_bitflags, path_beneath_rules,
};
use std::fs;
use std::path::{Path, PathBuf};

/// What the rules are written for; an older kernel holds what it knows of them.
const RULES: ABI = ABI::V5;
/// The first that holds ports.
const PORTS: ABI = ABI::V4;
/// DNS, where an answer is too long for UDP.
const DNS: u16 = 53;
/// Folders of links that an exporter's folder may consist of, below it.
const BUNDLE_DEPTH: usize = 2;

/// Names, users, certificates, libraries, and what the kernel says of the machine. `/run` because a resolver's file
/// may come to be there at any time.
const READ: [&str; 9] = [
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/run",
    "/proc",
    "/sys",
    "/dev/null",
    "/dev/urandom",
];

/// Confines the thread, and tells the log how far. What the kernel doesn't have is no error.
pub(crate) fn confine(config: &Config) -> Result<()> {
    let state_dir = &config.model.state_dir;
    // A rule is for what is there.
    fs::create_dir_all(state_dir)
        .with_context(|| format!("the state directory {} can't be made", state_dir.display()))?;
    let ports = [DNS, config.broker.port];
    match restrict(&readable(config), state_dir, &ports) {
        Ok(status) => say(&status, state_dir, ports),
        Err(e) => tracing::warn!("Landlock can't be set up, so it confines nothing: {e}"),
    }
    Ok(())
}

fn restrict(
    readable: &[PathBuf],
    writable: &Path,
    ports: &[u16],
) -> Result<RestrictionStatus, RulesetError> {
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    // No device, socket or link, and nothing that can be run.
    let write: BitFlags<AccessFs> = read
        | make_bitflags!(AccessFs::{WriteFile | Truncate | MakeReg | MakeDir | RemoveFile | RemoveDir | Refer});
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(RULES))?
        .handle_access(AccessNet::from_all(RULES))?
        .create()?
        .add_rules(path_beneath_rules(readable, read))?
        .add_rules(path_beneath_rules([writable], write))?
        .add_rules(
            ports
                .iter()
                .map(|port| Ok::<_, RulesetError>(NetPort::new(*port, AccessNet::ConnectTcp))),
        )?
        .restrict_self()
}

/// Folders and files that the agent reads at its start or later.
fn readable(config: &Config) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = READ.iter().map(PathBuf::from).collect();
    // A renewed file takes the place of another in its folder; where it is a link, in the folder of what it leads to.
    let brokers =
        std::iter::once(&config.broker).chain(config.pool.iter().map(|pool| &pool.broker));
    for file in brokers.flat_map(|broker| broker.access.paths()) {
        let led = file.canonicalize();
        let both = [Some(file.as_path()), led.as_deref().ok()];
        all.extend(both.into_iter().flatten().filter_map(folder));
    }
    // Another may take its place, too.
    let models = config.model.bundle.parent();
    all.extend(
        models
            .into_iter()
            .chain([config.model.bundle.as_path()])
            .filter_map(existing),
    );
    links(&config.model.bundle, BUNDLE_DEPTH, &mut all);
    all
}

fn folder(file: &Path) -> Option<PathBuf> {
    let folder = file.parent()?;
    let is_here = folder.as_os_str().is_empty();
    Some(if is_here {
        ".".into()
    } else {
        folder.to_owned()
    })
}

/// A folder, or what there is of the way to it: it may be brought later.
fn existing(folder: &Path) -> Option<PathBuf> {
    let mut way = folder.ancestors().filter(|path| path.exists());
    let there = way.next()?.to_owned();
    (there.parent().is_some()).then_some(there)
}

/// What the links in a model's folder lead to: a cache of models keeps its files elsewhere.
fn links(folder: &Path, depth: usize, all: &mut Vec<PathBuf>) {
    for path in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = path.path();
        if path.is_symlink() {
            all.extend(path.canonicalize());
        } else if path.is_dir() && depth > 1 {
            links(&path, depth - 1, all);
        }
    }
}

fn say(status: &RestrictionStatus, state_dir: &Path, [dns, broker]: [u16; 2]) {
    let place = state_dir.display();
    let files = format!("the agent writes below {place} alone, and reads only what it needs");
    let ports = format!("connects to the ports {broker} and {dns} alone");
    match (&status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => tracing::warn!(
            "Landlock is switched off in this kernel and confines nothing (boot with lsm=landlock,… to have it)"
        ),
        (RulesetStatus::NotEnforced, _) => {
            tracing::warn!(
                "there is no Landlock (kernels from 5.13 on have it; a container may hide it), so it confines nothing"
            );
        }
        (_, LandlockStatus::Available { effective_abi, .. }) if effective_abi >= PORTS => {
            tracing::info!("Landlock confines: {files}, and {ports}");
        }
        _ => tracing::info!(
            "Landlock confines: {files}; this kernel doesn't hold it to ports (6.7 does)"
        ),
    }
}

#[cfg(test)]
mod tests;
