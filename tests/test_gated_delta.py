"""The compiled step of the gated delta rule, against its equation and against stock transformers."""

from typing import Any

import pytest
import torch
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import torch_recurrent_gated_delta_rule

from polymoe.kernels.cpu.gated_delta import fast_gated_delta_step, gated_delta_step, is_fast_gated_delta
from polymoe.native.library import cpu_kernels

needs_kernels = pytest.mark.skipif(cpu_kernels() is None, reason="no compiled kernels here")


def made(batch: int, heads: int, groups: int, keys: int, values: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "state": noise(batch, heads, keys, values),
        "query": noise(batch, groups, keys),
        "key": noise(batch, groups, keys),
        "value": noise(batch, heads, values),
        "gate": -noise(batch, heads).abs(),
        "beta": noise(batch, heads).sigmoid(),
    }


@needs_kernels
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 8, 16), (3, 6, 2, 24, 80), (7, 4, 4, 64, 64)], ids=["least", "odd", "square"]
)
def test_kernel_and_reference_agree(sizes: tuple[int, ...], normalise: bool) -> None:
    one, other = made(*sizes), made(*sizes)
    assert is_fast_gated_delta(one["state"])
    out, expected = fast_gated_delta_step(**one, normalise=normalise), gated_delta_step(**other, normalise=normalise)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one["state"], other["state"], atol=1e-5, rtol=1e-5)


def test_reference_is_what_transformers_computes() -> None:
    given = made(3, 6, 2, 24, 80)
    expected, state = torch_recurrent_gated_delta_rule(
        *(given[name][:, None] for name in ("query", "key", "value")), g=given["gate"][:, None],
        beta=given["beta"][:, None], initial_state=given["state"].clone(), output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    out = gated_delta_step(**given, normalise=True)
    torch.testing.assert_close(out, expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given["state"], state, atol=1e-5, rtol=1e-5)


def test_other_states_are_not_the_kernels() -> None:
    assert not is_fast_gated_delta(torch.zeros(1, 2, 8, 12))  # no multiple of 16 values
    assert not is_fast_gated_delta(torch.zeros(1, 2, 8, 16, dtype=torch.bfloat16))
    assert not is_fast_gated_delta(torch.zeros(1, 2, 16, 8).transpose(2, 3))
