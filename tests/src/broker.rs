//! A mosquitto of the test's own, on a free port, with its files in a folder of its own.

use crate::authority::{Authority, DAY, SERVER};
use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Who may connect to the port that agents use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Security {
    Open,
    /// Users `gw`, `mes` and `hmi` with their name and `-secret` as password, and an ACL that holds senders to
    /// their topics.
    Passwords,
    /// TLS with a certificate from a CA made for this test, in `ca.pem`; see [`Broker::file`].
    Tls,
    /// The same, and only for clients with a certificate of that CA; see [`Broker::authority`].
    Mutual,
}

/// What a broker keeps of its sessions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keeps {
    /// Saved when it ends well, and every half hour.
    AtTheEnd,
    /// Saved after each change.
    EachChange,
    Nothing,
}

/// A running broker.
pub struct Broker {
    child: Child,
    folder: TempDir,
    /// Whether clients need a password.
    pub(crate) knows_users: bool,
    /// Where agents connect.
    pub port: u16,
    /// Where tests connect: the same, but without TLS.
    pub client_port: u16,
}

impl Broker {
    pub fn open() -> Self {
        Self::start(Security::Open)
    }

    pub fn start(security: Security) -> Self {
        Self::with(security, Keeps::AtTheEnd)
    }

    pub fn with(security: Security, keeps: Keeps) -> Self {
        Self::launch(security, keeps, "log_type all\n")
    }

    /// One that doesn't log each packet, for measuring and for hours; with more lines for its configuration.
    pub fn quiet(keeps: Keeps, lines: &str) -> Self {
        let lines = format!("log_type error\n{lines}\n");
        Self::launch(Security::Open, keeps, &lines)
    }

    fn launch(security: Security, keeps: Keeps, lines: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        match security {
            Security::Open => {}
            Security::Passwords => write_users(folder.path()),
            Security::Tls | Security::Mutual => {
                Authority::make(folder.path()).issue("server", SERVER, -DAY, 2 * DAY);
            }
        }
        let is_encrypted = matches!(security, Security::Tls | Security::Mutual);
        let (at, lines) = (folder.path().to_owned(), lines.to_owned());
        Self::of_configuration(folder, security == Security::Passwords, move |port| {
            let client_port = if is_encrypted { free_port() } else { port };
            let text = configuration(&at, security, keeps, &lines, (port, client_port));
            (text, client_port)
        })
    }

    /// One with a configuration of its own, made for the port that agents use; beside it goes the port of the tests' clients.
    pub(crate) fn of_configuration(
        folder: TempDir,
        knows_users: bool,
        make: impl Fn(u16) -> (String, u16),
    ) -> Self {
        // Another program may take a port between here and mosquitto's start.
        for _ in 0..5 {
            let port = free_port();
            let (configuration, client_port) = make(port);
            fs::write(folder.path().join("mosquitto.conf"), configuration)
                .expect("the configuration");
            let mut child = spawn(folder.path());
            if is_up(&mut child, client_port) {
                return Self {
                    child,
                    folder,
                    knows_users,
                    port,
                    client_port,
                };
            }
            crate::end(&mut child);
        }
        panic!("mosquitto did not start:\n{}", log(folder.path()));
    }

    /// A file of the broker's folder: `ca.pem`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Ends the broker as a restart of its service would: it saves its sessions.
    pub fn stop(&mut self) {
        crate::signal(&self.child, "TERM");
        crate::await_end("mosquitto ends", &mut self.child);
    }

    /// Kills it as a power cut would.
    pub fn kill(&mut self) {
        crate::end(&mut self.child);
    }

    /// Starts it again on the same port.
    pub fn resume(&mut self) {
        // Somebody's connection may have been given the port in the meantime, for as long as it lasts.
        for _ in 0..5 {
            self.child = spawn(self.folder.path());
            if is_up(&mut self.child, self.client_port) {
                return;
            }
            crate::end(&mut self.child);
            std::thread::sleep(Duration::from_millis(500));
        }
        panic!("mosquitto did not start again:\n{}", self.log());
    }

    /// The CA of its certificates. A server certificate issued is in use from the next start.
    pub fn authority(&self) -> Authority {
        Authority::of(self.folder.path())
    }

