//! A certificate authority of a test's own, made with openssl in a folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

pub const DAY: i64 = 86_400;
/// What a certificate is for: the broker under its address, or a client.
pub const SERVER: &str = "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth\n";
pub const CLIENT: &str = "extendedKeyUsage=clientAuth\n";

const KEY: [&str; 5] = [
    "-newkey",
    "ec",
    "-pkeyopt",
    "ec_paramgen_curve:P-256",
    "-nodes",
];
const CONFIGURATION: &str = "[ca]\ndefault_ca=own\n[own]\ndir=.\nnew_certs_dir=.\ndatabase=index\nserial=serial\n\
    certificate=ca.pem\nprivate_key=ca.key\ndefault_md=sha256\npolicy=any\nunique_subject=no\n\
    [any]\ncommonName=supplied\n";

/// Signs certificates for brokers and clients.
pub struct Authority {
    folder: PathBuf,
}

impl Authority {
    /// Makes a new one, whose own certificate is `ca.pem`.
    pub fn make(folder: &Path) -> Self {
        let new = Self::of(folder);
        let files = ["-keyout", "ca.key", "-out", "ca.pem", "-days", "3650"];
        let more = [
            "-subj",
            "/CN=Plant CA",
            "-addext",
            "basicConstraints=critical,CA:TRUE",
            "-addext",
            "keyUsage=critical,keyCertSign",
        ];
        new.openssl(&[&["req", "-x509"], &KEY[..], &files, &more].concat());
        fs::write(folder.join("index"), "").expect("the database");
        fs::write(folder.join("serial"), "01\n").expect("the serial number");
        fs::write(folder.join("ca.cnf"), CONFIGURATION).expect("the configuration");
        new
    }

    /// The one in a folder.
    pub fn of(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
        }
    }

    pub fn ca(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// A new key and its certificate, in `{name}.key` and `{name}.pem`, good from and until so many seconds from now.
    pub fn issue(&self, name: &str, purpose: &str, begins: i64, ends: i64) {
        let file = |extension: &str| format!("{name}.{extension}");
        let (key, request) = (file("key"), file("csr"));
        let subject = format!("/CN={name}");
        let files = ["-keyout", &key, "-out", &request, "-subj", &subject];
        self.openssl(&[&["req"], &KEY[..], &files].concat());
        self.sign(name, purpose, begins, ends);
    }

    /// The certificate `{name}.pem` for the request `{name}.csr`.
    pub fn sign(&self, name: &str, purpose: &str, begins: i64, ends: i64) {
        let file = |extension: &str| format!("{name}.{extension}");
        let (request, certificate) = (file("csr"), file("pem"));
        let extensions = format!("basicConstraints=CA:FALSE\n{purpose}");
        fs::write(self.folder.join(file("ext")), extensions).expect("the extensions");
        let (begins, ends, extensions) = (date(begins), date(ends), file("ext"));
        let how = ["ca", "-batch", "-notext", "-config", "ca.cnf"];
        let files = [
            "-in",
            &request,
            "-out",
            &certificate,
            "-extfile",
            &extensions,
        ];
        let dates = ["-startdate", &begins, "-enddate", &ends];
        self.openssl(&[&how[..], &files, &dates].concat());
    }

    /// `{name}.pem` and `{name}.key`.
    pub fn files(&self, name: &str) -> (PathBuf, PathBuf) {
        let file = |extension: &str| self.folder.join(format!("{name}.{extension}"));
        (file("pem"), file("key"))
    }

    fn openssl(&self, arguments: &[&str]) {
        crate::run(
            Command::new("openssl")
                .args(arguments)
                .current_dir(&self.folder),
        );
    }
}

/// As openssl writes it.
fn date(from_now: i64) -> String {
    let now = SystemTime::UNIX_EPOCH.elapsed().expect("a clock").as_secs();
    let at = format!("@{}", now as i64 + from_now);
    let output = Command::new("date")
        .args(["-u", "-d", &at, "+%Y%m%d%H%M%SZ"])
        .output();
    String::from_utf8_lossy(&output.expect("date").stdout)
        .trim()
        .to_owned()
}
