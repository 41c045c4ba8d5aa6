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
"""

import json
import pathlib
import subprocess

import numpy
import onnxruntime
from tokenizers import Tokenizer

HERE = pathlib.Path(__file__).resolve().parent
TINY_PROMPT = (
    "<|im_start|>user\nthe bearing of pump 7 is hot (81 °C) and vibration is high.<|im_end|>\n"
    "<|im_start|>assistant\nCheck the oil level, then the seal; replace what leaks."
)
TINY_TOKENS, TINY_STEPS = 40, 4
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
SMOLLM2_PROMPTS = [
    SYSTEM + "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "Replace the bearing of the cooling pump when the vibration exceeds 7.1 mm/s. Before the work begins,",
]
SMOLLM2_POSITIONS, SMOLLM2_TOP = 4, 5


class Model:
    """A bundle in ONNX Runtime, one sequence at a time."""

    def __init__(self, name, precision):
        command = ["cargo", "run", "--quiet", "-p", "millwright-forge", "--", "pull", name, "--precision", precision]
        path = subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        self.path = pathlib.Path(path)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(self.path / "model.onnx", options)
        self.tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        self.reset()

    def reset(self):
        inputs = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self.past = {i.name: numpy.zeros((1, i.shape[1], 0, i.shape[3]), numpy.float32) for i in inputs}
        self.position = 0

    def feed(self, tokens):
        """The logits of each token, [tokens, vocab]."""
        end = self.position + len(tokens)
        feeds = {
            "input_ids": numpy.array([tokens], numpy.int64),
            "attention_mask": numpy.ones((1, end), numpy.int64),
            "position_ids": numpy.arange(self.position, end, dtype=numpy.int64)[None],
        }
        names = [output.name for output in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(None, feeds | self.past)))
        logits = outputs.pop("logits")[0]
        self.past = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
        self.position = end
        return logits

    def whole(self, tokens, chunk):
        """All of a prompt's logits, checked against feeding it in chunks."""
        self.reset()
        pieces = [self.feed(tokens[i : i + chunk]) for i in range(0, len(tokens), chunk)]
        self.reset()
        logits = self.feed(tokens)
        off = numpy.abs(numpy.concatenate(pieces) - logits).max()
        assert off < 1e-3, f"chunks of {chunk} change a logit by {off}"
        return logits

    def header(self):
        manifest = (self.path / "manifest.toml").read_text()
        digest = manifest.split('name = "model.onnx.data"\nsha256 = "')[1][:64]
        return {"oracle": f"onnxruntime {onnxruntime.__version__}, graph optimisation disabled", "weights_sha256": digest}


def rounded(values):
    return [float(f"{value:.7g}") for value in values]


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


def write(name, golden):
    text = json.dumps(golden, separators=(",", ":"), ensure_ascii=False)
    # A row a line, so that a change shows where it is.
    text = text.replace("],[", "],\n[").replace('{"', '\n{"').lstrip()
    (HERE / name).write_text(text + "\n")
    print(f"{name}: {len(text):,} bytes")


if __name__ == "__main__":
    for precision in ["int8", "f32"]:
        write(f"tiny-{precision}.json", tiny(precision))
    write("smollm2-135m-int8.json", smollm2())
