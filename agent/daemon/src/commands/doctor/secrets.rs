//! Files whose rights matter: the configuration, which says what the agent does, and the secrets that it names.

use super::report::Finding;
use crate::commands::credentials::KEPT;
use crate::config::Config;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const CHECK: &str = "rights";

pub(super) fn check(path: &Path, config: &Config) -> Vec<Finding> {
    let mut all = Vec::new();
    all.extend(configuration(path));
    let files = config.broker.access.files();
    let key = files.tls.as_ref().and_then(|tls| tls.key.as_deref());
    for secret in [files.password.as_deref(), key].into_iter().flatten() {
        all.push(self::secret(secret));
    }
    all
}

fn configuration(path: &Path) -> Option<Finding> {
    let mode = path.metadata().ok()?.mode();
    let place = path.display();
    (mode & 0o002 != 0).then(|| {
        Finding::problem(
            CHECK,
            format!("everybody may write {place}, and so say where prompts go"),
            format!("chmod o-w {place}"),
        )
    })
}

fn secret(path: &Path) -> Finding {
    let place = path.display();
    let Ok(data) = path.metadata() else {
        return Finding::problem(
            CHECK,
            format!("{place} can't be looked at"),
            "check the path",
        );
    };
    let others = data.mode() & 0o007;
    let group = data.mode() & 0o070;
    if others != 0 {
        return Finding::problem(
            CHECK,
            format!(
                "everybody on this machine may read or write the secret in {place} (mode {:04o})",
                data.mode() & 0o7777
            ),
            format!(
                "let the agent's user own it (the service's is millwright; below {KEPT} root), chmod 600 {place}, and replace \
                 the secret if others have been on this machine"
            ),
        );
    }
    if group != 0 {
        return Finding::note(
            CHECK,
            format!(
                "{place} can be read by its group (mode {:04o})",
                data.mode() & 0o7777
            ),
        )
        .advising("fine if that is the agent's own group; else let the agent's user own it, and chmod 600");
    }
    Finding::ok(CHECK, format!("{place} is for its owner alone"))
}

#[cfg(test)]
mod tests {
    use super::super::report::Level;
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn who_may_read_a_secret_is_judged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("password");
        fs::write(&path, "x").unwrap();
        let with = |mode| {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            secret(&path).level
        };
        assert_eq!(with(0o600), Level::Ok);
        assert_eq!(with(0o640), Level::Note);
        assert_eq!((with(0o604), with(0o666)), (Level::Problem, Level::Problem));
        fs::set_permissions(&path, Permissions::from_mode(0o646)).unwrap();
        assert_eq!(configuration(&path).unwrap().level, Level::Problem);
        assert_eq!(secret(&dir.path().join("none")).level, Level::Problem);
    }
}
