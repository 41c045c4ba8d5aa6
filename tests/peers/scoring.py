"""Perplexity and KL divergence of every engine on one text, from the same windows of tokens."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ours
import peer
from models import HERE, Engine, Unusable

WINDOW = 512
# Prose, tables and Python that the repository carries; only the first windows of it are taken.
TEXTS = ["LICENSE", "agent/task/PROTOCOL.md", "agent/kernels/ARITHMETIC.md", "tests/goldens/make.py"]
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Text:
    file: Path
    windows: Path  # the same as JSON: a list of windows, each a list of token ids
    tokens: int


def text(bundle: Path, windows_max: int, scratch: Path) -> Text:
    """The first whole windows of the texts."""
    from tokenizers import Tokenizer

    file, windows = scratch / "text", scratch / "windows.json"
    file.write_text("\n".join((ROOT / name).read_text() for name in TEXTS))
    ids = Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(file.read_text()).ids
    count = min(windows_max, len(ids) // WINDOW)
    windows.write_text(json.dumps([ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]))
    return Text(file, windows, count * WINDOW)


def score_all(
    engines: list[Engine],
    program: Path,
    f32: Path,
    cpus: list[int],
    windows_max: int,
    scratch: Path,
    say: Callable[[str], None],
) -> dict[str, dict]:
    """By engine what `fidelity.summary` has; `f32` is the reference itself. Logits are kept in `scratch`, 100 MB a window."""
    taken, log = text(f32, windows_max, scratch), scratch / "score.log"
    say(f"fidelity over {taken.tokens} tokens: the f32 reference (ONNX Runtime, optimisation off)")
    reference = peer.score("onnx", f32 / "model.onnx", cpus, taken.windows, scratch, True, log)
    scores, known = {"f32": reference}, {}
    for engine in engines:
        if engine.source() not in known:
            say(f"fidelity: {engine.name}")
            if engine.kind == "millwright":
                found = ours.score(program, engine.path, f32, cpus, taken.file, WINDOW, taken.tokens)
                agree(found, reference)
            else:
                found = peer.score(engine.kind, engine.file(), cpus, taken.windows, scratch, False, log)
            known[engine.source()] = found
        scores[engine.name] = known[engine.source()]
    return scores


def agree(mine: dict, f32: dict) -> None:
    """Our command has a reference of its own (tract in f32): it must have seen the same tokens and say the same."""
    off = mine["reference_perplexity"] / f32["perplexity"] - 1
    if mine["tokens"] != f32["tokens"] or abs(off) > 1e-4:
        raise Unusable(
            f"the references disagree: ONNX Runtime {f32['perplexity']:.4f} over {f32['tokens']} tokens, "
            f"millwright eval {mine['reference_perplexity']:.4f} over {mine['tokens']}"
        )
