"""What one variant is asked, alone and held in less memory: the same questions to an engine and to stock weights."""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.baselines.weights import Weights, put_weights
from polymoe.engine.llm import LLM
from polymoe.evaluate.fidelity import Fidelity, Logits, OriginalModel, Samples, check_token_ids, compare, served_logits
from polymoe.evaluate.texts import WINDOW, encode_texts, spread_windows
from polymoe.offline.family import Family, max_model_len

Model = OriginalModel | LLM
Advance = Callable[[int], None]  # told of samples done since the last call


@dataclass(frozen=True)
class Marks:
    """What came out. rouge: kind -> F-measure of each sample; empty where nothing is answered."""

    fidelity: Fidelity
    rouge: dict[str, list[float]] = field(default_factory=dict)


class Evaluation:
    """One variant's questions. Everything is computed in float32 on the CPU.

    Args:
        samples: what the variant is measured on.
        longest: tokens that an engine must take, as `max_model_len`.
        batch: samples a pass.
        folder: for what the variant itself says to them, a file that is written when it is first needed.

    Raises `PolymoeError` for a token that the variant lacks.
    """

    kind: str  # what a sample is, in the plural

    def __init__(self, family: Family, variant: str, samples: Samples, longest: int, batch: int, folder: Path) -> None:
        index = family.names.index(variant)
        self.variant, self.samples, self.longest, self.batch = variant, samples, longest, batch
        self.checkpoint, self.vocab_size = family.checkpoints[index], family.vocab_sizes[index]
        self._folder = folder
        check_token_ids(variant, [*samples.windows, *(samples.inputs or ())], self.vocab_size)

    def alone(self, advance: Advance) -> Marks:
        """The variant's own checkpoint in stock transformers; fidelity to itself is perfect."""
        return self._marks(self.original, self._stock, advance)

    def of_engine(self, llm: LLM, advance: Advance) -> Marks:
        """What the engine of a bundle serves for the variant."""
        return self._marks(self._logits(llm), lambda: llm, advance)

    def of_weights(self, weights: Weights, advance: Advance) -> Marks:
        """The variant's checkpoint in stock transformers with other weights in some places."""
        model = self._stock(weights)
        return self._marks(self._logits(model), lambda: model, advance)

    def _marks(self, logits: Logits, model: Callable[[], Model], advance: Advance) -> Marks:  # noqa: ARG002
        """`logits` of the samples; `model`: the same model, for those who let it answer."""
        return Marks(compare(self.samples.windows, self.original, logits, self.vocab_size, self.batch, advance))

    @cached_property
    def original(self) -> Logits:
        """What the variant itself says: log-probabilities, computed once."""
        kept = KeptLogProbs(self._folder / f"{self.variant}.f32", self._original_logits())
        gc.collect()
        return lambda first, windows: [kept[i] for i in range(first, first + len(windows))]

    def _original_logits(self) -> Iterator[Tensor]:
        logits, windows = self._logits(self._stock()), self.samples.windows
        for first in range(0, len(windows), self.batch):
            yield from logits(first, windows[first : first + self.batch])

    def _stock(self, weights: Weights = ()) -> OriginalModel:
        model = OriginalModel(self.checkpoint.path, torch.float32, torch.device("cpu"))
        put_weights(model.model, weights)
        return model

    def _logits(self, model: Model) -> Logits:
        inputs = self.samples.inputs
        if isinstance(model, OriginalModel):
            return model.numbered_logits(inputs)
        return served_logits(model.engine, model.variants.index(self.variant), inputs)


class TextEvaluation(Evaluation):
    """A decoder-only variant continues held-out text, windows of it at a time.

    Args:
        samples: windows of `window` tokens at most, evenly spread over the text.

    Raises `PolymoeError` as `encode_texts`.
    """

    kind = "windows"

    def __init__(
        self, family: Family, variant: str, text: Path, samples: int, folder: Path, window: int = WINDOW, batch: int = 8
    ) -> None:
        window = min(window, *(max_model_len(c.config) for c in family.checkpoints))
        path = family.checkpoints[family.names.index(variant)].path
        ids = encode_texts({variant: path}, {variant: text})[variant]
        windows = spread_windows(ids, window, samples)
        super().__init__(family, variant, Samples(windows), window, batch, folder)


class KeptLogProbs:
    """`log_softmax` of float32 logits [tokens, vocabulary], an item after the other, in a memory-mapped file.

    Args:
        path: the file; it is written now, while `logits` is read, and belongs to this object.
        logits: one item at a time.
    """

    def __init__(self, path: Path, logits: Iterable[Tensor]) -> None:
        self._starts, vocab = [0], 0
        with path.open("wb") as file:
            for item in logits:
                file.write(item.log_softmax(dim=-1).numpy().tobytes())
                self._starts.append(self._starts[-1] + len(item))
                vocab = item.shape[1]
        self._rows = np.memmap(path, np.float32, "r", shape=(self._starts[-1], vocab))

    def __getitem__(self, index: int) -> Tensor:
        """float32 [tokens, vocabulary], a copy."""
        return torch.from_numpy(np.array(self._rows[self._starts[index] : self._starts[index + 1]]))
