//! The questions about the broker, and what the configuration says of the answers.

use super::questions::{Question, Questions};
use super::text::{Entry, entry, path_entry};
use super::{absolute, optional};
use crate::broker::{Access, Files, tls};
use crate::commands::credentials;
use crate::config::{host_is_plain, is_loopback};
use anyhow::{Context, Result, bail, ensure};
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};

/// What was answered.
pub(super) struct Broker {
    pub(super) host: String,
    /// Where it is another than the usual one.
    pub(super) port: Option<u16>,
    pub(super) tls: Option<tls::Files>,
    pub(super) plaintext: bool,
    pub(super) user: Option<String>,
    pub(super) password: Option<PathBuf>,
    enrolls: bool,
    folder: PathBuf,
    is_units: bool,
}

/// What flags say of it, or what was answered before.
#[derive(Default)]
#[allow(clippy::struct_excessive_bools)] // each is a fact of its own
pub(super) struct Given {
    pub(super) host: Option<String>,
    pub(super) port: Option<String>,
    pub(super) ca: Option<String>,
    pub(super) cert: Option<String>,
    pub(super) key: Option<String>,
    pub(super) plaintext: bool,
    pub(super) user: Option<String>,
    pub(super) password: Option<String>,
    /// Key and certificate are still to be made.
    pub(super) enrolls: bool,
    /// The configuration's, in which certificates and secrets are looked for.
    pub(super) folder: PathBuf,
    /// It is the unit's, which is given its secrets under other paths.
    pub(super) is_units: bool,
    /// All of this is only offered.
    pub(super) is_offered: bool,
}

impl Given {
    fn question<'a>(
        &self,
        flag: &'a str,
        text: &'a str,
        known: Option<&String>,
        default: Option<String>,
    ) -> Question<'a> {
        if self.is_offered {
            return optional(flag, text, None, known.cloned().or(default));
        }
        optional(flag, text, known, default)
    }

    /// What is usual, where it is there.
    fn beside(&self, name: &str) -> Option<String> {
        let path = self.folder.join(name);
        path.exists().then(|| path.display().to_string())
    }

    /// Whether the unit would find a secret there.
    fn check_secret(&self, path: &Path) -> Result<()> {
        if self.is_units {
            credentials::check(path)?;
        }
        Ok(())
    }

    fn path(&self, known: Option<&String>, usual: &str) -> Result<PathBuf> {
        let usual = self.folder.join(usual).display().to_string();
        absolute(known.unwrap_or(&usual))
    }
}

impl Broker {
    pub(super) fn ask<R: BufRead, W: Write>(
        given: &Given,
        questions: &mut Questions<R, W>,
    ) -> Result<Self> {
        // A script says it: the machine itself is seldom meant.
        let default = questions.is_asking().then(|| "127.0.0.1".to_owned());
        let text = "Broker: its name or address";
        let question = given.question("host", text, given.host.as_ref(), default);
        let host = questions.ask(&question, |text| {
            ensure!(
                host_is_plain(text),
                "it must be a name or an address alone, without a scheme, a user or a path; the port is asked for by itself"
            );
            Ok(text.to_owned())
        })?;
        let (tls, plaintext) = transport(given, &host, questions)?;
        let usual = usual_port(tls.is_some());
        let default = Some(usual.to_string());
        let question = given.question("port", "Port", given.port.as_ref(), default);
        let port = questions.ask(&question, |text| {
            let port = text.parse().ok().filter(|port| *port > 0);
            port.context("it must be 1 to 65535")
        })?;
        let text = "Broker user (- for none)";
        let question = given.question("user", text, given.user.as_ref(), None);
        let user = questions.ask_if_any(&question, |text| Ok(text.to_owned()))?;
        Ok(Self {
            password: password(given, user.as_deref(), questions)?,
            host,
            port: (port != usual).then_some(port),
            tls,
            plaintext,
            user,
            enrolls: given.enrolls,
            folder: given.folder.clone(),
            is_units: given.is_units,
        })
    }

    pub(super) fn place(&self) -> String {
        let port = self.port.unwrap_or(usual_port(self.tls.is_some()));
        format!("{}:{port}", self.host)
    }

    /// As something to be offered.
    pub(super) fn given(&self) -> Given {
        let text = |path: Option<&PathBuf>| path.map(|path| path.display().to_string());
        let tls = self.tls.as_ref();
        Given {
            host: Some(self.host.clone()),
            port: self.port.map(|port| port.to_string()),
            ca: text(tls.map(|tls| &tls.ca)),
            cert: text(tls.and_then(|tls| tls.cert.as_ref())),
            key: text(tls.and_then(|tls| tls.key.as_ref())),
            plaintext: false,
            user: self.user.clone(),
            password: text(self.password.as_ref()),
            enrolls: self.enrolls,
            folder: self.folder.clone(),
            is_units: self.is_units,
            is_offered: true,
        }
    }

