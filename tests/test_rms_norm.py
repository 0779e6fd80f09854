"""The fused norm against the stock modules it stands for, and what it must leave alone."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from polymoe.kernels.cpu.rms_norm import fast_rms_norm, rms_norm, why_not_fast_norm
from polymoe.model.backends.choose import choose_backend
from polymoe.model.backends.context import ForwardContext
from polymoe.model.backends.reference import ReferenceBackend
from polymoe.model.batch.batch import ForwardBatch, RowMap, segments_from_variants
from polymoe.model.stock.fused_norm import _FusedNorm, fuse_norms
from polymoe.model.variants.variant_stack import VariantStack
from polymoe.native.library import cpu_kernels

needs_kernels = pytest.mark.skipif(cpu_kernels() is None, reason="the CPU kernels are not built or cannot run here")


@needs_kernels
@pytest.mark.parametrize(("rows", "width", "repeat"), [(1, 16, 1), (7, 1024, 1), (40, 64, 8), (300, 192, 1)])
def test_the_kernel_matches_the_formula(rows: int, width: int, repeat: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = (5 * torch.randn(rows, width, generator=generator)).bfloat16()
    weights = torch.randn(3, width, generator=generator).bfloat16()
    weight_of = torch.randint(3, (rows // repeat,), generator=generator)
    out = fast_rms_norm(x, weights, weight_of, repeat, 1e-5)
    want = torch.cat([rms_norm(x[i : i + 1], weights[weight_of[i // repeat]], 1e-5) for i in range(rows)])
    # The order of the sum differs, so a value may round to its neighbour; few do.
    assert torch.allclose(out.float(), want.float(), rtol=2**-6, atol=1e-6)
    assert (out != want).float().mean() < 0.02


def test_what_the_kernel_does_not_do_has_a_reason() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert why_not_fast_norm(dtype, 24)
        x, weights = torch.full((2, 24), 3.0, dtype=dtype), torch.ones(1, 24, dtype=dtype)
        found = choose_backend(torch.device("cpu"), dtype).rms_norm(x, weights, None, 1e-5)
        assert torch.equal(found, rms_norm(x, weights[0], 1e-5))


def test_only_norms_that_compute_the_formula_are_fused() -> None:
    """Gemma's norm multiplies by 1 + weight, LayerNorm subtracts a mean: both have an epsilon and a weight."""
    model = torch.nn.ModuleList([MixtralRMSNorm(32), Gemma2RMSNorm(32), torch.nn.LayerNorm(32), torch.nn.Linear(4, 4)])
    assert fuse_norms(model, ReferenceBackend()) == 1
    assert isinstance(model[0].forward, _FusedNorm)
    assert not isinstance(model[1].forward, _FusedNorm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[5, 0, 0], [2, 0, 3], [1, 1, 1], [0, 4, 0]])
def test_each_token_meets_its_own_variants_weight(dtype: torch.dtype, counts: list[int]) -> None:
    backend = choose_backend(torch.device("cpu"), dtype)
    context = ForwardContext(backend)
    segments = segments_from_variants([0, 1, 2], counts)
    context.set(ForwardBatch(tokens=segments, sampled=segments))
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 32, generator=generator).to(dtype)
    for shape in ((1, sum(counts), 32), (1, sum(counts), 4, 32)):
        norm = MixtralRMSNorm(32)
        norm._parameters.pop("weight")
        norm.weight = VariantStack(rows, RowMap([2, 0, 1]), context, {3: 1, 4: 1})  # type: ignore[assignment]
        x = torch.randn(*shape, generator=generator).to(dtype)
        want = norm(x)
        assert fuse_norms(torch.nn.ModuleList([norm]), backend) == 1
        assert torch.allclose(norm(x).float(), want.float(), rtol=2**-6, atol=1e-6)
