"""How far the variants' experts of one layer are apart."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polymoe.quant.exact import changed

_PIECE = 1 << 20  # values compared at once


class LayerDistances:
    """Distances and norms of one layer's experts, summed up tensor by tensor.

    d(e) = Σ_{i<j} ‖W_i(e) − W_j(e)‖₂ with each expert's tensors flattened into one vector (method.md "Similarity";
    arXiv 2505.06481). The arithmetic is float32: bfloat16 distances come in steps of 1/64 and tie.
    """

    def __init__(self, num_variants: int, num_experts: int) -> None:
        self._pairs = list(combinations(range(num_variants), 2))
        self._square = np.zeros((len(self._pairs), num_experts))
        self._norm_square = np.zeros((num_variants, num_experts))
        self.changed_bytes = np.zeros((num_variants, num_experts), dtype=np.int64)  # bits differ from the first's

    def add(self, expert: int, weights: Sequence[Tensor], digests: Sequence[Sequence[bytes]] | None = None) -> None:
        """Add one tensor of an expert, `weights[v]` of any shape. Pairs with equal `digests[v][e]` count as 0.

        Several threads may add, each other experts.
        """
        # In pieces: float32 copies of several experts at once would be gigabytes.
        for pieces in zip(*(torch.split(weight.reshape(-1), _PIECE) for weight in weights), strict=True):
            rows = [piece.to(torch.float32) for piece in pieces]
            for variant, row in enumerate(rows):
                self._norm_square[variant, expert] += float(torch.linalg.vector_norm(row)) ** 2
            for index, (i, j) in enumerate(self._pairs):
                if digests is None or digests[i][expert] != digests[j][expert]:
                    if i == 0:
                        self.changed_bytes[j, expert] += int(changed(pieces[j], pieces[0]).sum()) * pieces[j].itemsize
                    self._square[index, expert] += float(torch.linalg.vector_norm(rows[i] - rows[j])) ** 2

    @property
    def distance(self) -> NDArray[np.float64]:
        """[E], the sum over all pairs of variants."""
        distance: NDArray[np.float64] = np.sqrt(self._square).sum(axis=0)
        return distance

    @property
    def squares(self) -> NDArray[np.float64]:
        """[E, V, V], ‖W_i − W_j‖², and ‖W_i‖² on the diagonal."""
        num_variants, num_experts = self._norm_square.shape
        squares = np.zeros((num_experts, num_variants, num_variants))
        squares[:, range(num_variants), range(num_variants)] = self._norm_square.T
        for (i, j), square in zip(self._pairs, self._square, strict=True):
            squares[:, i, j] = squares[:, j, i] = square
        return squares

    @property
    def norms(self) -> NDArray[np.float64]:
        """[V, E], ‖W_v(e)‖₂."""
        return np.sqrt(self._norm_square)
