"""A layer's experts from what the router chose, tables looked up and all, in one call (routed_experts.cpp)."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from polymoe.kernels.cpu.compressed_layer import CompressedLayer, Weights
from polymoe.kernels.cpu.grouped_experts import why_not_one_call
from polymoe.kernels.cpu.packed_experts import why_not_fused
from polymoe.kernels.cpu.packed_stack import address
from polymoe.native.library import cpu_kernels, kernel_threads

_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Layer(ctypes.Structure):
    """`RoutedLayer` of routed_experts.cpp."""

    _fields_ = (
        ("table", _POINTER), ("delta", _POINTER), ("sign", _POINTER), ("row", _NUMBER), ("width", _NUMBER),
        ("inner", _NUMBER), ("is_tiled", _NUMBER), ("num_stored", _NUMBER), ("gate_up", _POINTER), ("down", _POINTER),
        ("gate_up_bases", _POINTER), ("gate_up_deltas", _POINTER), ("down_bases", _POINTER), ("down_deltas", _POINTER),
        ("up_bits", _NUMBER), ("down_bits", _NUMBER),
    )  # fmt: skip


class RoutedLayer:
    """What the kernel is told of a layer, and the tensors that it reads."""

    def __init__(self, struct: _Layer, kept: Any) -> None:
        self.struct, self._kept = struct, kept
        self.width = int(struct.width)

    def __call__(self, hidden: Tensor, variant: Tensor, experts: Tensor, gate: Tensor) -> Tensor | None:
        """The layer's output, as `hidden`; None where a token needs an absent expert.

        Args: `hidden [T, H]` bfloat16, `variant [T]` int64, `experts [T, K]` int64, `gate [T, K]`.
        """
        kernels = cpu_kernels()
        assert kernels is not None
        assert hidden.shape[1] == self.width
        assert variant.dtype == experts.dtype == torch.int64
        hidden, gate, experts = hidden.contiguous(), gate.float().contiguous(), experts.contiguous()
        out = torch.empty_like(hidden)
        absent = kernels.polymoe_routed_experts_bf16(
            ctypes.byref(self.struct), hidden.data_ptr(), variant.data_ptr(), experts.data_ptr(), gate.data_ptr(),
            len(hidden), experts.shape[1], out.data_ptr(), kernel_threads(),
        )  # fmt: skip
        return None if absent else out


def routed_layer(
    module: Any,
    dtype: torch.dtype,
    table: Tensor,
    delta: Tensor | None,
    sign: Tensor | None,
    weights: Weights | CompressedLayer,
    activation_bits: tuple[int, int],
) -> RoutedLayer | None:
    """For a layer that one call computes; None for any other.

    Args:
        module: the stock experts module.
        table, delta, sign: `[V, E]`, perhaps slices of the model's; read at every call.
        activation_bits: see `packed_experts`.
    """
    tables = [(table, torch.int32), (delta, torch.int32), (sign, torch.int8)]
    if any(t is not None and (t.dtype != kind or t.stride() != (table.stride(0), 1)) for t, kind in tables):
        return None
    here = {"table": address(table), "delta": address(delta), "sign": address(sign), "row": table.stride(0)}
    kept = table, delta, sign, weights
    if not isinstance(weights, CompressedLayer):
        if not weights or delta is not None or why_not_one_call(module, dtype, weights):
            return None
        gate_up, down = weights["gate_up_proj"], weights["down_proj"]
        count, width, inner = down.shape
        struct = _Layer(
            **here, width=width, inner=inner, num_stored=count, gate_up=gate_up.data_ptr(), down=down.data_ptr()
        )
        return RoutedLayer(struct, kept)
    if why_not_fused(module, dtype, weights):
        return None
    stacks = weights.stacks
    assert stacks is not None
    if not weights.deltas:
        here["delta"] = here["sign"] = None
    up, down_matrix = stacks.matrices["gate_up_proj"], stacks.matrices["down_proj"]
    assert up.outputs == 2 * down_matrix.inputs
    pointers = {
        name: ctypes.cast(stack, _POINTER)
        for name, stack in (
            ("gate_up_bases", up.bases), ("gate_up_deltas", up.deltas),
            ("down_bases", down_matrix.bases), ("down_deltas", down_matrix.deltas),
        )
    }  # fmt: skip
    struct = _Layer(
        **here, **pointers, width=up.inputs, inner=down_matrix.inputs, is_tiled=weights.is_tiled,
        up_bits=activation_bits[0], down_bits=activation_bits[1],
    )  # fmt: skip
    return RoutedLayer(struct, kept)
