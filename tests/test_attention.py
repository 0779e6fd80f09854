"""`attend` and `PagedAttention` against attention written out in float64, one query and one head at a time."""

import itertools
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polymoe.errors import UnsupportedModelError
from polymoe.model.attention.paged import AttentionLayer, KVCache, PagedAttention, check_attention_arguments
from polymoe.model.backends.context import ForwardContext
from polymoe.model.backends.reference_attention import attend
from polymoe.model.batch.batch import AttentionBatch, ForwardBatch, RowMap, segments_from_variants
from polymoe.model.variants.variant_stack import VariantStack


def naive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """`query [n, Hq, D]` at the end of `key [L, Hk, D]`, `value [L, Hk, Dv]`, `sinks [Hq]` -> `[n, Hq, Dv]` float64."""
    query, key, value = query.double(), key.double(), value.double()
    n, heads, _ = query.shape
    length, kv_heads, value_dim = value.shape
    out = torch.zeros(n, heads, value_dim, dtype=torch.float64)
    for i, head in itertools.product(range(n), range(heads)):
        position, kv_head = length - n + i, head // (heads // kv_heads)
        first = 0 if window is None else max(0, position - window + 1)
        scores = [float(query[i, head] @ key[j, kv_head]) * scaling for j in range(first, position + 1)]
        if softcap is not None:
            scores = [softcap * math.tanh(score / softcap) for score in scores]
        total = sum(math.exp(score) for score in scores) + (0.0 if sinks is None else math.exp(float(sinks[head])))
        for j, score in enumerate(scores, start=first):
            out[i, head] += math.exp(score) / total * value[j, kv_head]
    return out


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"), [(4, 4, 8, 8), (6, 2, 8, 8), (4, 1, 8, 12), (3, 3, 12, 5)]
)
def test_attend(
    heads: int, kv_heads: int, dim: int, value_dim: int, window: int | None, with_sinks: bool, softcap: float | None
) -> None:
    torch.manual_seed(0)
    n, length = 4, 11
    query, key = torch.randn(2, n, heads, dim), torch.randn(2, length, kv_heads, dim)
    value, sinks = torch.randn(2, length, kv_heads, value_dim), torch.randn(heads) if with_sinks else None
    keys, queries = torch.arange(length), torch.arange(length - n, length)[:, None]
    visible = (keys <= queries) & (keys > queries - (window or length))
    got = attend(
        query.transpose(1, 2), key, value, visible.expand(2, n, length), scaling=0.7, softcap=softcap,
        sinks=None if sinks is None else sinks[None, :, None].expand(2, heads, n),
    )  # fmt: skip
    for b in range(2):
        want = naive(query[b], key[b], value[b], scaling=0.7, window=window, sinks=sinks, softcap=softcap)
        torch.testing.assert_close(got[b].transpose(0, 1).double(), want, rtol=1e-5, atol=1e-5)


