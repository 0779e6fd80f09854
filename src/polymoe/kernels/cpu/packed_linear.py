"""One product with a layer's packed bases and deltas by the compiled kernels, for experts that need it by itself.

    y_r = (base_b(r) + s_r delta_d(r)) x_r + its bias

bfloat16 of sizes that are multiples of 32 goes to packed_experts.cpp, every other dtype and size to packed_floats.cpp,
which computes in float32. Each matrix is decoded once a call, a few rows at a time.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.packed_pool import ExactPool
from polymoe.kernels.cpu.packed_stack import Matrix, address
from polymoe.kernels.cpu.routing import Routing
from polymoe.native.library import cpu_kernels, kernel_threads

# int64, on the CPU: G + 1 offsets of the segments of rows, and the base, the delta (−1: none) and the sign of each
PackedSegments = tuple[Tensor, Tensor, Tensor, Tensor]


def packed_linear(x: Tensor, name: str, layer: CompressedLayer, routing: Routing) -> Tensor | None:
    """Every row of `x` `[S, I]` by its base and its delta.

    Returns: `[S, O]` in x's dtype; None where there are no kernels, or for tensors that they cannot read.
    """
    stacks = layer.stacks if cpu_kernels() is not None and x.device.type == "cpu" else None
    if stacks is None:
        return None
    matrix = stacks.matrices[name]
    bias = _segment_biases(f"{name}_bias", layer, routing) if stacks.has_biases else None
    return packed_product(x, matrix, routing.arrays, bias)


def packed_product(x: Tensor, matrix: Matrix, segments: PackedSegments, bias: Tensor | None = None) -> Tensor:
    """The product itself, where there are kernels.

    Args:
        bias: `[G, O]`, what each segment adds.

    Returns: `[S, O]` in x's dtype.
    """
    kernels = cpu_kernels()
    assert kernels is not None
    assert x.shape[1] == matrix.inputs
    small = x.dtype == torch.bfloat16 and matrix.fits_bf16
    dtype = torch.bfloat16 if small else torch.float32
    function = kernels.polymoe_packed_linear_bf16 if small else kernels.polymoe_packed_linear_f32
    rows = x.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype)
    out = torch.empty(len(x), matrix.outputs, dtype=dtype)
    starts, base, delta, sign = segments
    function(
        rows.data_ptr(), matrix.inputs, matrix.outputs, len(base), starts.data_ptr(), base.data_ptr(),
        delta.data_ptr(), sign.data_ptr(), matrix.bases, matrix.deltas, address(bias), out.data_ptr(),
        kernel_threads(),
    )  # fmt: skip
    return out.to(x.dtype)


def _segment_biases(name: str, layer: CompressedLayer, routing: Routing) -> Tensor:
    """float32 `[G, O]`: what each segment of rows adds."""
    _, base, delta, sign = routing.arrays
    out = torch.empty(len(base), layer.stored[name].shape[-1])
    offset = 0
    stacks = [layer.stored[name], *(_plain(pool.tensors[name]) for pool in layer.bases)]
    for stack in stacks:
        here = (base >= offset) & (base < offset + len(stack))
        out[here] = stack[base[here] - offset].float()
        offset += len(stack)
    offset = 0
    for pool in layer.deltas:
        here = (delta >= offset) & (delta < offset + len(pool))
        if isinstance(pool, ExactPool):
            for g in here.nonzero().flatten().tolist():
                own = pool.changed(name, int(delta[g]) - offset, layer.stored[name][base[g]])
                out[g] = own.float()
        else:
            out[here] += sign[here, None] * _plain(pool.tensors[name])[delta[here] - offset].float()
        offset += len(pool)
    return out


def _plain(tensor: Tensor | Mapping[str, Tensor]) -> Tensor:
    """A pool's biases, which are never packed."""
    return tensor if isinstance(tensor, Tensor) else tensor[""]
