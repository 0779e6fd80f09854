"""Lossless deltas for variants that changed few values: a bitmap of the changed ones and their new values.

Fine-tuning by reinforcement or preferences leaves most bfloat16 values as they were (arXiv 2505.11711): at a share ρ
of changed values this takes (1 + 16 ρ) / 8 bytes a value. The base must be stored in the checkpoint's dtype.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polymoe.native.library import cpu_kernels
from polymoe.quant.format import Format, Kind, Parts, PoolParts

_BITS_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def changed(weight: Tensor, base: Tensor) -> Tensor:
    """bool [O, I]: the values whose bits differ (−0 and 0 do)."""
    assert weight.dtype == base.dtype
    return _as_bits(weight) != _as_bits(base)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_as_bits(a), _as_bits(b))


def _as_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS_OF_SIZE[tensor.dtype.itemsize])


def exact_bytes(shape: tuple[int, ...], num_changed: int, dtype: torch.dtype) -> int:
    """Bytes of the exact delta of one matrix or bias with `num_changed` changed values."""
    *lead, inputs = shape
    return int(np.prod(lead, dtype=np.int64)) * -(-inputs // 8) + num_changed * dtype.itemsize


def encode_exact(weight: Tensor, base: Tensor) -> dict[str, Tensor]:
    """{"bitmap": uint8 [O, ⌈I / 8⌉] (value j of a byte's eight in bit j), "values": [changed] in the stored dtype}."""
    kernels = cpu_kernels()
    if kernels is None or weight.dtype.itemsize not in (2, 4):
        return encode_exact_torch(weight, base)
    assert weight.shape == base.shape
    assert weight.dtype == base.dtype
    weight, base = weight.contiguous(), base.contiguous()
    *lead, inputs = weight.shape
    bitmap = torch.empty((*lead, -(-inputs // 8)), dtype=torch.uint8)
    values = torch.empty(weight.numel(), dtype=weight.dtype)
    encode = kernels.polymoe_changes_16 if weight.dtype.itemsize == 2 else kernels.polymoe_changes_32
    count = encode(weight.data_ptr(), base.data_ptr(), math.prod(lead), inputs, bitmap.data_ptr(), values.data_ptr())
    return {"bitmap": bitmap, "values": values[:count].clone()}


def encode_exact_torch(weight: Tensor, base: Tensor) -> dict[str, Tensor]:
    """The same without the compiled kernel: its reference."""
    mask = changed(weight, base)
    bitmap = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    return {"bitmap": bitmap, "values": weight[mask]}


def changes_before_rows(bitmaps: Tensor) -> Tensor:
    """int64 [D, O]: how many values each delta changes before each of its rows. `bitmaps`: uint8 [D, O, ⌈I / 8⌉]."""
    if bitmaps.device.type == "cpu":
        counts = torch.from_numpy(_ones(bitmaps))
    else:
        ones = torch.tensor([number.bit_count() for number in range(256)], dtype=torch.uint8, device=bitmaps.device)
        counts = torch.stack([ones[bits.int()].sum(-1, dtype=torch.int64) for bits in bitmaps])
    return counts.cumsum(-1) - counts


def _ones(bitmaps: Tensor) -> NDArray[np.int64]:
    """int64 [...]: how many bits are set along the last axis."""
    array: NDArray[Any] = bitmaps.contiguous().numpy()
    words = array.view(np.uint64) if array.shape[-1] % 8 == 0 and array.size else array
    counts: NDArray[np.int64] = np.bitwise_count(words).sum(axis=-1, dtype=np.int64)
    return counts


def decode_exact(tensors: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """The variant's weight, bit for bit, from the stored `base`; all on one device."""
    if base.device.type != "cpu":
        return decode_exact_torch(tensors, base)
    bits = np.unpackbits(tensors["bitmap"].numpy(), axis=-1, count=base.shape[-1], bitorder="little")
    weight = base.clone()
    weight[torch.from_numpy(bits.astype(np.bool_))] = tensors["values"]
    return weight


def decode_exact_torch(tensors: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """The same in operations that a GPU has and that do not wait for it."""
    places = torch.arange(8, dtype=torch.uint8, device=base.device)
    bits = ((tensors["bitmap"][..., None] >> places) & 1).flatten(-2)[..., : base.shape[-1]]
    return base.masked_scatter(bits.bool(), tensors["values"])


class Exact(Format):
    """The lossless delta. In a pool the values of all lie back to back: delta d's are `starts[d] : starts[d + 1]`."""

    kind = Kind.CHANGES

    def parts(self, shape: tuple[int, ...], dtype: torch.dtype) -> Parts:
        raise AssertionError("the size of an exact delta is only known from the weights")

    def pool_parts(self, count: int, shape: tuple[int, ...]) -> PoolParts:
        *lead, inputs = shape
        bitmap = (count, *lead, -(-inputs // 8))
        return {"bitmap": (torch.uint8, bitmap), "values": (None, (-1,)), "starts": (torch.int64, (count + 1,))}

    def num_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Those of the matrix itself, which a delta hardly ever exceeds; `exact_bytes` where the changes are known."""
        return math.prod(shape) * dtype.itemsize

    def encode_delta(self, weight: Tensor, base: Tensor, second_moment: Tensor | None = None) -> dict[str, Tensor]:
        return encode_exact(weight, base)

    def corrected(self, base: Tensor, tensors: Mapping[str, Tensor], sign: int = 1) -> Tensor:
        return decode_exact(tensors, base)

    def pool(self, entries: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
        values = [entry["values"] for entry in entries]
        ends = torch.tensor([0, *map(len, values)]).cumsum(0)
        return {"bitmap": [entry["bitmap"][None] for entry in entries], "values": values, "starts": [ends]}

    def entry(self, pool: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        start, stop = pool["starts"][index : index + 2].tolist()
        return {"bitmap": pool["bitmap"][index], "values": pool["values"][start:stop]}

    def contradiction(self, pool: Mapping[str, Tensor]) -> str | None:
        starts, bitmap = pool["starts"], pool["bitmap"]
        changes = _ones(bitmap).reshape(len(bitmap), -1).sum(axis=1)
        fit = torch.equal(starts[1:], torch.from_numpy(changes).cumsum(0)) and int(starts[-1]) == len(pool["values"])
        return None if fit and int(starts[0]) == 0 else "do not fit their bitmaps"
