"""The formats there are. Adding one: an entry here (or `register`, from outside), what its kernels do with its `Kind`
where that is a new one, and its test; nothing else asks a format for its name."""

import math
from dataclasses import replace
from functools import cache
from typing import Literal

import torch

from polymoe.errors import PlanError
from polymoe.quant.codec import Centred, Float8, Levels
from polymoe.quant.exact import Exact
from polymoe.quant.format import (
    BLOCK_BYTES,
    PLANES,
    SCALE_DTYPE,
    Format,
    Kind,
    Parts,
    group_size,
    num_groups,
    row_bytes,
)

__all__ = [
    "BASE_FORMATS", "BLOCK_BYTES", "DELTA_FORMATS", "EXACT", "FREE_LEVELS", "GRID_LEVELS", "PLANES", "SCALE_DTYPE",
    "STORED", "Format", "Kind", "Parts", "get_format", "group_size", "level_bytes", "num_bytes", "num_groups",
    "parts", "register", "row_bytes", "unregister",
]  # fmt: skip


def _mirrored(*positive: float) -> tuple[float, ...]:
    return (*(-level for level in reversed(positive)), *positive)


# The least-squares (Lloyd-Max) levels of a Gaussian with variance 1: rows of trained weights and of their deltas are
# close to it.
_GAUSSIAN = {
    1: _mirrored(0.7979),
    2: _mirrored(0.4528, 1.5104),
    3: _mirrored(0.2451, 0.7560, 1.3439, 2.1519),
    4: _mirrored(0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
    5: _mirrored(
        *(0.0659, 0.1981, 0.3314, 0.4667, 0.6049, 0.7471, 0.8946, 1.0488),
        *(1.2118, 1.3863, 1.5762, 1.7872, 2.0287, 2.3177, 2.6911, 3.2607),
    ),
    6: _mirrored(
        *(0.0334, 0.1003, 0.1673, 0.2346, 0.3022, 0.3703, 0.4389, 0.5083, 0.5785, 0.6497, 0.7219, 0.7955, 0.8705),
        *(0.9472, 1.0257, 1.1065, 1.1897, 1.2758, 1.3651, 1.4583, 1.5558, 1.6586, 1.7675, 1.8840, 2.0096, 2.1468),
        *(2.2990, 2.4713, 2.6723, 2.9174, 3.2404, 3.7441),
    ),
}
LARGEST_BYTE = 127  # that a level is a multiple of


def _on_grid(levels: tuple[float, ...]) -> tuple[float, ...]:
    """The levels as multiples of a 127th of the largest, so that codes can be multiplied as 8-bit integers.

    It costs nothing that can be measured: deltas are taken against bases with these levels.
    """
    step = levels[-1] / LARGEST_BYTE
    return tuple(round(level / step) * step for level in levels)


_GRID = {bits: _on_grid(levels) for bits, levels in _GAUSSIAN.items()}
GRID_LEVELS: Literal["grid"] = "grid"  # of new bundles
FREE_LEVELS: Literal["free"] = "free"  # of those planned before levels were on a grid
_EVEN = tuple(float(code - 128) for code in range(256))
_GROUP = 256


def _repair(*left: float) -> dict[str, float]:
    """Of a base's rounding error, the share left below d1, d2, …, by the KL that bases with and without rounding left
    on three families of fine-tunes. It is more than the delta's distortion, and falls little from d3 on: where a base
    clips a large weight, the delta, whose values are small, clips what is missing again."""
    return {f"d{bits}": share for bits, share in enumerate(left, start=1)}


STORED = Format("stored", 16, 1, distortion=1.3e-6)
EXACT = Exact("exact", 0, 1, is_delta=True)
# Physical ids run through a layer's pools in the order of these lists; the lossless delta stays the last.
BASE_FORMATS: list[Format] = [
    STORED,
    Float8("fp8", 8, _GROUP, (), 6.8e-4),
    Centred("int8", 8, _GROUP, _EVEN, 4.8e-5, _repair(0.25, 0.060, 0.010, 0.0030, 0.0010)),
    Levels("int6", 6, _GROUP, _GRID[6], 0.00064, _repair(0.38, 0.200, 0.100, 0.0700, 0.0450)),
    Levels("int5", 5, _GROUP, _GRID[5], 0.0025, _repair(0.36, 0.160, 0.085, 0.0620, 0.0450)),
    Levels("int4", 4, _GROUP, _GRID[4], 0.0095, _repair(0.34, 0.120, 0.061, 0.0400, 0.0270)),
    Levels("int3", 3, _GROUP, _GRID[3], 0.0345, _repair(0.34, 0.130, 0.069, 0.0420, 0.0250)),
]
DELTA_FORMATS: list[Format] = [
    Levels("d1", 1, _GROUP, _GRID[1], 0.363, is_delta=True),
    Levels("d2", 2, _GROUP, _GRID[2], 0.1175, is_delta=True),
    Levels("d3", 3, _GROUP, _GRID[3], 0.0345, is_delta=True),
    Levels("d4", 4, _GROUP, _GRID[4], 0.0095, is_delta=True),
    Levels("d5", 5, _GROUP, _GRID[5], 0.0025, is_delta=True),
    EXACT,
]


@cache
def get_format(name: str, levels: str = GRID_LEVELS) -> Format:
    """The format called `name`, with the levels that a bundle's manifest names. Raises `PlanError` with the list."""
    for fmt in (*BASE_FORMATS, *DELTA_FORMATS):
        if fmt.name == name:
            free = levels == FREE_LEVELS and isinstance(fmt, Levels)
            return replace(fmt, levels=_GAUSSIAN[fmt.bits]) if free else fmt
    bases, deltas = (", ".join(fmt.name for fmt in fmts) for fmts in (BASE_FORMATS, DELTA_FORMATS))
    raise PlanError(f"unknown format {name!r}; bases are {bases}, deltas {deltas}.")


def register(fmt: Format) -> None:
    """Make a format from outside known to planning, bundles and serving, before any of them is asked for.

    Its kernels: those of its `kind`; elsewhere the experts are computed in torch by `Format.decode`.
    Raises `PlanError` for a name that is taken.
    """
    if any(fmt.name == known.name for known in (*BASE_FORMATS, *DELTA_FORMATS)):
        raise PlanError(f"there is a format {fmt.name!r} already.")
    formats = DELTA_FORMATS if fmt.is_delta else BASE_FORMATS
    formats.insert(len(formats) - formats[-1].is_lossless, fmt)


def unregister(fmt: Format) -> None:
    """Undo `register`: bundles that have it cannot be opened any more. Raises `ValueError` where it is not known."""
    (DELTA_FORMATS if fmt.is_delta else BASE_FORMATS).remove(fmt)
    get_format.cache_clear()


def level_bytes(fmt: Format) -> tuple[tuple[int, ...], float] | None:
    """(an unsigned byte for each code, what 1 of it is worth): a level is (byte - 128) times that.

    None where levels are no such multiples: formats without a table, and those of old bundles.
    """
    if not fmt.levels:
        return None
    step = max(fmt.levels) / LARGEST_BYTE
    found = tuple(round(level / step) for level in fmt.levels)
    pairs = zip(fmt.levels, found, strict=True)
    exact = all(math.isclose(level, byte * step, rel_tol=1e-9, abs_tol=1e-12) for level, byte in pairs)
    return (tuple(byte + 128 for byte in found), step) if exact else None


def parts(fmt: Format, shape: tuple[int, ...], dtype: torch.dtype) -> Parts:
    """`Format.parts`."""
    return fmt.parts(shape, dtype)


def num_bytes(fmt: Format, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """`Format.num_bytes`."""
    return fmt.num_bytes(shape, dtype)