class Simulation:
    """Sequences that grow in a paged cache with shuffled blocks; every step is compared with `naive`."""

    def __init__(self, layer: AttentionLayer, heads: int, block_size: int = 3, num_variants: int = 2) -> None:
        self.layer, self.heads, self.num_variants = layer, heads, num_variants
        self.cache = KVCache({7: layer}, 60, block_size, torch.device("cpu"), torch.float32)
        for side in (self.cache.key, self.cache.value):
            side[7].fill_(float("nan"))  # what a sequence did not write itself must never reach it
        self.free = random.Random(0).sample(range(60), 60)
        self.context = ForwardContext()
        self.attention = PagedAttention(self.context, self.cache)
        self.blocks: dict[int, list[int]] = {}
        self.past: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def step(self, counts: dict[int, int], sinks: Any = None, **options: Any) -> None:
        """`counts`: sequence -> its new tokens; sequence s is of variant s modulo the number of variants."""
        order = sorted(counts, key=lambda s: s % self.num_variants)
        size, layer, total = self.cache.block_size, self.layer, sum(counts.values())
        query = torch.randn(total, self.heads, layer.key_dim)
        key, value = (
            torch.randn(total, layer.kv_heads, layer.key_dim),
            torch.randn(total, layer.kv_heads, layer.value_dim),
        )
        starts, lens, slots = [0], [], []
        for s in order:
            first = len(self.past[s][0]) if s in self.past else 0
            lens.append(first + counts[s])
            table = self.blocks.setdefault(s, [])
            while len(table) * size < lens[-1]:
                table.append(self.free.pop())
            slots += [table[p // size] * size + p % size for p in range(first, lens[-1])]
            rows = slice(starts[-1], starts[-1] + counts[s])
            old = self.past.get(s, (key[:0], value[:0]))
            self.past[s] = torch.cat([old[0], key[rows]]), torch.cat([old[1], value[rows]])
            starts.append(rows.stop)
        block_table = torch.zeros(len(order), max(len(self.blocks[s]) for s in order), dtype=torch.int64)
        for i, s in enumerate(order):
            block_table[i, : len(self.blocks[s])] = torch.tensor(self.blocks[s])
        batch = AttentionBatch(
            query_start_loc=starts,
            seq_lens=lens,
            block_table=block_table,
            slot_mapping=torch.tensor(slots),
            token_sequence=torch.tensor([i for i, s in enumerate(order) for _ in range(counts[s])]),
            token_visible=torch.tensor(
                [n for i, s in enumerate(order) for n in range(lens[i] - counts[s] + 1, lens[i] + 1)]
            ),
        )
        segments = segments_from_variants([s % self.num_variants for s in order], [counts[s] for s in order])
        self.context.set(ForwardBatch(tokens=segments, sampled=segments, attention=batch))
        got = self.attention.forward(
            7, query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), sinks=sinks, **options
        )
        for i, s in enumerate(order):
            own = sinks.rows[s % self.num_variants] if isinstance(sinks, VariantStack) else sinks
            rows = slice(starts[i], starts[i + 1])
            want = naive(query[rows], *self.past[s], window=layer.sliding_window, sinks=own, **options)
            torch.testing.assert_close(got[rows].double(), want, rtol=1e-4, atol=1e-5)


STEPS = [
    {0: 5, 1: 1, 2: 7},  # prompts, one of a single token
    {0: 1, 1: 1, 2: 4, 3: 2},  # decode, a second chunk, a newcomer
    {0: 1, 1: 1, 2: 1, 3: 1},  # decode only
    {3: 6, 4: 9},  # prefill only
    {4: 1},
    {0: 1, 2: 1, 4: 3, 1: 8},
]


@pytest.mark.parametrize("sinks", ["none", "shared", "own"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value_dim"), [(4, 2, 8, 8), (4, 1, 8, 12)])
def test_paged_attention(
    heads: int, kv_heads: int, dim: int, value_dim: int, window: int | None, softcap: float | None, sinks: str
) -> None:
    torch.manual_seed(0)
    simulation = Simulation(AttentionLayer(kv_heads, dim, value_dim, window), heads)
    given: Any = None
    if sinks == "shared":
        given = torch.randn(heads)
    elif sinks == "own":
        given = VariantStack(torch.randn(2, heads), RowMap([0, 1]), simulation.context)
    for counts in STEPS:
        simulation.step(counts, given, scaling=dim**-0.5, softcap=softcap)


def module(**attributes: Any) -> Any:
    return SimpleNamespace(**attributes)


def test_arguments_that_change_nothing_are_accepted() -> None:
    arguments = {
        "scaling": 0.5,
        "dropout": 0.0,
        "position_ids": torch.arange(3),
        "output_attentions": False,
        "new": None,
    }
    check_attention_arguments(module(is_causal=True), None, arguments)


@pytest.mark.parametrize(
    ("attributes", "mask", "arguments", "reason"),
    [
        ({}, torch.ones(1), {}, "builds its own attention mask"),
        ({"is_causal": False}, None, {}, "not causal"),
        ({}, None, {"is_causal": False}, "not causal"),
        ({}, None, {"position_bias": torch.ones(1)}, "`position_bias`"),
        ({}, None, {"output_attentions": True}, "`output_attentions`"),
        ({}, None, {"dropout": 0.1}, "`dropout`"),
    ],
)
def test_arguments_that_would_have_to_be_honoured_are_refused(
    attributes: dict[str, Any], mask: Any, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check_attention_arguments(module(**attributes), mask, arguments)
