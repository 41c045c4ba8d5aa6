"""The results' file and the table that is made of it. Pure but for that file: knows no engine and no process."""

import json
from pathlib import Path
from statistics import mean, median

Results = dict


class Mismatch(Exception):
    """The file holds results of something else."""


def load(file: Path, about: dict) -> Results:
    """What the file holds already, which must be about the same; keys that it doesn't know yet are added."""
    held = json.loads(file.read_text()) if file.exists() else {"about": {}, "rows": {}}
    for key, value in about.items():
        if held["about"].setdefault(key, value) != value:
            raise Mismatch(f"{file} is of {key} {held['about'][key]}, not {value}: give another file, or remove it")
    return held


def keep(file: Path, results: Results) -> None:
    """Whole or not at all, for it may be stopped at any time."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(file)


def pending(results: Results, forms: list[str], part: str) -> list[str]:
    """The forms whose row lacks a part (`ours`, `speed`), in the order given."""
    return [form for form in forms if part not in results["rows"].get(form, {})]


def put(results: Results, form: str, found: dict, order: list[str]) -> None:
    """Adds to a form's row; rows stand in the order given, whichever was measured first, and others behind."""
    rows = results["rows"]
    rows[form] = rows.get(form, {}) | found
    results["rows"] = {name: rows[name] for name in dict.fromkeys([*order, *rows]) if name in rows}


def speed(natives: list[dict], forms: list[dict]) -> dict:
    """Decoding beside the native form, as if both read as many bytes for a token.

    `natives` has one sample more than `forms`, which were taken in between: each is held to the mean of its two
    neighbours, so that a machine that slows down slows both.
    """
    rate = lambda sample: sample["decode_tokens_per_s"]
    ratios = [rate(form) / mean(map(rate, natives[i : i + 2])) for i, form in enumerate(forms)]
    bytes_ratio = forms[0]["bytes_per_token"] / natives[0]["bytes_per_token"]
    return {
        "ratio": median(ratios) * bytes_ratio,
        "bytes_ratio": bytes_ratio,
        "native_tokens_per_s": [rate(sample) for sample in natives],
        "form_tokens_per_s": [rate(sample) for sample in forms],
    }


def figure(row: dict, part: str, key: str, digits: int) -> str:
    """A cell: the figure, or in a word why there is none."""
    found = row.get(part, {})
    return found["error"] if "error" in found else f"{found[key]:.{digits}f}" if key in found else "-"


def fused(row: dict) -> str:
    return "{} / {}".format(*row["inspect"]["fused"]) if "fused" in row.get("inspect", {}) else "-"


def truth(row: dict, key: str) -> str:
    return {True: "yes", False: "no", None: "-"}[row.get("inspect", {}).get(key)]


def loads(row: dict) -> str:
    return "-" if "ours" not in row else "no" if "error" in row["ours"] else "yes"


COLUMNS = [
    ("form", lambda form, row: f"`{form}`"),
    ("loads", lambda form, row: loads(row)),
    ("ours / all", lambda form, row: fused(row)),
    ("plan", lambda form, row: row.get("inspect", {}).get("plan", "-")),
    ("exact", lambda form, row: truth(row, "exact")),
    ("top-1", lambda form, row: figure(row, "ours", "top1_agreement", 3)),
    ("KL ours", lambda form, row: figure(row, "ours", "kl_divergence", 5)),
    ("KL own weights", lambda form, row: figure(row, "own", "kl_divergence", 5)),
    ("KL ONNX Runtime", lambda form, row: figure(row, "onnxruntime", "kl_divergence", 5)),
    ("speed", lambda form, row: figure(row, "speed", "ratio", 2)),
]
# Words begin at the left, figures end at the right.
WORDS = {"form", "loads", "plan", "exact"}


def caption(results: Results) -> str:
    """What was measured, in a sentence; of a file that has only speeds, the model's name."""
    about, reference = results["about"], results.get("reference")
    if reference is None:
        return about["model"]
    return (
        f"{about['model']}: {reference['tokens']} tokens of {about['text']} predicted, in windows of {reference['window']}; "
        f"perplexity of the f32 model {reference['perplexity']:.3f}; ONNX Runtime {about['onnxruntime']}"
    )


def markdown(results: Results) -> str:
    lines = [[title for title, _ in COLUMNS], ["---" if title in WORDS else "---:" for title, _ in COLUMNS]]
    lines += [[cell(form, row) for _, cell in COLUMNS] for form, row in results["rows"].items()]
    return "\n".join([caption(results), "", *(f"| {' | '.join(line)} |" for line in lines)])
