"""The variant-segmented linear, in Triton's interpreter, against one product a run."""

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton, here for its interpreter")

from polymoe.kernels.gpu.segmented_linear import segmented_linear, segmented_linear_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("counts", "rows"),
    [
        ([1], [0]),
        ([3, 0, 5, 1], [2, -1, 0, 2]),  # an unloaded variant, and two that share a row
        ([0, 0, 40, 0], [0, 1, 2, 3]),  # one variant only
        ([17, 16, 1, 33, 2], [4, 3, 2, 1, 0]),
        ([200, 3], [1, 0]),
    ],
)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (100, 33)])
def test_against_reference(counts: list[int], rows: list[int], inputs: int, outputs: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts), inputs, generator=generator).to(DEVICE)
    stack = torch.randn(5, outputs, inputs, generator=generator).to(DEVICE)
    own = torch.randn(5, outputs, generator=generator).to(DEVICE) if bias else None
    run_row = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, *counts], dtype=torch.int32, device=DEVICE).cumsum(0).int()
    args = (x, stack, own, run_row, starts)
    torch.testing.assert_close(segmented_linear(*args), segmented_linear_torch(*args), atol=1e-4, rtol=1e-4)


def test_rows_behind_the_last_run_cost_nothing() -> None:
    """A graph captured for 32 rows serves 5: the others are padding that no run holds."""
    x, stack = torch.randn(32, 64, device=DEVICE), torch.randn(2, 16, 64, device=DEVICE)
    run_row = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)
    found = segmented_linear(x, stack, None, run_row, starts)
    expected = segmented_linear_torch(x[:5], stack, None, run_row, starts)
    torch.testing.assert_close(found[:5], expected, atol=1e-4, rtol=1e-4)


def test_a_strided_input_in_half_precision() -> None:
    x = torch.randn(9, 2, 64, device=DEVICE).half()[:, 1]
    stack = torch.randn(2, 32, 64, device=DEVICE).half()
    run_row = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    found = segmented_linear(x, stack, None, run_row, starts)
    expected = segmented_linear_torch(x.float(), stack.float(), None, run_row, starts)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
