"""A checkpoint's tensors under the names that transformers' rules expect, however they lie in its files."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from polymoe.bundle.tensor_file import TensorEntry

Load = Callable[[str], Tensor]  # stored name -> tensor
Make = Callable[[Load], Tensor]


@dataclass(frozen=True)
class SourceTensor:
    """One tensor that the rules work on. `make(load)` reads its `parts`, the stored names it is made of, and no others.

    `dtype` is None for a type that no weight can have (8-bit floats without scales …); `stored_as` is what a message
    calls it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    stored_as: str
    parts: tuple[str, ...]
    make: Make


def plain(name: str, entry: TensorEntry) -> SourceTensor:
    """A tensor that is read as it is stored."""
    return SourceTensor(entry.shape, entry.dtype, entry.dtype_name, (name,), lambda load: load(name))


class TensorFiles:
    """The tensors of a checkpoint's files, read one at a time. `entries`: stored name -> what its header says.

    Threads may share it; files stay open.
    """

    def __init__(self, tensors: Mapping[str, tuple[Path, TensorEntry]]) -> None:
        self.entries = {name: entry for name, (_, entry) in tensors.items()}
        self._paths = {name: path for name, (path, _) in tensors.items()}
        self._handles: dict[Path, Any] = {}
        self._lock = threading.Lock()

    def load(self, name: str) -> Tensor:
        """On the CPU, in the dtype that it is stored in."""
        path = self._paths[name]
        with self._lock:
            if path not in self._handles:
                self._handles[path] = safe_open(path, framework="pt", device="cpu")
            handle = self._handles[path]
        tensor: Tensor = handle.get_tensor(name)
        return tensor

    def num_bytes(self, tensor: SourceTensor) -> int:
        """What its parts take in the files."""
        return sum(self.entries[name].num_bytes for name in tensor.parts)
