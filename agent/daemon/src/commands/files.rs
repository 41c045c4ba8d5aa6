//! Files that are there as a whole or not at all, with the rights that they shall have.

use anyhow::{Context, Result, bail};
use rustix::fs::Access;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Writes a file by way of another beside it. One that is there is left as it is, with an error, unless it may be replaced.
pub(super) fn write(
    path: &Path,
    text: &str,
    mode: u32,
    group: Option<u32>,
    replace: bool,
) -> Result<()> {
    let place = path.display();
    let beside = beside(path)?;
    let written = fill(&beside, text, mode, group).and_then(|()| {
        if replace {
            fs::rename(&beside, path)
        } else {
            // Unlike a rename, a link never replaces.
            fs::hard_link(&beside, path)
        }
    });
    // After a rename it is no longer there.
    let _ = fs::remove_file(&beside);
    match written {
        Ok(()) => {
            sync_folder(path).with_context(|| format!("the folder of {place} can't be synced"))
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            bail!("{place} is there already and stays as it is")
        }
        Err(e) => Err(e).with_context(|| format!("{place} can't be written")),
    }
}

/// Makes the folder of a file where there is none.
pub(super) fn folder_of(path: &Path, mode: u32) -> Result<()> {
    let Some(folder) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) else {
        return Ok(());
    };
    if folder.is_dir() {
        return Ok(());
    }
    let make = || format!("the folder {} can't be made", folder.display());
    fs::create_dir_all(folder).with_context(make)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(mode)).with_context(make)
}

/// Whether a file can be written, before anybody is asked what shall be in it.
pub(super) fn writable(path: &Path) -> Result<()> {
    let path =
        std::path::absolute(path).with_context(|| format!("{} names no file", path.display()))?;
    // Folders that are missing will be made.
    let Some(folder) = path.ancestors().skip(1).find(|dir| dir.is_dir()) else {
        bail!(
            "{} can't be written: its folder can't be looked at",
            path.display()
        );
    };
    let rights = Access::WRITE_OK | Access::EXEC_OK;
    rustix::fs::access(folder, rights).with_context(|| {
        format!("{} can't be written, for its folder {} can't be: run this as root, or name another by --config", path.display(), folder.display())
    })
}

/// The number of a group of this machine.
pub(super) fn group(name: &str) -> Option<u32> {
    group_in(&fs::read_to_string("/etc/group").ok()?, name)
}

fn group_in(text: &str, name: &str) -> Option<u32> {
    let mut lines = text.lines().map(|line| line.split(':'));
    let mut words = lines.find_map(|mut words| (words.next() == Some(name)).then_some(words))?;
    words.nth(1)?.parse().ok()
}

fn beside(path: &Path) -> Result<PathBuf> {
    let name = path
        .file_name()
        .with_context(|| format!("{} names no file", path.display()))?;
    let name = format!(".{}.{}", name.to_string_lossy(), std::process::id());
    Ok(path.with_file_name(name))
}

fn fill(path: &Path, text: &str, mode: u32, group: Option<u32>) -> io::Result<()> {
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())?;
    if group.is_some() {
        // Who isn't root may not; then it stays the caller's.
        let _ = std::os::unix::fs::fchown(&file, None, group);
    }
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.sync_all()
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_file_is_whole_has_its_rights_and_replaces_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/key");
        folder_of(&path, 0o700).unwrap();
        assert_eq!(
            dir.path().join("a").metadata().unwrap().mode() & 0o7777,
            0o700
        );
        write(&path, "one", 0o600, None, false).unwrap();
        let error = write(&path, "two", 0o600, None, false)
            .unwrap_err()
            .to_string();
        assert!(error.contains("is there already"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "one");
        write(&path, "two", 0o640, None, true).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o640);
        assert_eq!(fs::read_dir(dir.path().join("a")).unwrap().count(), 1);
        assert!(write(Path::new("/proc/none"), "x", 0o600, None, true).is_err());
        assert!(write(Path::new("/"), "x", 0o600, None, true).is_err());
    }

    #[test]
    fn a_group_is_found_by_its_name() {
        let text = "root:x:0:\nmillwright:x:997:\nmillwright-x:x:3:\nbad\n";
        assert_eq!(group_in(text, "millwright"), Some(997));
        assert_eq!(
            (group_in(text, "mill"), group_in(text, "bad")),
            (None, None)
        );
    }
}
