"""Which engines are compared and with which files: all from the weights of one GGUF file."""

import hashlib
import importlib.metadata
import logging
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "smollm2-135m"


class Unusable(Exception):
    """What is missing or wrong, and what to do about it."""


@dataclass(frozen=True)
class Engine:
    name: str
    kind: str  # "millwright", "llama" or "onnx"
    path: Path  # a bundle's folder, or a file
    all_logits: bool = False  # whether prefill computes every position's logits or the last one's

    def file_bytes(self) -> int:
        """Weights and graph on disk, as they are distributed."""
        files = self.path.glob("model.onnx*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)

    def source(self) -> tuple[str, Path]:
        """What decides the logits."""
        return self.kind, self.file()

    def file(self) -> Path:
        return self.path / "model.onnx" if self.kind == "onnx" and self.path.is_dir() else self.path


class Forge:
    def __init__(self, program: Path):
        self.program = program

    def run(self, *arguments: str) -> str:
        done = subprocess.run([self.program, *arguments], stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise Unusable(f"{self.program.name} {' '.join(arguments)} failed; see its message above")
        return done.stdout.strip()

    def pull(self, name: str, *arguments: str) -> Path:
        return Path(self.run("pull", name, *arguments))

    def knows(self, name: str) -> bool:
        return re.search(rf"^\s*{re.escape(name)}\b(?!-)", self.run("list"), re.MULTILINE) is not None


def source(bundle: Path) -> Path:
    """The GGUF file that a bundle was made of, its digest checked."""
    found = re.search(r'^source = ".*?(\S+\.gguf) \(sha256 ([0-9a-f]{64})\)', (bundle / "manifest.toml").read_text(), re.M)
    if not found:
        raise Unusable(f"{bundle}/manifest.toml does not say which GGUF file it comes from")
    file = bundle.parent.parent / "downloads" / found[1]
    if not file.is_file():
        raise Unusable(f"{file} is gone: remove {bundle} and run again, so that the forge downloads it")
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != found[2]:
        raise Unusable(f"{file} has sha256 {digest}, not {found[2]}: remove it and {bundle}, and run again")
    return file


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ["llama-cpp-python", "onnxruntime", "onnx", "gguf", "numpy"]}


def derive(gguf_file: Path, f32_bundle: Path, cache: Path) -> Path:
    """The folder of the derived forms, which is made once for these weights, these versions and this code."""
    key = hashlib.sha256(repr(sorted(versions().items())).encode())
    with gguf_file.open("rb") as weights:
        key.update(hashlib.file_digest(weights, "sha256").digest())
    for code in ["onnx_forms.py", "gguf_forms.py"]:
        key.update((HERE / code).read_bytes())
    folder = cache / "forms" / key.hexdigest()[:16]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
    try:
        derive_into(partial, gguf_file, f32_bundle)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def derive_into(folder: Path, gguf_file: Path, f32_bundle: Path) -> None:
    import gguf_forms
    import onnx_forms

    # ONNX Runtime's quantisers log advice for other kinds of models.
    logging.disable(logging.WARNING)
    f32 = folder / "f32"
    say = lambda form: print(f"deriving {form}", flush=True)
    say("f32 GGUF")
    gguf_forms.write_f32(gguf_file, f32)
    for kind in ["Q8_0", "Q4_0"]:
        say(kind)
        gguf_forms.quantise(f32, folder / f"{kind}.gguf", kind)
    say("f32 ONNX")
    onnx_forms.write_f32(f32_bundle, f32)
    say("dynamic int8 ONNX")
    onnx_forms.write_dynamic_int8(f32, folder / "int8.onnx")
    say("MatMulNBits 8 ONNX")
    onnx_forms.write_nbits8(f32, folder / "nbits8.onnx")
    f32.unlink()


def prepare(forge: Forge, cache: Path) -> tuple[list[Engine], Path]:
    """The engines to compare, and the f32 bundle that is the reference."""
    int8 = forge.pull(NAME)
    f32 = forge.pull(NAME, "--precision", "f32")
    gguf_file = source(f32)
    forms = derive(gguf_file, f32, cache)
    engines = [Engine("millwright int8", "millwright", int8)]
    if forge.knows(f"{NAME}-q4"):
        engines.append(Engine("millwright q4", "millwright", forge.pull(f"{NAME}-q4")))
    else:
        print(f"left out: millwright q4, for the catalogue has no {NAME}-q4")
    engines += [
        Engine("llama.cpp Q8_0", "llama", forms / "Q8_0.gguf"),
        Engine("llama.cpp Q4_0", "llama", forms / "Q4_0.gguf"),
        Engine("llama.cpp Q4_1", "llama", gguf_file),
        Engine("onnxruntime int8", "onnx", forms / "int8.onnx", all_logits=True),
        Engine("onnxruntime int8, last row", "onnx", forms / "int8.onnx"),
        Engine("onnxruntime native", "onnx", int8, all_logits=True),
        Engine("onnxruntime nbits8", "onnx", forms / "nbits8.onnx", all_logits=True),
    ]
    return engines, f32
