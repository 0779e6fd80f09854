"""Packed experts in tiles, multiplied in 8-bit integers, against the same pools decoded."""

from dataclasses import replace

import pytest
import torch

from polymoe.kernels.cpu.compressed_experts import experts_compressed_torch
from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.packed_experts import packed_experts
from polymoe.kernels.cpu.packed_pool import ExactPool, PackedPool, TiledPool
from polymoe.kernels.cpu.tiles import ACTIVATIONS, can_multiply_tiles, tiled_layer
from polymoe.quant.codec import encode
from polymoe.quant.exact import encode_exact
from polymoe.quant.formats import FREE_LEVELS, get_format, level_bytes
from test_packed_experts import Module, no_host

pytestmark = pytest.mark.skipif(not can_multiply_tiles(), reason="this processor cannot run the kernels of tiles")

H, INNER, V = 192, 352, 4  # groups of 192, and of 192 and 160
SHAPES = {"gate_up_proj": (2 * INNER, H), "down_proj": (H, INNER)}


def pool(name: str, count: int, scale: float, levels: str = "grid") -> PackedPool:
    fmt = get_format(name, levels)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for tensor, shape in SHAPES.items():
        parts = [encode(torch.randn(shape) * scale / shape[1] ** 0.5, fmt) for _ in range(count)]
        tensors[tensor] = {part: torch.stack([one[part] for one in parts]).contiguous() for part in parts[0]}
    return PackedPool(fmt, tensors, SHAPES)


def exact(stored: dict[str, torch.Tensor], count: int) -> ExactPool:
    """Each changes a few values of the stored expert 0."""
    tensors = {}
    for name, stack in stored.items():
        own = [stack[0].clone() for _ in range(count)]
        for weight in own:
            weight.view(-1)[::7] += 0.1
        parts = [encode_exact(weight, stack[0]) for weight in own]
        starts = torch.tensor([0, *(len(part["values"]) for part in parts)]).cumsum(0)
        tensors[name] = {
            "bitmap": torch.stack([part["bitmap"] for part in parts]),
            "values": torch.cat([part["values"] for part in parts]), "starts": starts,
        }  # fmt: skip
    return ExactPool(tensors)


def stored_experts(count: int) -> dict[str, torch.Tensor]:
    return {name: (torch.randn(count, *shape) / shape[1] ** 0.5).bfloat16() for name, shape in SHAPES.items()}


def float_layer(layer: CompressedLayer) -> CompressedLayer:
    return replace(layer, stored={name: stack.float() for name, stack in layer.stored.items()})


