//! The image that deploy/container/image makes: what is in it, and what it refuses to be made of.

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// An ELF header of a program for a machine, 64 bits wide, with one program header of a kind.
fn program(machine: u16, kind: u32) -> Vec<u8> {
    let mut bytes = vec![0; 120];
    bytes[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
    bytes[18..20].copy_from_slice(&machine.to_le_bytes());
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56] = 1;
    bytes[64..68].copy_from_slice(&kind.to_le_bytes());
    bytes
}

const AARCH64: u16 = 0xb7;
const X86_64: u16 = 0x3e;
const LOAD: u32 = 1;
const INTERPRETER: u32 = 3;

fn image(out: &Path, binaries: &[PathBuf]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/container/image");
    let mut command = Command::new(script);
    command.arg("-o").arg(out).args(binaries);
    command.output().expect("python3")
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// A blob by its descriptor, whose size and digest are as it says.
fn blob(layout: &Path, descriptor: &Value) -> PathBuf {
    let (algorithm, hex) = descriptor["digest"]
        .as_str()
        .unwrap()
        .split_once(':')
        .unwrap();
    let path = layout.join("blobs").join(algorithm).join(hex);
    let sum = run("sha256sum", &[path.to_str().unwrap()]);
    assert_eq!(sum.split_whitespace().next(), Some(hex));
    assert_eq!(
        fs::metadata(&path).unwrap().len(),
        descriptor["size"].as_u64().unwrap()
    );
    path
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn an_image_holds_one_binary_for_each_architecture_and_a_user_who_is_not_root() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("arm"), program(AARCH64, LOAD)).unwrap();
    fs::write(at("x86"), program(X86_64, LOAD)).unwrap();
    let binaries = [at("arm"), at("x86")];
    for out in ["image.tar", "again.tar"] {
        let output = image(&at(out), &binaries);
        assert!(output.status.success(), "{output:?}");
    }
    assert_eq!(
        fs::read(at("image.tar")).unwrap(),
        fs::read(at("again.tar")).unwrap()
    );
    let layout = at("layout");
    fs::create_dir(&layout).unwrap();
    let layout_text = layout.to_str().unwrap();
    run(
        "tar",
        &["-xf", at("image.tar").to_str().unwrap(), "-C", layout_text],
    );
    let top = read(&layout.join("index.json"));
    let index = read(&blob(&layout, &top["manifests"][0]));
    let mut found = Vec::new();
    for described in index["manifests"].as_array().unwrap() {
        let manifest = read(&blob(&layout, described));
        let config = read(&blob(&layout, &manifest["config"]));
        assert_eq!(config["config"]["User"], "10001:10001");
        assert_eq!(
            config["architecture"],
            described["platform"]["architecture"]
        );
        let layer = blob(&layout, &manifest["layers"][0]);
        let listed = run(
            "tar",
            &["--numeric-owner", "-tvzf", layer.to_str().unwrap()],
        );
        let line = |name: &str| {
            let found = listed.lines().find(|line| line.ends_with(name));
            found
                .unwrap_or_else(|| panic!("{name} in {listed}"))
                .to_owned()
        };
        assert!(line(" usr/bin/millwright").starts_with("-rwxr-xr-x 0/0"));
        assert!(line(" var/lib/millwright/").starts_with("drwxr-x--- 10001/10001"));
        // Nothing else that can be run, and nothing with anybody else's rights.
        let programs = listed
            .lines()
            .filter(|line| line.starts_with('-') && line[..10].contains(['x', 's']));
        assert_eq!(programs.count(), 1, "{listed}");
        found.push(config["architecture"].as_str().unwrap().to_owned());
    }
    assert_eq!(found, ["arm64", "amd64"]);
}

#[test]
fn what_could_not_start_in_an_image_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let whole = program(AARCH64, LOAD);
    fs::write(at("whole"), &whole).unwrap();
    fs::write(at("shared"), program(AARCH64, INTERPRETER)).unwrap();
    fs::write(at("cut"), &whole[..66]).unwrap();
    fs::write(at("other"), program(0xf3, LOAD)).unwrap();
    fs::write(at("text"), "#!/bin/sh\n").unwrap();
    let cases: [(&[&str], &str); 6] = [
        (&["shared"], "linked to shared libraries"),
        (&["cut"], "cut off"),
        (&["other"], "ELF machine 0xf3"),
        (&["text"], "no ELF program"),
        (&["whole", "whole"], "a second binary for arm64"),
        (&["nowhere"], "No such file"),
    ];
    for (names, words) in cases {
        let binaries: Vec<PathBuf> = names.iter().map(|name| at(name)).collect();
        let output = image(&at("image.tar"), &binaries);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(words), "{words:?} in {said:?}");
        assert!(!at("image.tar").exists());
    }
    assert!(image(&at("image.tar"), &[at("whole")]).status.success());
}
