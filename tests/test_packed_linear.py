"""Experts that take one compiled call a product (dtype, sizes, activation, biases) against the torch reference."""

from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from polymoe.kernels.cpu.compressed_experts import experts_compressed, experts_compressed_torch
from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.packed_linear import packed_linear
from polymoe.kernels.cpu.routing import route
from polymoe.native.library import cpu_kernels
from test_packed_experts import (
    PAIRS,
    SIZES,
    E,
    K,
    Module,
    V,
    in_float32,
    make_layer,
    no_host,
    traffic,
    with_biases,
)

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="the CPU kernels are not built or not for this CPU")

# (width, inner): no whole step, one value, a last step of every length of planes, rows that no tile fills
ODD = [(250, 37), (33, 500), (8, 1)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Relu(Module):
    act_fn = torch.nn.ReLU()  # type: ignore[assignment]


class Gelu(Module):
    act_fn = ACT2FN["gelu_pytorch_tanh"]


class GptOss(Module):
    """Gate and up interleaved, clamped."""

    alpha, limit = 1.702, 7.0
    _apply_gate = GptOssExperts._apply_gate


def assert_close(module: Any, layer: CompressedLayer, dtype: torch.dtype, kind: str, signed: bool) -> None:
    """`experts_compressed` in `dtype` within its rounding of the float32 reference, over one step of traffic."""
    generator = torch.Generator().manual_seed(5)
    width = layer.stored["down_proj"].shape[-2]
    variant, expert = traffic(kind, generator)
    entry = variant[:, None], expert
    deltas = (expert * V + variant[:, None]).int() if layer.deltas else None
    sign = torch.randint(2, (V, E), generator=generator).mul(2).sub(1).to(torch.int8)[entry] if signed else None
    hidden = torch.randn(len(variant), width, generator=generator).to(dtype)
    gate = torch.rand(len(variant), K, generator=generator).to(dtype)
    found = experts_compressed(module, hidden, expert.int(), variant, deltas, sign, gate, layer, no_host)
    assert found.dtype == dtype
    wide = in_float32(layer)
    expected = experts_compressed_torch(
        module, hidden.float(), expert.int(), variant, deltas, sign, gate.float(), wide, no_host
    )
    assert (found.float() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize(("base", "delta"), PAIRS)
@pytest.mark.parametrize(("width", "inner"), [SIZES[0], *ODD])
def test_every_format_in_float32_and_in_odd_sizes(base: str, delta: str, width: int, inner: int) -> None:
    layer = make_layer(base, delta, width, inner)
    for kind in ("zipf", "distinct", "one token"):
        assert_close(Module(), layer, torch.float32, kind, signed=delta.startswith("d"))
    assert_close(Module(), layer, torch.float16, "zipf", signed=False)
    assert_close(Module(), layer, torch.bfloat16, "zipf", signed=False)


@pytest.mark.parametrize("module", [Relu(), Gelu(), GptOss()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(("base", "delta"), [("int4", "d2"), ("stored", "exact"), ("fp8", "d5"), ("int6", "none")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activations_and_biases(module: Any, base: str, delta: str, dtype: torch.dtype) -> None:
    layer = make_layer(base, delta, 64, 96)
    for kind in ("zipf", "distinct", "one token"):
        assert_close(module, layer, dtype, kind, signed=False)
        assert_close(module, with_biases(layer, 64, 96), dtype, kind, signed=delta.startswith("d"))


def test_a_stored_layer_that_is_not_bfloat16() -> None:
    """Bases that are stored in the model's own dtype beside lossless deltas in the checkpoint's."""
    layer = make_layer("stored", "exact", 250, 37)
    for dtype in (torch.float32, torch.float16):
        own = CompressedLayer({n: t.to(dtype) for n, t in layer.stored.items()}, layer.bases, layer.deltas)
        assert_close(Module(), own, dtype, "zipf", signed=False)


def test_with_several_threads() -> None:
    """In float32 helpers looked for the segments in memory of their own, where there were none: the process crashed."""
    layer, threads = make_layer("int4", "d2", 250, 37), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in range(5):
            assert_close(Module(), layer, torch.float32, "zipf", signed=False)
    finally:
        torch.set_num_threads(threads)


def test_the_kernel_computed_it() -> None:
    """The comparisons above would hold as well if everything fell to torch."""
    for name, sizes in (("int5", (250, 37)), ("int4", (64, 96))):
        layer = with_biases(make_layer(name, "d2", *sizes), *sizes)
        routing = route(torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 1]), None, None)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            out = packed_linear(torch.ones(4, sizes[0], dtype=dtype), "gate_up_proj", layer, routing)
            assert out is not None
            assert (out.shape, out.dtype) == ((4, 2 * sizes[1]), dtype)
