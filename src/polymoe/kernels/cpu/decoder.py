"""A decoder layer from hidden states to hidden states, or a whole pass from tokens to logits, in one call of the
compiled kernels (decoder.cpp).

    h = x + c attention(norm(x)),   y = h + c experts(norm(h))

Letters: T tokens, H hidden, O vocabulary, R rows whose logits are wanted.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polymoe.kernels.cpu.attention_layer import Norm, Projection, StepView
from polymoe.native.library import cpu_kernels, kernel_threads

_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Router(ctypes.Structure):
    """`Router` of decoder.cpp; the same of those below."""

    _fields_ = (
        ("weights", _POINTER), ("grouping", _NUMBER), ("experts", _NUMBER), ("top_k", _NUMBER), ("scoring", _NUMBER),
        ("rounds", _NUMBER),
    )  # fmt: skip


class DecoderView(ctypes.Structure):
    """What the kernel is told of a layer. attention: a `LayerView`; experts: what `RoutedLayer` has."""

    _fields_ = (
        ("first", Norm), ("second", Norm), ("attention", _POINTER), ("experts", _POINTER), ("router", Router),
        ("width", _NUMBER), ("multiplier", ctypes.c_float),
    )  # fmt: skip


class Embedding(ctypes.Structure):
    """Of all versions. Without `rows` hidden states are given, instead of ids."""

    _fields_ = (
        ("rows", _POINTER), ("grouping", _NUMBER), ("vocabulary", _NUMBER), ("multiplier", ctypes.c_float),
    )  # fmt: skip


class PassView(ctypes.Structure):
    """What the kernel is told of a model."""

    _fields_ = (
        ("layers", _POINTER), ("count", _NUMBER), ("embedding", Embedding), ("norm", Norm), ("head", Projection),
    )  # fmt: skip

    def tell(self, layers: Sequence[DecoderView]) -> None:
        """Which layers there are."""
        self.kept = (_POINTER * len(layers))(*map(ctypes.addressof, layers)), layers
        self.layers, self.count, self.width = ctypes.addressof(self.kept[0]), len(layers), int(layers[0].width)


@dataclass(frozen=True)
class Turns:
    """Rotary embedding: cosines and sines `[P, rotary]` bfloat16, of which token t has rows `positions [T]` int64."""

    cos: Tensor
    sin: Tensor
    positions: Tensor


def decoder_layer(layer: DecoderView, step: StepView, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [T, H]` bfloat16 -> `[T, H]`; `cos`, `sin` `[T, rotary]` bfloat16. All contiguous. No expert is absent."""
    kernels = cpu_kernels()
    assert kernels is not None
    assert x.dtype == cos.dtype == sin.dtype == torch.bfloat16
    assert x.is_contiguous()
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert x.shape == (step.num_tokens, layer.width)
    assert len(cos) == step.num_tokens
    out = torch.empty_like(x)
    absent = kernels.polymoe_decoder_layer_bf16(
        ctypes.byref(layer), ctypes.byref(step.struct), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[1],
        out.data_ptr(), kernel_threads(),
    )  # fmt: skip
    assert not absent
    return out


def whole_pass(model: PassView, step: StepView, tokens: Tensor, turns: Turns, kept: Tensor) -> Tensor:
    """Logits `[R, O]` bfloat16 of rows `kept [R]` int64; without a head its inputs `[R, H]`. All contiguous. No expert
    is absent.

    tokens: ids `[T]` int64, or hidden states before the first layer `[T, H]` bfloat16.
    Raises: `IndexError` if an id is none of the vocabulary.
    """
    kernels = cpu_kernels()
    assert kernels is not None
    assert turns.cos.dtype == turns.sin.dtype == torch.bfloat16
    assert turns.cos.shape == turns.sin.shape
    assert turns.cos.is_contiguous()
    assert turns.sin.is_contiguous()
    assert len(tokens) == len(turns.positions) == step.num_tokens
    assert tokens.is_contiguous()
    assert turns.positions.dtype == kept.dtype == torch.int64
    given = tokens.dtype == torch.bfloat16
    assert tokens.dtype == (torch.bfloat16 if given else torch.int64)
    out = turns.cos.new_empty(len(kept), model.head.outputs or model.width)
    failed = kernels.polymoe_pass_bf16(
        ctypes.byref(model), ctypes.byref(step.struct), tokens.data_ptr() if given else None,
        None if given else tokens.data_ptr(), turns.positions.data_ptr(), turns.cos.data_ptr(), turns.sin.data_ptr(),
        turns.cos.shape[1], kept.data_ptr(), len(kept), out.data_ptr(), kernel_threads(),
    )  # fmt: skip
    if failed == 2:
        raise IndexError("a token id is none of the vocabulary")
    assert not failed
    return out
