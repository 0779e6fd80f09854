"""Packed bases and deltas against a plain sum over tokens with decoded experts, over skewed traffic."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from polymoe.kernels.compressed_experts import CompressedLayer, experts_compressed, route
from polymoe.kernels.packed_pool import ExactPool, PackedPool
from polymoe.quant.codec import decode, encode
from polymoe.quant.exact import encode_exact
from polymoe.quant.formats import get_format
from test_grouped_experts import H, make_module, one_by_one

V, E, K = 3, 4, 2


@dataclass
class Case:
    """Each expert of each variant decoded (`own[v][e]`, [out, in]), and the layer that stands for them."""

    module: Any
    layer: CompressedLayer
    table: torch.Tensor
    delta: torch.Tensor
    sign: torch.Tensor
    host: dict[int, dict[str, torch.Tensor]]
    own: list[list[dict[str, torch.Tensor]]]

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Name -> `[V · E, *shape]` in the stock layout."""
        found = {}
        for name in self.own[0][0]:
            stack = torch.stack([self.own[v][e][name] for v in range(V) for e in range(E)]).to(dtype)
            found[name] = stack.transpose(1, 2) if self.module.is_transposed and stack.ndim == 3 else stack
        return found


def make_case(layout: tuple[bool, bool, bool], dtype: torch.dtype) -> Case:
    """Expert 0: stored, variants 0 and 1 ± one delta. 1: int4 base, a d2 delta each. 2: stored with exact deltas for
    two, the third absent. 3: one int8 base for two, an fp8 one for the third."""
    module, pool = make_module(*layout)
    flip = module.is_transposed
    matrices = {n: t.transpose(1, 2).contiguous() if flip and t.ndim == 3 else t for n, t in pool.items()}
    shapes = {name: tuple(t.shape[1:]) for name, t in matrices.items()}
    matrices = {n: t.to(dtype).float() for n, t in matrices.items()}
    base = [{name: t[e] for name, t in matrices.items()} for e in range(5)]
    generator = torch.Generator().manual_seed(5)

    def noise(name: str) -> torch.Tensor:
        return 0.2 * torch.randn(shapes[name], generator=generator)

    def packed(
        experts: list[dict[str, torch.Tensor]], fmt_name: str
    ) -> tuple[PackedPool, list[dict[str, torch.Tensor]]]:
        fmt = get_format(fmt_name)
        parts = [{name: encode(t, fmt) for name, t in expert.items()} for expert in experts]
        tensors = {
            name: {part: torch.stack([p[name][part] for p in parts]) for part in parts[0][name]} for name in parts[0]
        }
        decoded = [{name: decode(p[name], fmt, shapes[name], torch.float32) for name in p} for p in parts]
        return PackedPool(fmt, tensors, shapes), decoded

    int8, (wide,) = packed([base[3]], "int8")
    fp8, (narrow,) = packed([base[4]], "fp8")
    int4, (coarse,) = packed([base[1]], "int4")
    d1, (half,) = packed([{n: noise(n) for n in shapes}], "d1")
    d2, fixes = packed([{n: noise(n) for n in shapes} for _ in range(V)], "d2")
    changed = []
    for _ in range(2):
        mask = {n: torch.rand(shapes[n], generator=generator) < 0.1 for n in shapes}
        changed.append({n: torch.where(mask[n], (t + 1).to(dtype).float(), t) for n, t in base[2].items()})
    entries = [{n: encode_exact(t.to(dtype), base[2][n].to(dtype)) for n, t in expert.items()} for expert in changed]
    exact = {
        name: {
            "bitmap": torch.stack([entry[name]["bitmap"] for entry in entries]),
            "values": torch.cat([entry[name]["values"] for entry in entries]),
            "starts": torch.tensor([0, *(len(entry[name]["values"]) for entry in entries)]).cumsum(0),
        }
        for name in shapes
    }

    def stock(expert: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: (t.T if flip and t.ndim == 2 else t).contiguous().to(dtype) for n, t in expert.items()}

    stored = [stock(base[0]), stock(base[2])]
    stacks = {name: torch.stack([expert[name] for expert in stored]) for name in shapes}
    layer = CompressedLayer(stacks, (fp8, int8, int4), (d1, d2, ExactPool(exact)), flip)
    absent = {n: noise(n).to(dtype).float() for n in shapes}
    # ids: stored 0 1, fp8 2, int8 3, int4 4; deltas: d1 0, d2 1 2 3, exact 4 5
    table = torch.tensor([[0, 4, 1, 3], [0, 4, 1, 3], [0, 4, -1, 2]], dtype=torch.int32)
    delta = torch.tensor([[0, 1, 4, -1], [0, 2, 5, -1], [-1, 3, -1, -1]], dtype=torch.int32)
    sign = torch.tensor([[1, 1, 1, 1], [-1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.int8)
    own = [
        [
            {n: base[0][n] + s * half[n] for n in shapes},
            {n: coarse[n] + fixes[v][n] for n in shapes},
            changed[v] if v < 2 else absent,
            narrow if v == 2 else wide,
        ]
        for v, s in enumerate((1, -1, 0))
    ]
    return Case(module, layer, table, delta, sign, {-1: stock(absent)}, own)


@pytest.mark.parametrize("layout", [(False, False, True), (True, True, True), (False, True, False)])
@pytest.mark.parametrize("routing", ["uniform", "one expert", "one variant", "one token", "all absent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_one_token_at_a_time(layout: tuple[bool, bool, bool], routing: str, dtype: torch.dtype) -> None:
    case = make_case(layout, dtype)
    generator = torch.Generator().manual_seed(1)
    num_tokens = 1 if routing == "one token" else 19
    variant = torch.randint(V, (num_tokens,), generator=generator).sort().values
    index = torch.rand(num_tokens, E, generator=generator).argsort(dim=1)[:, :K]
    if routing == "one expert":
        index[:] = 1
    if routing == "one variant":
        variant[:] = 1
    if routing == "all absent":
        variant[:], index[:] = 2, 2
    hidden = torch.randn(num_tokens, H, generator=generator).to(dtype)
    gate = torch.rand(num_tokens, K, generator=generator)

    entry = variant[:, None], index
    fetched: list[int] = []

    def host_expert(physical: int) -> dict[str, torch.Tensor]:
        fetched.append(physical)
        return case.host[physical]

    out = experts_compressed(
        case.module, hidden, case.table[entry], variant, case.delta[entry], case.sign[entry], gate, case.layer,
        host_expert,
    )  # fmt: skip
    assert out.dtype == dtype
    expected = one_by_one(case.module, hidden, variant[:, None] * E + index, gate, case.weights(torch.float32))
    if dtype == torch.float32:
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    else:
        assert (out.float() - expected.float()).norm() < 0.02 * expected.float().norm()
    assert len(fetched) == len(set(fetched))  # once a pass, for both projections


def test_rows_are_sorted_by_base_then_variant() -> None:
    physical = torch.tensor([[3, 0], [0, -2], [3, 3]], dtype=torch.int32)
    made = route(physical, torch.tensor([0, 1, 2]), None, None)
    assert made.order.tolist() == [3, 1, 2, 0, 4, 5]
    assert (made.base, made.starts) == ([-2, 0, 0, 3, 3], [0, 1, 2, 3, 4, 6])
    assert (made.delta, made.sign) == ([-1] * 5, [1] * 5)
