//! Whether the service reaches what root, who sets it up, reaches anyway. By owner, group and mode: other access rules of the
//! system are not looked at.

use super::report::Finding;
use crate::commands::credentials::{self, PASSED};
use crate::config::Config;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const CHECK: &str = "service";
/// The service's user, and the only tree that its unit lets it write to.
const USER: &str = "millwright";
const WRITABLE: &str = "/var/lib/millwright";
/// What its unit hides from it: ProtectHome= and PrivateTmp=.
const HIDDEN: [&str; 5] = ["/home", "/root", "/run/user", "/tmp", "/var/tmp"];

/// A file or folder that the service must reach.
struct Need {
    path: PathBuf,
    /// Where it is if all is as usual.
    home: String,
    /// Nobody else may read it, so rights are not widened for it.
    is_secret: bool,
}

impl Need {
    fn new(path: &Path, home: impl Into<String>) -> Self {
        Self {
            path: path.canonicalize().unwrap_or_else(|_| path.to_owned()),
            home: home.into(),
            is_secret: false,
        }
    }

    fn secret(path: &Path, is_key: bool) -> Self {
        Self {
            is_secret: true,
            ..Self::new(path, credentials::place(is_key))
        }
    }

    fn is_hidden(&self, hidden: &[&str]) -> bool {
        hidden.iter().any(|tree| self.path.starts_with(tree))
    }

    /// What keeps the service from it.
    fn trouble(&self, user: User, hidden: &[&str]) -> Option<Finding> {
        let home = &self.home;
        if self.is_hidden(hidden) {
            let says = format!("the unit hides {} from the service", self.path.display());
            return Some(Finding::problem(CHECK, says, format!("put it in {home}")));
        }
        let blocked = user.unreadable(&self.path)?;
        let place = blocked.display();
        let advice = if self.is_secret {
            let file = self.path.display();
            format!(
                "move it to {home}, for root alone, and have millwright init name it (or chown {USER} {file})"
            )
        } else {
            format!("chgrp {USER} {place} and chmod g+rX {place}, or chmod a+rX {place}")
        };
        let says = format!("the user {USER} can't read {place}");
        Some(Finding::problem(CHECK, says, advice))
    }
}

/// What the service's user can't reach; for the service's own configuration alone.
pub(super) fn check(path: &Path, config: &Config) -> Vec<Finding> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let Some(user) = user(&passwd).filter(|_| credentials::is_the_units(path)) else {
        return Vec::new();
    };
    let mut all: Vec<Finding> = needs(path, config)
        .iter()
        .filter_map(|need| need.trouble(user, &HIDDEN))
        .collect();
    all.extend(strays(config));
    let state_dir = &config.model.state_dir;
    let state = Need::new(state_dir, WRITABLE);
    if state.is_hidden(&HIDDEN) {
        all.extend(state.trouble(user, &HIDDEN));
    } else if !state_dir.starts_with(WRITABLE) {
        all.push(Finding::warning(
            CHECK,
            format!(
                "the unit as shipped lets the service write below {WRITABLE} alone, and model.state_dir is {}",
                state_dir.display()
            ),
            format!("take {WRITABLE}/state, or see that ReadWritePaths= has it (systemctl edit {USER})"),
        ));
    } else if state_dir.is_dir() && !user.may(state_dir, 0o7) {
        let place = state_dir.display();
        all.push(Finding::problem(
            CHECK,
            format!("the user {USER} can't write to {place}"),
            format!("chown -R {USER}: {place}"),
        ));
    }
    // One for each folder or file, though several lie behind it.
    all.dedup();
    if all.is_empty() {
        all.push(Finding::ok(
            CHECK,
            format!("the user {USER} reaches configuration, certificates, model and state"),
        ));
    }
    all
}

fn needs(path: &Path, config: &Config) -> Vec<Need> {
    let model = Need::new(&config.model.bundle, format!("{WRITABLE}/models"));
    let mut all = vec![Need::new(path, "/etc/millwright")];
    if !model.is_hidden(&HIDDEN) {
        let files = files_in(&model.path);
        all.extend(files.iter().map(|file| Need::new(file, &model.home)));
    }
    all.push(model);
    let files = config.broker.access.files();
    if let Some(tls) = &files.tls {
        let certificates = [Some(&tls.ca), tls.cert.as_ref()];
        all.extend(
            certificates
                .into_iter()
                .flatten()
                .map(|file| Need::new(file, "/etc/millwright/tls")),
        );
    }
    let secrets = secrets(config).into_iter();
    // What the unit passes, root reads for it.
    let own =
        secrets.filter(|(file, _)| credentials::passed(file) == *file && !file.starts_with(PASSED));
    all.extend(own.map(|(file, is_key)| Need::secret(file, is_key)));
    all
}

/// The files of secrets, and whether each is the key.
fn secrets(config: &Config) -> Vec<(&Path, bool)> {
    let files = config.broker.access.files();
    let key = files.tls.as_ref().and_then(|tls| tls.key.as_deref());
    let all = [(key, true), (files.password.as_deref(), false)];
    all.into_iter()
        .filter_map(|(file, is_key)| Some((file?, is_key)))
        .collect()
}

