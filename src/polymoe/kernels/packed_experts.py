"""The routed experts of a layer with packed bases and deltas in one call of the compiled kernel (packed_experts.cpp).

The kernel decodes a few rows of a weight at a time, the base's once for all variants, and keeps no dense expert.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from polymoe.kernels.cpu import cpu_kernels, kernel_threads
from polymoe.kernels.grouped_experts import is_plain_silu, mlp, project
from polymoe.kernels.packed_pool import ExactPool, PackedPool, StoredPool
from polymoe.quant.exact import changes_before_rows
from polymoe.quant.formats import SCALE_DTYPE, Format, group_size, row_bytes

if TYPE_CHECKING:
    from polymoe.kernels.compressed_experts import CompressedLayer

Weights = Mapping[str, Tensor]
Pool = PackedPool | StoredPool | ExactPool

_NAMES = ("gate_up_proj", "down_proj")
_EXACT, _FP8, _STORED = 0, 9, 16  # kinds, as packed_codes.h has them; of other formats their bits
_MARK_ROWS = 16


class _Stack(ctypes.Structure):
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
    )


@dataclass(frozen=True, eq=False)
class _Layer:
    """What the kernel is told of a layer: for each of `_NAMES` the bases and the deltas, C arrays of `_Stack`."""

    stacks: list[Any]
    width: int
    inner: int
    made: list[Tensor]  # tensors that only the kernel looks at


def packed_experts(
    module: Any,
    hidden: Tensor,
    physical: Tensor,
    delta: Tensor | None,
    sign: Tensor | None,
    gate: Tensor,
    layer: "CompressedLayer",
    host_expert: Callable[[int], Weights],
) -> Tensor | None:
    """`experts_compressed` by the compiled kernel; None where it does not apply.

    It knows one kind of expert: bfloat16, gated by SiLU as transformers does by default, stored as `[out, in]` with
    sizes that are multiples of 32, without biases. Absent experts are multiplied by torch, one at a time.
    """
    kernels = cpu_kernels()
    if kernels is None or hidden.device.type != "cpu" or hidden.dtype != torch.bfloat16 or gate.dtype != torch.float32:
        return None
    known = _known(module, layer)
    if known is None:
        return None
    assert hidden.shape[1] == known.width
    assert physical.shape == gate.shape
    absent = _absent_outputs(module, hidden, physical, host_expert) if bool((physical < 0).any()) else None
    hidden, gate = hidden.contiguous(), gate.contiguous()
    base = physical.to(torch.int32).contiguous()
    deltas = None if delta is None or not layer.deltas else delta.to(torch.int32).contiguous()
    signs = None if sign is None else sign.to(torch.int8).contiguous()
    out = torch.empty_like(hidden)
    kernels.polymoe_packed_experts_bf16(
        hidden.data_ptr(), base.data_ptr(), _address(deltas), _address(signs), gate.data_ptr(), *gate.shape,
        known.width, known.inner, *known.stacks, _address(absent), out.data_ptr(), kernel_threads(),
    )  # fmt: skip
    return out


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _absent_outputs(module: Any, hidden: Tensor, physical: Tensor, host_expert: Callable[[int], Weights]) -> Tensor:
    """`[A, H]`: the outputs of the A (token, k) pairs with an absent expert, in the order of the pairs."""
    pairs = (physical.reshape(-1) < 0).nonzero().squeeze(1)
    ids = physical.reshape(-1)[pairs]
    out = hidden.new_empty(len(pairs), hidden.shape[1])
    for expert in torch.unique(ids).tolist():
        mine = (ids == expert).nonzero().squeeze(1)
        rows = hidden[pairs[mine] // physical.shape[1]]
        out[mine] = mlp(module, rows, partial(project, module, weights=host_expert(expert)))
    return out


_LAYERS: WeakKeyDictionary["CompressedLayer", _Layer | None] = WeakKeyDictionary()


def is_known(module: Any, layer: "CompressedLayer") -> bool:
    """Whether the kernel computes this layer, in bfloat16 and where it is built."""
    return _known(module, layer) is not None


def _known(module: Any, layer: "CompressedLayer") -> _Layer | None:
    if module.is_transposed or not is_plain_silu(module):
        return None
    if layer not in _LAYERS:
        _LAYERS[layer] = _described(layer)
    return _LAYERS[layer]


def _described(layer: "CompressedLayer") -> _Layer | None:
    """None if the kernel cannot compute the layer."""
    bases: list[Pool] = [StoredPool(layer.stored), *layer.bases]
    deltas: list[Pool] = [*layer.deltas]
    if any(set(pool.tensors) != set(_NAMES) for pool in (*bases, *deltas)):
        return None
    rows, width = layer.stored["gate_up_proj"].shape[-2:]
    inner = rows // 2
    assert tuple(layer.stored["down_proj"].shape[-2:]) == (width, inner)
    if width % 32 or inner % 32:
        return None
    made: list[Tensor] = []
    stacks = []
    for name in _NAMES:
        for pools in (bases, deltas):
            inputs = width if name == "gate_up_proj" else inner
            found = [stack for pool in pools if (stack := _stack(pool, name, inputs, made)) is not None]
            if len(found) < len(pools):
                return None
            stacks.append((_Stack * len(found))(*found))
    return _Layer(stacks, width, inner, made)


def _stack(pool: Pool, name: str, inputs: int, made: list[Tensor]) -> _Stack | None:
    """A pool's matrix `name`; None if its tensors are not as the kernel reads them."""
    if isinstance(pool, StoredPool):
        stored = pool.tensors[name]
        if stored.dtype != torch.bfloat16 or not stored.is_contiguous():
            return None
        return _Stack(kind=_STORED, count=len(pool), data=stored.data_ptr(), row_bytes=2 * inputs)
    parts = pool.tensors[name]
    if not all(part.is_contiguous() for part in parts.values()):
        return None
    if isinstance(pool, ExactPool):
        if parts["values"].dtype != torch.bfloat16:
            return None
        # int32 [D, ⌈O / 16⌉]
        marks = changes_before_rows(parts["bitmap"])[:, ::_MARK_ROWS].to(torch.int32).contiguous()
        made.append(marks)
        return _Stack(
            kind=_EXACT, count=len(pool), data=parts["bitmap"].data_ptr(), row_bytes=parts["bitmap"].shape[-1],
            values=parts["values"].data_ptr(), starts=parts["starts"].data_ptr(), marks=marks.data_ptr(),
            num_marks=marks.shape[1],
        )  # fmt: skip
    fmt = pool.fmt
    if "codes" not in parts or parts["scales"].dtype != SCALE_DTYPE:
        return None
    assert parts["codes"].shape[-1] == row_bytes(fmt, inputs)
    return _Stack(
        kind=_FP8 if fmt.name == "fp8" else fmt.bits, count=len(pool), data=parts["codes"].data_ptr(),
        scales=parts["scales"].data_ptr(), row_bytes=row_bytes(fmt, inputs), group=group_size(fmt, inputs),
        levels=_address(_levels(fmt)),
    )  # fmt: skip


@cache
def _levels(fmt: Format) -> Tensor | None:
    """float32 [64]: the levels over and over, so that bits above a code's do not matter. fp8: [128], without sign."""
    if fmt.name == "fp8":
        return torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return torch.tensor(fmt.levels, dtype=torch.float32).repeat(64 // len(fmt.levels)) if fmt.bits < 8 else None
