"""The targets that the comparison is held against, and how far each is met. Pure, as report.py is."""

from dataclasses import asdict, dataclass

from report import OURS, OURS_4BIT, Row, aligned, find, ratio, text

MIB_15 = 15e6


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


def speed(rows: list[Row]) -> list[Check]:
    decode, prefill = "decode_tokens_per_s", "prefill_tokens_per_s"
    checks = against(rows, OURS, "llama.cpp Q8_0", decode, lambda threads: 1.5 if threads == 1 else 2.0)
    for config in configs(rows, 1):
        share = (find(rows, OURS, *config) or {}).get("bandwidth_share")
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


def memory(rows: list[Row], packed_bytes: dict[str, int], kv_bytes_per_token: int, tokenizer: int, decode: int) -> list[Check]:
    """Resident memory in batch 1 on one thread: against 1.15 x packed + KV + tokenizer + 15 MB, and every peer's."""
    checks = []
    for config in [config for config in configs(rows, 1) if config[0] == 1]:
        peers = [r for r in rows if (r["threads"], r["batch"], r["prompt_tokens"]) == config]
        peers = [r["resident_bytes"] for r in peers if not r["engine"].startswith("millwright")]
        least = min(filter(None, peers), default=None)
        for name, packed in packed_bytes.items():
            ours = (find(rows, name, *config) or {}).get("resident_bytes")
            kv = kv_bytes_per_token * (config[2] + decode)
            figure = 1.15 * packed + kv + tokenizer + MIB_15
            mb = lambda value: None if value is None else value / 1e6
            checks.append(Check(f"resident {name}, MB, design's figure, {at(config)}", mb(ours), mb(figure), False))
            checks.append(Check(f"resident {name}, MB, the smallest peer, {at(config)}", mb(ours), mb(least), False))
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
