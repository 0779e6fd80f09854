"""The compiled kernel for packed experts against the torch reference in float32: every base with every delta."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers.integrations.moe import _default_apply_gate

from polymoe.kernels.compressed_experts import CompressedLayer, experts_compressed, experts_compressed_torch
from polymoe.kernels.cpu import cpu_kernels
from polymoe.kernels.packed_experts import packed_experts, why_not_fused, why_not_packed
from polymoe.kernels.packed_pool import ExactPool, PackedPool, StoredPool
from polymoe.quant.codec import encode
from polymoe.quant.exact import encode_exact
from polymoe.quant.formats import BASE_FORMATS, DELTA_FORMATS, get_format

V, E, K = 3, 4, 2
# (width, inner): whole blocks of all planes, groups of 256 and a tail, a tail alone, groups of 192 and a tail
SIZES = [(256, 416), (96, 288)]
PAIRS = [
    (base.name, delta)
    for base in BASE_FORMATS
    for delta in ("none", *(fmt.name for fmt in DELTA_FORMATS))
    if delta != "exact" or base.name == "stored"
]

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="the CPU kernels are not built or not for this CPU")


class Module:
    """What the kernel asks of a stock experts module."""

    has_gate, is_transposed, act_fn = True, False, torch.nn.SiLU()
    _apply_gate = _default_apply_gate


Tensors = dict[str, torch.Tensor]


def shapes_of(width: int, inner: int) -> dict[str, tuple[int, int]]:
    return {"gate_up_proj": (2 * inner, width), "down_proj": (width, inner)}


def random_pool(name: str, count: int, width: int, inner: int, scale: float, generator: torch.Generator) -> PackedPool:
    fmt, shapes = get_format(name), shapes_of(width, inner)
    made = [
        {n: encode(scale * torch.randn(s, generator=generator), fmt) for n, s in shapes.items()} for _ in range(count)
    ]
    tensors = {n: {part: torch.stack([m[n][part] for m in made]) for part in made[0][n]} for n in shapes}
    return PackedPool(fmt, tensors, shapes)


def exact_pool(stored: Tensors, generator: torch.Generator) -> ExactPool:
    """Delta e · V + v changes 15 % of stored expert e; the last changes nothing, the one before it everything."""
    shares = [0.15] * (E * V - 2) + [1.0, 0.0]
    tensors = {}
    for name, stack in stored.items():
        made = []
        for d, share in enumerate(shares):
            mask = torch.rand(stack[d // V].shape, generator=generator) < share
            made.append(encode_exact(torch.where(mask, stack[d // V] + 0.02, stack[d // V]), stack[d // V]))
        tensors[name] = {
            "bitmap": torch.stack([m["bitmap"] for m in made]),
            "values": torch.cat([m["values"] for m in made]),
            "starts": torch.tensor([0, *(len(m["values"]) for m in made)]).cumsum(0),
        }
    return ExactPool(tensors)


def make_layer(base: str, delta: str, width: int, inner: int) -> CompressedLayer:
    """E bases of 0.05, and for each of V variants a delta of 0.01."""
    generator = torch.Generator().manual_seed(2)
    count = E if base == "stored" else 0
    stored = {
        n: (0.05 * torch.randn(count, *s, generator=generator)).bfloat16() for n, s in shapes_of(width, inner).items()
    }
    bases = () if base == "stored" else (random_pool(base, E, width, inner, 0.05, generator),)
    if delta == "none":
        return CompressedLayer(stored, bases, ())
    if delta == "exact":
        return CompressedLayer(stored, bases, (exact_pool(stored, generator),))
    return CompressedLayer(stored, bases, (random_pool(delta, E * V, width, inner, 0.01, generator),))


def with_biases(layer: CompressedLayer, width: int, inner: int) -> CompressedLayer:
    """The same with biases in every pool: 0.5 of bases in bfloat16, 0.1 of deltas in float32."""
    generator = torch.Generator().manual_seed(7)
    sizes = {"gate_up_proj_bias": 2 * inner, "down_proj_bias": width}

    def random(count: int, size: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(count, size, generator=generator)

    stored = {
        **layer.stored, **{n: random(layer.num_stored, s, 0.5).bfloat16() for n, s in sizes.items()}
    }  # fmt: skip

    def biased(pool: Any, scale: float, dtype: torch.dtype) -> Any:
        if isinstance(pool, StoredPool):
            return StoredPool({**pool.tensors, **{n: random(len(pool), s, 0.5).bfloat16() for n, s in sizes.items()}})
        if isinstance(pool, ExactPool):
            tensors = dict(pool.tensors)
            for name in sizes:
                old = stored[name]
                made = [encode_exact(torch.where(old[d // V] > 0, old[d // V] + 1, old[d // V]), old[d // V])
                        for d in range(len(pool))]  # fmt: skip
                starts = torch.tensor([0, *(len(m["values"]) for m in made)]).cumsum(0)
                bitmap, values = torch.stack([m["bitmap"] for m in made]), torch.cat([m["values"] for m in made])
                tensors[name] = {"bitmap": bitmap, "values": values, "starts": starts}
            return ExactPool(tensors)
        own = {n: {"": random(len(pool), s, scale).to(dtype)} for n, s in sizes.items()}
        return PackedPool(pool.fmt, {**pool.tensors, **own}, {**pool.shapes, **{n: (s,) for n, s in sizes.items()}})

    bases = tuple(biased(pool, 0.5, torch.bfloat16) for pool in layer.bases)
    deltas = tuple(biased(pool, 0.1, torch.float32) for pool in layer.deltas)
    return CompressedLayer(stored, bases, deltas)


def in_float32(layer: CompressedLayer) -> CompressedLayer:
    def wide(tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return {n: t.float() for n, t in tensors.items()}

    bases = (StoredPool(wide(pool.tensors)) if isinstance(pool, StoredPool) else pool for pool in layer.bases)
    return CompressedLayer(wide(layer.stored), tuple(bases), layer.deltas)


def traffic(kind: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(variants `[T]` ascending, experts `[T, K]`). zipf: segments of one row to more than a hundred."""
    num_tokens = {"none": 0, "one token": 1, "distinct": V}.get(kind, 150)
    skew = 1.0 / torch.arange(1, 1 + max(V, E)) ** 2 if kind == "zipf" else torch.ones(max(V, E))
    variant = torch.multinomial(skew[:V].expand(max(num_tokens, 1), V), 1, generator=generator)[:num_tokens, 0]
    expert = torch.multinomial(skew[:E].expand(max(num_tokens, 1), E), K, generator=generator)[:num_tokens]
    if kind == "one variant":
        variant[:] = 1
    if kind == "distinct":
        variant = torch.arange(V)
    return variant.sort().values, expert


