//! Whether the service reaches what root, who sets it up, reaches anyway. By owner, group and mode: other access rules of the
//! system are not looked at.

use super::report::Finding;
use crate::config::Config;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const CHECK: &str = "service";
/// The service's user, and the only tree that its unit lets it write to.
const USER: &str = "millwright";
const WRITABLE: &str = "/var/lib/millwright";
/// What its unit hides from it.
const HIDDEN: [&str; 3] = ["/home", "/root", "/run/user"];

/// What the service's user can't reach; for the service's own configuration alone.
pub(super) fn check(path: &Path, config: &Config) -> Vec<Finding> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let Some(user) = user(&passwd).filter(|_| path == Path::new(super::CONFIG)) else {
        return Vec::new();
    };
    let tls = config.broker.access.files().tls.as_ref();
    let ours = [path.to_owned(), config.model.bundle.clone()];
    let ours = ours.into_iter().chain(files_in(&config.model.bundle));
    let certificates = tls
        .into_iter()
        .flat_map(|tls| [Some(tls.ca.clone()), tls.cert.clone()]);
    let read = ours.chain(certificates.flatten());
    let blocked = read.filter_map(|path| user.unreadable(&path));
    let mut all: Vec<Finding> = blocked
        .map(|path| {
            let place = path.display();
            let advice =
                format!("chgrp {USER} {place} and chmod g+rX {place}, or chmod a+rX {place}");
            Finding::problem(CHECK, format!("the user {USER} can't read {place}"), advice)
        })
        .collect();
    let hidden = [&config.model.bundle, &config.model.state_dir];
    for path in hidden
        .into_iter()
        .filter(|path| HIDDEN.iter().any(|tree| path.starts_with(tree)))
    {
        all.push(Finding::problem(
            CHECK,
            format!("the unit hides {} from the service", path.display()),
            format!("put it below {WRITABLE}"),
        ));
    }
    let state_dir = &config.model.state_dir;
    if !state_dir.starts_with(WRITABLE) {
        all.push(Finding::problem(
            CHECK,
            format!(
                "the unit lets the service write below {WRITABLE} alone, and model.state_dir is {}",
                state_dir.display()
            ),
            format!("take {WRITABLE}/state, or widen ReadWritePaths= (systemctl edit {USER})"),
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
