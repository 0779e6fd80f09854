"""The compiled attention kernel against attention in float64 on the gathered keys and values."""

import pytest
import torch

from polymoe.kernels.cpu.paged_attention import paged_attention, why_not_attention
from polymoe.native.library import cpu_kernels

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="the CPU kernels are not built or cannot run here")


@pytest.mark.parametrize("lens", [[1], [16, 1, 17, 33, 5], [200, 3]])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (8, 2), (6, 2), (5, 1), (16, 4)])
@pytest.mark.parametrize(("dim", "value_dim"), [(32, 32), (64, 64), (96, 48), (128, 128)])
@pytest.mark.parametrize("window", [None, 7])
def test_against_float64(
    lens: list[int], q_heads: int, kv_heads: int, dim: int, value_dim: int, window: int | None
) -> None:
    generator = torch.Generator().manual_seed(len(lens))
    block_size, width = 16, (max(lens) + 15) // 16
    num_blocks = len(lens) * width + 3
    key = torch.randn(num_blocks, block_size, kv_heads, dim, generator=generator).to(torch.bfloat16)
    value = torch.randn(num_blocks, block_size, kv_heads, value_dim, generator=generator).to(torch.bfloat16)
    table = torch.randperm(num_blocks, generator=generator)[: len(lens) * width].view(len(lens), width)
    # The last tokens of each sequence are queries, as in a prompt; each sees what stands before it.
    tokens = [(i, seen) for i, length in enumerate(lens) for seen in range(max(1, length - 2), length + 1)]
    sequence, visible = torch.tensor(tokens).t().contiguous()
    query = torch.randn(len(tokens), q_heads, dim, generator=generator).to(torch.bfloat16)
    for i, length in enumerate(lens):  # what lies behind the end must not matter
        for t in range(length, width * block_size):
            key[table[i, t // block_size], t % block_size] = float("nan")
            value[table[i, t // block_size], t % block_size] = float("nan")
    out = paged_attention(query, key, value, table, sequence, visible, 0.3, window)
    for n, (i, seen) in enumerate(tokens):
        first = max(0, seen - window) if window else 0
        k = key[table[i]].flatten(0, 1)[first:seen].double()
        v = value[table[i]].flatten(0, 1)[first:seen].double()
        for head in range(q_heads):
            shared = head // (q_heads // kv_heads)
            weights = torch.softmax(0.3 * (k[:, shared] @ query[n, head].double()), dim=0)
            torch.testing.assert_close(out[n, head].double(), weights @ v[:, shared], atol=4e-3, rtol=8e-3)


def test_a_bias_and_a_later_start() -> None:
    """A decoder's own tokens stand behind its encoder's in the same blocks, and have a bias by distance."""
    generator = torch.Generator().manual_seed(0)
    starts, stops, heads, dim, block_size = [0, 5, 16, 21], [1, 40, 33, 22], 3, 32, 16
    key, value = torch.randn(2, 12, block_size, heads, dim, generator=generator).to(torch.bfloat16)
    table = torch.randperm(12, generator=generator).view(4, 3)
    query = torch.randn(4, heads, dim, generator=generator).to(torch.bfloat16)
    bias = torch.randn(4, heads, 37, generator=generator)
    start, stop = torch.tensor(starts), torch.tensor(stops)
    out = paged_attention(query, key, value, table, torch.arange(4), stop, 1.0, None, start, bias)
    for n, (first, last) in enumerate(zip(starts, stops, strict=True)):
        k, v = (side[table[n]].flatten(0, 1)[first:last].double() for side in (key, value))
        scores = torch.einsum("hd,thd->ht", query[n].double(), k) + bias[n, :, : last - first]
        expected = torch.einsum("ht,thd->hd", torch.softmax(scores, dim=-1), v)
        torch.testing.assert_close(out[n].double(), expected, atol=8e-3, rtol=8e-3)


def test_very_large_and_equal_scores() -> None:
    key = torch.zeros(1, 16, 1, 32, dtype=torch.bfloat16)
    key[0, 3] = 1000.0
    value = torch.arange(16.0).repeat_interleave(32).view(1, 16, 1, 32).to(torch.bfloat16)
    query = torch.ones(1, 1, 32, dtype=torch.bfloat16)
    table, first, lens = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0]), torch.tensor([16])
    out = paged_attention(query, key, value, table, first, lens, 1.0, None)
    assert (out == 3.0).all()
    out = paged_attention(query, torch.zeros_like(key), value, table, first, lens, 1.0, None)
    torch.testing.assert_close(out.float(), torch.full((1, 1, 32), 7.5))


def test_other_dtypes_and_sizes_are_left_to_torch() -> None:
    assert why_not_attention(torch.float32, 32, 32)
    assert why_not_attention(torch.bfloat16, 24, 24)
