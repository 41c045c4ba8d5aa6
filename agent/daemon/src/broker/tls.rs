//! TLS to the broker: a private CA, the server's name checked against the configured host, and a client
//! certificate where the broker wants one. rustls with ring; the system's own roots are not trusted. Certificates are
//! judged by the latest time that is known ([`clock::latest`]).

use crate::clock;
use anyhow::{Context, Result, anyhow, bail, ensure};
use millwright_task::calendar;
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::time_provider::TimeProvider;
use rustls::{CertificateError, ClientConfig, RootCertStore};
use serde::Deserialize;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A file larger than this holds no certificates, no key and no password.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// A certificate is to be renewed this long before its end; one of a short life in the last third of it.
const RENEWAL: Duration = Duration::from_hours(14 * 24);

/// PEM files.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    pub ca: PathBuf,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

/// The TLS side of a connection.
#[derive(Debug, Clone)]
pub struct Client {
    pub config: Arc<ClientConfig>,
    /// The own certificate, and the CA that ends last.
    lives: Vec<Life>,
}

/// From when until when a certificate is good.
#[derive(Debug, Clone)]
struct Life {
    path: PathBuf,
    begins: Duration,
    ends: Duration,
}

/// Reads the files. Errors name the file, never what is in it.
pub fn client(files: &Files) -> Result<Client> {
    let mut roots = RootCertStore::empty();
    let ca = certificates(&files.ca)?;
    for cert in &ca {
        roots.add(cert.clone()).map_err(|_| {
            let place = place(&files.ca);
            anyhow!("{place} holds a certificate that can't be a CA's")
        })?;
    }
    let latest = life(&files.ca, &ca).max_by_key(|life| life.ends);
    let mut lives = Vec::from_iter(latest);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_details(provider, Arc::new(Latest))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut config = match (&files.cert, &files.key) {
        (None, None) => builder.with_no_client_auth(),
        (Some(cert), Some(key)) => {
            let secret = PrivateKeyDer::from_pem_slice(&read(key)?)
                .map_err(|_| anyhow!("{} holds no private key that can be read", place(key)))?;
            let chain = certificates(cert)?;
            lives.extend(life(cert, &chain).min_by_key(|life| life.ends));
            builder.with_client_auth_cert(chain, secret).map_err(|e| {
                anyhow!(
                    "{} and {} don't belong together: {e}",
                    place(cert),
                    place(key)
                )
            })?
        }
        _ => bail!("a client certificate needs both cert and key"),
    };
    // A session that is resumed would not judge the broker's certificate again.
    config.resumption = Resumption::disabled();
    Ok(Client {
        config: Arc::new(config),
        lives,
    })
}

impl Client {
    /// What holds one, and from when until when each is good: the own certificate, and the CA that ends last.
    pub fn lives(&self) -> impl Iterator<Item = (String, Duration, Duration)> {
        let lives = self.lives.iter();
        lives.map(|life| (place(&life.path), life.begins, life.ends))
    }

    /// What is to be renewed, if anything is.
    pub fn complaint(&self, now: Duration) -> Option<String> {
        let first = self.lives.iter().min_by_key(|life| life.ends)?;
        let (path, ends) = (place(&first.path), date(first.ends));
        if first.ends <= now {
            return Some(format!("the certificate in {path} ended on {ends}"));
        }
        let soon = ends_soon(first.begins, first.ends, now);
        soon.then(|| format!("the certificate in {path} ends on {ends}"))
    }
}

/// Whether it is time to renew a certificate.
pub fn ends_soon(begins: Duration, ends: Duration, now: Duration) -> bool {
    ends <= now + RENEWAL.min(ends.saturating_sub(begins) / 3)
}

/// The lives of certificates; of one that is not understood, none.
fn life(path: &Path, certs: &[CertificateDer<'_>]) -> impl Iterator<Item = Life> {
    certs.iter().filter_map(|cert| {
        let (begins, ends) = validity(cert)?;
        let path = path.to_owned();
        Some(Life { path, begins, ends })
    })
}

/// rustls tells a certificate's dates only to those who judge it when it is not valid, which comes before all else.
pub(super) fn validity(cert: &CertificateDer<'_>) -> Option<(Duration, Duration)> {
    const YEAR_10000: u64 = 253_402_300_800;
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
    let cert = ParsedCertificate::try_from(cert).ok()?;
    let judged = |seconds| {
        let at = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let roots = RootCertStore::empty();
        verify_server_cert_signed_by_trust_anchor(&cert, &roots, &[], at, algorithms.all).err()
    };
    match (judged(0)?, judged(YEAR_10000)?) {
        (
            rustls::Error::InvalidCertificate(CertificateError::NotValidYetContext {
                not_before,
                ..
            }),
            rustls::Error::InvalidCertificate(CertificateError::ExpiredContext {
                not_after, ..
            }),
        ) => Some((seconds(not_before), seconds(not_after))),
        _ => None,
    }
}

fn seconds(time: UnixTime) -> Duration {
    Duration::from_secs(time.as_secs())
}

/// A day and its time, for sentences.
pub fn date(time: Duration) -> String {
    calendar::format(time.as_millis() as u64)
}

/// A path for a sentence. What does not look like one may be the secret itself, written in the wrong place.
pub(super) fn place(path: &Path) -> String {
    let text = path.to_string_lossy();
    let is_path = text.starts_with(['/', '.']) || path.exists();
    if is_path && !text.contains(char::is_control) {
        text.into_owned()
    } else {
        "a file whose name is not repeated here, lest it be the secret itself (an absolute path would be),".into()
    }
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes))
        .with_context(|| format!("{} can't be read", place(path)))?;
    ensure!(
        bytes.len() as u64 <= FILE_BYTES_MAX,
        "{} is larger than {FILE_BYTES_MAX} bytes",
        place(path)
    );
    Ok(bytes)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = read(path)?;
    let certs: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let certs = certs.map_err(|_| anyhow!("{} can't be read as PEM", place(path)))?;
    ensure!(!certs.is_empty(), "{} holds no certificate", place(path));
    Ok(certs)
}

#[derive(Debug)]
struct Latest;

impl TimeProvider for Latest {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(clock::latest()))
    }
}
