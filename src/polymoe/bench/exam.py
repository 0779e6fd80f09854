"""What one variant is asked, alone and consolidated: the same questions to a bundle's engine and to stock weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from polymoe.bench.originals import KeptLogProbs
from polymoe.bench.rivals import Weights, put_weights
from polymoe.evaluate.fidelity import Fidelity, Logits, OriginalModel, check_token_ids, compare, served_logits
from polymoe.evaluate.record import float32_engine
from polymoe.evaluate.texts import WINDOW, encode_texts, spread_windows
from polymoe.offline.bundle import Bundle
from polymoe.offline.family import Family, max_model_len

Advance = Callable[[int], None]  # told of samples done since the last call


@dataclass(frozen=True)
class Marks:
    """What came out. rouge: kind -> F-measure of each sample; empty where nothing is answered."""

    fidelity: Fidelity
    rouge: dict[str, list[float]] = field(default_factory=dict)


class Exam(ABC):
    """One variant's questions. Everything is computed in float32 on the CPU."""

    variant: str
    num_samples: int
    sample: str  # what a sample is, in the plural

    @abstractmethod
    def alone(self, advance: Advance) -> Marks:
        """The variant's own checkpoint in stock transformers; fidelity to itself is perfect."""

    @abstractmethod
    def of_bundle(self, bundle: Bundle, advance: Advance) -> Marks:
        """What the engine serves for the variant."""

    @abstractmethod
    def of_weights(self, weights: Weights, advance: Advance) -> Marks:
        """The variant's checkpoint in stock transformers with other weights in some places."""


class TextExam(Exam):
    """A decoder-only variant continues held-out text, windows of it at a time.

    Args:
        folder: for the original's log-probabilities.
        samples: windows at most, evenly spread over the text.
    """

    sample = "windows"

    def __init__(self, family: Family, variant: str, text: Path, samples: int, folder: Path, batch: int = 8) -> None:
        index = family.names.index(variant)
        self.variant, self.batch = variant, batch
        self.path = family.checkpoints[index].path
        self.vocab_size = family.vocab_sizes[index]
        self.window = min(WINDOW, *(max_model_len(c.config) for c in family.checkpoints))
        ids = encode_texts({variant: self.path}, {variant: text})[variant]
        self.windows = spread_windows(ids, self.window, samples)
        self.num_samples = len(self.windows)
        check_token_ids(variant, self.windows, self.vocab_size)
        self._kept = KeptLogProbs(folder / f"{variant}.f32", self._original_logits())

    def _original_logits(self) -> Iterator[Tensor]:
        model = self._stock()
        for start in range(0, len(self.windows), self.batch):
            yield from model.logits(self.windows[start : start + self.batch])

    def _stock(self) -> OriginalModel:
        return OriginalModel(self.path, torch.float32, torch.device("cpu"))

    def _originals(self, first: int, group: list[list[int]]) -> list[Tensor]:
        return [self._kept[i] for i in range(first, first + len(group))]

    def alone(self, advance: Advance) -> Marks:
        return self._marks(self._originals, advance)

    def of_bundle(self, bundle: Bundle, advance: Advance) -> Marks:
        engine = float32_engine(bundle, self.window, self.batch)
        index = [v.name for v in engine.info.variants].index(self.variant)
        return self._marks(served_logits(engine, index), advance)

    def of_weights(self, weights: Weights, advance: Advance) -> Marks:
        model = self._stock()
        put_weights(model.model, weights)
        return self._marks(model.numbered_logits(), advance)

    def _marks(self, logits: Logits, advance: Advance) -> Marks:
        return Marks(compare(self.windows, self._originals, logits, self.vocab_size, self.batch, advance))
