"""The sort of rows for the GPU's experts against its torch reference and against what a tile promises."""

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton, here for its interpreter")

from polymoe.kernels.gpu.token_sort import SortedRows, max_tiles, sort_rows, sort_rows_torch

V, E = 3, 6
Tables = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_tables(generator: torch.Generator) -> Tables:
    """Strided views of `[V, 2, E]`, as a layer's slice is."""
    table = torch.randint(-2, 9, (V, 2, E), generator=generator, dtype=torch.int32)
    delta = torch.randint(-1, 4, (V, 2, E), generator=generator, dtype=torch.int32)
    sign = (torch.randint(0, 2, (V, 2, E), generator=generator) * 2 - 1).to(torch.int8)
    return table[:, 1], delta[:, 1], sign[:, 1]


def routing(kind: str, tokens: int, top_k: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.rand(tokens, E, generator=generator).topk(top_k).indices
    if kind == "one expert":
        index = torch.arange(top_k).expand(tokens, top_k).contiguous()
    variant = torch.randint(0, V, (tokens,), generator=generator).sort().values
    if kind == "one variant":
        variant.fill_(1)
    if kind == "padded":
        variant[tokens // 2 :] = -1
    return index, variant


def same(a: SortedRows, b: SortedRows) -> None:
    for name in ("order", "delta", "sign", "segment_stop", "tile_base", "tile_start", "tile_stop"):
        found, expected = getattr(a, name), getattr(b, name)
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.dtype == torch.int32
            torch.testing.assert_close(found, expected, msg=name)


@pytest.mark.parametrize("kind", ["spread", "one expert", "one variant", "padded"])
@pytest.mark.parametrize(("tokens", "top_k", "block_m"), [(1, 1, 16), (7, 3, 16), (40, 2, 16), (150, 2, 64)])
def test_sort_equals_reference(kind: str, tokens: int, top_k: int, block_m: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    table, delta, sign = make_tables(generator)
    index, variant = routing(kind, tokens, top_k, generator)
    for deltas in ((None, None), (delta, None), (delta, sign)):
        args = (index, variant, table, *deltas, block_m, V * E)
        same(sort_rows(*args), sort_rows_torch(*args))


def test_tiles_cover_every_row_once_and_hold_one_base() -> None:
    generator = torch.Generator().manual_seed(1)
    table, delta, sign = make_tables(generator)
    index, variant = routing("spread", 60, 2, generator)
    rows = sort_rows(index, variant, table, delta, sign, 16, V * E)
    assert sorted(rows.order.tolist()) == list(range(120))
    covered: list[int] = []
    for base, start, stop in zip(
        rows.tile_base.tolist(), rows.tile_start.tolist(), rows.tile_stop.tolist(), strict=True
    ):
        assert stop - start <= 16
        covered += range(start, stop)
        for r in range(start, stop):
            token, k = divmod(int(rows.order[r]), 2)
            entry = int(variant[token]), int(index[token, k])
            assert rows.delta is not None
            assert rows.sign is not None
            assert (base, int(rows.delta[r]), int(rows.sign[r])) == (
                int(table[entry]), int(delta[entry]), int(sign[entry]),
            )  # fmt: skip
            end = int(rows.segment_stop[r])
            assert r < end
            assert end == 120 or rows.delta[end] != rows.delta[r] or end not in range(start, stop)
    assert covered == list(range(120))


def test_max_tiles_is_enough_for_the_worst_spread() -> None:
    for rows in range(1, 70):
        for bases in range(1, 12):
            used = min(rows, bases)
            # all bases but one get one row more than fills tiles
            worst = max(
                sum(-(-count // 16) for count in (*(extra,) * (used - 1), rows - extra * (used - 1)))
                for extra in range(1, rows + 1)
                if rows - extra * (used - 1) >= 1
            )
            assert worst <= max_tiles(rows, 16, bases)