/// Secrets among those of the unit under a name that it doesn't pass.
fn strays(config: &Config) -> Vec<Finding> {
    let stray = |(file, is_key): (&Path, bool)| {
        let e = credentials::check(file).err()?;
        let advice = format!(
            "move it to {}, and have millwright init name it",
            credentials::place(is_key)
        );
        Some(Finding::warning(CHECK, e.to_string(), advice))
    };
    secrets(config).into_iter().filter_map(stray).collect()
}

/// A user and its group.
#[derive(Debug, Clone, Copy, PartialEq)]
struct User {
    uid: u32,
    gid: u32,
}

fn user(passwd: &str) -> Option<User> {
    let mut lines = passwd.lines().map(|line| line.split(':'));
    let mut words = lines.find_map(|mut words| (words.next() == Some(USER)).then_some(words))?;
    Some(User {
        uid: words.nth(1)?.parse().ok()?,
        gid: words.next()?.parse().ok()?,
    })
}

impl User {
    /// What keeps it from reading a path: the outermost folder that it may not enter, or the path itself.
    fn unreadable(self, path: &Path) -> Option<PathBuf> {
        let mut folders: Vec<_> = path
            .ancestors()
            .skip(1)
            .filter(|dir| dir.is_dir())
            .collect();
        folders.reverse();
        let closed = folders.into_iter().find(|dir| !self.may(dir, 0o1));
        let wanted = if path.is_dir() { 0o5 } else { 0o4 };
        closed
            .or_else(|| (path.exists() && !self.may(path, wanted)).then_some(path))
            .map(Path::to_owned)
    }

    fn may(self, path: &Path, wanted: u32) -> bool {
        let Ok(data) = path.metadata() else {
            return true;
        };
        let shift = match (data.uid() == self.uid, data.gid() == self.gid) {
            (true, _) => 6,
            (false, true) => 3,
            (false, false) => 0,
        };
        (data.mode() >> shift) & wanted == wanted
    }
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .take(64)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_services_user_is_found() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\nmillwright:x:996:995::/var/lib/millwright:/bin/false\n";
        assert_eq!(user(passwd), Some(User { uid: 996, gid: 995 }));
        assert_eq!((user(""), user("millwright:x:y:z")), (None, None));
    }

    #[test]
    fn what_the_unit_hides_is_moved_and_rights_to_secrets_are_not_widened() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("password");
        fs::write(&file, "x").unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        let owner = file.metadata().unwrap();
        let other = User {
            uid: owner.uid() + 1,
            gid: owner.gid() + 1,
        };
        let linked = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &linked).unwrap();
        let tree = dir.path().canonicalize().unwrap();
        let hidden = Need::new(&linked, "/etc/millwright/tls")
            .trouble(other, &[tree.to_str().unwrap()])
            .unwrap();
        assert!(
            hidden.says.contains("hides") && hidden.says.contains("password"),
            "{hidden:?}"
        );
        assert_eq!(hidden.advice.unwrap(), "put it in /etc/millwright/tls");
        let closed = Need::secret(&file, false).trouble(other, &[]).unwrap();
        let advice = closed.advice.unwrap();
        assert!(
            advice.contains("/etc/millwright/credentials/password") && !advice.contains("chmod"),
            "{advice}"
        );
        let own = User {
            uid: owner.uid(),
            ..other
        };
        assert_eq!(Need::secret(&file, false).trouble(own, &[]), None);
        for path in ["/root/ca.pem", "/home/x/model", "/tmp/x", "/var/tmp/x"] {
            assert!(Need::new(Path::new(path), "").is_hidden(&HIDDEN), "{path}");
        }
        assert!(!Need::new(Path::new("/etc/millwright/tls"), "").is_hidden(&HIDDEN));
    }

    #[test]
    fn what_keeps_another_user_out_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, file) = (dir.path().join("m"), dir.path().join("m/f"));
        fs::create_dir(&folder).unwrap();
        fs::write(&file, "x").unwrap();
        let mode =
            |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        mode(dir.path(), 0o755);
        let owner = dir.path().metadata().unwrap();
        let other = User {
            uid: owner.uid() + 1,
            gid: owner.gid() + 1,
        };
        let of_group = User {
            gid: owner.gid(),
            ..other
        };
        mode(&folder, 0o750);
        mode(&file, 0o644);
        assert_eq!(other.unreadable(&file), Some(folder.clone()));
        assert_eq!(of_group.unreadable(&file), None);
        mode(&folder, 0o755);
        mode(&file, 0o600);
        assert_eq!(other.unreadable(&file), Some(file.clone()));
        mode(&file, 0o604);
        assert_eq!(
            (other.unreadable(&file), of_group.unreadable(&file)),
            (None, Some(file))
        );
        assert!(!other.may(&folder, 0o7) && other.may(&folder, 0o5));
    }
}
