//! On threads of their own, which take their confinement with them.

use super::*;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use tempfile::TempDir;

struct Plant {
    folder: TempDir,
    config: Config,
    port: u16,
    /// Keeps the port.
    _broker: TcpListener,
}

impl Plant {
    /// `tls/password` is a link into `store`; the model's graph one into `cache`.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["tls", "store", "models/own/onnx", "cache", "elsewhere"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        fs::write(at("store/1"), "first").unwrap();
        symlink(at("store/1"), at("tls/password")).unwrap();
        fs::write(at("cache/blob"), "graph").unwrap();
        symlink(at("cache/blob"), at("models/own/onnx/model.onnx")).unwrap();
        fs::write(at("elsewhere/file"), "theirs").unwrap();
        let broker = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = broker.local_addr().unwrap().port();
        let text = format!(
            "[gateway]\nsite='a'\nname='b'\n[broker]\nhost='127.0.0.1'\nport={port}\nuser='u'\npassword_file='{}'\n\
             [model]\nbundle='{}'\nstate_dir='{}'\n",
            at("tls/password").display(),
            at("models/own").display(),
            at("state").display(),
        );
        Self {
            config: Config::parse(&text).unwrap(),
            port,
            _broker: broker,
            folder,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs `act` confined, with the ABI that the kernel has; says so where it has none.
    fn confined(&self, act: impl FnOnce(Option<ABI>) + Send) {
        std::thread::scope(|scope| {
            let act = || {
                let writable = self.at("state");
                fs::create_dir_all(&writable).unwrap();
                let status = restrict(&readable(&self.config), &writable, &[self.port]).unwrap();
                let abi = match status.landlock {
                    LandlockStatus::Available { effective_abi, .. } => Some(effective_abi),
                    _ => None,
                };
                if abi.is_none() {
                    eprintln!("this kernel has no Landlock: nothing was refused");
                }
                act(abi);
            };
            scope.spawn(act).join().unwrap();
        });
    }
}

#[track_caller]
fn refused<T>(result: std::io::Result<T>) {
    assert_eq!(
        result.err().map(|e| e.kind()),
        Some(ErrorKind::PermissionDenied)
    );
}

#[test]
fn what_the_agent_does_still_works() {
    let plant = Plant::new();
    plant.confined(|_| {
        // The journal is written, set aside and begun anew.
        let (journal, aside) = (plant.at("state/journal"), plant.at("state/journal.damaged"));
        fs::create_dir_all(plant.at("state/packed")).unwrap();
        File::create(&journal).unwrap().write_all(b"text").unwrap();
        fs::rename(&journal, &aside).unwrap();
        File::options()
            .write(true)
            .open(&aside)
            .unwrap()
            .set_len(1)
            .unwrap();
        fs::write(plant.at("state/packed/new"), "w").unwrap();
        fs::rename(plant.at("state/packed/new"), plant.at("state/weights")).unwrap();
        fs::remove_file(&aside).unwrap();
        fs::remove_dir(plant.at("state/packed")).unwrap();
        // The model, through links too; the machine; names.
        assert_eq!(
            fs::read(plant.at("models/own/onnx/model.onnx")).unwrap(),
            b"graph"
        );
        for path in [
            "/proc/meminfo",
            "/proc/self/status",
            "/etc/hosts",
            "/etc/passwd",
        ] {
            fs::read(path).unwrap();
        }
        fs::read_dir("/sys/class").unwrap();
        TcpStream::connect(("127.0.0.1", plant.port)).unwrap();
    });
}

#[test]
fn a_renewed_file_is_read_behind_its_link_and_in_its_place() {
    let plant = Plant::new();
    let (renew, renewed) = std::sync::mpsc::sync_channel(1);
    let (done, wait) = std::sync::mpsc::sync_channel(1);
    std::thread::scope(|scope| {
        let plant = &plant;
        scope.spawn(move || {
            renewed.recv().unwrap();
            fs::write(plant.at("store/2"), "second").unwrap();
            symlink(plant.at("store/2"), plant.at("tls/new")).unwrap();
            fs::rename(plant.at("tls/new"), plant.at("tls/password")).unwrap();
            done.send(()).unwrap();
            renewed.recv().unwrap();
            fs::write(plant.at("tls/new"), "third").unwrap();
            fs::rename(plant.at("tls/new"), plant.at("tls/password")).unwrap();
            done.send(()).unwrap();
        });
        plant.confined(move |_| {
            // By somebody who is not confined.
            for expected in ["second", "third"] {
                renew.send(()).unwrap();
                wait.recv().unwrap();
                assert_eq!(
                    fs::read_to_string(plant.at("tls/password")).unwrap(),
                    expected
                );
            }
        });
    });
}

#[test]
fn what_it_has_no_business_with_is_refused() {
    let plant = Plant::new();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let other = other.local_addr().unwrap();
    plant.confined(|abi| {
        let Some(abi) = abi else { return };
        refused(fs::read(plant.at("elsewhere/file")));
        refused(fs::read_dir(plant.at("elsewhere")));
        refused(fs::write(plant.at("elsewhere/new"), "x"));
        refused(fs::write(plant.at("models/new"), "x"));
        refused(fs::write(plant.at("tls/new"), "x"));
        refused(fs::remove_file(plant.at("store/1")));
        refused(fs::create_dir(plant.at("more")));
        refused(symlink("/etc/passwd", plant.at("state/link")));
        // Nothing can be run, its own included.
        refused(std::process::Command::new("/bin/true").status());
        if abi >= PORTS {
            refused(TcpStream::connect(other));
            refused(TcpListener::bind("127.0.0.1:0"));
        }
    });
}

/// `models` is the folder of the folder.
#[test]
fn a_model_that_takes_the_place_of_another_can_be_read() {
    let plant = Plant::new();
    let (renew, renewed) = std::sync::mpsc::sync_channel(1);
    let (done, wait) = std::sync::mpsc::sync_channel(1);
    std::thread::scope(|scope| {
        let plant = &plant;
        scope.spawn(move || {
            renewed.recv().unwrap();
            fs::create_dir(plant.at("new")).unwrap();
            fs::write(plant.at("new/model.onnx"), "another").unwrap();
            fs::remove_dir_all(plant.at("models/own")).unwrap();
            fs::rename(plant.at("new"), plant.at("models/own")).unwrap();
            done.send(()).unwrap();
        });
        plant.confined(move |_| {
            renew.send(()).unwrap();
            wait.recv().unwrap();
            let model = fs::read_to_string(plant.at("models/own/model.onnx"));
            assert_eq!(model.unwrap(), "another");
        });
    });
}

#[test]
fn a_model_that_is_brought_later_can_be_read() {
    let plant = Plant::new();
    fs::remove_dir_all(plant.at("models/own")).unwrap();
    assert_eq!(existing(&plant.at("models/own")), Some(plant.at("models")));
    assert_eq!(
        existing(Path::new("/not/there")),
        None,
        "never all there is"
    );
}
