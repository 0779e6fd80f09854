"""How far the variants' experts are apart: the distance that Algorithm 1 sorts by, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polymoe.quant.exact import changed

if TYPE_CHECKING:
    from polymoe.offline.scan import FamilyScan

_PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins
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


def is_own_picture(path: Path) -> bool:
    """Whether a file may be replaced by a picture: it is one, or empty."""
    if not path.is_file():
        return False
    if path.suffix.lower() != ".png":
        return path.stat().st_size == 0
    with path.open("rb") as file:
        return file.read(len(_PNG)) in (_PNG, b"")


def heatmap(scan: FamilyScan, path_png: str | Path) -> None:
    """Draw the relative distances of `scan`, layer by expert, into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    relative = scan.relative_distance
    num_layers, num_experts = relative.shape
    top = max(float(relative.max()), 1e-6)  # identical variants still get a scale
    width = min(16.0, max(6.4, 2.6 + 0.55 * num_experts))
    height = min(14.0, max(3.4, 1.9 + 0.4 * num_layers))
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained", dpi=150)
    image = axes.imshow(relative, cmap="viridis", aspect="auto", interpolation="nearest", vmin=0.0, vmax=top)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    if num_layers <= 32:
        axes.set_yticks(range(num_layers), scan.layer_names)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if num_experts <= 16 and num_layers <= 32:  # room for the numbers
        middle = 0.6 * top
        for (layer, expert), value in np.ndenumerate(relative):
            shade = "black" if value > middle else "white"
            axes.text(expert, layer, f"{100 * value:.2g}", ha="center", va="center", color=shade, fontsize=8)
    axes.set_title("How far apart the variants' experts are", loc="left", fontweight="bold", pad=22)
    names = ", ".join(scan.variant_names)
    names = names if len(names) <= 90 else names[:89] + "…"
    axes.annotate(
        names,
        (0, 1),
        (0, 6),
        xycoords="axes fraction",
        textcoords="offset points",
        va="bottom",
        color="0.35",
        fontsize=9,
    )
    bar = figure.colorbar(image, ax=axes, format=FuncFormatter(lambda value, _: f"{100 * value:.4g} %"), pad=0.02)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=6))
    bar.set_label("mean pair distance / weight norm")
    bar.outline.set_visible(False)
    figure.savefig(path_png)
    plt.close(figure)
