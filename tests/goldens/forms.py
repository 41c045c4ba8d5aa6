#!/usr/bin/env python3
"""Makes forms/*.json: what ONNX Runtime computes for the tiny model in each form that `cargo forge export` writes.

    target/goldens/bin/python tests/goldens/forms.py [FORM …]

A golden is of the form's own weights in f32 arithmetic, so that an engine can be held to it tightly. A graph that asks
for less is rewritten before it runs: dynamic quantisation rounds activations by the range of a whole prompt, which
nobody should copy, so its weights are dequantised and multiplied plainly; f16 becomes f32 around the same f16 weights;
a permission to round (`accuracy_level`) is taken away. `runtime_kl` says, for information, how far from that ONNX
Runtime is with the graph as it stands: the mean KL divergence of a token, fed as one prompt.

`tokens` are the first of a text and greedy steps after them, each with the past; `logits` has a row for each of
`positions`. `files` are the digests of the graph and its data: a golden of other bytes is stale. Some forms have a
second golden of the same model with biases on q, k and v.
"""

import hashlib
import pathlib
import sys
import tempfile

import numpy
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer

from oracle import HERE, ORACLE, TINY_PROMPT, Session, forge, rounded, write

TOKENS, STEPS = 20, 4
POSITIONS = [0, 13, 19, 20, 23]
# One for each way to write a bias.
BIASED = ["f32", "dynamic-int8", "dynamic-int8-channel", "q4", "q4f16", "q8-zp", "qdq-channel", "genai-int4", "dynamic-uint8-gqa"]
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def in_f32(model):
    """Makes all of a model's arithmetic f32 without changing a weight."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for inner in graphs(graph):
        undo_dynamic(inner, tensors, graph)
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == HALF:
                    attribute.i = FLOAT
                if attribute.name == "accuracy_level":
                    attribute.i = 0
                if attribute.HasField("t"):
                    widen(attribute.t)
        for value in [*inner.input, *inner.output]:
            if value.type.tensor_type.elem_type == HALF:
                value.type.tensor_type.elem_type = FLOAT
    for tensor in graph.initializer:
        widen(tensor)
    return model


def graphs(graph):
    """A graph and its branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def widen(tensor):
    if tensor.data_type == HALF:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(numpy.float32), tensor.name))


def undo_dynamic(inner, tensors, graph):
    """Puts a MatMul in the place of each MatMulInteger with the Cast and the Muls behind it."""
    makers = {output: node for node in inner.node for output in node.output}
    readers = {}
    for node in inner.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    gone = []
    for product in [node for node in inner.node if node.op_type == "MatMulInteger"]:
        quantise = makers[product.input[0]]
        (cast,) = readers[product.output[0]]
        (scaled,) = readers[cast.output[0]]
        scales = makers[next(name for name in scaled.input if name != cast.output[0])]
        scale = next(name for name in scales.input if name in tensors)
        weight = product.input[1] + "_f32"
        if weight not in tensors:
            q, scale = (numpy_helper.to_array(tensors[name]) for name in (product.input[1], scale))
            zero = numpy_helper.to_array(tensors[product.input[3]]) if len(product.input) > 3 else 0
            values = (q.astype(numpy.int32) - numpy.int32(zero)).astype(numpy.float32) * scale
            tensors[weight] = numpy_helper.from_array(values.astype(numpy.float32), weight)
            graph.initializer.append(tensors[weight])
        plain = helper.make_node("MatMul", [quantise.input[0], weight], [scaled.output[0]], scaled.name)
        scaled.CopyFrom(plain)
        gone += [product, cast, scales]
    gone += [node for node in inner.node if node.op_type == "DynamicQuantizeLinear"]
    for node in gone:
        inner.node.remove(node)


def divergence(expected, found):
    """The mean over tokens of KL(expected ‖ found)."""
    expected, found = (row - numpy.log(numpy.exp(row).sum(-1, keepdims=True)) for row in (expected, found))
    return float((numpy.exp(expected) * (expected - found)).sum(-1).mean())


def golden(form, bias):
    with tempfile.TemporaryDirectory() as folder:
        forge("export", "--form", form, "-o", folder, *(["--bias"] if bias else []))
        folder = pathlib.Path(folder)
        (graph,) = folder.rglob("*.onnx")
        files = sorted(path for path in graph.parent.iterdir() if path.name.startswith(graph.stem + ".onnx"))
        digests = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
        tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TINY_PROMPT).ids[:TOKENS]
        assert len(tokens) == TOKENS
        exact = Session(in_f32(onnx.load(graph)).SerializeToString())
        logits = list(exact.whole(tokens, 7))
        for _ in range(STEPS):
            tokens.append(int(logits[-1].argmax()))
            logits += list(exact.feed(tokens[-1:]))
        runtime = Session(graph).feed(tokens)
    logits = numpy.array(logits)
    return {
        "oracle": ORACLE,
        "form": form,
        "bias": bias,
        "files": digests,
        "text": TINY_PROMPT,
        "prompt_tokens": TOKENS,
        "tokens": tokens,
        "positions": POSITIONS,
        "runtime_kl": round(max(divergence(logits, runtime), 0), 7),
        "logits": [rounded(logits[position]) for position in POSITIONS],
    }


if __name__ == "__main__":
    (HERE / "forms").mkdir(exist_ok=True)
    known = [line.split()[0] for line in forge("export", "--form", "list").splitlines()]
    for form in sys.argv[1:] or known:
        for bias in [False, True] if form in BIASED else [False]:
            write(HERE / "forms" / (form + ("-bias" if bias else "") + ".json"), golden(form, bias))
