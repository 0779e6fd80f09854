"""The routed experts of one layer where bases are packed or variants have deltas of their own.

    y_t = Σ_k g_tk · (act(x_t G) ∘ (x_t U)) D ,   G, U, D = base_b + s · delta_d of (variant of t, k-th expert)

Rows, one a (token, expert) pair, are sorted by base, then variant, so that all variants share the base product:

    |------------- base 0 -------------|---- base 1 ----| …
    |- variant 0 -|- variant 2 -| v. 3 |- v. 0 -| v. 1 -| …      a segment has one base, one delta and one sign

Deltas are added in float32, before the activation and before the routing weight. Letters as in `grouped_experts.py`,
with S = T · K rows.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.grouped_experts import combine, mlp, project
from polymoe.kernels.cpu.grouped_linear import grouped_linear
from polymoe.kernels.cpu.packed_experts import packed_experts
from polymoe.kernels.cpu.packed_linear import packed_linear
from polymoe.kernels.cpu.packed_pool import Groups, PackedPool
from polymoe.kernels.cpu.routing import Routing, route

Weights = Mapping[str, Tensor]


def experts_compressed(
    module: Any,
    hidden: Tensor,
    physical: Tensor,
    token_variant: Tensor,
    delta: Tensor | None,
    sign: Tensor | None,
    gate: Tensor,
    layer: CompressedLayer,
    host_expert: Callable[[int], Weights],
    activation_bits: tuple[int, int] = (16, 16),
) -> Tensor:
    """One layer's experts for a batch that mixes variants: in one call of the compiled kernel where that applies, else
    each product in a call of its own, else by torch.

    Args:
        module: the stock experts module; its `_apply_gate` (or `act_fn`) and layout flags are used.
        hidden: `[T, H]`. physical: `[T, K]` base ids, < 0 for absent experts. token_variant: `[T]`.
        delta, sign: `[T, K]`, or None where there are none; delta −1 is none.
        gate: `[T, K]` routing weights.
        host_expert: id < 0 -> the tensors of an absent expert, fetched; asked once for each.
        activation_bits: see `packed_experts`.

    Returns: `[T, H]` in `hidden`'s dtype.
    """
    fused = packed_experts(module, hidden, physical, delta, sign, gate, layer, host_expert, activation_bits)
    if fused is not None:
        return fused
    return _by_product(module, hidden, physical, token_variant, delta, sign, gate, layer, host_expert, _fast_project)


def experts_compressed_torch(
    module: Any,
    hidden: Tensor,
    physical: Tensor,
    token_variant: Tensor,
    delta: Tensor | None,
    sign: Tensor | None,
    gate: Tensor,
    layer: CompressedLayer,
    host_expert: Callable[[int], Weights],
) -> Tensor:
    """The reference for any device, dtype and module: one matrix at a time. Arguments as `experts_compressed`."""
    return _by_product(module, hidden, physical, token_variant, delta, sign, gate, layer, host_expert, _project)


def _by_product(
    module: Any,
    hidden: Tensor,
    physical: Tensor,
    token_variant: Tensor,
    delta: Tensor | None,
    sign: Tensor | None,
    gate: Tensor,
    layer: CompressedLayer,
    host_expert: Callable[[int], Weights],
    product: Callable[..., Tensor],
) -> Tensor:
    """Sort, `product(x, tensor name, layer, routing)` for each weight, combine."""
    if not len(hidden):
        return torch.empty_like(hidden)
    routing = route(physical, token_variant, delta, sign)
    inputs = hidden[routing.order // gate.shape[1]]
    pieces = []
    first = 0  # segments of host experts come first
    while first < len(routing.base) and routing.base[first] < 0:
        following = next((g for g in range(first, len(routing.base)) if routing.base[g] != routing.base[first]), None)
        following = len(routing.base) if following is None else following
        weights = host_expert(routing.base[first])
        rows = inputs[routing.starts[first] : routing.starts[following]]
        pieces.append(mlp(module, rows, partial(project, module, weights=weights)))
        first = following
    if first < len(routing.base):
        here = routing.from_segment(first)
        rows = inputs[routing.starts[first] :]
        pieces.append(mlp(module, rows, partial(product, layer=layer, routing=here)))
    return combine(torch.cat(pieces), routing.order, gate, hidden.dtype)


def _fast_project(x: Tensor, name: str, layer: CompressedLayer, routing: Routing) -> Tensor:
    """`_project` by the compiled kernels where there are any."""
    out = packed_linear(x, name, layer, routing)
    return _project(x, name, layer, routing) if out is None else out


def _project(x: Tensor, name: str, layer: CompressedLayer, routing: Routing) -> Tensor:
    """`[S, I]` -> `[S, O]` in x's dtype; every row by its base and its delta."""
    shape, transposed = layer.stored[name].shape, layer.transposed
    out = torch.empty(x.shape[0], shape[-1] if transposed else shape[-2], dtype=torch.float32, device=x.device)
    runs = list(_runs(routing))
    here = [run for run in runs if run[0] < layer.num_stored]
    if here:
        last = here[-1][2]
        stack = layer.stored[name].transpose(-2, -1) if transposed else layer.stored[name]
        starts = [*(run[1] for run in here), last]
        out[:last] = grouped_linear(x[:last], stack, [run[0] for run in here], starts, layer.stored.get(f"{name}_bias"))

    offset = layer.num_stored
    for pool in layer.bases:
        here = [run for run in runs if offset <= run[0] < offset + len(pool)]
        ids = [run[0] - offset for run in here]
        pool.linear(x, name, Groups(ids, [run[1] for run in here], [run[2] for run in here], [1] * len(here)), out)
        offset += len(pool)
    _add_deltas(x, name, routing, layer, out)
    return out.to(x.dtype)


def _add_deltas(x: Tensor, name: str, routing: Routing, layer: CompressedLayer, out: Tensor) -> None:
    offset = 0
    for pool in layer.deltas:
        here = [g for g, delta in enumerate(routing.delta) if offset <= delta < offset + len(pool)]
        groups = Groups(
            [routing.delta[g] - offset for g in here],
            [routing.starts[g] for g in here],
            [routing.starts[g + 1] for g in here],
            [routing.sign[g] for g in here],
        )
        if isinstance(pool, PackedPool):
            pool.add(x, name, groups, out)
        else:
            bases = [routing.base[g] for g in here]

            def stored_base(tensor: str, g: int, bases: list[int] = bases) -> Tensor:
                base = layer.stored[tensor][bases[g]]
                return base.T if layer.transposed and base.ndim == 2 else base

            pool.replace(x, name, groups, stored_base, out)
        offset += len(pool)


def _runs(routing: Routing) -> Iterator[tuple[int, int, int]]:
    """(base, start, stop): neighbouring segments on one base joined."""
    begins = [g for g, base in enumerate(routing.base) if g == 0 or routing.base[g - 1] != base]
    for g, following in pairwise([*begins, len(routing.base)]):
        yield routing.base[g], routing.starts[g], routing.starts[following]
