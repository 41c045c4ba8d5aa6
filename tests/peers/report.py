"""From samples to rows, the table and the targets. Pure: knows no engine, process or file."""

from statistics import median

OURS, OURS_4BIT = "millwright int8", "millwright q4"
MEASURED = ["prefill_tokens_per_s", "decode_tokens_per_s", "load_ms", "resident_bytes"]
# Ours alone: what `millwright bench` says beside.
OURS_MEASURED = ["read_bandwidth_gb_s", "bytes_per_token", "tokenizer_bytes"]

Row = dict


def row(engine: str, config: tuple[int, int, int], samples: list[dict], about: dict) -> Row:
    """One engine in one configuration (threads, batch, prompt): medians over rounds, and the rounds themselves."""
    threads, batch, prompt = config
    made = {"engine": engine, "threads": threads, "batch": batch, "prompt_tokens": prompt} | about
    for key in MEASURED + (OURS_MEASURED if engine.startswith("millwright") else []):
        values = [sample[key] for sample in samples if sample.get(key) is not None]
        made[key] = median(values) if values else None
    made["samples"] = [{key: sample[key] for key in MEASURED[:2]} for sample in samples]
    return made


def find(rows: list[Row], engine: str, threads: int, batch: int, prompt: int) -> Row | None:
    wanted = (engine, threads, batch, prompt)
    fits = (r for r in rows if (r["engine"], r["threads"], r["batch"], r["prompt_tokens"]) == wanted)
    return next(fits, None)


def beside(rows: list[Row], row: Row) -> Row | None:
    """Our row to compare a row with: 4-bit with 4-bit where there is one."""
    names = [OURS_4BIT, OURS] if "Q4_" in row["engine"] else [OURS]
    found = (find(rows, name, row["threads"], row["batch"], row["prompt_tokens"]) for name in names)
    return None if row["engine"].startswith("millwright") else next(filter(None, found), None)


def ratio(ours: Row | None, theirs: Row | None, key: str) -> float | None:
    if ours is None or theirs is None or not ours.get(key) or not theirs.get(key):
        return None
    return ours[key] / theirs[key]


def text(value: float | None, digits: int = 0, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


COLUMNS = [
    ("engine", lambda r, o: r["engine"]),
    ("file MB", lambda r, o: text(r["file_bytes"], 0, 1e-6)),
    ("threads", lambda r, o: str(r["threads"])),
    ("batch", lambda r, o: str(r["batch"])),
    ("prompt", lambda r, o: str(r["prompt_tokens"])),
    ("prefill tok/s", lambda r, o: text(r["prefill_tokens_per_s"])),
    ("ours/it", lambda r, o: text(ratio(o, r, "prefill_tokens_per_s"), 2)),
    ("decode tok/s", lambda r, o: text(r["decode_tokens_per_s"], 1)),
    ("ours/it", lambda r, o: text(ratio(o, r, "decode_tokens_per_s"), 2)),
    ("resident MB", lambda r, o: text(r["resident_bytes"], 0, 1e-6)),
    ("load ms", lambda r, o: text(r["load_ms"])),
    ("perplexity", lambda r, o: text(r["perplexity"], 3)),
    ("KL", lambda r, o: text(r["kl_divergence"], 4)),
    ("logits", lambda r, o: "all" if r["all_logits"] else "last"),
]


def aligned(lines: list[list[str]]) -> str:
    """The first column begins at the left, the others end at the right."""
    first, *others = [max(map(len, column)) for column in zip(*lines)]
    padded = ([line[0].ljust(first), *map(str.rjust, line[1:], others)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def table(rows: list[Row]) -> str:
    """All rows in the order given, each configuration apart."""
    lines = [[title for title, _ in COLUMNS]]
    lines += [[cell(r, beside(rows, r)) for _, cell in COLUMNS] for r in rows]
    head, *body = aligned(lines).splitlines()
    made, before = [head], None
    for r, line in zip(rows, body):
        config = (r["threads"], r["batch"], r["prompt_tokens"])
        made += [line] if config == before else ["", line]
        before = config
    return "\n".join(made)
