"""The targets that the comparison is held against, and how far each is met. Pure, as report.py is."""

from dataclasses import asdict, dataclass
from statistics import median

from report import OURS, OURS_4BIT, Row, aligned, find, ratio, text

# design: resident <= 1.15 x packed + KV in use + tokenizer + this.
BESIDE_BYTES = 15e6


@dataclass(frozen=True)
class Check:
    """A figure that must be at least (or at most) a bound; None where it could not be measured."""

    what: str
    measured: float | None
    bound: float | None
    at_least: bool = True

    def missed_by(self) -> float | None:
        """The share of the bound that is lacking; 0 when it is met."""
        if self.measured is None or not self.bound:
            return None
        short = 1 - self.measured / self.bound if self.at_least else self.measured / self.bound - 1
        return max(short, 0.0)

    def verdict(self) -> str:
        missed = self.missed_by()
        if missed is None:
            return "not measured"
        return "met" if missed == 0 else f"missed by {missed * 100:.1f} %"

    def as_json(self) -> dict:
        return asdict(self) | {"missed_by": self.missed_by()}


def configs(rows: list[Row], batch: int) -> list[tuple[int, int, int]]:
    found = {(r["threads"], r["batch"], r["prompt_tokens"]) for r in rows if r["batch"] == batch}
    return sorted(found)


def at(config: tuple[int, int, int]) -> str:
    threads, batch, prompt = config
    return f"{threads} thread{'s' * (threads > 1)}, prompt {prompt}" + (f", batch {batch}" if batch > 1 else "")


def against(rows: list[Row], ours: str, theirs: str, key: str, least) -> list[Check]:
    """The ratio in every configuration of batch 1; `least` maps a thread count to the bound."""
    verb = key.split("_")[0]
    return [
        Check(
            f"{verb} {ours} / {theirs}, {at(config)}",
            ratio(find(rows, ours, *config), find(rows, theirs, *config), key),
            least(config[0]),
        )
        for config in configs(rows, 1)
    ]


def bandwidths(rows: list[Row]) -> dict[int, float]:
    """GB/s that so many threads read, by thread count: the median of what all of our runs measured."""
    counts = sorted({r["threads"] for r in rows})
    seen = {t: [r["read_bandwidth_gb_s"] for r in rows if r["threads"] == t and r.get("read_bandwidth_gb_s")] for t in counts}
    return {threads: median(values) for threads, values in seen.items() if values}


def bandwidth_share(rows: list[Row], row: Row | None) -> float | None:
    """Weight bytes read a second as a share of the bandwidth; the KV cache's bytes are left out."""
    bandwidth = bandwidths(rows).get(row["threads"]) if row else None
    if not bandwidth:
        return None
    return row["decode_tokens_per_s"] / row["batch"] * row["bytes_per_token"] / (bandwidth * 1e9)


def speed(rows: list[Row]) -> list[Check]:
    decode, prefill = "decode_tokens_per_s", "prefill_tokens_per_s"
    checks = against(rows, OURS, "llama.cpp Q8_0", decode, lambda threads: 1.5 if threads == 1 else 2.0)
    for config in configs(rows, 1):
        share = bandwidth_share(rows, find(rows, OURS, *config))
        checks.append(Check(f"decode {OURS}, share of bandwidth / bytes per token, {at(config)}", share, 0.8))
    for theirs in ["llama.cpp Q4_0", "llama.cpp Q4_1"]:
        checks += against(rows, OURS_4BIT, theirs, decode, lambda threads: 1.3)
    checks += against(rows, OURS, "onnxruntime int8", prefill, lambda threads: 1.2)
    checks += against(rows, OURS, "onnxruntime int8, last row", prefill, lambda threads: 1.2)
    return checks + against(rows, OURS, "llama.cpp Q8_0", prefill, lambda threads: 2.0)


def together(rows: list[Row]) -> list[Check]:
    """Four tasks at once beside one."""
    checks = []
    for name in [OURS, OURS_4BIT]:
        for threads, batch, prompt in configs(rows, 4):
            four, one = find(rows, name, threads, batch, prompt), find(rows, name, threads, 1, prompt)
            if four is not None or name == OURS:
                gain = ratio(four, one, "decode_tokens_per_s")
                checks.append(Check(f"decode {name}, four at once / one, {at((threads, 1, prompt))}", gain, 2.5))
    return checks


def memory(rows: list[Row], kv_bytes_per_token: int, decode: int) -> list[Check]:
    """Resident memory with one answer on one thread: against design's figure, and beside the peers."""
    checks = []
    for config in [config for config in configs(rows, 1) if config[0] == 1]:
        here = [r for r in rows if (r["threads"], r["batch"], r["prompt_tokens"]) == config and r["resident_bytes"]]
        peers = {r["engine"]: r["resident_bytes"] / 1e6 for r in here if not r["engine"].startswith("millwright")}
        eight_bits = [mb for name, mb in peers.items() if "Q4_" not in name]
        kv = kv_bytes_per_token * (config[2] + decode)
        for ours in [r for r in here if r["engine"] in (OURS, OURS_4BIT)]:
            figure = 1.15 * ours["bytes_per_token"] + kv + ours["tokenizer_bytes"] + BESIDE_BYTES
            bounds = {"design's figure": figure / 1e6, "the smallest peer": min(peers.values(), default=None)}
            if ours["engine"] == OURS:
                bounds["the smallest 8-bit peer"] = min(eight_bits, default=None)
            for against, bound in bounds.items():
                what = f"resident {ours['engine']}, MB, {against}, {at(config)}"
                checks.append(Check(what, ours["resident_bytes"] / 1e6, bound, at_least=False))
    return checks


def fidelity(scores: dict[str, dict]) -> list[Check]:
    kl = lambda name: scores.get(name, {}).get("kl_divergence")
    return [
        Check(f"KL {OURS}, at most llama.cpp Q8_0's", kl(OURS), kl("llama.cpp Q8_0"), False),
        Check(f"KL {OURS_4BIT}", kl(OURS_4BIT), 0.0045, False),
    ]


def table(checks: list[Check]) -> str:
    lines = [["target", "measured", "bound", ""]]
    for check in checks:
        digits = 4 if check.what.startswith("KL") else 2
        bound = (">= " if check.at_least else "<= ") + text(check.bound, digits)
        lines.append([check.what, text(check.measured, digits), bound, check.verdict()])
    return aligned(lines)
