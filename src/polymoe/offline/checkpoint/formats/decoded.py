"""What a format makes of the stored tensors that it knows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from polymoe.offline.checkpoint.source_tensor import SourceTensor, TensorFiles


@dataclass
class Decoded:
    """`tensors`: name -> the weight that several stored tensors make. `dropped`: stored names that say nothing of
    weights (scales of activations, which no stock model in 16 or 32 bits reads)."""

    tensors: dict[str, SourceTensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    @property
    def used(self) -> Iterator[str]:
        """The stored names that are accounted for."""
        for tensor in self.tensors.values():
            yield from tensor.parts
        yield from self.dropped


class Format(Protocol):
    """Finds the weights of one format in `files`, without reading more than what tells their shapes.

    `settings` is config.json's `quantization_config`, `dtype` that of the weights once they are dequantised. The
    arithmetic is that of the format's own library. Raises `CheckpointError` for a weight with a part missing or of the
    wrong shape, `UnsupportedModelError` for a kind of the format that is not read.
    """

    def __call__(self, settings: Mapping[str, Any], files: TensorFiles, dtype: torch.dtype, /) -> Decoded: ...
