"""Packed non-experts on a GPU, in Triton's interpreter, against products with the whole matrices."""

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton, here for its interpreter")

from polymoe.kernels.gpu.packed_linear import packed_linear_gpu, packed_linear_torch
from test_packed_nonexperts import WAYS, rows_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("way", WAYS)
def test_against_the_whole_matrices(way: tuple[str, str]) -> None:
    """Skewed traffic, a variant that is not loaded, and padding at the end."""
    weight, versions = rows_of(way, 3, (64, 128), DEVICE)
    variant = torch.tensor([0] * 20 + [2, 2, 3, 3, 3, -1, -1])
    row = torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    x = torch.randn(len(variant), 128, generator=torch.Generator().manual_seed(0))
    whole = torch.stack([x[i] @ versions[row[v]].T for i, v in enumerate(variant.tolist()) if v >= 0])
    for product in (packed_linear_gpu, packed_linear_torch):
        found = product(x.to(DEVICE), weight, variant.to(DEVICE), row.to(DEVICE))
        torch.testing.assert_close(found[: len(whole)].cpu(), whole, atol=2e-3, rtol=2e-3)
