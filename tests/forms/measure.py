"""A model in every form: what the agent makes of it, how near it is to f32, how fast it is. README.md says how to read it."""

import argparse
import hashlib
import importlib.metadata
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# What these scripts already do is taken from there.
sys.path += [str(ROOT / "tests/peers"), str(ROOT / "tests/goldens")]

import ours
import results
from models import Forge, Unusable
from rounds import cpus
from scoring import agree

WINDOW = 512
# Drawn of weights that were trained for something else: nonsense, whose distance says nothing.
NONSENSE = {"gemma", "phi", "mistral"}
BEGAN = time.monotonic()


def say(words: str) -> None:
    passed = int(time.monotonic() - BEGAN)
    print(f"{passed // 60:3}:{passed % 60:02}  {words}", file=sys.stderr, flush=True)


@dataclass
class Source:
    """The model, by a name of the catalogue or a path to its weights."""

    forge: Forge
    model: str
    scratch: Path

    def forms(self) -> list[str]:
        listed = [line.split()[0] for line in self.forge.run("export", "--form", "list").splitlines()]
        native = ["native-int8"]
        if not self.is_named() or self.forge.knows(f"{self.model}-q4"):
            native.append("native-q4")
        return native + [form for form in listed if form not in NONSENSE]

    def is_named(self) -> bool:
        return self.forge.knows(self.model)

    def write(self, form: str, folder: Path) -> Path:
        """The form's folder: a new one, or a bundle that is there already."""
        if form.startswith("native-"):
            return self.bundle(form.removeprefix("native-"))
        self.forge.run("export", "--form", form, "--model", self.model, "-o", str(folder))
        return folder

    def bundle(self, precision: str) -> Path:
        """A native bundle: in the catalogue's cache, or for as long as the run takes."""
        if self.is_named():
            # The catalogue's four-bit models have a name of their own.
            name = f"{self.model}-q4" if precision == "q4" else self.model
            return self.forge.pull(name, "--precision", precision)
        folder = self.scratch / precision
        if not folder.exists():
            self.forge.run("convert", self.model, "--precision", precision, "-o", str(folder))
        return folder


class Fidelity:
    """How far a form is from f32, three times: ours, its own weights in f32 arithmetic, ONNX Runtime."""

    part = "ours"

    def __init__(self, arguments: argparse.Namespace, source: Source, scratch: Path):
        from runtime import Reference

        self.arguments, self.threads = arguments, arguments.threads
        self.f32 = source.bundle("f32")
        say("the f32 reference, in ONNX Runtime")
        logits = scratch / "reference"
        logits.mkdir()
        window = min(WINDOW, self.told("model", "inspect", str(self.f32)).get("context_length", WINDOW))
        self.reference = Reference(self.f32, arguments.text, window, arguments.tokens, self.threads, logits)

    def measure(self, form: str, folder: Path, packed: Path) -> dict:
        row = {"inspect": self.told("model", "inspect", str(folder))}
        say(f"{form}: ours")
        row["ours"] = self.score(folder, packed, "auto")
        say(f"{form}: its own weights in f32 arithmetic")
        row["own"] = self.score(folder, packed, "reference")
        say(f"{form}: ONNX Runtime")
        (graph,) = folder.rglob("*.onnx")
        row["onnxruntime"] = self.reference.score(graph)
        for part, found in row.items():
            if "error" in found:
                say(f"{form}: {part} failed: {found['message']}")
        return row

    def score(self, folder: Path, packed: Path, plan: str) -> dict:
        options = {"model": folder, "state-dir": packed, "plan": plan, "reference": self.f32, "threads": self.threads}
        options |= {"text": self.arguments.text, "window": WINDOW, "max-tokens": self.arguments.tokens}
        found = self.told("eval", *(part for name, value in options.items() for part in (f"--{name}", str(value))))
        if "error" not in found:
            agree(found, self.reference.summary)
        return found

    def told(self, *command: str) -> dict:
        """A command's JSON, or that it failed and how."""
        try:
            return ours.call(self.arguments.millwright, sorted(os.sched_getaffinity(0)), *command)
        except Unusable as error:
            return {"error": "fails", "message": str(error)}


