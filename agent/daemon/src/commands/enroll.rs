//! `millwright enroll`: a key and a request for its certificate, made on the box. The key never leaves it.

use super::init::text::plain;
use super::{credentials, doctor, files};
use crate::config::Config;
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
    /// Where the name is taken from
    #[arg(long, value_name = "FILE", default_value = doctor::CONFIG)]
    config: PathBuf,
    /// The key; made where there is none, mode 0600, and never replaced: with one that is there the certificate is renewed
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/millwright/credentials/client.key"
    )]
    key: PathBuf,
    /// Where the request goes; `-` prints it
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/millwright/tls/client.csr"
    )]
    csr: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let name = match &args.name {
        Some(name) => name.clone(),
        None => named(&args.config).context("say whom the certificate shall name: --name NAME")?,
    };
    let request = request(&name, &args.key)?;
    if args.csr == Path::new("-") {
        print!("{}", request.pem);
        return Ok(());
    }
    write(&args.csr, &request)?;
    print!(
        "{}",
        advice(
            &name,
            &args.key,
            &args.csr,
            &args.csr.with_extension("pem"),
            request.is_new
        )
    );
    Ok(())
}

/// What the configuration calls this gateway. The certificate may be missing yet, so only its names are looked at.
fn named(config: &Path) -> Result<String> {
    let place = config.display();
    let text = std::fs::read_to_string(config)
        .with_context(|| format!("the configuration {place} can't be read"))?;
    let (text, _) = credentials::readable(&text);
    if let Ok(config) = Config::parse(&text) {
        let user = config.broker.access.user();
        return Ok(user.unwrap_or(&config.gateway.name).to_owned());
    }
    let table: toml::Table = toml::from_str(&text)
        .map_err(|_| anyhow::anyhow!("the configuration {place} can't be used"))?;
    let of = |section: &str, key: &str| table.get(section)?.get(key)?.as_str().map(str::to_owned);
    of("broker", "user")
        .or_else(|| of("gateway", "name"))
        .with_context(|| format!("{place} names no gateway"))
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
            openssl x509 -req -in client.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 90 -out client.pem\n\
         2. put the certificate, and behind it those between it and the root, in {certificate}: an agent that runs takes it up\n   \
            by itself\n\
         3. millwright doctor\n"
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
        assert_eq!(named(&path).unwrap(), "gw-07");
        fs::write(&path, text.replace("host = 'b'", "host = 'b'\nuser = 'u'")).unwrap();
        assert_eq!(named(&path).unwrap(), "u");
        fs::write(&path, "x").unwrap();
        assert!(named(&path).is_err() && named(dir.path()).is_err());
    }
}
