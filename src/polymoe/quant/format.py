"""What a format of expert matrices is: its codec, its tensors and bytes, and how much error it leaves.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

BLOCK_BYTES = 32
SCALE_DTYPE = torch.bfloat16
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]
PoolParts = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]


class Kind(Enum):
    """How a kernel reads what is stored; formats of one kind differ in `bits`, `group` and `levels` alone."""

    VALUES = "values as they are, without scales"
    FLOAT8 = "float8_e4m3fn, scaled"
    CENTRED = "(code - 128), scaled"
    LEVELS = "levels[code], scaled"
    CHANGES = "a bitmap of what differs from a base as stored, and the new values"


@dataclass(frozen=True)
class Format:
    """How one matrix is stored; by itself, values as they are. Other formats override what differs.

    name: in manifests and options. bits: of a code. group: most values along I that share a scale.
    levels: what each code stands for before the scale; empty where that is no table.
    distortion: share of a Gaussian matrix's energy that is left as error (its own row scales, encoded without text).
    repair: of a base, name of a delta format -> share of the base's rounding error that is left below such a delta;
        where it was not measured, it is the delta's distortion.
    is_delta: made for the difference to a base; False: for a base.
    """

    kind: ClassVar[Kind] = Kind.VALUES
    code_dtype: ClassVar[torch.dtype] = torch.uint8

    name: str
    bits: int
    group: int
    levels: tuple[float, ...] = ()
    distortion: float = 0.0
    repair: Mapping[str, float] = field(default_factory=dict, compare=False)
    is_delta: bool = False

    @property
    def is_packed(self) -> bool:
        """Not the checkpoint's values: another layout than the stock module's, and tensors of its own."""
        return self.kind is not Kind.VALUES

    @property
    def is_coded(self) -> bool:
        """Codes with scales, which a kernel decodes."""
        return self.is_packed and not self.is_lossless

    @property
    def lookup(self) -> tuple[float, ...]:
        """What kernels find a code's value in, before the scale; empty where they compute it."""
        return self.levels if self.kind is Kind.LEVELS else ()

    @property
    def is_lossless(self) -> bool:
        """A delta that gives the variant's weight bit for bit, against a base as stored; it has no sign."""
        return self.kind is Kind.CHANGES

    def parts(self, shape: tuple[int, ...], dtype: torch.dtype) -> Parts:
        """{part: (dtype, shape)} of the tensors that store one matrix [O, I] (or a bias [O]) of a checkpoint's `dtype`.

        Leading axes are kept.
        """
        return {"": (dtype, shape)}

    def pool_parts(self, count: int, shape: tuple[int, ...]) -> PoolParts:
        """The same of `count` matrices in one pool; dtype None: a checkpoint's, size −1: as many as there are."""
        parts = self.parts(shape, torch.float32)
        return {part: (dtype if part else None, (count, *size)) for part, (dtype, size) in parts.items()}

    def num_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes of one matrix or bias, scales counted."""
        return sum(math.prod(part) * kind.itemsize for kind, part in self.parts(shape, dtype).values())

    def encode(self, weight: Tensor, second_moment: Tensor | None = None) -> dict[str, Tensor]:
        """Pack one matrix.

        Args:
            weight: float32 [O, I] (or [O] for a bias, which is kept).
            second_moment: float32 [I, I], Σ x xᵀ over the matrix's inputs; None: every input counts alike.

        Returns: {part: tensor} as `parts` describes.
        """
        return {"": weight}

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The matrix [..., O, I] (or bias) that packed tensors stand for; the arithmetic is float32."""
        return tensors[""].to(dtype)

    def encode_delta(self, weight: Tensor, base: Tensor, second_moment: Tensor | None = None) -> dict[str, Tensor]:
        """The difference of `weight` to `base` as stored, packed; arguments as in `encode`, in the stored dtypes."""
        return self.encode(weight.float() - base.float(), second_moment)

    def corrected(self, base: Tensor, tensors: Mapping[str, Tensor], sign: int = 1) -> Tensor:
        """What a packed delta makes of `base`: float32 base + sign · delta, or the variant's weight as stored."""
        return base.float() + sign * self.decode(tensors, tuple(base.shape), torch.float32)

    def pool(self, entries: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
        """Part -> pieces that make a pool's tensor when joined along the first axis, of one matrix an entry."""
        return {part: [entry[part][None] for entry in entries] for part in entries[0]}

    def entry(self, pool: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        """The parts of matrix `index` of a pool."""
        return {part: stack[index] for part, stack in pool.items()}

    def contradiction(self, pool: Mapping[str, Tensor]) -> str | None:
        """What in a pool's values does not go together, so that a kernel would read past them; None: nothing."""
        return None


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