class Speed:
    """How fast a form decodes on one thread beside the native one, alternately."""

    part = "speed"

    def __init__(self, arguments: argparse.Namespace, source: Source, scratch: Path):
        self.arguments = arguments
        self.native, self.native_packed = source.bundle("int8"), scratch / "native"

    def measure(self, form: str, folder: Path, packed: Path) -> dict:
        natives, forms = [self.bench(self.native, self.native_packed)], []
        try:
            for _ in range(self.arguments.rounds):
                forms.append(self.bench(folder, packed))
                natives.append(self.bench(self.native, self.native_packed))
        except Unusable as error:
            say(f"{form}: {error}")
            return {"speed": {"error": "fails", "message": str(error)}}
        found = results.speed(natives, forms)
        say(f"{form}: {found['ratio']:.2f}")
        return {"speed": found}

    def bench(self, folder: Path, packed: Path) -> dict:
        return ours.bench(self.arguments.millwright, folder, cpus(1), 1, 80, 64, "--state-dir", str(packed))


def measure(arguments: argparse.Namespace, scratch: Path) -> None:
    """Form by form, each kept as soon as it is there. What the forge refuses to write has no row."""
    source = Source(Forge(arguments.forge), arguments.model, scratch)
    found = results.load(arguments.json, about(arguments))
    order = source.forms()
    wanted = results.pending(found, arguments.forms or order, (Speed if arguments.speed else Fidelity).part)
    if not wanted:
        say("nothing is left to measure")
        return
    way = (Speed if arguments.speed else Fidelity)(arguments, source, scratch)
    if not arguments.speed:
        found["reference"] = way.reference.summary
    for index, form in enumerate(wanted, 1):
        say(f"{form}: {index} of {len(wanted)}")
        with tempfile.TemporaryDirectory(dir=scratch) as place:
            try:
                folder = source.write(form, Path(place) / "model")
            except Unusable as error:
                say(f"{form}: {error}")
                continue
            row = way.measure(form, folder, Path(place) / "packed")
        results.put(found, form, row, order)
        results.keep(arguments.json, found)


def about(arguments: argparse.Namespace) -> dict:
    """What rows of one file must have in common."""
    model = {"model": Path(arguments.model).stem}
    if arguments.speed:
        return model
    return model | {
        "text": arguments.text.name,
        "text_sha256": hashlib.sha256(arguments.text.read_bytes()).hexdigest(),
        "window": WINDOW,
        "tokens_max": arguments.tokens,
        "onnxruntime": importlib.metadata.version("onnxruntime"),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/forms/run")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="where the results are kept")
    parser.add_argument("--markdown", action="store_true", help="print the table of what is there, and measure nothing")
    parser.add_argument("--model", metavar="NAME|PATH", help="a name of the catalogue, a GGUF file or a Hugging Face folder")
    parser.add_argument("--forms", type=lambda names: names.split(","), help="some of them, such as native-int8,q4")
    parser.add_argument("--text", type=Path, default=ROOT / "LICENSE")
    parser.add_argument("--tokens", type=int, default=0, help="how many of the text's; 0 takes all")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="speed is always of one")
    parser.add_argument("--speed", action="store_true", help="decoding beside the native form, on a quiet machine")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--millwright", type=Path, metavar="PROGRAM")
    parser.add_argument("--forge", type=Path, metavar="PROGRAM")
    arguments = parser.parse_args()
    if arguments.markdown:
        if not arguments.json.is_file():
            parser.error(f"--json {arguments.json}: there is no such file")
        return arguments
    if not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: its folder is not there")
    if arguments.model is None:
        parser.error("--model is missing")
    if min(arguments.rounds, arguments.threads) < 1 or arguments.tokens < 0:
        parser.error("--rounds and --threads are at least 1, --tokens at least 0")
    for file in [arguments.text, arguments.millwright, arguments.forge]:
        if file is None or not file.is_file():
            parser.error(f"there is no {file}")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.markdown:
        print(results.markdown(results.load(arguments.json, {})))
        return
    # So that the scratch folder goes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("tests/forms/run: terminated"))
    with tempfile.TemporaryDirectory(prefix="millwright-forms-") as scratch:
        measure(arguments, Path(scratch))


if __name__ == "__main__":
    try:
        main()
    except (Unusable, results.Mismatch) as error:
        sys.exit(f"tests/forms/run: {error}")
    except KeyboardInterrupt:
        sys.exit("tests/forms/run: interrupted")
