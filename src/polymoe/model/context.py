"""Which rows of the current forward pass belong to which variant: the one thing stacks, pool and attention share.

transformers hands keyword arguments to attention only, not to projections, norms, routers or experts. So every
replaced weight of one model holds the same `ForwardContext`, and the runner sets its `batch` before each pass. There
is no module-level state: two models in one process have two contexts.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch


class RowMap:
    """Which row of a stack serves which variant.

    Args:
        rows: one row index a variant; -1 means that the variant is not loaded (slots). The list is changed in place
            when a slot is loaded, and `generation` counts the changes so that cached look-ups know.
    """

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows
        self.generation = 0

    def assign(self, variant: int, row: int) -> None:
        """Point `variant` at `row` (-1: nowhere)."""
        self.rows[variant] = row
        self.generation += 1


@dataclass(frozen=True)
class RowGroups:
    """Group g is rows `starts[g] : starts[g + 1]` and uses row `ids[g]` of a stack."""

    ids: torch.Tensor  # [G] int64, on the CPU
    starts: torch.Tensor  # [G + 1] int64, on the CPU


class Segments:
    """Rows of a tensor, sorted by variant: `|--variant 0--|--variant 2--|…`.

    Args:
        token_variant: `[T]` int64, ascending.
        spans: (variant, start, end) for each variant present, in order, covering `[0, T)`.
    """

    def __init__(self, token_variant: torch.Tensor, spans: tuple[tuple[int, int, int], ...]) -> None:
        assert token_variant.ndim == 1
        assert not spans or spans[-1][2] == len(token_variant)
        self.token_variant = token_variant
        self.spans = spans
        self._rows: dict[int, tuple[int, torch.Tensor]] = {}
        self._groups: dict[int, tuple[int, RowGroups]] = {}

    @property
    def num_tokens(self) -> int:
        return self.token_variant.shape[0]

    def row_groups(self, row_map: RowMap) -> "RowGroups":
        """The rows by version of the stack; neighbours that share one are joined. Computed once a pass for each map."""
        cached = self._groups.get(id(row_map))
        if cached is None or cached[0] != row_map.generation:
            ids: list[int] = []
            starts = [0]
            for variant, _, end in self.spans:
                row = row_map.rows[variant]
                if row < 0:
                    raise RuntimeError(f"variant {variant} is in the batch but in no slot")
                if ids and ids[-1] == row:
                    starts[-1] = end
                else:
                    ids.append(row)
                    starts.append(end)
            cached = (row_map.generation, RowGroups(torch.tensor(ids), torch.tensor(starts)))
            self._groups[id(row_map)] = cached
        return cached[1]

    def row_of_token(self, row_map: RowMap) -> torch.Tensor:
        """`[T]` int64: the stack's row for each token. Computed once a pass for each map."""
        cached = self._rows.get(id(row_map))
        if cached is None or cached[0] != row_map.generation:
            rows = torch.tensor(row_map.rows, device=self.token_variant.device)
            cached = (row_map.generation, rows[self.token_variant])
            self._rows[id(row_map)] = cached
        return cached[1]


def segments_from_variants(variants: list[int], counts: list[int], device: torch.device | str = "cpu") -> Segments:
    """`counts[i]` rows of `variants[i]`; the variants must ascend (equal neighbours allowed)."""
    assert variants == sorted(variants)
    spans: list[tuple[int, int, int]] = []
    start = 0
    for variant, count in zip(variants, counts, strict=True):
        if spans and spans[-1][0] == variant:
            spans[-1] = (variant, spans[-1][1], start + count)
        elif count:
            spans.append((variant, start, start + count))
        start += count
    token_variant = torch.repeat_interleave(torch.tensor(variants, dtype=torch.int64), torch.tensor(counts))
    return Segments(token_variant.to(device), tuple(spans))


@dataclass(frozen=True)
class AttentionBatch:
    """Where each sequence's queries, keys and values are. B sequences, T tokens of this pass.

    For sequence i, `|---- computed earlier ----|-- query --|` has `seq_lens[i]` tokens; its queries are rows
    `query_start_loc[i] : query_start_loc[i + 1]` of the flattened batch and stand at the end of the sequence.
    """

    query_start_loc: list[int]  # B + 1
    seq_lens: list[int]  # B
    block_table: torch.Tensor  # [B, max blocks] int64, padded with 0
    slot_mapping: torch.Tensor  # [T] int64, block * block_size + offset: where each new key and value goes
    token_sequence: torch.Tensor  # [T] int64, the row of the block table
    token_visible: torch.Tensor  # [T] int64, how many tokens of its sequence a token sees: its position + 1

    # Where there is no kernel, sequences with one query token are computed together and all others one by one.

    @cached_property
    def prefill_seqs(self) -> tuple[int, ...]:
        """Sequences with several query tokens."""
        return tuple(i for i, (start, end) in enumerate(pairwise(self.query_start_loc)) if end - start > 1)

    @cached_property
    def decode_seqs(self) -> tuple[int, ...]:
        """Sequences with one query token."""
        return tuple(i for i, (start, end) in enumerate(pairwise(self.query_start_loc)) if end - start == 1)


@dataclass(frozen=True)
class ForwardBatch:
    """All that one forward pass needs to know beside token ids and positions.

    `sampled` describes the rows kept for the language-model head (`logits_to_keep`); it is the same object as
    `tokens` when every row is kept.
    """

    tokens: Segments
    sampled: Segments
    attention: AttentionBatch | None = None

    def segments(self, num_rows: int) -> Segments:
        """The segments of a tensor with `num_rows` rows; an unknown count is an error, never a guess."""
        if num_rows == self.tokens.num_tokens:
            return self.tokens
        if num_rows == self.sampled.num_tokens:
            return self.sampled
        raise RuntimeError(
            f"a weight met {num_rows} rows, the batch has {self.tokens.num_tokens} tokens "
            f"and {self.sampled.num_tokens} sampled rows"
        )


@dataclass
class ForwardContext:
    """The holder: one a model, set by the runner before each pass."""

    _batch: ForwardBatch | None = field(default=None, repr=False)

    @property
    def batch(self) -> ForwardBatch:
        if self._batch is None:
            raise RuntimeError("no batch is set: the model is only called by its runner")
        return self._batch

    def set(self, batch: ForwardBatch | None) -> None:
        self._batch = batch