def traffic(kind: str, tokens: int, num_bases: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert `[T, 2]`, variant `[T]`)."""
    if kind == "one variant":
        variant = torch.zeros(tokens, dtype=torch.int64)
    elif kind == "zipf":
        variant = torch.multinomial(1 / torch.arange(1.0, V + 1) ** 2, tokens, replacement=True)
    else:
        variant = torch.arange(tokens) % V
    expert = torch.stack([torch.randperm(num_bases)[:2] for _ in range(tokens)])
    return expert, variant.sort().values


@pytest.mark.parametrize("kind", ["one variant", "uniform", "zipf"])
@pytest.mark.parametrize("tokens", [1, 3, 17, 120])
@pytest.mark.parametrize(
    ("bases", "deltas"),
    [
        (["int3"], ["d1"]), (["int4", "int6"], ["d1", "d3"]), (["int5"], ["d5", "d2"]), (["int8"], ["d4"]),
        (["fp8", "int4"], ["d2"]), ([], ["d2"]),
    ],
)  # fmt: skip
def test_as_the_reference(bases: list[str], deltas: list[str], tokens: int, kind: str) -> None:
    """In 16 bits as close to float32 as bfloat16 rounds; in 8 bits as close as 8 bits are."""
    torch.manual_seed(tokens)
    stored = stored_experts(2)
    layer = CompressedLayer(stored, tuple(pool(name, 2, 1.0) for name in bases), tuple(pool(n, 5, 0.2) for n in deltas))
    expert, variant = traffic(kind, tokens, layer.num_bases)
    delta = torch.randint(-1, layer.num_deltas, (V, layer.num_bases))[variant[:, None], expert]
    sign = torch.where(torch.rand(V, layer.num_bases) < 0.3, -1, 1)[variant[:, None], expert]
    hidden, gate = torch.randn(tokens, H).bfloat16(), torch.rand(tokens, 2)
    expected = experts_compressed_torch(
        Module(), hidden.float(), expert, variant, delta, sign, gate, float_layer(layer), no_host
    )
    tiled = tiled_layer(Module(), layer, torch.bfloat16)
    assert tiled.is_tiled
    decoded = experts_compressed_torch(
        Module(), hidden.float(), expert, variant, delta, sign, gate, float_layer(tiled), no_host
    )
    assert torch.allclose(decoded, expected, atol=1e-5), "tiles are the same weights"
    for name, most in (("int16", 0.008), ("mixed", 0.02), ("int8", 0.03)):
        found = packed_experts(
            Module(), hidden, expert, delta, sign, gate, tiled, no_host, activation_bits=ACTIVATIONS[name]
        )
        assert found is not None
        assert float((found.float() - expected).norm() / expected.norm()) < most, name


@pytest.mark.parametrize(("base", "delta"), [("int4", "d1"), ("int5", "d1"), ("int4", "d2"), ("int3", "d3")])
def test_many_rows_of_a_coarse_pair_are_as_few_rows(base: str, delta: str) -> None:
    """With many rows base and delta become one matrix of bytes; with few they are two products and round nothing."""
    torch.manual_seed(0)
    layer = CompressedLayer(stored_experts(0), (pool(base, 2, 1.0),), (pool(delta, 4, 0.2),))
    tokens = 150
    expert, variant = traffic("zipf", tokens, 2)
    ids = torch.randint(-1, 4, (V, 2))[variant[:, None], expert]
    sign = torch.tensor([[1, -1], [-1, 1], [1, 1], [-1, -1]])[variant[:, None], expert]
    hidden, gate = torch.randn(tokens, H).bfloat16(), torch.rand(tokens, 2)
    tiled = tiled_layer(Module(), layer, torch.bfloat16)

    def outputs(rows: slice) -> torch.Tensor:
        found = packed_experts(
            Module(), hidden[rows], expert[rows], ids[rows], sign[rows], gate[rows], tiled, no_host,
            activation_bits=ACTIVATIONS["int8"],
        )  # fmt: skip
        assert found is not None
        return found.float()

    few = torch.cat([outputs(slice(start, start + 5)) for start in range(0, tokens, 5)])
    assert float((outputs(slice(None)) - few).norm() / few.norm()) < 0.02


def test_lossless_deltas_beside_tiles() -> None:
    torch.manual_seed(0)
    stored = stored_experts(1)
    layer = CompressedLayer(stored, (pool("int4", 2, 1.0),), (pool("d2", 4, 0.2), exact(stored, 3)))
    tokens = 40
    expert, variant = traffic("uniform", tokens, 3)
    table = torch.tensor([[4, 0, 1], [5, 2, -1], [-1, 3, 0], [6, 1, 2]])  # exact ones are on the stored expert
    delta = table[variant[:, None], expert]
    hidden, gate = torch.randn(tokens, H).bfloat16(), torch.rand(tokens, 2)
    expected = experts_compressed_torch(Module(), hidden, expert, variant, delta, None, gate, layer, no_host).float()
    tiled = tiled_layer(Module(), layer, torch.bfloat16)
    found = packed_experts(Module(), hidden, expert, delta, None, gate, tiled, no_host)
    assert found is not None
    assert float((found.float() - expected).norm() / expected.norm()) < 0.01


def test_levels_that_are_no_bytes_stay_as_they_are() -> None:
    """Bundles of old have levels between those of the grid."""
    old = pool("int4", 2, 1.0, FREE_LEVELS)
    assert level_bytes(old.fmt) is None
    assert level_bytes(get_format("int4")) is not None
    layer = CompressedLayer(stored_experts(1), (old,), (pool("d2", 2, 0.2),))
    base, delta = (tiled_layer(Module(), layer, torch.bfloat16).bases[0], tiled_layer(Module(), layer, torch.bfloat16))
    assert base is old
    assert isinstance(delta.deltas[0], TiledPool)


def test_other_dtypes_and_modules_are_left_to_others() -> None:
    layer = CompressedLayer(stored_experts(1), (pool("int4", 1, 1.0),), (pool("d2", 2, 0.2),))
    assert not tiled_layer(Module(), layer, torch.float32).is_tiled
