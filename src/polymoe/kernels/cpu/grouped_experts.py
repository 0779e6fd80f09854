"""The routed experts of one layer for a batch that mixes variants: sort by physical expert, multiply, weigh, sum.

    y_t = Σ_k g_tk · (act(x_t G_p) ∘ (x_t U_p)) D_p ,   p = physical id of (variant of t, k-th expert of t)

Letters: T tokens, K experts a token, P physical experts, H hidden, I intermediate. Four implementations of the same
function: `experts_by_loop` (any device, any dtype, experts may come from anywhere) is the reference; `experts_by_group`
runs over a stacked pool on a CPU, two grouped linears in all; `experts_in_one_call` is one call of the compiled kernel
for the commonest kind of expert; `experts_by_grouped_mm` is for a GPU and never waits for the device.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from polymoe.kernels.cpu.grouped_linear import grouped_linear
from polymoe.native.library import cpu_kernels, kernel_threads, why_no_kernels

Weights = Mapping[str, torch.Tensor]


def experts_by_loop(
    module: torch.nn.Module,
    hidden: torch.Tensor,
    physical: torch.Tensor,
    gate: torch.Tensor,
    weights_of: Callable[[int], Weights],
) -> torch.Tensor:
    """One matmul pair for each physical expert that some token was routed to.

    Args:
        module: the stock experts module; its `_apply_gate` (or `act_fn`) and layout flags are used.
        hidden: `[T, H]`.
        physical: `[T, K]` int32 ids, any values that `weights_of` knows.
        gate: `[T, K]` routing weights.
        weights_of: physical id -> the expert's tensors by name, each of the stock per-expert shape.

    Returns: `[T, H]` in `hidden`'s dtype.
    """
    top_k = physical.shape[1]
    order = torch.argsort(physical.reshape(-1), stable=True)
    ids, counts = torch.unique_consecutive(physical.reshape(-1)[order], return_counts=True)
    inputs = hidden[order // top_k]
    pieces = []
    start = 0
    for expert, count in zip(ids.tolist(), counts.tolist(), strict=True):
        weights = weights_of(expert)
        pieces.append(mlp(module, inputs[start : start + count], partial(project, module, weights=weights)))
        start += count
    return combine(torch.cat(pieces), order, gate, hidden.dtype)


def experts_by_group(
    module: torch.nn.Module,
    hidden: torch.Tensor,
    physical: torch.Tensor,
    gate: torch.Tensor,
    pool: Weights,
    linear: Callable[..., torch.Tensor] = grouped_linear,
) -> torch.Tensor:
    """The same over stacked tensors `[P, …]` with ids in `[0, P)`.

    Args: as `experts_by_loop`, with `pool` name -> `[P, *shape]`, stored as `[out, in]` (not `is_transposed`).
        linear: `grouped_linear`, or its reference.
    """
    top_k = physical.shape[1]
    flat = physical.reshape(-1).numpy()
    order = np.argsort(flat, kind="stable")
    found, starts = np.unique(flat[order], return_index=True)
    ids = found.tolist()
    bounds = [*starts.tolist(), len(flat)]

    def project_groups(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, pool[name], ids, bounds, pool.get(f"{name}_bias"))

    out = mlp(module, hidden[torch.from_numpy(order // top_k)], project_groups)
    return combine(out, torch.from_numpy(order), gate, hidden.dtype)


def experts_by_grouped_mm(
    module: torch.nn.Module,
    hidden: torch.Tensor,
    physical: torch.Tensor,
    gate: torch.Tensor,
    pool: Weights,
) -> torch.Tensor:
    """The same over stacked tensors `[P, …]` with ids in `[0, P)`: no host synchronisation.

    Args: as `experts_by_loop`, with `pool` name -> `[P, *shape]`.
    """
    top_k = physical.shape[1]
    flat = physical.reshape(-1)
    order = torch.argsort(flat, stable=True)
    sorted_ids = flat[order]
    num_physical = next(iter(pool.values())).shape[0]
    bounds = torch.arange(num_physical, device=flat.device, dtype=flat.dtype)
    ends = torch.searchsorted(sorted_ids, bounds, right=True, out_int32=True)

    def project_groups(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = pool[name] if module.is_transposed else pool[name].transpose(-2, -1)
        out = torch.nn.functional.grouped_mm(x, weight, offs=ends)
        bias = pool.get(f"{name}_bias")
        return out if bias is None else out + bias[sorted_ids]

    return combine(mlp(module, hidden[order // top_k], project_groups), order, gate, hidden.dtype)


def why_not_one_call(module: torch.nn.Module, dtype: torch.dtype, pool: Weights) -> str:
    """Why `experts_in_one_call` does not compute these experts; empty where it does.

    It knows one kind: bfloat16, gated by SiLU as transformers does by default, sizes of multiples of 32, no biases.
    """
    if dtype != torch.bfloat16:
        return str(dtype).removeprefix("torch.")
    if not is_plain_silu(module):
        return "an activation other than SiLU"
    if set(pool) != {"gate_up_proj", "down_proj"}:
        return "biases"
    if any(size % 32 for size in pool["down_proj"].shape[1:]):
        return "sizes that are no multiples of 32"
    return why_no_kernels() if all(stack.is_contiguous() for stack in pool.values()) else "stacks that are views"


def experts_in_one_call(
    _module: torch.nn.Module, hidden: torch.Tensor, physical: torch.Tensor, gate: torch.Tensor, pool: Weights
) -> torch.Tensor:
    """`experts_by_group` by the compiled kernel (experts.cpp), for what `why_not_one_call` has no reason against."""
    kernels = cpu_kernels()
    assert kernels is not None
    gate_up, down = pool["gate_up_proj"], pool["down_proj"]
    hidden = hidden.contiguous()
    (tokens, width), (num_experts, _, inner) = hidden.shape, down.shape
    out = torch.empty_like(hidden)
    ids, gate = physical.to(torch.int32).contiguous(), gate.float().contiguous()
    kernels.polymoe_experts_bf16(
        hidden.data_ptr(), ids.data_ptr(), gate.data_ptr(), tokens, ids.shape[1], width, inner, num_experts,
        gate_up.data_ptr(), down.data_ptr(), out.data_ptr(), kernel_threads(),
    )  # fmt: skip
    return out


def is_plain_silu(module: Any) -> bool:
    """Whether the stock module computes `silu(gate) * up` on the halves of gate_up."""
    default = getattr(type(module), "_apply_gate", None) is _default_apply_gate
    return bool(module.has_gate) and default and isinstance(module.act_fn, torch.nn.SiLU | SiLUActivation)


def mlp(module: Any, x: torch.Tensor, project: Callable[[torch.Tensor, str], torch.Tensor]) -> torch.Tensor:
    """`x [S, H]` through an expert as the stock module has it; `project(x, tensor name)` multiplies by a weight."""
    x = project(x, "gate_up_proj" if module.has_gate else "up_proj")
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    return project(x.contiguous(), "down_proj")


def project(module: torch.nn.Module, x: torch.Tensor, name: str, weights: Weights) -> torch.Tensor:
    """`x` times one expert's tensor `name`, with its bias if there is one."""
    weight, bias = weights[name], weights.get(f"{name}_bias")
    out = x @ weight if module.is_transposed else torch.nn.functional.linear(x, weight)
    return out if bias is None else out + bias


def combine(out: torch.Tensor, order: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weigh the expert outputs (sorted by expert) and sum each token's, in float32 where the gate is.

    Args:
        out: `[T * K, H]`, row i for the (token, k) pair `order[i]`.
        gate: `[T, K]`.
    """
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)  # where the output for each (token, k) is
    kernels = cpu_kernels() if out.device.type == "cpu" and out.dtype == dtype == torch.bfloat16 else None
    if kernels is None or out.shape[1] % 16 or not out.is_contiguous():
        return (out[place].view(*gate.shape, -1) * gate[..., None]).sum(dim=1).to(dtype)
    summed = out.new_empty(gate.shape[0], out.shape[1])
    gate = gate.float().contiguous()  # many routers weigh in the model's dtype
    kernels.polymoe_combine_bf16(
        out.data_ptr(), place.data_ptr(), gate.data_ptr(), *gate.shape, out.shape[1], summed.data_ptr(),
        kernel_threads(),
    )  # fmt: skip
    return summed
