"""What the compiled kernels are told of a layer's packed and stored experts: addresses, kinds and sizes."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from polymoe.kernels.cpu.packed_pool import ExactPool, PackedPool, StoredPool, TiledPool
from polymoe.quant.formats import SCALE_DTYPE, Format, Kind, group_size, row_bytes

Pool = PackedPool | TiledPool | StoredPool | ExactPool

_CODED = (Kind.FLOAT8, Kind.CENTRED, Kind.LEVELS)
_EXACT, _FLOAT8, _STORED = 0, 9, 16  # kinds, as packed_codes.h has them; of other formats their bits
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Stack(ctypes.Structure):
    """`Stack` of packed_codes.h."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("levels", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("marks", ctypes.c_void_p),
        ("num_marks", ctypes.c_int64),
        ("type", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("step", ctypes.c_float),
    )


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix of a layer's experts in all pools: `[outputs, inputs]`, C arrays of `Stack`.

    fits_bf16: whether packed_experts.cpp knows it; packed_floats.cpp knows all.
    """

    bases: Any
    deltas: Any
    outputs: int
    inputs: int
    fits_bf16: bool


@dataclass(frozen=True, eq=False)
class LayerStacks:
    """matrices: tensor name -> what the kernels are told. made: tensors that only they look at."""

    matrices: dict[str, Matrix]
    has_biases: bool
    made: list[Tensor]

    @property
    def fits_bf16(self) -> bool:
        return all(matrix.fits_bf16 for matrix in self.matrices.values())


def describe(
    weights: Mapping[str, Tensor], base_pools: Sequence[Pool], delta_pools: Sequence[Pool], transposed: bool
) -> LayerStacks | None:
    """What to tell of a layer's experts, `CompressedLayer` as it has them; None if its tensors are not laid out as the
    kernels read them."""
    stored = StoredPool(weights)
    bases: list[Pool] = [stored, *base_pools]
    names = {name for name in weights if not name.endswith("_bias")}
    if any(set(pool.tensors) != set(weights) for pool in (*bases, *delta_pools)):
        return None
    if transposed and len(stored):
        return None
    made: list[Tensor] = []
    matrices = {}
    for name in names:
        outputs, inputs = weights[name].shape[-2:]
        if transposed:
            outputs, inputs = inputs, outputs
        arrays = []
        for pools in (bases, delta_pools):
            found = [stack for pool in pools if (stack := _stack(pool, name, inputs, made)) is not None]
            if len(found) < len(pools):
                return None
            arrays.append((Stack * len(found))(*found))
        in_bases, in_deltas = arrays
        types = {stack.type for array in arrays for stack in array if stack.count}
        fits = outputs % 32 == 0 and inputs % 32 == 0 and types <= {_TYPES[torch.bfloat16]}
        matrices[name] = Matrix(in_bases, in_deltas, outputs, inputs, fits)
    return LayerStacks(matrices, set(weights) != names, made)


def _stack(pool: Pool, name: str, inputs: int, made: list[Tensor]) -> Stack | None:
    """A pool's matrix `name`; None if its tensors are not as the kernels read them."""
    if isinstance(pool, StoredPool):
        stored = pool.tensors[name]
        if stored.dtype not in _TYPES or not stored.is_contiguous():
            return None
        return Stack(kind=_STORED, count=len(pool), data=stored.data_ptr(), type=_TYPES[stored.dtype])
    parts = pool.tensors[name]
    if not all(part.is_contiguous() for part in parts.values()):
        return None
    if isinstance(pool, ExactPool):
        if parts["values"].dtype not in _TYPES:
            return None
        marks = pool.marks[name]
        made.append(marks)
        return Stack(
            kind=_EXACT, count=len(pool), data=parts["bitmap"].data_ptr(), row_bytes=parts["bitmap"].shape[-1],
            values=parts["values"].data_ptr(), starts=parts["starts"].data_ptr(), marks=marks.data_ptr(),
            num_marks=marks.shape[1], type=_TYPES[parts["values"].dtype],
        )  # fmt: skip
    fmt = pool.fmt
    if fmt.kind not in _CODED or "codes" not in parts or parts["scales"].dtype != SCALE_DTYPE:
        return None
    assert parts["codes"].shape[-1] == row_bytes(fmt, inputs)
    return Stack(
        kind=_FLOAT8 if fmt.kind is Kind.FLOAT8 else fmt.bits, count=len(pool), data=parts["codes"].data_ptr(),
        scales=parts["scales"].data_ptr(), row_bytes=row_bytes(fmt, inputs), group=group_size(fmt, inputs),
        levels=address(_levels(fmt)), table=address(pool.table) if isinstance(pool, TiledPool) else None,
        step=pool.step if isinstance(pool, TiledPool) else 0.0,
    )  # fmt: skip


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _levels(fmt: Format) -> Tensor | None:
    """float32 [64]: `Format.lookup` over and over, so that bits above a code's do not matter; [128] of a longer one."""
    return torch.tensor(fmt.lookup).repeat(max(1, 64 // len(fmt.lookup))) if fmt.lookup else None
