"""llama.cpp through its C interface, as a worker drives it: one context, one configuration, tokens in, logits out."""

import ctypes
import time
from pathlib import Path

import llama_cpp
import numpy

FLASH_ATTENTION_AUTO = -1


@llama_cpp.llama_log_callback
def quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Its log says nothing that a failed call doesn't."""


def initialise() -> None:
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


def features() -> str:
    """The instruction sets that it was built for: the proof of a native build."""
    return llama_cpp.llama_print_system_info().decode().strip()


class LlamaCpp:
    def __init__(self, model: Path, threads: int, batch: int, positions: int):
        initialise()
        began = time.perf_counter()
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp refuses {model}")
        self.context = llama_cpp.llama_init_from_model(self.model, self.parameters(threads, batch, positions))
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {batch} x {positions} for {model}")
        self.load_s = time.perf_counter() - began
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch, self.position = batch, 0
        self.tokens = llama_cpp.llama_batch_init(batch * positions, 0, 1)

    @staticmethod
    def parameters(threads: int, batch: int, positions: int) -> llama_cpp.llama_context_params:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = batch * positions
        params.n_seq_max = batch
        params.n_batch = batch * positions
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = FLASH_ATTENTION_AUTO
        return params

    def reset(self) -> None:
        """Forgets the past."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        self.position = 0

    def feed(self, tokens: numpy.ndarray, all_logits: bool) -> numpy.ndarray:
        """[batch, n] tokens to [batch, n or 1, vocab] logits, which are valid until the next call."""
        batch, n = tokens.shape
        inputs = self.tokens
        inputs.n_tokens = batch * n
        for sequence in range(batch):
            for i in range(n):
                at = sequence * n + i
                inputs.token[at] = int(tokens[sequence, i])
                inputs.pos[at] = self.position + i
                inputs.n_seq_id[at] = 1
                inputs.seq_id[at][0] = sequence
                inputs.logits[at] = all_logits or i == n - 1
        if llama_cpp.llama_decode(self.context, inputs) != 0:
            raise RuntimeError(f"llama_decode failed on {batch} x {n} tokens at {self.position}")
        self.position += n
        # Rows come in the order of the batch.
        rows = n if all_logits else 1
        first = ctypes.cast(llama_cpp.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        return numpy.ctypeslib.as_array(first, shape=(batch, rows, self.vocab))

    def score(self, tokens: list[int]) -> numpy.ndarray:
        """[tokens, vocab]: what follows each of a window's tokens."""
        self.reset()
        return self.feed(numpy.array([tokens], numpy.int64), all_logits=True)[0]
