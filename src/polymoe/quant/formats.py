"""How an expert's matrices are stored: the formats of bases and of deltas, their tensors and their bytes.

A matrix is [O, I]: O outputs, I inputs (the reduction axis, last). Modules that hold [in, out] (`is_transposed`) are
packed as [out, in] too. A vector (a bias) is never quantised. Each value is `levels[code] · scale of its group`.

Groups: a row is cut into the fewest groups of at most `Format.group` values, each a multiple of 64 but the last.

    I = 192, group 256: |---------- 192 ----------|          I = 384: |--- 192 ---|--- 192 ---|

Packing, along I: 32 bytes hold 256 / bits consecutive values; byte j has value j in its low bits, value j + 32 above,
and so on, so that one 32-byte load gives 32 lanes a shift. The last block of a row may be shorter: n bytes then hold
its values with stride n in place of 32, without padding beyond the last byte. Widths that are no power of two are
planes, one after the other in the row: 3 bits = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, low bits first.
"""

import math
from dataclasses import dataclass

import torch

from polymoe.errors import PlanError

BLOCK_BYTES = 32
SCALE_DTYPE = torch.bfloat16
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


@dataclass(frozen=True)
class Format:
    """`bits` a value; `group`: most values along I that share a scale; `levels`: the code's value before the scale.

    `levels` is empty for formats without a table: "stored", "none", "fp8" (codes are float8_e4m3fn) and "exact".
    """

    name: str
    bits: int
    group: int
    levels: tuple[float, ...] = ()


def _mirrored(*positive: float) -> tuple[float, ...]:
    return (*(-level for level in reversed(positive)), *positive)


# The least-squares (Lloyd-Max) levels of a Gaussian with variance 1: rows of trained weights and of their deltas are
# close to it. In brackets the share of the variance that is left.
_GAUSSIAN = {
    1: _mirrored(0.7979),  # .363
    2: _mirrored(0.4528, 1.5104),  # .117
    3: _mirrored(0.2451, 0.7560, 1.3439, 2.1519),  # .0345
    4: _mirrored(0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),  # .0095
    5: _mirrored(
        *(0.0659, 0.1981, 0.3314, 0.4667, 0.6049, 0.7471, 0.8946, 1.0488),
        *(1.2118, 1.3863, 1.5762, 1.7872, 2.0287, 2.3177, 2.6911, 3.2607),
    ),  # .0025
    6: _mirrored(
        *(0.0334, 0.1003, 0.1673, 0.2346, 0.3022, 0.3703, 0.4389, 0.5083, 0.5785, 0.6497, 0.7219, 0.7955, 0.8705),
        *(0.9472, 1.0257, 1.1065, 1.1897, 1.2758, 1.3651, 1.4583, 1.5558, 1.6586, 1.7675, 1.8840, 2.0096, 2.1468),
        *(2.2990, 2.4713, 2.6723, 2.9174, 3.2404, 3.7441),
    ),  # .0006
}
_GROUP = 256

LARGEST_BYTE = 127  # that a level is a multiple of


def _on_grid(levels: tuple[float, ...]) -> tuple[float, ...]:
    """The levels as multiples of a 127th of the largest, so that codes can be multiplied as 8-bit integers.

    It costs nothing that can be measured: deltas are taken against bases with these levels.
    """
    step = levels[-1] / LARGEST_BYTE
    return tuple(round(level / step) * step for level in levels)


_GRID = {bits: _on_grid(levels) for bits, levels in _GAUSSIAN.items()}
GRID_LEVELS, FREE_LEVELS = "grid", "free"  # of new bundles, and of those planned before levels were on a grid


def _bases(levels: dict[int, tuple[float, ...]]) -> tuple[Format, ...]:
    named = (Format(f"int{bits}", bits, _GROUP, levels[bits]) for bits in (6, 5, 4, 3))
    # code 128 is zero; 0 is not used, so that the levels are symmetric
    eight = Format("int8", 8, _GROUP, tuple(float(code - 128) for code in range(256)))
    return (Format("stored", 16, 1), Format("fp8", 8, _GROUP), eight, *named)


