"""Both implementations of the routed experts against a plain sum over tokens, over skewed routing."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from polymoe.kernels.cpu.grouped_experts import experts_by_group, experts_by_grouped_mm, experts_by_loop

H, INNER, P, K = 32, 64, 6, 3


def make_module(transposed: bool, bias: bool, gated: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """Layout flags as transformers sets them, and a pool `[P, …]`."""
    generator = torch.Generator().manual_seed(0)
    up, wide = ("gate_up_proj", 2 * INNER) if gated else ("up_proj", INNER)
    shapes = {up: (wide, H), "down_proj": (H, INNER)}
    pool = {n: torch.randn(P, *(reversed(s) if transposed else s), generator=generator) for n, s in shapes.items()}
    if bias:
        pool |= {f"{n}_bias": torch.randn(P, s[0], generator=generator) for n, s in shapes.items()}

    def apply_gate(x: torch.Tensor) -> torch.Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value

    return SimpleNamespace(has_gate=gated, is_transposed=transposed, _apply_gate=apply_gate, act_fn=F.relu), pool


def one_by_one(
    module: Any, hidden: torch.Tensor, physical: torch.Tensor, gate: torch.Tensor, pool: Any
) -> torch.Tensor:
    out = torch.zeros_like(hidden, dtype=torch.float64)
    for t in range(hidden.shape[0]):
        for k in range(physical.shape[1]):
            expert = {n: w[physical[t, k]].double() for n, w in pool.items()}
            up = "gate_up_proj" if module.has_gate else "up_proj"
            x = hidden[t].double() @ (expert[up] if module.is_transposed else expert[up].T)
            x = x + expert.get(f"{up}_bias", 0)
            x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
            x = x @ (expert["down_proj"] if module.is_transposed else expert["down_proj"].T)
            out[t] += gate[t, k] * (x + expert.get("down_proj_bias", 0))
    return out.float()


@pytest.mark.parametrize("layout", [(False, False, True), (True, True, True), (False, False, False)])
@pytest.mark.parametrize("routing", ["uniform", "one expert", "zipf", "all distinct", "one token"])
def test_against_one_token_at_a_time(layout: tuple[bool, bool, bool], routing: str) -> None:
    module, pool = make_module(*layout)
    generator = torch.Generator().manual_seed(1)
    num_tokens = {"one token": 1, "all distinct": P // K}.get(routing, 17)
    weights = 1.0 / torch.arange(1, P + 1) ** 2 if routing == "zipf" else torch.ones(P)
    physical = torch.multinomial(weights.expand(num_tokens, P), K, generator=generator).to(torch.int32)
    if routing == "one expert":
        physical = torch.full((num_tokens, K), 4, dtype=torch.int32)
    if routing == "all distinct":
        physical = torch.randperm(P, generator=generator).view(num_tokens, K).to(torch.int32)
    hidden = torch.randn(num_tokens, H, generator=generator)
    gate = torch.rand(num_tokens, K, generator=generator)

    expected = one_by_one(module, hidden, physical, gate, pool)
    by_loop = experts_by_loop(module, hidden, physical, gate, lambda p: {n: w[p] for n, w in pool.items()})
    torch.testing.assert_close(by_loop, expected, atol=1e-4, rtol=1e-4)
    if not module.is_transposed:
        by_group = experts_by_group(module, hidden, physical, gate, pool)
        torch.testing.assert_close(by_group, expected, atol=1e-4, rtol=1e-4)
    grouped = experts_by_grouped_mm(module, hidden, physical, gate, pool)
    torch.testing.assert_close(grouped, expected, atol=1e-4, rtol=1e-4)

    rounded = {n: w.to(torch.bfloat16) for n, w in pool.items()}
    exact = one_by_one(module, hidden.to(torch.bfloat16), physical, gate, rounded)
    functions: list[Callable[..., torch.Tensor]] = [
        partial(experts_by_loop, weights_of=lambda p: {n: w[p] for n, w in rounded.items()})
    ]
    if not module.is_transposed:
        functions.append(partial(experts_by_group, pool=rounded))
    for function in functions:  # in bfloat16 each step of the chain rounds: compared by the size of the whole
        out = function(module, hidden.to(torch.bfloat16), physical, gate)
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).norm() < 0.02 * exact.norm()
