"""ONNX Runtime, one sequence at a time, and what the scripts beside this share."""

import functools
import json
import pathlib
import subprocess

import numpy
import onnxruntime

HERE = pathlib.Path(__file__).resolve().parent
ORACLE = f"onnxruntime {onnxruntime.__version__}, graph optimisation disabled"
TINY_PROMPT = (
    "<|im_start|>user\nthe bearing of pump 7 is hot (81 °C) and vibration is high.<|im_end|>\n"
    "<|im_start|>assistant\nCheck the oil level, then the seal; replace what leaks."
)
TYPES = {"tensor(float)": numpy.float32, "tensor(float16)": numpy.float16}


def forge(*arguments):
    """What `cargo forge` prints."""
    return run(forge_path(), *arguments)


@functools.cache
def forge_path():
    """The forge, built with the whole workspace: alone it would have other features and take its dependencies anew."""
    run("cargo", "build", "--quiet", "--workspace", "--bin", "millwright-forge")
    target = json.loads(run("cargo", "metadata", "--format-version", "1", "--no-deps"))["target_directory"]
    return pathlib.Path(target) / "debug" / "millwright-forge"


def run(*command):
    return subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.PIPE, text=True).stdout


class Session:
    """A model, by its path or its bytes: to the letter of its graph, or optimised, which is ONNX Runtime's default.

    Threads: 0 for as many as ONNX Runtime thinks right.
    """

    def __init__(self, model, optimised=False, threads=0):
        options = onnxruntime.SessionOptions()
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        # Errors only: a rewritten graph has weights that nothing reads.
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(model, options)
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.reset()

    def reset(self):
        inputs = [i for i in self.inputs.values() if i.name.startswith("past_key_values.")]
        self.past = {i.name: numpy.zeros((1, i.shape[1], 0, i.shape[3]), TYPES[i.type]) for i in inputs}
        self.position = 0

    def feed(self, tokens):
        """The logits of each token, [tokens, vocab]."""
        end = self.position + len(tokens)
        feeds = {
            "input_ids": numpy.array([tokens], numpy.int64),
            "attention_mask": numpy.ones((1, end), numpy.int64),
            "position_ids": numpy.arange(self.position, end, dtype=numpy.int64)[None],
            "use_cache_branch": numpy.array([self.position > 0]),
        }
        feeds = {name: value for name, value in feeds.items() if name in self.inputs}
        names = [output.name for output in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(None, feeds | self.past)))
        logits = outputs.pop("logits")[0].astype(numpy.float32)
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


def rounded(values):
    return [float(f"{value:.7g}") for value in values]


def write(path, golden):
    text = json.dumps(golden, separators=(",", ":"), ensure_ascii=False)
    # A row a line, so that a change shows where it is.
    text = text.replace("],[", "],\n[").replace('{"', '\n{"').lstrip()
    path.write_text(text + "\n")
    print(f"{path.name}: {len(text):,} bytes")
