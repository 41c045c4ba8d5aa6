"""Millwright beside its peers: the same weights, the same tokens, alternately in one run. README.md says how to read it."""

import argparse
import datetime
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import models
import others
import ours
import peer
import report
import targets
from models import Engine, Unusable

DECODE = 64
WINDOW = 512
# Prose, tables and Python that the repository carries; only the first windows of it are taken.
TEXTS = ["LICENSE", "agent/task/PROTOCOL.md", "agent/kernels/ARITHMETIC.md", "tests/goldens/make.py"]
CONFIGS = [(threads, batch, prompt) for threads in (1, 2) for batch in (1, 4) for prompt in (80, 512)]
QUICK_CONFIGS = [(1, 1, 80), (1, 4, 80), (2, 1, 80)]
# A worker that waits may wake now and then; more than this of a processor is a measurement spoilt.
IDLE_SHARE = 0.02
# Processor time is told in hundredths of a second.
IDLE_S = 0.02


def say(words: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S}  {words}", flush=True)


def cpus(threads: int) -> list[int]:
    """The last ones: interrupts tend to come to the first."""
    return sorted(os.sched_getaffinity(0))[-threads:]


class Comparison:
    def __init__(self, arguments: argparse.Namespace, scratch: Path):
        self.program, self.rounds, self.scratch = arguments.millwright, arguments.rounds, scratch
        self.windows = arguments.windows
        self.engines, self.reference = models.prepare(models.Forge(arguments.forge), arguments.cache)
        self.scores: dict[str, dict] = {}
        self.rows: list[report.Row] = []
        self.others: list[float] = []
        self.warnings: list[str] = []

    # Fidelity

    def text(self) -> tuple[Path, Path, int]:
        """The text, the same as windows of tokens, and how many tokens these are."""
        from tokenizers import Tokenizer

        root = models.HERE.parent.parent
        text = self.scratch / "text"
        text.write_text("\n".join((root / name).read_text() for name in TEXTS))
        tokens = Tokenizer.from_file(str(self.reference / "tokenizer.json")).encode(text.read_text()).ids
        count = min(self.windows, len(tokens) // WINDOW)
        windows = self.scratch / "windows.json"
        windows.write_text(json.dumps([tokens[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]))
        return text, windows, count * WINDOW

    def score_all(self) -> None:
        text, windows, tokens = self.text()
        cores, log = cpus(2), self.scratch / "score.log"
        say(f"fidelity over {tokens} tokens: the f32 reference (ONNX Runtime, optimisation off)")
        reference = self.reference / "model.onnx"
        self.scores["f32"] = peer.score("onnx", reference, cores, windows, self.scratch, True, log)
        for engine in self.unique_files():
            say(f"fidelity: {engine.name}")
            if engine.kind == "millwright":
                self.scores[engine.name] = ours.score(
                    self.program, engine.path, self.reference, cores, text, WINDOW, tokens
                )
                self.agree(engine.name)
            else:
                found = peer.score(engine.kind, engine.file(), cores, windows, self.scratch, False, log)
                self.scores |= {same.name: found for same in self.engines if same.source() == engine.source()}

    def unique_files(self) -> list[Engine]:
        """One engine for each way of running a file."""
        return list({engine.source(): engine for engine in reversed(self.engines)}.values())[::-1]

    def agree(self, name: str) -> None:
        """Our command has a reference of its own (tract in f32); it must have seen the same tokens and say the same."""
        f32, mine = self.scores["f32"], self.scores[name]
        off = mine["reference_perplexity"] / f32["perplexity"] - 1
        if mine["tokens"] != f32["tokens"] or abs(off) > 1e-4:
            raise Unusable(
                f"the references disagree: ONNX Runtime {f32['perplexity']:.4f} over {f32['tokens']} tokens, "
                f"millwright eval {mine['reference_perplexity']:.4f} over {mine['tokens']}"
            )

    # Speed

    def measure(self, config: tuple[int, int, int]) -> None:
        """Every engine once a round, the order turning; those that wait must be idle."""
        threads, batch, prompt = config
        say(f"{targets.at(config)}: loading")
        workers: dict[str, peer.Peer] = {}
        samples: dict[str, list[dict]] = {engine.name: [] for engine in self.engines}
        try:
            loaded = {}
            for index, engine in enumerate(self.engines):
                if engine.kind != "millwright":
                    log = self.scratch / f"{index}.log"
                    workers[engine.name] = peer.speed(engine, cpus(threads), batch, prompt, DECODE, log)
                    loaded[engine.name] = workers[engine.name].answer()
            for turn in range(self.rounds):
                shift = turn % len(self.engines)
                for engine in self.engines[shift:] + self.engines[:shift]:
                    with self.watched(engine, workers):
                        if engine.kind == "millwright":
                            sample = ours.bench(self.program, engine.path, cpus(threads), batch, prompt, DECODE)
                        else:
                            sample = workers[engine.name].run() | loaded[engine.name]
                    samples[engine.name].append(sample)
                say(f"{targets.at(config)}: round {turn + 1} of {self.rounds}: " + self.outline(samples))
        finally:
            for worker in workers.values():
                worker.stop()
        for engine in self.engines:
            self.rows.append(report.row(engine.name, config, samples[engine.name], self.about(engine)))

    @contextmanager
    def watched(self, running: Engine, workers: dict[str, peer.Peer]):
        """Sees to it that workers which wait are idle, and how busy all the others of this machine are."""
        mine = lambda: others.ended_children_cpu_s() + sum(worker.cpu_s() for worker in workers.values())
        before = {name: worker.cpu_s() for name, worker in workers.items() if name != running.name}
        used, machine, began = mine(), others.machine_cpu_s(), time.monotonic()
        yield
        took = time.monotonic() - began
        self.others.append(max(others.machine_cpu_s() - machine - (mine() - used), 0.0) / took)
        for name, cpu_s in before.items():
            spent = workers[name].cpu_s() - cpu_s
            if spent > max(IDLE_SHARE * took, IDLE_S):
                self.warnings.append(f"{name} used {spent:.2f} s in {took:.2f} s while {running.name} was measured")

    def outline(self, samples: dict[str, list[dict]]) -> str:
        """The latest decode rates, in the order of the table."""
        return " ".join(f"{made[-1]['decode_tokens_per_s']:.0f}" for made in samples.values()) + " tok/s decoded"

    def about(self, engine: Engine) -> dict:
        score = self.scores.get(engine.name, {})
        return {
            "model": engine.path.name,
            "file_bytes": engine.file_bytes(),
            "all_logits": engine.all_logits,
            "kl_divergence": score.get("kl_divergence"),
            "perplexity": score.get("perplexity"),
            "top1_agreement": score.get("top1_agreement"),
        }

    # Results

    def checks(self) -> list[targets.Check]:
        memory = targets.memory(self.rows, kv_bytes_per_token(self.reference), DECODE)
        return targets.speed(self.rows) + targets.together(self.rows) + memory + targets.fidelity(self.scores)

    def result(self) -> dict:
        digests = {name: hashlib.sha256((models.HERE.parent.parent / name).read_bytes()).hexdigest() for name in TEXTS}
        return {
            "rows": self.rows,
            "targets": [check.as_json() for check in self.checks()],
            "machine": machine(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": models.versions(),
            "llama_cpp_built_for": llama_cpp_features(),
            "read_bandwidth_gb_s": targets.bandwidths(self.rows),
            "others_cpus": {"median": statistics.median(self.others), "worst": max(self.others)},
            "rounds": self.rounds,
            "decode_tokens": DECODE,
            "texts": digests,
            "fidelity": self.scores,
            "warnings": self.warnings,
        }


def llama_cpp_features() -> str:
    from engine_llama import features

    return features()


def kv_bytes_per_token(bundle: Path) -> int:
    """Of an f16 cache: keys and values of every layer."""
    import onnx

    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    caches = [i.type.tensor_type.shape.dim for i in graph.input if i.name.startswith("past_key_values.")]
    return sum(dims[1].dim_value * dims[3].dim_value * 2 for dims in caches)


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": name, "cpus": len(os.sched_getaffinity(0)), "kernel": platform.release()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/peers/run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three configurations, three rounds, fewer windows of text")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="where the figures go")
    parser.add_argument("--rounds", type=int, help="of which the median counts [default: 5; quick: 3]")
    parser.add_argument("--cache", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--millwright", type=Path, required=True, help="the program [default: built for release]")
    parser.add_argument("--forge", type=Path, required=True, help="the forge [default: built for release]")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 5)
    arguments.windows = 4 if arguments.quick else 12
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    for program in [arguments.millwright, arguments.forge]:
        if not program.is_file():
            parser.error(f"there is no {program}")
    return arguments


def main() -> None:
    arguments = parse()
    wanted = QUICK_CONFIGS if arguments.quick else CONFIGS
    available = len(os.sched_getaffinity(0))
    for config in [config for config in wanted if config[0] > available]:
        say(f"left out: {targets.at(config)}, for there are {available} CPUs")
    with tempfile.TemporaryDirectory(dir=arguments.cache, prefix="run-") as scratch:
        comparison = Comparison(arguments, Path(scratch))
        comparison.score_all()
        for config in [config for config in wanted if config[0] <= available]:
            comparison.measure(config)
    result = comparison.result()
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{report.table(comparison.rows)}\n\n{targets.table(comparison.checks())}\n")
    for warning in comparison.warnings:
        print(f"not idle: {warning}")
    reads = ", ".join(f"{gb_s:.1f} GB/s with {threads}" for threads, gb_s in result["read_bandwidth_gb_s"].items())
    print(f"{result['machine']['cpu']}, {available} CPUs; threads read {reads}")
    busy = result["others_cpus"]
    print(f"other programs used {busy['median']:.2f} CPUs at the median, {busy['worst']:.2f} at worst, while engines were measured")
    print(f"figures: {arguments.json}")


if __name__ == "__main__":
    try:
        main()
    except Unusable as error:
        sys.exit(f"tests/peers/run: {error}")
    except KeyboardInterrupt:
        sys.exit("tests/peers/run: interrupted")
