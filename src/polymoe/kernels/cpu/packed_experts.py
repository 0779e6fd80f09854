"""The routed experts of a layer with packed bases and deltas in one call of the compiled kernel (packed_experts.cpp).

The kernel decodes a few rows of a weight at a time, the base's once for all variants, and keeps no dense expert.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.grouped_experts import is_plain_silu, mlp, project
from polymoe.kernels.cpu.packed_stack import address
from polymoe.native.library import cpu_kernels, kernel_threads, why_no_kernels

Weights = Mapping[str, Tensor]


def packed_experts(
    module: Any,
    hidden: Tensor,
    physical: Tensor,
    delta: Tensor | None,
    sign: Tensor | None,
    gate: Tensor,
    layer: CompressedLayer,
    host_expert: Callable[[int], Weights],
    activation_bits: tuple[int, int] = (16, 16),
) -> Tensor | None:
    """`experts_compressed` in one call; None where that does not apply (`why_not_fused`).

    Absent experts are multiplied by torch, one at a time.
    activation_bits: of what gate/up and down read, where pools are in tiles; see `Activations`.
    """
    if hidden.device.type != "cpu" or why_not_fused(module, hidden.dtype, layer):
        return None
    kernels, stacks = cpu_kernels(), layer.stacks
    assert kernels is not None
    assert stacks is not None
    up, down = stacks.matrices["gate_up_proj"], stacks.matrices["down_proj"]
    assert hidden.shape[1] == up.inputs == down.outputs
    assert up.outputs == 2 * down.inputs
    assert physical.shape == gate.shape
    absent = _absent_outputs(module, hidden, physical, host_expert) if bool((physical < 0).any()) else None
    hidden, gate = hidden.contiguous(), gate.float().contiguous()  # many routers weigh in the model's dtype
    base = physical.to(torch.int32).contiguous()
    deltas = None if delta is None or not layer.deltas else delta.to(torch.int32).contiguous()
    signs = None if sign is None else sign.to(torch.int8).contiguous()
    out = torch.empty_like(hidden)
    function = kernels.polymoe_tiled_experts_bf16 if layer.is_tiled else kernels.polymoe_packed_experts_bf16
    function(
        hidden.data_ptr(), base.data_ptr(), address(deltas), address(signs), gate.data_ptr(), *gate.shape,
        up.inputs, down.inputs, up.bases, up.deltas, down.bases, down.deltas,
        *(activation_bits if layer.is_tiled else ()), address(absent), out.data_ptr(), kernel_threads(),
    )  # fmt: skip
    return out


def why_not_packed(layer: CompressedLayer) -> str:
    """Why no compiled kernel multiplies by this layer's experts; empty where one does."""
    if cpu_kernels() is None:
        return why_no_kernels()
    return "" if layer.stacks is not None else "its tensors are not laid out as the kernels read them"


def why_not_fused(module: Any, dtype: torch.dtype, layer: CompressedLayer) -> str:
    """Why the layer takes more than one call of the compiled kernels; empty where one does.

    One kind of expert is computed in one call: bfloat16, gated by SiLU as transformers does by default, with sizes that
    are multiples of 32, without biases. Of any other each product is a call of its own (packed_linear.py).
    """
    if reason := why_not_packed(layer):
        return reason
    stacks = layer.stacks
    assert stacks is not None
    if dtype != torch.bfloat16:
        return str(dtype).removeprefix("torch.")
    if stacks.has_biases:
        return "biases"
    if not is_plain_silu(module):
        return "an activation other than SiLU"
    if not stacks.fits_bf16:
        return "sizes that are no multiples of 32, or stored values that are not bfloat16"
    return ""


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
