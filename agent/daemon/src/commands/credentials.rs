//! Where secrets are. systemd passes the unit's from a folder that root alone reads, under a path that is there only while
//! the unit runs and that the configuration names; before that, whoever sets the gateway up finds them in the folder.

use std::path::{Path, PathBuf};

/// Where root keeps them, and where the unit sees them.
pub(super) const KEPT: &str = "/etc/millwright/credentials";
pub(super) const PASSED: &str = "/run/credentials/millwright.service";

/// The path that the configuration names for a secret.
pub(super) fn passed(path: &Path) -> PathBuf {
    path.strip_prefix(KEPT)
        .map_or_else(|_| path.to_owned(), |name| Path::new(PASSED).join(name))
}

/// The configuration as it can be read now: where the unit doesn't run, with the secrets where root keeps them. Lines stay
/// what they are. Whether something was replaced comes second.
pub(super) fn readable(text: &str) -> (String, bool) {
    if Path::new(PASSED).is_dir() {
        return (text.to_owned(), false);
    }
    kept(text)
}

fn kept(text: &str) -> (String, bool) {
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
        assert_eq!(of("/root/client.key"), "/root/client.key");
        let text = format!("key = \"{PASSED}/client.key\"\npassword_file = '{PASSED}/password'\n");
        let expected = format!("key = \"{KEPT}/client.key\"\npassword_file = '{KEPT}/password'\n");
        assert_eq!(kept(&text), (expected, true));
        assert_eq!(kept("key = 'k'"), ("key = 'k'".into(), false));
    }
}
