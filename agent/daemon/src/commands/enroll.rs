//! `millwright enroll`: a key and a request for its certificate, made on the box. The key never leaves it.

use super::init::text::plain;
use super::{credentials, doctor, files};
use anyhow::{Context, Result, bail, ensure};
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose,
};
use std::path::{Path, PathBuf};

/// A common name has no more characters (X.520).
const NAME_CHARS_MAX: usize = 64;
/// A key file larger than this holds no key.
const KEY_BYTES_MAX: u64 = 64 << 10;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Whom the certificate shall name: what the broker takes for the user [default: the configuration's broker.user, else
    /// gateway.name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Where name, key and certificate are taken from
    #[arg(long, value_name = "FILE", default_value = doctor::CONFIG)]
    config: PathBuf,
    /// The key; made where there is none, mode 0600, and never replaced: with one that is there the certificate is renewed
    /// [default: the configuration's broker.tls.key, else /etc/millwright/credentials/client.key]
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Where the request goes; `-` prints it [default: beside the configuration's broker.tls.cert, else
    /// /etc/millwright/tls/client.csr]
    #[arg(long, value_name = "FILE")]
    csr: Option<PathBuf>,
}

const KEY: &str = "/etc/millwright/credentials/client.key";
const CERTIFICATE: &str = "/etc/millwright/tls/client.pem";

pub(super) fn run(args: &Args) -> Result<()> {
    let known = match named(&args.config) {
        Ok(known) => known,
        // Before there is a configuration, everything may be said by flags.
        Err(_) if args.name.is_some() && !args.config.exists() => Named::default(),
        Err(e) if args.name.is_none() => {
            return Err(e.context("say whom the certificate shall name: --name NAME"));
        }
        Err(e) => return Err(e),
    };
    let name = args.name.clone().or(known.name);
    let name = name.context("the configuration names no gateway: --name NAME")?;
    let key = args.key.clone().or(known.key).unwrap_or_else(|| KEY.into());
    let (csr, certificate) = match (&args.csr, known.certificate) {
        (Some(csr), Some(certificate)) => (csr.clone(), certificate),
        (Some(csr), None) => (csr.clone(), csr.with_extension("pem")),
        (None, certificate) => {
            let certificate = certificate.unwrap_or_else(|| CERTIFICATE.into());
            (certificate.with_extension("csr"), certificate)
        }
    };
    let request = request(&name, &key)?;
    if csr == Path::new("-") {
        print!("{}", request.pem);
        return Ok(());
    }
    write(&csr, &request)?;
    print!(
        "{}",
        advice(&name, &key, &csr, &certificate, request.is_new)
    );
    print!("{}", after(&args.config, request.is_new));
    Ok(())
}

/// What the configuration says of this gateway.
#[derive(Debug, Default, PartialEq)]
struct Named {
    name: Option<String>,
    key: Option<PathBuf>,
    certificate: Option<PathBuf>,
}

/// Looks at these entries alone, for the certificate may be missing yet. The key is where it can be read now, or root keeps it.
fn named(config: &Path) -> Result<Named> {
    let place = config.display();
    let text = std::fs::read_to_string(config)
        .with_context(|| format!("the configuration {place} can't be read"))?;
    let table: toml::Table = toml::from_str(&text)
        .map_err(|_| anyhow::anyhow!("the configuration {place} can't be used"))?;
    let of = |section: &str, key: &str| Some(table.get(section)?.get(key)?.as_str()?.to_owned());
    let tls = |key: &str| {
        Some(PathBuf::from(
            table.get("broker")?.get("tls")?.get(key)?.as_str()?,
        ))
    };
    Ok(Named {
        name: of("broker", "user").or_else(|| of("gateway", "name")),
        key: tls("key").map(|key| credentials::kept(&key)),
        certificate: tls("cert"),
    })
}

/// What is to be signed.
pub(super) struct Request {
    pub(super) pem: String,
    /// Whether the key was made now.
    pub(super) is_new: bool,
}

/// A request by the key in a file, which is made where there is none.
pub(super) fn request(name: &str, key: &Path) -> Result<Request> {
    plain(name).context("the certificate's name")?;
    ensure!(
        name.chars().count() <= NAME_CHARS_MAX,
        "the certificate's name has more than {NAME_CHARS_MAX} characters: a certificate can't hold it"
    );
    let place = key.display();
    let (pair, is_new) = match key.symlink_metadata() {
        Ok(data) => {
            ensure!(key.is_file(), "{place} is no file");
            ensure!(
                data.len() <= KEY_BYTES_MAX,
                "{place} is larger than {KEY_BYTES_MAX} bytes: that is no key"
            );
            let text =
                std::fs::read_to_string(key).with_context(|| format!("{place} can't be read"))?;
            // Without the source: it may tell of the key.
            let pair = KeyPair::from_pem(&text).map_err(|_| {
                anyhow::anyhow!("{place} holds no key that can be used (PEM, PKCS #8); it stays as it is: name another file by --key")
            })?;
            (pair, false)
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let pair = KeyPair::generate().context("no key can be made")?;
            files::folder_of(key, 0o700)?;
            files::write(key, &pair.serialize_pem(), 0o600, None, false)?;
            (pair, true)
        }
        Err(e) => bail!("{place} can't be looked at: {e}"),
    };
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let request = params
        .serialize_request(&pair)
        .context("the request can't be made")?;
    Ok(Request {
        pem: request
            .pem()
            .context("the request can't be written as PEM")?,
        is_new,
    })
}

/// A request is no secret, and a newer one replaces it.
pub(super) fn write(csr: &Path, request: &Request) -> Result<()> {
    files::folder_of(csr, 0o755)?;
    files::write(csr, &request.pem, 0o644, None, true)
}

/// What to do now.
pub(super) fn advice(
    name: &str,
    key: &Path,
    csr: &Path,
    certificate: &Path,
    is_new: bool,
) -> String {
    let made = if is_new {
        "was made"
    } else {
        "was there already, so this renews its certificate"
    };
    let (key, csr, certificate) = (key.display(), csr.display(), certificate.display());
    format!(
        "The key {key} {made}. It stays on this box.\n\
         The request for a certificate that names {name} is in {csr}. Now\n\
         1. have the plant's CA sign it. Where that is openssl with the CA's files:\n   \
            openssl x509 -req -in client.csr -CA ca.pem -CAkey ca.key -CAcreateserial -copy_extensions copyall -days 90 -out client.pem\n   \
            (openssl 3; it copies what the request says of its use, clientAuth, without which agent and brokers refuse it)\n\
         2. put the certificate, and behind it those between it and the root, in {certificate}\n"
    )
}

/// What to do once the certificate is there.
pub(super) fn after(config: &Path, is_new: bool) -> String {
    let runs = if is_new {
        "an agent that runs needs a restart for a new key: systemctl restart millwright"
    } else {
        "an agent that runs takes the certificate up by itself"
    };
    format!(
        "3. {runs}\n4. millwright doctor --config {}\n",
        config.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_key_is_made_once_for_its_owner_alone_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("credentials/client.key");
        let first = request("gw-07", &key).unwrap();
        assert!(first.is_new && first.pem.starts_with("-----BEGIN CERTIFICATE REQUEST-----"));
        assert_eq!(key.metadata().unwrap().mode() & 0o7777, 0o600);
        let secret = fs::read_to_string(&key).unwrap();
        assert!(!request("gw-08", &key).unwrap().is_new);
        assert_eq!(fs::read_to_string(&key).unwrap(), secret);
        for bad in [
            "",
            "not a key",
            "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        ] {
            fs::write(&key, bad).unwrap();
            let error = format!("{:#}", request("gw-07", &key).err().unwrap());
            assert!(
                error.contains("holds no key") && !error.contains("AAAA"),
                "{error}"
            );
            assert_eq!(fs::read_to_string(&key).unwrap(), bad);
        }
        fs::write(&key, "x".repeat(70_000)).unwrap();
        assert!(request("gw-07", &key).is_err());
        assert!(request("gw-07", dir.path()).is_err());
    }

    #[test]
    fn a_name_has_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        for bad in ["", "a\nb", "a\u{202e}b", &"x".repeat(65)] {
            assert!(request(bad, &key).is_err(), "{bad:?}");
        }
        assert!(!key.exists());
        assert!(request(&"x".repeat(64), &key).is_ok());
    }

    #[test]
    fn the_configuration_names_it_also_before_there_is_a_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        let text = "[gateway]\nsite = 's'\nname = 'gw-07'\n[broker]\nhost = 'b'\n[broker.tls]\nca = '/none'\n[model]\nbundle = 'm'\nstate_dir = 's'\n";
        fs::write(&path, text).unwrap();
        let known = named(&path).unwrap();
        assert_eq!(
            (known.name.as_deref(), known.key, known.certificate),
            (Some("gw-07"), None, None)
        );
        let tls = "ca = '/none'\ncert = '/x/own.pem'\nkey = '/run/credentials/millwright.service/client.key'";
        let more = text
            .replace("host = 'b'", "host = 'b'\nuser = 'u'")
            .replace("ca = '/none'", tls);
        fs::write(&path, more).unwrap();
        let expected = Named {
            name: Some("u".into()),
            key: Some(KEY.into()),
            certificate: Some("/x/own.pem".into()),
        };
        assert_eq!(named(&path).unwrap(), expected);
        fs::write(&path, "x").unwrap();
        assert!(named(&path).is_err() && named(dir.path()).is_err());
    }
}
