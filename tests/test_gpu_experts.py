"""The GPU's experts, in Triton's interpreter, against each token's own decoded expert in float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton, here for its interpreter")

from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.packed_pool import ExactPool, PackedPool
from polymoe.kernels.gpu import experts as kernels
from polymoe.kernels.gpu.experts import ExpertMatrices, expert_matrices, supported, warm_up
from polymoe.quant.codec import decode, encode
from polymoe.quant.formats import BASE_FORMATS, get_format

experts_gpu: Any = kernels.experts_gpu  # their inputs are handed on with *, of a length that mypy does not know
experts_torch: Any = kernels.experts_torch
V, E, K = 3, 4, 2
Dense = dict[str, torch.Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASES = [fmt.name for fmt in BASE_FORMATS if fmt.name != "stored"]


class Experts(torch.nn.Module):
    """What the kernels ask of a stock experts module."""

    has_gate, is_transposed = True, False
    _apply_gate = _default_apply_gate

    def __init__(self) -> None:
        super().__init__()
        self.act_fn: torch.nn.Module = SiLUActivation()


@dataclass
class Case:
    layer: Any
    bases: list[Dense]  # by id, decoded
    deltas: list[Dense]
    width: int

    def matrices(self, dtype: torch.dtype) -> ExpertMatrices:
        return expert_matrices(self.layer, dtype)


def pool(experts: Sequence[Dense], name: str) -> tuple[PackedPool, list[Dense]]:
    fmt = get_format(name)
    parts = [{n: encode(t, fmt) for n, t in expert.items()} for expert in experts]
    shapes = {n: tuple(t.shape) for n, t in experts[0].items()}
    tensors = {n: {part: torch.stack([p[n][part] for p in parts]) for part in parts[0][n]} for n in parts[0]}
    dense = [{n: decode(p[n], fmt, shapes[n], torch.float32) for n in p} for p in parts]
    return PackedPool(fmt, {n: {k: t.to(DEVICE) for k, t in ts.items()} for n, ts in tensors.items()}, shapes), dense


def make_case(
    bases: Sequence[str], deltas: Sequence[str], width: int, inner: int, bias: bool = False, dtype: Any = torch.float32
) -> Case:
    """Two experts in each of the `bases` formats, three in each of the `deltas`."""
    generator = torch.Generator().manual_seed(width + inner)

    def expert(size: float) -> Dense:
        made = {
            "gate_up_proj": size * torch.randn(2 * inner, width, generator=generator) * width**-0.5,
            "down_proj": size * torch.randn(width, inner, generator=generator) * inner**-0.5,
        }
        if bias:
            made["gate_up_proj_bias"] = size * torch.randn(2 * inner, generator=generator)
            made["down_proj_bias"] = size * torch.randn(width, generator=generator)
        return made

    dense_bases: list[Dense] = []
    num_stored = 2 if "stored" in bases else 0
    made = [expert(1.0) for _ in range(num_stored)]
    stored = {n: torch.stack([e[n] for e in made]).to(DEVICE, dtype) for n in made[0]} if made else {}
    dense_bases += [{n: t[e].float().cpu() for n, t in stored.items()} for e in range(num_stored)]
    packed, packed_deltas, dense_deltas = [], [], []
    for name in bases:
        if name != "stored":
            found, dense = pool([expert(1.0), expert(1.0)], name)
            packed.append(found)
            dense_bases += dense
    for name in deltas:
        found, dense = pool([expert(0.5) for _ in range(3)], name)
        packed_deltas.append(found)
        dense_deltas += dense
    layer = CompressedLayer(stored, tuple(packed), tuple(packed_deltas)) if packed or packed_deltas else stored
    return Case(layer, dense_bases, dense_deltas, width)


def expected(case: Case, x: torch.Tensor, inputs: tuple[Any, ...]) -> torch.Tensor:
    index, weight, variant, table, delta, sign = inputs
    out = torch.zeros(len(x), case.width)
    for t, k in torch.ones_like(index).nonzero().tolist():
        entry = int(variant[t]), int(index[t, k])
        if table[entry] < 0:
            continue
        own = dict(case.bases[int(table[entry])])
        if delta is not None and delta[entry] >= 0:
            own = {n: w + int(sign[entry]) * case.deltas[int(delta[entry])][n] for n, w in own.items()}
        z = own["gate_up_proj"] @ x[t].float() + own.get("gate_up_proj_bias", 0)
        gate, up = z.chunk(2)
        down = own["down_proj"] @ (torch.nn.functional.silu(gate) * up) + own.get("down_proj_bias", 0)
        out[t] += weight[t, k] * down
    return out


def traffic(case: Case, kind: str, tokens: int, seed: int = 0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, E, generator=generator).topk(K).indices
    if kind == "one expert":
        index = torch.tensor([2, 0]).expand(tokens, K).contiguous()
    present = torch.tensor({"spread": [0, 1, 2], "one expert": [0, 2], "one variant": [1]}[kind])
    variant = present[torch.randint(0, len(present), (tokens,), generator=generator)].sort().values
    table = torch.randint(0, len(case.bases), (V, E), generator=generator, dtype=torch.int32)
    weight = torch.rand(tokens, K, generator=generator)
    if not case.deltas:
        return index, weight, variant, table, None, None
    table = table[0].expand(V, E).contiguous()  # variants share bases, so tiles mix deltas
    delta = torch.randint(-1, len(case.deltas), (V, E), generator=generator, dtype=torch.int32)
    sign = (torch.randint(0, 2, (V, E), generator=generator) * 2 - 1).to(torch.int8)
    return index, weight, variant, table, delta, sign


def check(case: Case, kind: str, tokens: int, dtype: torch.dtype = torch.float32, tolerance: float = 1e-4) -> None:
    inputs = traffic(case, kind, tokens)
    x = torch.randn(tokens, case.width, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    want = expected(case, x, inputs)
    on_device = [None if t is None else t.to(DEVICE) for t in inputs]
    found = experts_gpu(x.to(DEVICE), *on_device, case.matrices(x.dtype), num_absent=0)
    assert found.dtype == dtype
    error = (found.float().cpu() - want).norm() / want.norm()
    assert error < tolerance, error


@pytest.mark.parametrize("kind", ["spread", "one expert", "one variant"])
@pytest.mark.parametrize("tokens", [1, 21])
def test_stored(kind: str, tokens: int) -> None:
    check(make_case(["stored"], [], 72, 40), kind, tokens)


def test_stored_in_prefill_tiles() -> None:
    check(make_case(["stored"], [], 128, 128, bias=True), "one expert", 150)


def test_stored_in_half_precision() -> None:
    check(make_case(["stored"], [], 128, 64, dtype=torch.float16), "spread", 9, torch.float16, 3e-3)


@pytest.mark.parametrize("base", BASES)
def test_packed_base(base: str) -> None:
    """Inputs of a whole chunk and a rest (320 = 256 + 64), and of one short group (192)."""
    check(make_case([base], [], 320, 192), "spread", 5)


@pytest.mark.parametrize("inner", [384, 100])
@pytest.mark.parametrize("base", BASES)
def test_packed_base_with_odd_groups(base: str, inner: int) -> None:
    """384 inputs are two groups of 192, which no chunk of 256 divides; 100 are no whole block of any plane."""
    check(make_case([base], [], 64, inner), "one expert", 3)


@pytest.mark.parametrize("base", ["stored", "int4"])
@pytest.mark.parametrize("delta", ["d1", "d2", "d3", "d4", "d5"])
def test_deltas_of_both_signs(delta: str, base: str) -> None:
    check(make_case([base], [delta], 256, 64), "spread", 12)


@pytest.mark.parametrize("kind", ["spread", "one expert", "one variant"])
def test_pools_of_many_formats_with_biases(kind: str) -> None:
    check(make_case(["stored", "int8", "int3"], ["d1", "d3"], 128, 64, bias=True), kind, 19)


def test_packed_in_half_precision() -> None:
    check(make_case(["fp8", "int6"], ["d2"], 256, 64), "spread", 9, torch.float16, 5e-3)


def test_absent_experts_contribute_nothing() -> None:
    case = make_case(["stored"], ["d2"], 64, 64)
    index, weight, variant, table, delta, sign = traffic(case, "spread", 17)
    table[:, 1] = torch.tensor([-1, -2, -1])
    delta[:, 1] = -1
    x = torch.randn(17, 64)
    inputs = (index, weight, variant, table, delta, sign)
    found = experts_gpu(x.to(DEVICE), *(t.to(DEVICE) for t in inputs), case.matrices(x.dtype))
    torch.testing.assert_close(found.cpu(), expected(case, x, inputs), atol=1e-4, rtol=1e-4)


def test_padding_gives_zeros() -> None:
    """A graph for 20 tokens serves 12; what the padding's rows hold does not matter."""
    case = make_case(["int8"], ["d2"], 64, 64)
    index, weight, variant, *tables = (t.to(DEVICE) for t in traffic(case, "spread", 20))
    variant[12:] = -1
    x = torch.randn(20, 64, device=DEVICE)
    expected = experts_gpu(x[:12], index[:12], weight[:12], variant[:12], *tables, case.matrices(x.dtype))
    x[12:] = float("nan")
    found = experts_gpu(x, index, weight, variant, *tables, case.matrices(x.dtype), num_absent=0)
    torch.testing.assert_close(found[:12], expected)
    assert not found[12:].any()


