//! What a connection needs from files: the CA, the client certificate with its key, and the password. They are read
//! anew when they change; what can't be used leaves what was there. Renewed files that the broker refuses are tried in
//! turns with those that it took. Opens no connection.

use super::tls::{self, Client, place};
use anyhow::{Context, Result, ensure};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A user and its password. `Debug` shows no password.
#[derive(Clone)]
pub(super) struct Credentials {
    pub(super) user: String,
    pub(super) password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({})", self.user)
    }
}

/// Who we are, and the files that prove it.
#[derive(Debug, Clone, Default)]
pub struct Files {
    pub tls: Option<tls::Files>,
    pub user: Option<String>,
    pub password: Option<PathBuf>,
}

/// What was read from the files at one time.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    /// Tells it from another.
    print: u64,
    /// The CA's file as it is.
    ca: Vec<u8>,
    pub(super) credentials: Option<Credentials>,
    pub(super) tls: Option<Client>,
}

/// The files, and what is used of them.
#[derive(Debug, Clone)]
pub struct Access {
    files: Files,
    /// How the files looked when they were last read.
    look: Vec<Look>,
    /// How they looked since, when that was last seen.
    changed: Option<Vec<Look>>,
    current: Reading,
    /// What the broker took before, until it takes what is current.
    before: Option<Reading>,
    is_before_next: bool,
    /// The broker took that, having refused what is current.
    is_renewal_refused: bool,
    /// Why the files can't be used as they are.
    trouble: Option<String>,
}

/// What tells one state of a file from another; `None` where there is no file.
type Look = Option<(u64, u64, u64, (i64, i64), (i64, i64))>;

impl Files {
    fn read(&self) -> Result<Reading> {
        let mut hasher = DefaultHasher::new();
        for path in self.paths() {
            tls::read(path)?.hash(&mut hasher);
        }
        let ca = self
            .tls
            .as_ref()
            .map(|tls| tls::read(&tls.ca))
            .transpose()?;
        let (print, ca) = (hasher.finish(), ca.unwrap_or_default());
        let tls = self.tls.as_ref().map(tls::client).transpose()?;
        let Some(user) = self.user.clone() else {
            ensure!(self.password.is_none(), "a password file without a user");
            return Ok(Reading {
                print,
                ca,
                credentials: None,
                tls,
            });
        };
        let password = self.password.as_deref().map(password).transpose()?;
        let credentials = Credentials {
            user,
            password: password.unwrap_or_default(),
        };
        Ok(Reading {
            print,
            ca,
            credentials: Some(credentials),
            tls,
        })
    }

    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        let tls = self.tls.iter();
        let tls = tls.flat_map(|f| [Some(&f.ca), f.cert.as_ref(), f.key.as_ref()]);
        tls.chain([self.password.as_ref()]).flatten()
    }

    fn look(&self) -> Vec<Look> {
        let look = |path: &PathBuf| {
            let data = path.metadata().ok()?;
            let (modified, changed) = (
                (data.mtime(), data.mtime_nsec()),
                (data.ctime(), data.ctime_nsec()),
            );
            Some((data.dev(), data.ino(), data.len(), modified, changed))
        };
        self.paths().map(look).collect()
    }
}

/// A trailing newline is not part of a password.
fn password(path: &Path) -> Result<String> {
    let bytes = tls::read(path).context("the password file")?;
    let text = String::from_utf8(bytes)
        .map_err(|_| anyhow::anyhow!("the password file {} is not UTF-8", place(path)))?;
    let text = text.trim_end_matches(['\r', '\n']);
    ensure!(
        !text.is_empty(),
        "the password file {} is empty",
        place(path)
    );
    Ok(text.to_owned())
}

impl Access {
    /// Reads the files. Errors name the file, never what is in it.
    pub fn read(files: Files) -> Result<Self> {
        let look = files.look();
        let current = files.read()?;
        Ok(Self {
            files,
            look,
            changed: None,
            current,
            before: None,
            is_before_next: false,
            is_renewal_refused: false,
            trouble: None,
        })
    }

    pub fn user(&self) -> Option<&str> {
        self.files.user.as_deref()
    }

    /// The TLS side of the next connection.
    pub fn tls(&self) -> Option<&Client> {
        self.next().tls.as_ref()
    }

    /// The files that are read.
    pub fn files(&self) -> &Files {
        &self.files
    }

    pub fn has_tls(&self) -> bool {
        self.files.tls.is_some()
    }

    /// The files, which may be others at any time.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.files.paths()
    }

    /// Reads the files again if they changed, or could not be used. Whether there is something new. Beside a connection that
    /// stands they are given time until two looks agree: somebody may be writing them.
    pub(super) fn refresh(&mut self, is_online: bool) -> bool {
        let look = self.files.look();
        if look == self.look && self.trouble.is_none() {
            return false;
        }
        if is_online && self.changed.as_ref() != Some(&look) {
            self.changed = Some(look);
            return false;
        }
        self.look = look;
        match self.files.read() {
            Ok(reading) if reading.print == self.current.print => {
                self.trouble = None;
                false
            }
            Ok(reading) => {
                // Of two that were never tried, the later one counts.
                let before = std::mem::replace(&mut self.current, reading);
                self.before.get_or_insert(before);
                // A CA that was taken away is trusted no more.
                self.before.take_if(|before| before.ca != self.current.ca);
                self.is_before_next = false;
                self.is_renewal_refused = false;
                self.trouble = None;
                tracing::info!("certificates and password were read anew");
                true
            }
            Err(e) => {
                self.trouble = Some(format!("{e:#}"));
                false
            }
        }
    }

    /// The files could not be read within that time, which says nothing of what is in them.
    pub(super) fn stands_still(&mut self, time: Duration) {
        self.trouble = Some(format!(
            "certificates or password can't be read: the disk has not answered for {time:.0?}"
        ));
    }

    /// What the next connection uses.
    pub(super) fn next(&self) -> &Reading {
        let before = self.before.as_ref().filter(|_| self.is_before_next);
        before.unwrap_or(&self.current)
    }

    /// The broker took [`Self::next`].
    pub(super) fn taken(&mut self) {
        self.is_renewal_refused = self.is_before_next;
        if !self.is_before_next {
            self.before = None;
        }
    }

    /// The broker refused [`Self::next`].
    pub(super) fn refused(&mut self) {
        self.is_before_next = self.before.is_some() && !self.is_before_next;
    }

    /// The next connection is begun with what is current.
    pub(super) fn lost(&mut self) {
        self.is_before_next = false;
    }

    /// What somebody should look after, if anything.
    pub(super) fn complaint(&self, now: Duration) -> Option<String> {
        let used = if self.is_renewal_refused {
            self.next()
        } else {
            &self.current
        };
        let ends = used.tls.as_ref().and_then(|tls| tls.complaint(now));
        let what = if let Some(trouble) = &self.trouble {
            format!("{trouble}; what was read before is used")
        } else if self.is_renewal_refused {
            "the broker refuses the renewed certificate or password; the one from before is used"
                .into()
        } else {
            return ends;
        };
        Some(ends.map_or(what.clone(), |ends| format!("{what}, and {ends}")))
    }
}
