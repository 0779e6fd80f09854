"""The compiled kernel against the reference, over skewed groups. Runs wherever the kernel was built."""

import itertools

import pytest
import torch

from polymoe.kernels.cpu.grouped_linear import grouped_linear, grouped_linear_by_loop
from polymoe.native.library import cpu_kernels


def case(
    counts: list[int], inputs: int, outputs: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), inputs, generator=generator)
    stack = torch.randn(len(counts) + 2, outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(len(counts) + 2, outputs, generator=generator)
    return x, stack, bias


@pytest.mark.parametrize("counts", [[1], [8], [31], [1, 1, 1, 1], [0, 5, 0, 3], [7, 1, 16, 2], [30, 1, 1], [9] * 12])
# More inputs than 2048 and 4096: fewer rows a pass, and weights that are fetched less far ahead.
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 16), (96, 33), (1024, 100), (64, 7), (3072, 40), (4128, 37)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float32(counts: list[int], inputs: int, outputs: int, with_bias: bool, dtype: torch.dtype) -> None:
    """In bfloat16 within its rounding of the float32 result of the same (rounded) inputs."""
    x, stack, bias = (t.to(dtype) for t in case(counts, inputs, outputs))
    ids = list(reversed(range(len(counts))))  # not in order, and the last rows of the stack unused
    starts = [0, *itertools.accumulate(counts)]
    expected = grouped_linear_by_loop(x.float(), stack.float(), ids, starts, bias.float() if with_bias else None)
    for function in (grouped_linear, grouped_linear_by_loop):
        out = function(x, stack, ids, starts, bias if with_bias else None)
        assert out.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(cpu_kernels() is None, reason="the CPU kernels are not built or cannot run here")
def test_the_kernel_rounds_to_nearest_and_keeps_nan() -> None:
    x, stack, _ = (t.to(torch.bfloat16) for t in case([8, 8], 64, 48))
    exact = grouped_linear_by_loop(x.double(), stack.double(), [0, 1], [0, 8, 16])
    out = grouped_linear(x, stack, [0, 1], [0, 8, 16]).double()
    assert ((out - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()  # half a unit in the last of 8 bits
    x[3, 5] = float("nan")
    out = grouped_linear(x, stack, [0, 1], [0, 8, 16])
    assert out[3].isnan().all()
    assert not out[[0, 1, 2, 4, 9]].isnan().any()


def test_offsets_that_do_not_cover_the_rows_are_an_error() -> None:
    x, stack, _ = case([2, 2], 32, 8)
    with pytest.raises(AssertionError):
        grouped_linear(x, stack, [0, 1], [0, 2, 3])