def _deltas(levels: dict[int, tuple[float, ...]]) -> tuple[Format, ...]:
    return (*(Format(f"d{bits}", bits, _GROUP, levels[bits]) for bits in (1, 2, 3, 4, 5)), Format("exact", 0, 1))


BASE_FORMATS, DELTA_FORMATS = _bases(_GRID), _deltas(_GRID)
_FORMATS = {
    GRID_LEVELS: {fmt.name: fmt for fmt in (*BASE_FORMATS, *DELTA_FORMATS)},
    FREE_LEVELS: {fmt.name: fmt for fmt in (*_bases(_GAUSSIAN), *_deltas(_GAUSSIAN))},
}
SIGNED = "±"  # "±d2": midpoint base of two variants, one d2 delta that the first adds and the second subtracts

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def get_format(name: str, levels: str = GRID_LEVELS) -> Format:
    """The format called `name` with the levels that a bundle's manifest names. Raises `PlanError` with the list."""
    if name not in _FORMATS[levels]:
        bases, deltas = (", ".join(fmt.name for fmt in fmts) for fmts in (BASE_FORMATS, DELTA_FORMATS))
        raise PlanError(f"unknown format {name!r}; bases are {bases}, deltas {deltas}.")
    return _FORMATS[levels][name]


def level_bytes(fmt: Format) -> tuple[tuple[int, ...], float] | None:
    """(an unsigned byte for each code, what 1 of it is worth): a level is (byte - 128) times that.

    None where levels are no such multiples: formats without a table, and those of old bundles.
    """
    if not fmt.levels:
        return None
    step = max(fmt.levels) / LARGEST_BYTE
    found = tuple(round(level / step) for level in fmt.levels)
    exact = all(
        math.isclose(level, byte * step, rel_tol=1e-9, abs_tol=1e-12)
        for level, byte in zip(fmt.levels, found, strict=True)
    )
    return (tuple(max(byte, -128) + 128 for byte in found), step) if exact else None


def group_size(fmt: Format, inputs: int) -> int:
    """Values that share a scale in a row of `inputs`; the last group may have fewer."""
    groups = math.ceil(inputs / fmt.group)
    return math.ceil(inputs / groups / 64) * 64


def num_groups(fmt: Format, inputs: int) -> int:
    return math.ceil(inputs / group_size(fmt, inputs))


def plane_bytes(bits: int, inputs: int) -> int:
    """Bytes of one plane of a row. A short last block takes whole bytes."""
    return math.ceil(inputs * bits / 8)


def row_bytes(fmt: Format, inputs: int) -> int:
    """Bytes of the codes of one row."""
    return sum(plane_bytes(bits, inputs) for bits in PLANES[fmt.bits])


def parts(fmt: Format, shape: tuple[int, ...], dtype: torch.dtype) -> Parts:
    """{part: (dtype, shape)} of the tensors that store one matrix [O, I] (or a bias [O], which is stored plainly).

    Leading axes are kept. A delta's bias is the difference in float32. "exact" has a length of its own for every
    expert and is not described here: see `polymoe.quant.exact`.
    """
    assert fmt.name != "exact", "the size of an exact delta is only known from the weights"
    if len(shape) == 1 or fmt.name == "stored":
        return {"": (torch.float32 if fmt in DELTA_FORMATS else dtype, shape)}
    *lead, inputs = shape
    codes = torch.float8_e4m3fn if fmt.name == "fp8" else torch.uint8
    return {
        "codes": (codes, (*lead, row_bytes(fmt, inputs))),
        "scales": (SCALE_DTYPE, (*lead, num_groups(fmt, inputs))),
    }


def num_bytes(fmt: Format, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one matrix or bias, scales counted."""
    return sum(math.prod(part) * kind.itemsize for kind, part in parts(fmt, shape, dtype).values())
