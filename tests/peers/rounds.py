"""Speed: every engine once a round, the order turning, while the others wait and are watched."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import others
import ours
import peer
import targets
from models import Engine

DECODE = 64
# A worker that waits may wake now and then; more than this of a processor spoils a measurement.
IDLE_SHARE = 0.02
# Processor time is told in hundredths of a second.
IDLE_S = 0.02


def cpus(threads: int) -> list[int]:
    """The last ones: interrupts tend to come to the first."""
    return sorted(os.sched_getaffinity(0))[-threads:]


class Rounds:
    def __init__(self, engines: list[Engine], program: Path, count: int, scratch: Path, say: Callable[[str], None]):
        self.engines, self.program, self.count, self.scratch, self.say = engines, program, count, scratch, say
        # How many CPUs others used during each run, and which workers did not wait quietly.
        self.others: list[float] = []
        self.warnings: list[str] = []

    def measure(self, config: tuple[int, int, int]) -> dict[str, list[dict]]:
        """By engine a sample a round, in a configuration (threads, batch, prompt)."""
        name = targets.at(config)
        self.say(f"{name}: loading")
        workers: dict[str, peer.Peer] = {}
        loaded: dict[str, dict] = {}
        samples: dict[str, list[dict]] = {engine.name: [] for engine in self.engines}
        try:
            self.load(config, workers, loaded)
            for turn in range(self.count):
                shift = turn % len(self.engines)
                for engine in self.engines[shift:] + self.engines[:shift]:
                    with self.watched(engine, workers):
                        sample = self.sample(engine, config, workers)
                    samples[engine.name].append(loaded.get(engine.name, {}) | sample)
                rates = " ".join(f"{made[-1]['decode_tokens_per_s']:.0f}" for made in samples.values())
                self.say(f"{name}: round {turn + 1} of {self.count}: decoded {rates} tok/s")
        finally:
            for worker in workers.values():
                worker.stop()
        return samples

    def load(self, config: tuple[int, int, int], workers: dict[str, peer.Peer], loaded: dict[str, dict]) -> None:
        """Starts the peers' workers, each when the one before is ready. `workers` is filled as they start."""
        threads, batch, prompt = config
        for index, engine in enumerate(self.engines):
            if engine.kind != "millwright":
                log = self.scratch / f"{index}.log"
                workers[engine.name] = peer.speed(engine, cpus(threads), batch, prompt, DECODE, log)
                loaded[engine.name] = workers[engine.name].answer()

    def sample(self, engine: Engine, config: tuple[int, int, int], workers: dict[str, peer.Peer]) -> dict:
        threads, batch, prompt = config
        if engine.kind == "millwright":
            return ours.bench(self.program, engine.path, cpus(threads), batch, prompt, DECODE)
        return workers[engine.name].run()

    @contextmanager
    def watched(self, running: Engine, workers: dict[str, peer.Peer]) -> Iterator[None]:
        """Notes workers that are not idle while they wait, and how busy the machine was beside us."""
        ours_all = lambda: others.ended_children_cpu_s() + sum(worker.cpu_s() for worker in workers.values())
        before = {name: worker.cpu_s() for name, worker in workers.items() if name != running.name}
        used, machine, began = ours_all(), others.machine_cpu_s(), time.monotonic()
        yield
        took = time.monotonic() - began
        beside = others.machine_cpu_s() - machine - (ours_all() - used)
        self.others.append(max(beside, 0.0) / took)
        for name, cpu_s in before.items():
            spent = workers[name].cpu_s() - cpu_s
            if spent > max(IDLE_SHARE * took, IDLE_S):
                self.warnings.append(f"{name} used {spent:.2f} s in {took:.2f} s while {running.name} was measured")