def assert_same(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Within what bfloat16 rounds: of weights, of the activation, of the outputs."""
    assert out.dtype == torch.bfloat16
    assert out.shape == expected.shape
    assert (out.float() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize(("base", "delta"), PAIRS)
@pytest.mark.parametrize(("width", "inner"), SIZES)
def test_against_the_reference(base: str, delta: str, width: int, inner: int) -> None:
    layer = make_layer(base, delta, width, inner)
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(2, (V, E), generator=generator).mul(2).sub(1).to(torch.int8)
    for kind in ("uniform", "zipf", "one variant", "distinct", "one token", "none"):
        variant, expert = traffic(kind, generator)
        entry = variant[:, None], expert
        deltas = None if delta == "none" else (expert * V + variant[:, None]).int()
        sign = signs[entry] if delta.startswith("d") and kind != "uniform" else None
        hidden = torch.randn(len(variant), width, generator=generator).bfloat16()
        gate = torch.rand(len(variant), K, generator=generator)
        found = packed_experts(Module(), hidden, expert.int(), deltas, sign, gate, layer, no_host)
        assert found is not None
        expected = experts_compressed_torch(
            Module(), hidden.float(), expert.int(), variant, deltas, sign, gate, in_float32(layer), no_host
        )
        assert_same(found, expected)


def no_host(physical: int) -> Tensors:
    raise AssertionError(f"asked for expert {physical}")


def test_pools_and_absent_experts_in_one_batch() -> None:
    """Ids run over the stored bases and all pools; deltas likewise; absent experts are fetched once and have none."""
    width, inner = SIZES[1]
    generator = torch.Generator().manual_seed(4)
    layer = make_layer("stored", "exact", width, inner)
    own = StoredPool({n: t.clone() + 0.01 for n, t in layer.stored.items()})
    layer = CompressedLayer(
        layer.stored,
        (
            random_pool("int6", 2, width, inner, 0.05, generator),
            own,
            random_pool("fp8", 1, width, inner, 0.05, generator),
        ),
        (random_pool("d1", 2, width, inner, 0.01, generator), *layer.deltas),
    )
    host = {
        -1 - h: {n: 0.05 * torch.randn(s, generator=generator) for n, s in shapes_of(width, inner).items()}
        for h in range(2)
    }
    fetched: list[int] = []

    def host_expert(dtype: torch.dtype) -> Any:
        def fetch(physical: int) -> Tensors:
            fetched.append(physical)
            return {n: t.to(dtype) for n, t in host[physical].items()}

        return fetch

    # stored 0-3, int6 4-5, own 6-9, fp8 10; d1 0-1, exact 2 + expert * V + variant
    table = torch.tensor([[0, 4, -1, 10], [0, 4, -1, 9], [0, 5, -2, 10]], dtype=torch.int32)
    delta = torch.tensor([[2, 0, -1, 1], [3, 0, -1, -1], [4, -1, -1, -1]], dtype=torch.int32)
    sign = torch.tensor([[1, 1, 1, -1], [1, -1, 1, 1], [1, 1, 1, 1]], dtype=torch.int8)
    for kind in ("zipf", "one token", "distinct"):
        variant, expert = traffic(kind, generator)
        entry = variant[:, None], expert
        hidden = torch.randn(len(variant), width, generator=generator).bfloat16()
        gate = torch.rand(len(variant), K, generator=generator)
        given = hidden, table[entry], variant, delta[entry], sign[entry], gate
        fetched.clear()
        found = experts_compressed(Module(), *given, layer, host_expert(torch.bfloat16))
        assert len(fetched) == len(set(fetched)) == len({p for p in table[entry].flatten().tolist() if p < 0})
        expected = experts_compressed_torch(
            Module(), hidden.float(), *given[1:], in_float32(layer), host_expert(torch.float32)
        )
        # The reference's exact deltas and own pool are bfloat16 numbers, so nothing but sums and roundings differ.
        assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("base", ["int4", "stored"])
def test_routing_weights_of_any_dtype(dtype: torch.dtype, base: str) -> None:
    """Most routers weigh in the model's dtype (Qwen, OLMoE, Granite, Phi …). Only float32 weights took the compiled
    path: Granite fell to torch without a word, which gave 0.4 tokens a second where its original gives 7."""
    layer = make_layer(base, "d2", *SIZES[1])
    generator = torch.Generator().manual_seed(3)
    variant, expert = traffic("zipf", generator)
    deltas = (expert * V + variant[:, None]).int()
    hidden = torch.randn(len(variant), SIZES[1][0], generator=generator).bfloat16()
    gate = torch.rand(len(variant), K, generator=generator).to(dtype)
    found = packed_experts(Module(), hidden, expert.int(), deltas, None, gate, layer, no_host)
    same = packed_experts(Module(), hidden, expert.int(), deltas, None, gate.float(), layer, no_host)
    assert found is not None
    assert same is not None
    assert torch.equal(found, same)


@pytest.mark.parametrize("what", ["float32", "float16", "another activation", "biases", "odd sizes"])
def test_what_one_call_leaves_to_several(what: str) -> None:
    width, inner = (48, 96) if what == "odd sizes" else (64, 96)
    layer = make_layer("int4", "d2", width, inner)
    module: Any = Module()
    if what == "another activation":
        module.act_fn = torch.nn.ReLU()
    if what == "biases":
        layer = with_biases(layer, width, inner)
    dtype = getattr(torch, what, torch.bfloat16)
    assert why_not_fused(module, dtype, layer)
    assert not why_not_packed(layer)
    hidden, ids = torch.randn(2, width, dtype=dtype), torch.zeros(2, K, dtype=torch.int32)
    assert packed_experts(module, hidden, ids, ids, None, torch.ones(2, K), layer, no_host) is None
