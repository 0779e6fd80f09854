"""What the variants themselves say to the texts: computed once, and read again for every row of a table."""

import gc
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from polymoe.evaluate.fidelity import Logits, OriginalModel


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


class OriginalLogProbs:
    """float32 log-probabilities of each variant on its windows, in memory-mapped files of `folder`.

    Args:
        checkpoints: variant -> its checkpoint.
        windows: variant -> token ids.
        batch: windows a pass.
    """

    def __init__(
        self, folder: Path, checkpoints: Mapping[str, Path], windows: Mapping[str, list[list[int]]], batch: int
    ) -> None:
        self.folder, self.checkpoints, self.windows, self.batch = folder, checkpoints, windows, batch
        self._kept: dict[str, KeptLogProbs] = {}

    def of(self, name: str) -> Logits:
        """One variant's, as `compare` wants them; computed by the first call."""
        if name not in self._kept:
            self._kept[name] = KeptLogProbs(self.folder / f"{name}.f32", self._compute(name))
            gc.collect()
        kept = self._kept[name]
        return lambda first, group: [kept[i] for i in range(first, first + len(group))]

    def _compute(self, name: str) -> Iterator[Tensor]:
        model = OriginalModel(self.checkpoints[name], torch.float32, torch.device("cpu"))
        windows = self.windows[name]
        for start in range(0, len(windows), self.batch):
            yield from model.logits(windows[start : start + self.batch])
