"""Millwright's own rows, from its own commands: `millwright bench` and `millwright eval`, a process each."""

import json
import os
import subprocess
from pathlib import Path

from models import Unusable


def call(program: Path, cpus: list[int], *arguments: str) -> dict:
    """A command's JSON, run on these CPUs."""
    command = [str(program), *arguments, "--json"]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )
    if done.returncode != 0:
        raise Unusable(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def bench(program: Path, bundle: Path, cpus: list[int], batch: int, prompt: int, decode: int, *more: str) -> dict:
    """One run's figures: of three in a process the middle one. The first is cold, so it is the slower of two warm ones."""
    sizes = {"threads": len(cpus), "batch": batch, "prompt-tokens": prompt, "decode-tokens": decode, "repeat": 3}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    report = call(program, cpus, "bench", "--model", str(bundle), *options, *more)
    if not report["runs"]:
        raise Unusable(f"{bundle} does not take {batch} answers at once")
    return report.pop("runs")[0] | report


def score(program: Path, bundle: Path, reference: Path, cpus: list[int], text: Path, window: int, tokens: int) -> dict:
    sizes = {"window": window, "max-tokens": tokens, "threads": len(cpus)}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    return call(program, cpus, "eval", "--model", str(bundle), "--text", str(text), "--reference", str(reference), *options)
