"""One peer in a process of its own. Loads once; then each line on standard input asks for one run.

    worker.py speed '{"kind": "llama", "model": ..., "threads": 1, "batch": 1, "prompt": 80, "decode": 64, "all_logits": false}'
    worker.py score '{"kind": "onnx", "model": ..., "threads": 2, "windows": FILE, "reference": DIR, "write": false}'

Answers are JSON objects, one a line. Between runs it waits for input and must use no processor time.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy

import fidelity


def resident_bytes() -> int:
    """This process's resident pages, mapped files among them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def prompts(batch: int, length: int) -> numpy.ndarray:
    """[batch, length]: the tokens that `millwright bench` takes, which see."""
    return numpy.array([[(i * 31 + answer * 7) % 250 + 1 for i in range(length)] for answer in range(batch)])


def open_engine(kind: str, model: Path, threads: int, batch: int, positions: int, **options):
    """An engine with `feed`, `reset`, `score` and `load_s`. Its library is imported here, after the baseline is taken."""
    if kind == "llama":
        from engine_llama import LlamaCpp

        return LlamaCpp(model, threads, batch, positions)
    from engine_onnx import OnnxRuntime

    return OnnxRuntime(model, threads, batch, positions, **options)


def run(engine, tokens: numpy.ndarray, decode: int, all_logits: bool) -> dict[str, float]:
    """Prefill gives each answer its first token, then the rest are decoded greedily; rates leave the first out."""
    engine.reset()
    began = time.perf_counter()
    following = engine.feed(tokens, all_logits)[:, -1].argmax(axis=-1)[:, None]
    prefilled = time.perf_counter()
    for _ in range(decode - 1):
        following = engine.feed(following, False)[:, -1].argmax(axis=-1)[:, None]
    ended = time.perf_counter()
    return {
        "prefill_tokens_per_s": tokens.size / (prefilled - began),
        "decode_tokens_per_s": len(tokens) * (decode - 1) / (ended - prefilled),
    }


def speed(say, kind, model, threads, batch, prompt, decode, all_logits) -> None:
    # The interpreter's own pages are not the engine's.
    baseline = resident_bytes()
    engine = open_engine(kind, Path(model), threads, batch, prompt + decode)
    tokens = prompts(batch, prompt)
    run(engine, tokens, decode, all_logits)
    say({"load_ms": engine.load_s * 1e3, "resident_bytes": resident_bytes() - baseline})
    for _ in sys.stdin:
        say(run(engine, tokens, decode, all_logits))


def score(say, kind, model, threads, windows, reference, write) -> None:
    """Writes the reference's logits of each window, or compares with them."""
    windows, folder = json.loads(Path(windows).read_text()), Path(reference)
    # By default ONNX Runtime fuses int8 activations in; the reference is plain f32 arithmetic.
    options = {"optimise": False} if write else {}
    engine = open_engine(kind, Path(model), threads, 1, max(map(len, windows)), **options)
    sums = []
    for index, tokens in enumerate(windows):
        logits, file = engine.score(tokens), folder / f"{index}.npy"
        if write:
            numpy.save(file, logits)
        sums.append(fidelity.compare(tokens, logits, logits if write else numpy.load(file)))
    say(fidelity.summary(sums))


def main() -> None:
    # Libraries may print; answers have the pipe to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    {"speed": speed, "score": score}[sys.argv[1]](say, **json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