def test_reference_equals_kernels_over_skewed_traffic() -> None:
    case = make_case(["stored", "int5"], ["d1", "d4"], 64, 64)
    for seed, kind in enumerate(["spread", "one expert", "one variant"]):
        inputs = [t.to(DEVICE) for t in traffic(case, kind, 13, seed)]
        x = torch.randn(13, 64, device=DEVICE)
        args = (x, *inputs, case.matrices(x.dtype))
        torch.testing.assert_close(experts_gpu(*args), experts_torch(*args), atol=1e-4, rtol=1e-4)


def test_the_same_batch_gives_the_same_bits() -> None:
    case = make_case(["int4"], ["d2"], 64, 64)
    inputs = [t.to(DEVICE) for t in traffic(case, "spread", 9)]
    x = torch.randn(9, 64, device=DEVICE)
    first, second = (experts_gpu(x, *inputs, case.matrices(x.dtype)) for _ in range(2))
    assert torch.equal(first, second)


def test_supported() -> None:
    case = make_case(["stored"], ["d1"], 64, 64)
    module = Experts()
    assert supported(module, case.layer)
    assert supported(module, CompressedLayer(case.layer.stored, (), (ExactPool({"down_proj": {}}),)))
    assert not supported(module, CompressedLayer(case.layer.stored, (), (ExactPool({"down_proj_bias": {}}),)))
    module.is_transposed = True
    assert not supported(module, case.layer)
    assert supported(module, make_case(["int8"], ["d1"], 64, 64).layer)
    other = Experts()
    other.act_fn = torch.nn.GELU()
    assert not supported(other, case.layer)


