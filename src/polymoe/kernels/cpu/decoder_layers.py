"""Decoder layers from hidden states to hidden states in one call of the compiled kernels (decoder_layers.cpp).

    h = x + c attention(norm(x)),   y = h + c experts(norm(h))

Letters: T tokens, H hidden.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from polymoe.kernels.cpu.attention_layer import Norm, StepView
from polymoe.native.library import cpu_kernels, kernel_threads

_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Router(ctypes.Structure):
    """`Router` of decoder_layers.cpp; the same of the one below."""

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


class DecoderViews:
    """Layers that run one after the other."""

    def __init__(self, layers: Sequence[DecoderView]) -> None:
        assert len({layer.width for layer in layers}) == 1
        self._kept, self.width, self.count = layers, int(layers[0].width), len(layers)
        self.addresses = (ctypes.c_void_p * len(layers))(*map(ctypes.addressof, layers))


def decoder_layers(layers: DecoderViews, step: StepView, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [T, H]` bfloat16 -> `[T, H]`; `cos`, `sin` `[T, rotary]` bfloat16. All contiguous. No expert is absent."""
    kernels = cpu_kernels()
    assert kernels is not None
    assert x.dtype == cos.dtype == sin.dtype == torch.bfloat16
    assert x.is_contiguous()
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert x.shape == (step.num_tokens, layers.width)
    assert len(cos) == step.num_tokens
    out = torch.empty_like(x)
    absent = kernels.polymoe_decoder_layers_bf16(
        layers.addresses, layers.count, ctypes.byref(step.struct), x.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        cos.shape[1], out.data_ptr(), kernel_threads(),
    )  # fmt: skip
    assert not absent
    return out
