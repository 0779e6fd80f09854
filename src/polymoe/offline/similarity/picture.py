"""A picture of how far the variants' experts are apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from polymoe.offline.similarity.scan import FamilyScan

_PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins


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
