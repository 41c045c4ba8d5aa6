"""Millwright beside its peers: the same weights, the same tokens, alternately in one run. README.md says how to read it."""

import argparse
import datetime
import hashlib
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from pathlib import Path

import models
import report
import scoring
import targets
from models import Engine, Unusable
from rounds import DECODE, Rounds, cpus

Config = tuple[int, int, int]
CONFIGS: list[Config] = [(threads, batch, prompt) for threads in (1, 2) for batch in (1, 4) for prompt in (80, 512)]
QUICK_CONFIGS: list[Config] = [(1, 1, 80), (1, 4, 80), (2, 1, 80)]

# More than this for others, and what was measured is the contention.
QUIET_CPUS = 0.1


def say(words: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S}  {words}", flush=True)


def possible(wanted: list[Config]) -> list[Config]:
    """Those for which the machine has the CPUs; the others are named."""
    available = len(os.sched_getaffinity(0))
    for config in wanted:
        if config[0] > available:
            say(f"left out: {targets.at(config)}, for there are {available} CPUs")
    return [config for config in wanted if config[0] <= available]


def about(engine: Engine, scores: dict[str, dict]) -> dict:
    """What a row says beside its measurements."""
    told = {key: scores[engine.name].get(key) for key in ["kl_divergence", "perplexity", "top1_agreement"]}
    return {"model": engine.path.name, "file_bytes": engine.file_bytes(), "all_logits": engine.all_logits} | told


def kv_bytes_per_token(bundle: Path) -> int:
    """Of an f16 cache: keys and values of every layer."""
    import onnx

    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    caches = [i.type.tensor_type.shape.dim for i in graph.input if i.name.startswith("past_key_values.")]
    return sum(dims[1].dim_value * dims[3].dim_value * 2 for dims in caches)


def surroundings() -> dict:
    """Where and with what this was measured."""
    from engine_llama import features

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    texts = {name: hashlib.sha256((scoring.ROOT / name).read_bytes()).hexdigest() for name in scoring.TEXTS}
    return {
        "machine": {"cpu": cpu, "cpus": len(os.sched_getaffinity(0)), "kernel": platform.release()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": models.versions(),
        "llama_cpp_built_for": features(),
        "texts": texts,
        "decode_tokens": DECODE,
    }


def compare(arguments: argparse.Namespace, scratch: Path) -> tuple[dict, list[targets.Check]]:
    """All figures, as the JSON has them, and the targets."""
    engines, f32 = models.prepare(models.Forge(arguments.forge), arguments.cache)
    configs = possible(QUICK_CONFIGS if arguments.quick else CONFIGS)
    scores = scoring.score_all(engines, arguments.millwright, f32, cpus(2), arguments.windows, scratch, say)
    rounds = Rounds(engines, arguments.millwright, arguments.rounds, scratch, say)
    rows = []
    for config in configs:
        samples = rounds.measure(config)
        rows += [report.row(engine.name, config, samples[engine.name], about(engine, scores)) for engine in engines]
    checks = targets.speed(rows) + targets.together(rows)
    checks += targets.memory(rows, kv_bytes_per_token(f32), DECODE) + targets.fidelity(scores)
    found = {
        "rows": rows,
        "targets": [check.as_json() for check in checks],
        "rounds": arguments.rounds,
        "read_bandwidth_gb_s": targets.bandwidths(rows),
        "others_cpus": {"median": statistics.median(rounds.others), "worst": max(rounds.others)},
        "fidelity": scores,
        "warnings": rounds.warnings,
    }
    return found | surroundings(), checks


def tell(found: dict, checks: list[targets.Check]) -> None:
    print(f"\n{report.table(found['rows'])}\n\n{targets.table(checks)}\n")
    for warning in found["warnings"]:
        print(f"not idle: {warning}")
    reads = ", ".join(f"{gb_s:.1f} GB/s with {threads}" for threads, gb_s in found["read_bandwidth_gb_s"].items())
    print(f"{found['machine']['cpu']}, {found['machine']['cpus']} CPUs; threads read {reads}")
    busy = found["others_cpus"]
    print(f"other programs used {busy['median']:.2f} CPUs at the median, {busy['worst']:.2f} at worst, during the runs")
    if busy["median"] > QUIET_CPUS:
        print("that is no quiet machine: even the ratios of these figures are not to be relied upon, with two threads least of all")


def parse() -> argparse.Namespace:
    usage = "tests/peers/run [--quick] --json FILE [--rounds N] [--millwright PROGRAM] [--forge PROGRAM]"
    parser = argparse.ArgumentParser(prog="tests/peers/run", usage=usage)
    parser.add_argument("--quick", action="store_true", help="three configurations, three rounds, fewer windows of text")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="where the figures go")
    parser.add_argument("--rounds", type=int, help="of which the median counts [default: 5; quick: 3]")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--millwright", type=Path, required=True)
    parser.add_argument("--forge", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.windows = 4 if arguments.quick else 12
    if arguments.rounds is None:
        arguments.rounds = 3 if arguments.quick else 5
    if not 1 <= arguments.rounds <= 100:
        parser.error("--rounds must be from 1 to 100")
    for program in [arguments.millwright, arguments.forge]:
        if not program.is_file():
            parser.error(f"there is no {program}")
    if not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: its folder is not there")
    return arguments


def main() -> None:
    arguments = parse()
    # So that workers and scratch files go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("tests/peers/run: terminated"))
    with tempfile.TemporaryDirectory(dir=arguments.cache, prefix="run-") as scratch:
        found, checks = compare(arguments, Path(scratch))
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    tell(found, checks)
    print(f"figures: {arguments.json}")


if __name__ == "__main__":
    try:
        main()
    except Unusable as error:
        sys.exit(f"tests/peers/run: {error}")
    except KeyboardInterrupt:
        sys.exit("tests/peers/run: interrupted")
