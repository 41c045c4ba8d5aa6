"""A worker process of a peer (worker.py): started, asked, stopped, and watched for idleness."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import others
from models import HERE, Engine, Unusable


class Peer:
    def __init__(self, task: str, arguments: dict, cpus: list[int], log: Path):
        self.about, self.log = arguments["model"], log
        # Libraries that size themselves by the environment must not be told by whoever runs this.
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "MKL_"))}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), task, json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                preexec_fn=lambda: os.sched_setaffinity(0, cpus),
            )

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text().strip().splitlines()[-3:]
            raise Unusable(f"the worker of {self.about} ended with {self.process.wait()}: {' / '.join(said)}")
        return json.loads(line)

    def run(self) -> dict:
        # One that died since its last answer reads no more; answer() says what of.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
        return self.answer()

    def cpu_s(self) -> float:
        """The processor time that it has used so far."""
        return others.process_cpu_s(self.process.pid)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


def speed(engine: Engine, cpus: list[int], batch: int, prompt: int, decode: int, log: Path) -> Peer:
    arguments = {"kind": engine.kind, "model": str(engine.file()), "threads": len(cpus), "batch": batch}
    arguments |= {"prompt": prompt, "decode": decode, "all_logits": engine.all_logits}
    return Peer("speed", arguments, cpus, log)


def score(kind: str, model: Path, cpus: list[int], windows: Path, reference: Path, write: bool, log: Path) -> dict:
    arguments = {"kind": kind, "model": str(model), "threads": len(cpus), "windows": str(windows)}
    peer = Peer("score", arguments | {"reference": str(reference), "write": write}, cpus, log)
    try:
        return peer.answer()
    finally:
        peer.stop()
