"""Weights to the device: through pinned buffers or directly, the same bytes arrive."""

import pytest
import torch

from polymoe.model.transfer.staging import Staging


@pytest.mark.parametrize("nbytes", [4, 60, 64, 1 << 20])
@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
     (torch.uint8, torch.uint8), (torch.float8_e4m3fn, torch.float8_e4m3fn)],
)  # fmt: skip
def test_buffers_change_nothing(nbytes: int, stored: torch.dtype, computed: torch.dtype) -> None:
    staging = Staging(torch.device("cpu"), nbytes=nbytes, always=True)
    for shape in ((7, 3), (1,), (5, 2, 2), ()):
        source = (torch.rand(shape) * 100).to(stored)
        target = torch.zeros(shape).to(computed)
        staging.copy(target, source)
        assert torch.equal(target.float(), source.to(computed).float())


def test_a_smaller_vocabulary_is_padded() -> None:
    staging = Staging(torch.device("cpu"), nbytes=8, always=True)
    target = torch.full((4, 3), 9.0)
    staging.copy(target, torch.ones(2, 3))
    assert target.tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2


def test_views_are_copied_too() -> None:
    staging = Staging(torch.device("cpu"), nbytes=8, always=True)
    source, target = torch.rand(4, 6), torch.zeros(6, 4)
    staging.copy(target, source.t())
    assert torch.equal(target, source.t())
