"""Lossless deltas in the GPU's experts, in Triton's interpreter: each token's own expert, whose bits are known."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton, here for its interpreter")

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.packed_pool import ExactPool
from polymoe.kernels.gpu.experts import expert_matrices
from polymoe.quant.exact import encode_exact
from test_gpu_experts import DEVICE, Case, Dense, E, K, V, expected, experts_gpu, experts_torch, make_case

TOKENS = 19


def exact_case(bases: list[str], deltas: list[str], share: float, exact_first: bool) -> tuple[Case, int]:
    """`make_case` with lossless deltas beside its own: two of each stored base, a `share` of whose values changed.

    Returns: the case, and the id of the first of them.
    """
    case = make_case(bases, deltas, 168, 88)
    generator = torch.Generator().manual_seed(1)
    pools: dict[str, list[dict[str, torch.Tensor]]] = {name: [] for name in case.bases[0]}
    changes: list[Dense] = []
    for base in case.bases[:2]:
        for _ in range(2):
            changes.append({})
            for name, old in base.items():
                flips = torch.rand(old.shape, generator=generator) < share
                flips[3] = True  # a row of changes beside rows of none
                new = torch.where(flips, old + 0.3 * torch.randn(old.shape, generator=generator), old)
                pools[name].append(encode_exact(new, old))
                changes[-1][name] = new - old
    tensors = {}
    for name, entries in pools.items():
        counts = torch.tensor([0, *(len(entry["values"]) for entry in entries)])
        tensors[name] = {
            "bitmap": torch.stack([entry["bitmap"] for entry in entries]).to(DEVICE),
            "values": torch.cat([entry["values"] for entry in entries]).to(DEVICE),
            "starts": counts.cumsum(0).to(DEVICE),
        }
    exact, own = (ExactPool(tensors),), case.layer.deltas if isinstance(case.layer, CompressedLayer) else ()
    stored, packed = (case.layer.stored, case.layer.bases) if own or bases[1:] else (case.layer, ())
    layer = CompressedLayer(stored, packed, (*exact, *own) if exact_first else (*own, *exact))
    dense = [*changes, *case.deltas] if exact_first else [*case.deltas, *changes]
    return Case(layer, case.bases, dense, case.width), 0 if exact_first else len(case.deltas)


def traffic(case: Case, first: int, seed: int = 0) -> tuple[Any, ...]:
    """Every variant on the same bases, so that tiles mix deltas; on a stored base often a lossless one."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(TOKENS, E, generator=generator).topk(K).indices
    variant = torch.randint(0, V, (TOKENS,), generator=generator).sort().values
    table = (torch.arange(E) % len(case.bases)).int().expand(V, E).contiguous()
    packed = [d for d in range(len(case.deltas)) if not first <= d < first + 4]
    choice = torch.randint(-1, len(packed), (V, E), generator=generator)
    delta = torch.where(choice < 0, choice, torch.tensor([*packed, -1])[choice])
    sign = torch.where(delta < 0, 1, torch.randint(0, 2, (V, E), generator=generator) * 2 - 1)
    lossless = (torch.rand(V, E, generator=generator) < 0.7) & (table < 2)
    delta = torch.where(lossless, first + 2 * table + torch.randint(0, 2, (V, E), generator=generator), delta)
    weight = torch.rand(TOKENS, K, generator=generator)
    return index, weight, variant, table, delta.int(), torch.where(lossless, 1, sign).to(torch.int8)


@pytest.mark.parametrize("share", [0.02, 0.6])
@pytest.mark.parametrize(
    ("bases", "deltas", "exact_first"),
    [(["stored"], [], True), (["stored", "int8"], ["d2"], True), (["stored"], ["d1", "d3"], False)],
)
def test_lossless_deltas(bases: list[str], deltas: list[str], exact_first: bool, share: float) -> None:
    """168 and 88 inputs are no whole step; packed deltas of other formats take passes of their own."""
    case, first = exact_case(bases, deltas, share, exact_first)
    inputs = traffic(case, first)
    assert ((inputs[4] >= first) & (inputs[4] < first + 4)).any()
    x = torch.randn(TOKENS, case.width, generator=torch.Generator().manual_seed(2))
    on_device: Any = [t.to(DEVICE) for t in inputs]
    matrices = expert_matrices(case.layer, x.dtype)
    found = experts_gpu(x.to(DEVICE), *on_device, matrices, num_absent=0)
    torch.testing.assert_close(found.cpu(), expected(case, x, inputs), atol=1e-4, rtol=1e-4)
    reference = experts_torch(x.to(DEVICE), *on_device, matrices, num_absent=0)
    torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)
