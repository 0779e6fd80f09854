"""Paged attention, in Triton's interpreter, against its float32 reference; what no sequence owns is NaN."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton, here for its interpreter")

from polymoe.kernels.gpu.paged_attention import paged_attention, paged_attention_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(
    query_lens: list[int], seq_lens: list[int], heads: tuple[int, int], dims: tuple[int, int], block_size: int = 16,
    max_blocks: int = 24, dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    generator = torch.Generator().manual_seed(sum(seq_lens))
    blocks = sum(-(-n // block_size) for n in seq_lens) + 1
    key = torch.randn(blocks, block_size, heads[1], dims[0], generator=generator)
    value = torch.randn(blocks, block_size, heads[1], dims[1], generator=generator)
    free = (torch.randperm(blocks - 1, generator=generator) + 1).tolist()
    table = torch.zeros(len(seq_lens), max_blocks, dtype=torch.int64)
    owned = torch.zeros(blocks, block_size, dtype=torch.bool)
    for i, length in enumerate(seq_lens):
        for b in range(-(-length // block_size)):
            table[i, b] = free.pop()
            owned[table[i, b], : length - b * block_size] = True
    key[~owned], value[~owned] = float("nan"), float("nan")
    query = torch.randn(heads[0], sum(query_lens), dims[0], generator=generator).transpose(0, 1)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return tuple(
        t.to(DEVICE, dtype) if t.is_floating_point() else t.to(DEVICE) for t in (query, key, value, table, starts, lens)
    )


def check(args: tuple[torch.Tensor, ...], tolerance: float = 1e-4, **options: Any) -> torch.Tensor:
    lens = args[4].diff()
    options = {"max_query_len": int(lens.max()), "scaling": 0.3, **options}
    found, expected = paged_attention(*args, **options), paged_attention_torch(*args, **options)
    assert found.dtype == args[0].dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    return found


OPTIONS: list[dict[str, Any]] = [{}, {"window": 20}, {"softcap": 2.0}, {"window": 7, "softcap": 5.0}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sinks", [0, 1, 2])
def test_decode_with_splits(options: dict[str, Any], sinks: int) -> None:
    """Lengths of one key, of whole steps and of odd ones; the longest needs several splits."""
    args = make([1, 1, 1], [1, 128, 301], (6, 2), (32, 16))
    shape = {1: (6,), 2: (3, 6)}.get(sinks)
    check(args, sinks=None if shape is None else torch.randn(shape, device=DEVICE), **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sinks", [0, 2])
def test_prefill_and_decode_together(options: dict[str, Any], sinks: int) -> None:
    """A whole prompt, a chunk at a sequence's end, one token, and a sequence that takes no part."""
    args = make([33, 5, 1, 0, 2], [33, 70, 90, 12, 2], (4, 2), (16, 16))
    check(args, sinks=torch.randn(41, 4, device=DEVICE) if sinks else None, **options)


@pytest.mark.parametrize(("heads", "dims"), [((3, 1), (24, 40)), ((8, 8), (64, 64)), ((20, 1), (16, 16))])
def test_head_shapes(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    check(make([1, 1], [40, 9], heads, dims, block_size=8))
    check(make([17, 3], [40, 9], heads, dims, block_size=8))


def test_many_rows_fill_several_tiles() -> None:
    check(make([150, 1, 140], [200, 31, 140], (4, 1), (16, 16)), window=50)


def test_padding_of_a_graph_gives_zeros() -> None:
    args = make([1, 1, 1], [20, 7, 5], (4, 2), (16, 16))
    args[5][1:] = 0
    found = check(args)
    assert not found[1:].any()


def test_half_precision_and_a_table_of_int32() -> None:
    args = make([1, 1], [150, 260], (8, 2), (32, 32), dtype=torch.float16)
    check((*args[:3], args[3].int(), *args[4:]), tolerance=3e-3)
