"""How far one model's predictions are from another's. Knows arrays of logits, and nothing of engines."""

import numpy

# Rows of logits taken at once: 64 rows of 49,152 in f64 are 25 MB.
ROWS = 64


def log_softmax(logits: numpy.ndarray) -> numpy.ndarray:
    """[rows, vocab] of any float to f64 log-probabilities."""
    shifted = logits.astype(numpy.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted).sum(axis=-1, keepdims=True))


def compare(tokens: list[int], logits: numpy.ndarray, reference: numpy.ndarray) -> dict[str, float]:
    """Sums over a window's predicted tokens: the first is given, the last predicts nothing.

    `logits` and `reference` are [tokens, vocab]. `divergence` is KL(reference || logits) in nats, `surprise`
    and `reference_surprise` are -log p of the token that follows, as `millwright eval` has them.
    """
    sums = {"tokens": len(tokens) - 1, "surprise": 0.0, "reference_surprise": 0.0, "divergence": 0.0, "same_top": 0}
    for start in range(0, len(tokens) - 1, ROWS):
        rows = slice(start, min(start + ROWS, len(tokens) - 1))
        following = numpy.array(tokens[start + 1 : rows.stop + 1])
        log_p, log_q = log_softmax(reference[rows]), log_softmax(logits[rows])
        at = (numpy.arange(len(following)), following)
        sums["surprise"] -= float(log_q[at].sum())
        sums["reference_surprise"] -= float(log_p[at].sum())
        sums["divergence"] += float((numpy.exp(log_p) * (log_p - log_q)).sum())
        sums["same_top"] += int((log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).sum())
    return sums


def summary(windows: list[dict[str, float]]) -> dict[str, float]:
    """What the sums of all windows come to; the field names are those of `millwright eval --json`."""
    total = {key: sum(window[key] for window in windows) for key in windows[0]}
    n = total["tokens"]
    return {
        "tokens": n,
        "perplexity": float(numpy.exp(total["surprise"] / n)),
        "reference_perplexity": float(numpy.exp(total["reference_surprise"] / n)),
        "kl_divergence": total["divergence"] / n,
        "top1_agreement": total["same_top"] / n,
    }