def test_warm_up_runs_every_size() -> None:
    case = make_case(["stored"], ["d1"], 64, 64)
    *_, table, delta, sign = (t.to(DEVICE) for t in traffic(case, "spread", 1))
    warm_up(Experts(), case.layer, table, delta, sign, [1, 3], torch.float32, K)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("base", ["stored", *BASES])
def test_bfloat16_on_the_gpu(base: str) -> None:
    """The paths that the interpreter has no words for: PTX for the codes, and both kinds of matrix instructions."""
    for delta in ([], ["d1"], ["d2"], ["d3"], ["d4"], ["d5"]):
        case = make_case([base], delta, 1408, 768, bias=True, dtype=torch.bfloat16)
        for tokens in (3, 400):
            check(case, "spread", tokens, torch.bfloat16, 1e-2)


@needs_gpu
@pytest.mark.gpu
def test_a_captured_graph_serves_every_mix() -> None:
    case = make_case(["int4"], ["d2"], 256, 256)
    inputs = [t.to(DEVICE) for t in traffic(case, "spread", 16)]
    x = torch.randn(16, 256, device=DEVICE, dtype=torch.bfloat16)
    args = (x, *inputs, case.matrices(x.dtype))
    experts_gpu(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts_gpu(*args)
    for seed, kind in enumerate(["one expert", "one variant", "spread"]):
        for tensor, value in zip(inputs, traffic(case, kind, 16, seed), strict=True):
            tensor.copy_(value)
        x.normal_()
        graph.replay()
        assert torch.equal(out, experts_gpu(*args))
