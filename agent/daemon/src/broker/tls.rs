//! TLS to the broker: a private CA, the server's name checked against the configured host, and a client
//! certificate where the broker wants one. rustls with ring; the system's own roots are not trusted.

use anyhow::{Context, Result, bail, ensure};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// PEM files.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    pub ca: PathBuf,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

/// The TLS side of a connection. Errors name the file.
pub fn client(files: &Files) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for cert in certificates(&files.ca)? {
        roots.add(cert).with_context(|| {
            format!(
                "{} holds no CA certificate that can be used",
                files.ca.display()
            )
        })?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let config = match (&files.cert, &files.key) {
        (None, None) => builder.with_no_client_auth(),
        (Some(cert), Some(key)) => {
            let secret = PrivateKeyDer::from_pem_file(key).map_err(|e| {
                anyhow::anyhow!(
                    "{} holds no private key that can be read: {e}",
                    key.display()
                )
            })?;
            builder
                .with_client_auth_cert(certificates(cert)?, secret)
                .with_context(|| {
                    format!(
                        "{} and {} don't belong together",
                        cert.display(),
                        key.display()
                    )
                })?
        }
        _ => bail!("a client certificate needs both cert and key"),
    };
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let certs = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
        .map_err(|e| {
            anyhow::anyhow!("{} can't be read as PEM certificates: {e}", path.display())
        })?;
    ensure!(!certs.is_empty(), "{} holds no certificate", path.display());
    Ok(certs)
}
