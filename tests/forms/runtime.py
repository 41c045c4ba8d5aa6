"""ONNX Runtime's half: the f32 model's logits, and how far a form is from them as users run it."""

from pathlib import Path

import fidelity
import numpy
from oracle import Session
from tokenizers import Tokenizer


class Reference:
    """The f32 model's logits of a text, kept in a folder; a window of 512 is 100 MB for 49,152 tokens."""

    def __init__(self, bundle: Path, text: Path, window: int, tokens_max: int, threads: int, folder: Path):
        tokens = Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(text.read_text()).ids
        tokens = tokens[: tokens_max or None]
        # The last may be shorter, as in `millwright eval`.
        self.windows = [tokens[i : i + window] for i in range(0, len(tokens), window)]
        self.folder, self.threads = folder, threads
        # By default ONNX Runtime would fuse; the reference is plain f32 arithmetic.
        session = Session(bundle / "model.onnx", threads=threads)
        self.summary = self.compare(session, write=True) | {"window": window}

    def score(self, graph: Path) -> dict:
        """How far ONNX Runtime with its defaults is from the reference, or why it can't run the graph."""
        try:
            return self.compare(Session(graph, optimised=True, threads=self.threads))
        # It has an exception for each of its own codes, all of which only its C module names.
        except Exception as error:
            return {"error": type(error).__name__, "message": str(error)}

    def compare(self, session: Session, write: bool = False) -> dict:
        sums = []
        for index, tokens in enumerate(self.windows):
            session.reset()
            logits, file = session.feed(tokens), self.folder / f"{index}.npy"
            if write:
                numpy.save(file, logits)
            sums.append(fidelity.compare(tokens, logits, logits if write else numpy.load(file)))
        return fidelity.summary(sums)
