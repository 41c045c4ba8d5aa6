"""ONNX Runtime, as a worker drives it: one session, one configuration, tokens in, logits out.

Two kinds of graph: `gqa` (ours to draw, onnx_forms.py: the past is one buffer, written in place) and `native`
(the agent's own bundle: the past is an input, the present an output, handed on without a copy of ours).
"""

import time
from pathlib import Path

import numpy
import onnxruntime
from onnxruntime import OrtValue


class OnnxRuntime:
    # A session keeps its threads spinning for a moment after a run; it must not while others are measured.
    ENTRIES = {"session.force_spinning_stop": "1"}

    def __init__(self, model: Path, threads: int, batch: int, positions: int, optimise: bool = True):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
        options.log_severity_level = 3
        for key, entry in self.ENTRIES.items():
            options.add_session_config_entry(key, entry)
        began = time.perf_counter()
        self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.load_s = time.perf_counter() - began
        self.batch, self.positions = batch, positions
        inputs = {i.name: i.shape for i in self.session.get_inputs()}
        self.in_place = "seqlens_k" in inputs
        self.past = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values.")}
        self.vocab = self.session.get_outputs()[0].shape[2]
        self.reset()

    def reset(self) -> None:
        """Forgets the past."""
        self.position = 0
        if self.in_place and hasattr(self, "cache"):
            return
        length = self.positions if self.in_place else 0
        empty = lambda shape: numpy.zeros((self.batch, shape[1], length, shape[3]), numpy.float32)
        self.cache = {name: OrtValue.ortvalue_from_numpy(empty(shape)) for name, shape in self.past.items()}

    def feed(self, tokens: numpy.ndarray, all_logits: bool) -> numpy.ndarray:
        """[batch, n] tokens to [batch, n or 1, vocab] logits."""
        n = tokens.shape[1]
        end = self.position + n
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", tokens)
        if self.in_place:
            rows = numpy.arange(n) if all_logits else numpy.array([n - 1])
            binding.bind_cpu_input("seqlens_k", numpy.full(self.batch, end - 1, numpy.int32))
            binding.bind_cpu_input("total_sequence_length", numpy.array(end, numpy.int32))
            binding.bind_cpu_input("rows", rows)
        else:
            positions = numpy.arange(self.position, end)[None].repeat(self.batch, axis=0)
            binding.bind_cpu_input("attention_mask", numpy.ones((self.batch, end), numpy.int64))
            binding.bind_cpu_input("position_ids", positions)
        binding.bind_output("logits", "cpu")
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
            present = name.replace("past_key_values", "present")
            if self.in_place:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present, "cpu")
        self.session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        if not self.in_place:
            self.cache = dict(zip(self.cache, outputs[1:]))
        self.position = end
        return outputs[0].numpy()

    def score(self, tokens: list[int]) -> numpy.ndarray:
        """[tokens, vocab]: what follows each of a window's tokens."""
        self.reset()
        return self.feed(numpy.array([tokens], numpy.int64), all_logits=True)[0]
