//! Where secrets are. systemd passes the unit's from a folder that root alone reads, under a path that is there only while
//! the unit runs and that the configuration names; before that, whoever sets the gateway up finds them in the folder.

use super::doctor::CONFIG;
use anyhow::{Result, ensure};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Where root keeps them, and where the unit sees them.
pub(super) const KEPT: &str = "/etc/millwright/credentials";
pub(super) const PASSED: &str = "/run/credentials/millwright.service";

/// What the unit passes: no other name is there for the service.
pub(super) const NAMES: [&str; 2] = ["client.key", "password"];
/// A secret larger than this is none.
const BYTES_MAX: u64 = 64 << 10;

/// Whether a configuration is the one that the unit starts the agent with, however its path is written.
pub(super) fn is_the_units(config: &Path) -> bool {
    resolved(config).is_some_and(|path| Some(path) == resolved(Path::new(CONFIG)))
        || config == Path::new(CONFIG)
}

fn resolved(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    if let Ok(real) = path.canonicalize() {
        return Some(real);
    }
    // It may be still to be written.
    Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?))
}

/// The path that the unit's configuration names for a secret.
pub(super) fn passed(path: &Path) -> PathBuf {
    let name = NAMES
        .into_iter()
        .find(|name| path == Path::new(KEPT).join(name));
    name.map_or_else(|| path.to_owned(), |name| Path::new(PASSED).join(name))
}

/// The path under which root keeps what the unit passes.
pub(super) fn kept(path: &Path) -> PathBuf {
    path.strip_prefix(PASSED)
        .map_or_else(|_| path.to_owned(), |name| Path::new(KEPT).join(name))
}

/// Refuses a file that lies where the unit's secrets do, and isn't one of them.
pub(super) fn check(path: &Path) -> Result<()> {
    let is_among = [KEPT, PASSED].iter().any(|folder| path.starts_with(folder));
    let is_one = NAMES.iter().any(|name| {
        [KEPT, PASSED]
            .iter()
            .any(|folder| path == Path::new(folder).join(name))
    });
    ensure!(
        !is_among || is_one,
        "the unit passes {} alone from {KEPT}, so the service would not find {}: rename it",
        NAMES.join(" and "),
        path.display()
    );
    Ok(())
}

/// Where a secret that the service can't read should be.
pub(super) fn place(is_key: bool) -> String {
    format!("{KEPT}/{}", NAMES[usize::from(!is_key)])
}

/// The names of those that are no longer what the running unit was given; only root can tell.
pub(super) fn changed() -> Vec<&'static str> {
    changed_between(Path::new(KEPT), Path::new(PASSED))
}

fn changed_between(kept: &Path, passed: &Path) -> Vec<&'static str> {
    let read = |path: PathBuf| {
        let mut bytes = Vec::new();
        let file = File::open(path).ok()?;
        file.take(BYTES_MAX).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    };
    let is_changed = |name: &&str| {
        let both = read(kept.join(name)).zip(read(passed.join(name)));
        both.is_some_and(|(kept, passed)| kept != passed)
    };
    NAMES.into_iter().filter(is_changed).collect()
}

/// The configuration as it can be read now: where the unit doesn't run, or has others, with the secrets where root keeps them.
/// Lines stay what they are. Whether something was replaced comes second.
pub(super) fn readable(text: &str) -> (String, bool) {
    if Path::new(PASSED).is_dir() && changed().is_empty() {
        return (text.to_owned(), false);
    }
    with_kept(text)
}

fn with_kept(text: &str) -> (String, bool) {
    let with = text.replace(&format!("\"{PASSED}/"), &format!("\"{KEPT}/"));
    let with = with.replace(&format!("'{PASSED}/"), &format!("'{KEPT}/"));
    let replaced = with != text;
    (with, replaced)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_units_secrets_have_two_paths() {
        let of = |path: &str| passed(Path::new(path)).display().to_string();
        assert_eq!(
            of("/etc/millwright/credentials/client.key"),
            format!("{PASSED}/client.key")
        );
        for other in ["/root/client.key", "/etc/millwright/credentials/gw-07.key"] {
            assert_eq!(of(other), other);
        }
        let text = format!("key = \"{PASSED}/client.key\"\npassword_file = '{PASSED}/password'\n");
        let expected = format!("key = \"{KEPT}/client.key\"\npassword_file = '{KEPT}/password'\n");
        assert_eq!(with_kept(&text), (expected, true));
        assert_eq!(with_kept("key = 'k'"), ("key = 'k'".into(), false));
    }

    #[test]
    fn only_what_the_unit_passes_may_lie_among_its_secrets() {
        for good in [
            "/etc/millwright/credentials/password",
            "/run/credentials/millwright.service/client.key",
            "/root/gw-07.key",
        ] {
            assert!(check(Path::new(good)).is_ok(), "{good}");
        }
        for bad in [
            "/etc/millwright/credentials/gw-07.key",
            "/run/credentials/millwright.service/x",
            "/etc/millwright/credentials/a/password",
        ] {
            let error = check(Path::new(bad)).unwrap_err().to_string();
            assert!(error.contains("client.key and password"), "{error}");
        }
    }

    #[test]
    fn the_units_configuration_is_known_by_any_path() {
        assert!(is_the_units(Path::new(CONFIG)));
        assert!(
            !is_the_units(Path::new("/etc/agent.toml")) && !is_the_units(Path::new("agent.toml"))
        );
    }

    #[test]
    fn a_secret_that_was_replaced_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, passed) = (dir.path().join("kept"), dir.path().join("passed"));
        for folder in [&kept, &passed] {
            std::fs::create_dir(folder).unwrap();
            std::fs::write(folder.join("password"), "one").unwrap();
        }
        assert_eq!(changed_between(&kept, &passed), Vec::<&str>::new());
        std::fs::write(kept.join("password"), "two").unwrap();
        assert_eq!(changed_between(&kept, &passed), ["password"]);
    }
}
