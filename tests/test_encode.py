"""The compiled encoder of weights against torch's, format by format."""

import pytest
import torch

from polymoe.native.library import cpu_kernels
from polymoe.quant import codec
from polymoe.quant.formats import get_format

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="the CPU kernels are not built or cannot run here")


@pytest.mark.parametrize("name", ["int8", "int6", "int5", "int4", "int3", "d1", "d2", "d3", "d4", "d5"])
@pytest.mark.parametrize("shape", [(7, 64), (5, 192), (9, 384), (4, 1000), (3, 33), (2, 1), (16, 4096)])
def test_as_torch_encodes(name: str, shape: tuple[int, int]) -> None:
    """The same codes, but where a scale lies between two bfloat16 neighbours; rows of zeros and short groups too."""
    fmt = get_format(name)
    assert isinstance(fmt, codec.Coded)
    generator = torch.Generator().manual_seed(shape[1])
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
    weight[0, :64] = 0
    fast, plain = fmt.encode_fast(weight), fmt.encode_plain(weight)
    assert fast is not None
    assert {part: (t.dtype, t.shape) for part, t in fast.items()} == {p: (t.dtype, t.shape) for p, t in plain.items()}
    assert (fast["scales"] != plain["scales"]).sum() <= 0.01 * plain["scales"].numel()
    assert (fast["codes"] != plain["codes"]).sum() <= 0.02 * plain["codes"].numel()
    errors = [
        float((weight - codec.decode(encoded, fmt, shape, torch.float32)).square().sum()) for encoded in (fast, plain)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3, abs=1e-9)
