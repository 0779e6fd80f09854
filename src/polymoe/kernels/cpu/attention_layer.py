"""One attention layer from hidden states to hidden states in one call of the compiled kernels (attention_layer.cpp).

    q, k, v = rotated(norm(x W_q)), rotated(norm(x W_k)), x W_v      k, v to the cache      y = attention(q) W_o

Where few tokens run, what torch and Python do between the kernels takes longer than the kernels. Letters: T tokens, R
versions of a weight, G groups of tokens that use one version, B sequences.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polymoe.native.library import cpu_kernels, kernel_threads

_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Grouping(ctypes.Structure):
    """`Grouping` of step.h; those below are there or in attention_layer.cpp."""

    _fields_ = (
        ("count", _NUMBER), ("ids", _POINTER), ("starts", _POINTER), ("of_token", _POINTER),
    )  # fmt: skip


class Projection(ctypes.Structure):
    """Addresses and sizes of one linear map."""

    _fields_ = (
        ("rows", _POINTER), ("bias", _POINTER), ("inputs", _NUMBER), ("outputs", _NUMBER), ("grouping", _NUMBER),
        ("bases", _POINTER), ("deltas", _POINTER), ("base_of", _POINTER),
        ("delta_of", _POINTER), ("bits", _NUMBER), ("coarse", _NUMBER),
    )  # fmt: skip


class Norm(ctypes.Structure):
    """A norm, or none."""

    _fields_ = (("weights", _POINTER), ("grouping", _NUMBER), ("eps", ctypes.c_float))


class LayerView(ctypes.Structure):
    """What the kernel is told of a layer."""

    _fields_ = (
        ("query", Projection), ("key", Projection), ("value", Projection), ("output", Projection),
        ("query_norm", Norm), ("key_norm", Norm), ("query_norm_dim", _NUMBER), ("key_norm_dim", _NUMBER),
        ("keys", _POINTER), ("values", _POINTER),
        ("block_size", _NUMBER), ("q_heads", _NUMBER), ("kv_heads", _NUMBER), ("key_dim", _NUMBER),
        ("value_dim", _NUMBER), ("window", _NUMBER), ("scaling", ctypes.c_float),
    )  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = (
        ("tokens", _NUMBER), ("groupings", ctypes.POINTER(_Grouping)), ("sampled", ctypes.POINTER(_Grouping)),
        ("slots", _POINTER), ("block_table", _POINTER), ("table_width", _NUMBER), ("sequence", _POINTER),
        ("visible", _POINTER), ("variant", _POINTER),
    )  # fmt: skip


@dataclass(frozen=True)
class Versions:
    """A step's tokens by the version of a weight: group g is rows `starts[g] : starts[g + 1]`, and has `ids[g]`."""

    ids: Tensor  # [G] int64
    starts: Tensor  # [G + 1] int64
    of_token: Tensor  # [T] int64


def _groupings(versions: list[Versions]) -> "ctypes.Array[_Grouping]":
    told = [_Grouping(len(v.ids), v.ids.data_ptr(), v.starts.data_ptr(), v.of_token.data_ptr()) for v in versions]
    return (_Grouping * len(versions))(*told)


class StepView:
    """What the kernel is told of a step, made once for all its layers.

    Args:
        versions: for each grouping that layers refer to. sampled: the same of the rows whose logits are wanted.
        slots: `[T]`, where new keys and values go. block_table: `[B, M]`. sequence, visible, variant: `[T]`; all int64.
    """

    def __init__(
        self,
        versions: list[Versions],
        sampled: list[Versions],
        slots: Tensor,
        block_table: Tensor,
        sequence: Tensor,
        visible: Tensor,
        variant: Tensor,
    ) -> None:
        assert block_table.is_contiguous()
        self._kept: Any = (versions, sampled, slots, block_table, sequence, visible, variant)
        groupings = _groupings(versions)
        of_sampled = groupings if sampled is versions else _groupings(sampled)
        self.num_tokens = len(slots)
        self.struct = _Step(
            len(slots), groupings, of_sampled, slots.data_ptr(), block_table.data_ptr(), block_table.shape[1],
            sequence.data_ptr(), visible.data_ptr(), variant.data_ptr(),
        )  # fmt: skip


def attention_layer(layer: LayerView, step: StepView, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [T, H]` bfloat16 -> `[T, H]`; `cos`, `sin` `[T, rotary]` bfloat16. All contiguous."""
    kernels = cpu_kernels()
    assert kernels is not None
    assert x.dtype == cos.dtype == sin.dtype == torch.bfloat16
    assert x.is_contiguous()
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert len(x) == len(cos) == step.num_tokens
    out = x.new_empty(len(x), layer.output.outputs)
    kernels.polymoe_attention_layer_bf16(
        ctypes.byref(layer), ctypes.byref(step.struct), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[1],
        out.data_ptr(), kernel_threads(),
    )  # fmt: skip
    return out


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The reference of the rotary embedding: `x [..., T, D]`, the first R values of each by `cos`, `sin` `[T, R]`."""
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turning.chunk(2, dim=-1)
    return torch.cat([turning * cos + torch.cat([-high, low], dim=-1) * sin, rest], dim=-1)
