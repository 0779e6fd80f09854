"""What the variants themselves say to the texts: computed once, and read again for every row of a table."""

import gc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from polymoe.evaluate.fidelity import Logits, OriginalModel


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
        self._files: dict[str, np.memmap[tuple[int, int], np.dtype[np.float32]]] = {}

    def of(self, name: str) -> Logits:
        """One variant's, as `compare` wants them; computed by the first call."""
        if name not in self._files:
            self._files[name] = self._compute(name)
        rows = self._files[name]
        starts = np.cumsum([0, *(len(window) for window in self.windows[name])])

        def read(first: int, group: list[list[int]]) -> list[torch.Tensor]:
            return [
                torch.from_numpy(np.array(rows[starts[i] : starts[i + 1]])) for i in range(first, first + len(group))
            ]

        return read

    def _compute(self, name: str) -> "np.memmap[tuple[int, int], np.dtype[np.float32]]":
        model = OriginalModel(self.checkpoints[name], torch.float32, torch.device("cpu"))
        windows = self.windows[name]
        path, place = self.folder / f"{name}.f32", 0
        with path.open("wb") as file:
            for start in range(0, len(windows), self.batch):
                for logits in model.logits(windows[start : start + self.batch]):
                    file.write(logits.log_softmax(dim=-1).numpy().tobytes())
                    place += len(logits)
                    vocab = logits.shape[1]
        del model
        gc.collect()
        return np.memmap(path, np.float32, "r", shape=(place, vocab))