    /// As it is to be written, secrets are named as the unit gets them. Else as they can be read now, and without a
    /// certificate that is still to be signed.
    pub(super) fn entries(&self, is_final: bool) -> Result<Vec<Entry>> {
        let secret = |path: &Path| {
            if is_final && self.is_units {
                credentials::passed(path)
            } else {
                path.to_owned()
            }
        };
        let mut all = vec![entry("broker", "host", self.host.as_str())];
        let port = self.port.map(i64::from);
        all.extend(port.map(|port| entry("broker", "port", port)));
        let user = self.user.as_deref();
        all.extend(user.map(|user| entry("broker", "user", user)));
        if let Some(password) = &self.password {
            all.push(path_entry("broker", "password_file", &secret(password))?);
        }
        let is_to_come = self.enrolls && !is_final;
        if self.plaintext || is_to_come {
            all.push(entry("broker", "plaintext", true));
        }
        if let Some(tls) = self.tls.as_ref().filter(|_| !is_to_come) {
            all.push(path_entry("broker.tls", "ca", &tls.ca)?);
            if let Some(cert) = &tls.cert {
                all.push(path_entry("broker.tls", "cert", cert)?);
            }
            if let Some(key) = &tls.key {
                all.push(path_entry("broker.tls", "key", &secret(key))?);
            }
        }
        Ok(all)
    }
}

fn usual_port(has_tls: bool) -> u16 {
    if has_tls { 8883 } else { 1883 }
}

/// The files of TLS, or that it goes without.
fn transport<R: BufRead, W: Write>(
    given: &Given,
    host: &str,
    questions: &mut Questions<R, W>,
) -> Result<(Option<tls::Files>, bool)> {
    if given.enrolls {
        // With the certificate that is to come the CA may come, too.
        let ca = given.path(given.ca.as_ref(), "tls/ca.pem")?;
        let files = tls::Files {
            cert: Some(given.path(given.cert.as_ref(), "tls/client.pem")?),
            key: Some(given.path(given.key.as_ref(), "credentials/client.key")?),
            ca,
        };
        files
            .key
            .iter()
            .try_for_each(|key| given.check_secret(key).context("--key"))?;
        return Ok((Some(files), false));
    }
    if given.plaintext {
        return Ok((None, true));
    }
    let is_here = is_loopback(host);
    let default = given.beside("tls/ca.pem").filter(|_| !is_here);
    let text = "TLS: the file of the broker's CA (- for no TLS)";
    let mut question = given.question("ca", text, given.ca.as_ref(), default);
    loop {
        let ca = questions.ask_if_any(&question, |text| {
            let ca = absolute(text)?;
            let files = tls::Files {
                ca,
                cert: None,
                key: None,
            };
            tls::client(&files)?;
            Ok(files.ca)
        })?;
        match ca {
            Some(ca) => return Ok((Some(certificate(given, ca, questions)?), false)),
            None if is_here => return Ok((None, false)),
            None if !questions.is_asking() => bail!(
                "--ca is missing: {host} is another machine, so TLS is needed (or --plaintext, where passwords and prompts may \
                 cross the network in the clear)"
            ),
            None => {}
        }
        let warning =
            "Without TLS passwords and prompts cross the network in the clear. Is that meant?";
        if questions.confirm(warning, false)? {
            return Ok((None, true));
        }
        question.given = None;
    }
}

/// The client's certificate and key, where there are some.
fn certificate<R: BufRead, W: Write>(
    given: &Given,
    ca: PathBuf,
    questions: &mut Questions<R, W>,
) -> Result<tls::Files> {
    let text = "Client certificate (- for none)";
    let default = given.beside("tls/client.pem");
    let question = given.question("cert", text, given.cert.as_ref(), default);
    let cert = questions.ask_if_any(&question, |text| {
        let path = absolute(text)?;
        ensure!(path.is_file(), "{} is no file", path.display());
        Ok(path)
    })?;
    if cert.is_none() {
        let is_alone = given.key.is_some() && !given.is_offered;
        ensure!(!is_alone, "--key needs --cert");
        let key = None;
        return Ok(tls::Files { ca, cert, key });
    }
    let default = given.beside("credentials/client.key");
    let question = given.question("key", "Its key", given.key.as_ref(), default);
    questions.ask(&question, |text| {
        let key = absolute(text)?;
        given.check_secret(&key)?;
        let files = tls::Files {
            ca: ca.clone(),
            cert: cert.clone(),
            key: Some(key),
        };
        tls::client(&files)?;
        Ok(files)
    })
}

fn password<R: BufRead, W: Write>(
    given: &Given,
    user: Option<&str>,
    questions: &mut Questions<R, W>,
) -> Result<Option<PathBuf>> {
    let Some(user) = user else {
        let is_alone = given.password.is_some() && !given.is_offered;
        ensure!(!is_alone, "--password-file needs --user");
        return Ok(None);
    };
    let text = "The file with the user's password, not the password itself (- for none)";
    let default = given.beside("credentials/password");
    // A script takes what a dialogue offers.
    let known = given
        .password
        .clone()
        .or_else(|| default.clone().filter(|_| !questions.is_asking()));
    let question = given.question("password-file", text, known.as_ref(), default);
    questions.ask_if_any(&question, |text| {
        let path = absolute(text)?;
        ensure!(
            text.contains('/') || path.exists(),
            "there is no such file; where that was the password itself: write it into a file, and name the file here"
        );
        given.check_secret(&path)?;
        Access::read(Files {
            tls: None,
            user: Some(user.to_owned()),
            password: Some(path.clone()),
        })?;
        Ok(path)
    })
}
