#!/usr/bin/env python3
"""Makes the golden files beside it: what ONNX Runtime computes for the forge's bundles.

    python3 -m venv target/goldens && target/goldens/bin/pip install -r tests/goldens/requirements.txt
    target/goldens/bin/python tests/goldens/make.py

Graph optimisation is off: by default ONNX Runtime fuses the int8 form to int8 activations, which is off by
up to 1.1 in a logit; without it weights are dequantised and all arithmetic is f32. The goldens are therefore
held tightly only by an f32 path; int8 activations are compared by KL divergence and by the top token.

tiny-*.json: every logit of the first 40 tokens of a text and of 4 greedy steps after them, each step with the
past; `tokens` holds all 44, `logits` a row for each.
smollm2-135m-int8.json: the five highest logits at the last positions of two prompts.

`forms.py` beside it makes those of what `cargo forge export` writes.
"""

import pathlib

import numpy
from tokenizers import Tokenizer

from oracle import HERE, ORACLE, TINY_PROMPT, Session, forge, rounded, write

TINY_TOKENS, TINY_STEPS = 40, 4
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
SMOLLM2_PROMPTS = [
    SYSTEM + "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "Replace the bearing of the cooling pump when the vibration exceeds 7.1 mm/s. Before the work begins,",
]
SMOLLM2_POSITIONS, SMOLLM2_TOP = 4, 5


class Model(Session):
    """A bundle."""

    def __init__(self, name, precision):
        self.path = pathlib.Path(forge("pull", name, "--precision", precision).strip())
        super().__init__(self.path / "model.onnx")
        self.tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))

    def header(self):
        manifest = (self.path / "manifest.toml").read_text()
        digest = manifest.split('name = "model.onnx.data"\nsha256 = "')[1][:64]
        return {"oracle": ORACLE, "weights_sha256": digest}


def tiny(precision):
    model = Model("tiny", precision)
    tokens = model.tokenizer.encode(TINY_PROMPT).ids[:TINY_TOKENS]
    assert len(tokens) == TINY_TOKENS
    logits = list(model.whole(tokens, 7))
    for _ in range(TINY_STEPS):
        tokens.append(int(logits[-1].argmax()))
        logits += list(model.feed(tokens[-1:]))
    return model.header() | {
        "text": TINY_PROMPT,
        "prompt_tokens": TINY_TOKENS,
        "tokens": tokens,
        "logits": [rounded(row) for row in logits],
    }


def smollm2():
    model = Model("smollm2-135m", "int8")
    prompts = []
    for text in SMOLLM2_PROMPTS:
        tokens = model.tokenizer.encode(text).ids
        logits = model.whole(tokens, 8)
        last = []
        for position in range(len(tokens) - SMOLLM2_POSITIONS, len(tokens)):
            row = logits[position]
            top = [int(i) for i in numpy.argsort(-row)[:SMOLLM2_TOP]]
            last.append({"position": position, "top": top, "logits": rounded(row[top])})
        prompts.append({"text": text, "tokens": tokens, "last": last})
    return model.header() | {"prompts": prompts}


if __name__ == "__main__":
    for precision in ["int8", "f32"]:
        write(HERE / f"tiny-{precision}.json", tiny(precision))
    write(HERE / "smollm2-135m-int8.json", smollm2())