    /// All it logged so far.
    pub fn log(&self) -> String {
        log(self.folder.path())
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        crate::end(&mut self.child);
        if std::thread::panicking() {
            eprintln!("--- mosquitto\n{}", log(self.folder.path()));
        }
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("its address").port()
}

fn configuration(
    folder: &Path,
    security: Security,
    keeps: Keeps,
    lines: &str,
    (port, client_port): (u16, u16),
) -> String {
    let persistence = match keeps {
        Keeps::AtTheEnd => "persistence true\n",
        Keeps::EachChange => "persistence true\nautosave_on_changes true\nautosave_interval 1\n",
        Keeps::Nothing => "persistence false\n",
    };
    let at = |name: &str| folder.join(name).display().to_string();
    // Without `user`, a mosquitto started by root could not read its files here.
    let mut text = format!(
        "user root\n{persistence}persistence_location {}/\nlog_dest file {}\n\
         max_queued_messages 1000\nmax_packet_size 1048576\n{lines}listener {port} 127.0.0.1\n",
        folder.display(),
        at("mosquitto.log"),
    );
    let more = match security {
        Security::Open => "allow_anonymous true\n".to_owned(),
        Security::Passwords => format!(
            "allow_anonymous false\npassword_file {}\nacl_file {}\n",
            at("users"),
            at("acl")
        ),
        Security::Tls | Security::Mutual => {
            let (cert, key, ca) = (at("server.pem"), at("server.key"), at("ca.pem"));
            let wants = if security == Security::Mutual {
                format!("cafile {ca}\nrequire_certificate true\n")
            } else {
                String::new()
            };
            format!(
                "certfile {cert}\nkeyfile {key}\n{wants}allow_anonymous true\nlistener {client_port} 127.0.0.1\n",
            )
        }
    };
    write!(text, "{more}").expect("writing to a string");
    text
}

fn spawn(folder: &Path) -> Child {
    // Debian installs it where only root looks.
    let installed = Path::new("/usr/sbin/mosquitto");
    let program = if installed.exists() {
        installed
    } else {
        Path::new("mosquitto")
    };
    Command::new(program)
        .arg("-c")
        .arg(folder.join("mosquitto.conf"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("mosquitto is not installed: run tests/run, which installs it")
}

fn is_up(child: &mut Child, port: u16) -> bool {
    for _ in 0..250 {
        if child
            .try_wait()
            .expect("a child can be waited for")
            .is_some()
        {
            return false;
        }
        if TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

fn log(folder: &Path) -> String {
    fs::read_to_string(folder.join("mosquitto.log")).unwrap_or_else(|e| e.to_string())
}

fn write_users(folder: &Path) {
    for (n, user) in ["gw", "mes", "hmi"].iter().enumerate() {
        let mut command = Command::new("mosquitto_passwd");
        if n == 0 {
            command.arg("-c");
        }
        command
            .arg("-b")
            .arg(folder.join("users"))
            .args([*user, &format!("{user}-secret")]);
        crate::run(&mut command);
    }
    // Of the pool, what PROTOCOL.md says that a member needs; answers no deeper than the default.
    let acl = "user gw\ntopic readwrite millwright/v1/plant/gw-1/#\n\
        topic read millwright/v1/plant/pool/line3/task/+\n\
        topic read millwright/v1/plant/pool/line3/cancel/+\n\
        topic write millwright/v1/plant/pool/line3/result/+/+\n\n\
        pattern write millwright/v1/plant/pool/line3/task/%u\n\
        pattern write millwright/v1/plant/pool/line3/cancel/%u\n\
        pattern read millwright/v1/plant/pool/line3/result/%u/#\n\
        pattern write millwright/v1/plant/gw-1/task/%u\n\
        pattern write millwright/v1/plant/gw-1/cancel/%u\n\
        pattern read millwright/v1/plant/gw-1/result/%u/#\n\
        pattern read millwright/v1/plant/gw-1/state\n\
        pattern read millwright/v1/plant/gw-1/alarm/#\n";
    fs::write(folder.join("acl"), acl).expect("the ACL");
}
