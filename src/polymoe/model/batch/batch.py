"""Which rows of a forward pass belong to which variant, and where each sequence's keys and values are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from polymoe.kernels.cpu.packed_linear import PackedSegments
from polymoe.kernels.cpu.packed_rows import Versions
from polymoe.model.transfer.upload import upload


class RowMap:
    """Which row of a stack serves which variant.

    Args:
        rows: one row index a variant; -1 means that the variant is not loaded (slots). The list is changed in place
            when a slot is loaded, and `generation` counts the changes so that cached look-ups know.
    """

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows
        self.generation = 0
        self.device_rows: torch.Tensor | None = None  # [V] int32, where kernels on a device read the same

    def assign(self, variant: int, row: int) -> None:
        """Point `variant` at `row` (-1: nowhere)."""
        self.rows[variant] = row
        self.generation += 1
        if self.device_rows is not None:
            self.device_rows[variant].fill_(row)

    def keep_on(self, device: torch.device) -> None:
        """Keep a copy at a fixed address of `device`, changed in place: a captured graph sees every change."""
        self.device_rows = torch.tensor(self.rows, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class RowGroups:
    """Group g is rows `starts[g] : starts[g + 1]` and uses row `ids[g]` of a stack."""

    ids: torch.Tensor  # [G] int64, on the CPU
    starts: torch.Tensor  # [G + 1] int64, on the CPU
    _packed: dict[int, PackedSegments] = field(default_factory=dict)

    def packed(self, versions: Versions) -> PackedSegments:
        """The groups with the packed base and delta of each; neighbours that have both in common are joined. Made once
        a pass for each `versions`."""
        found = self._packed.get(id(versions))
        if found is None:
            base, delta, starts = versions.base[self.ids], versions.delta[self.ids], self.starts
            if len(base) > 1:
                differs = torch.ones(len(base), dtype=torch.bool)
                differs[1:] = (base[1:] != base[:-1]) | (delta[1:] != delta[:-1])
                base, delta, starts = base[differs], delta[differs], torch.cat((starts[:-1][differs], starts[-1:]))
            found = self._packed[id(versions)] = starts, base, delta, torch.ones_like(base)
        return found


class Segments:
    """Rows of a tensor, sorted by variant: `|--variant 0--|--variant 2--|…`.

    Args:
        token_variant: `[T]` int64, ascending.
        spans: (variant, start, end) for each variant present, in order, covering `[0, T)`; empty where only the device
            knows (a captured graph).
    """

    def __init__(self, token_variant: torch.Tensor, spans: tuple[tuple[int, int, int], ...]) -> None:
        assert token_variant.ndim == 1
        assert not spans or spans[-1][2] == len(token_variant)
        self.token_variant = token_variant
        self.spans = spans
        self._rows: dict[int, tuple[int, torch.Tensor]] = {}
        self._groups: dict[int, tuple[int, RowGroups]] = {}
        self._start_loc: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.token_variant.shape[0]

    def row_groups(self, row_map: RowMap) -> "RowGroups":
        """The rows by version of the stack; neighbours that share one are joined. Computed once a pass for each map."""
        cached = self._groups.get(id(row_map))
        if cached is None or cached[0] != row_map.generation:
            assert self.spans or not self.num_tokens, "only the device knows which rows belong to whom"
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
            rows = row_map.device_rows
            if rows is None:
                rows = torch.tensor(row_map.rows, device=self.token_variant.device)
            cached = (row_map.generation, rows[self.token_variant])
            self._rows[id(row_map)] = cached
        return cached[1]

    def start_loc(self, num_variants: int) -> torch.Tensor:
        """`[V + 1]` int32 on the device: variant v has rows `start_loc[v] : start_loc[v + 1]`. Computed once a pass."""
        if self._start_loc is None:
            variants = torch.arange(num_variants + 1, device=self.token_variant.device)
            self._start_loc = torch.searchsorted(self.token_variant, variants, out_int32=True)
        return self._start_loc


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
    token_variant = np.repeat(np.array(variants, dtype=np.int64), np.array(counts, dtype=np.int64))
    return Segments(upload(token_variant, torch.device(device)), tuple(spans))


@dataclass(frozen=True)
class DeviceLengths:
    """Where the sequences' tokens are, for kernels on a GPU. B sequences."""

    query_start_loc: torch.Tensor  # [B + 1] int32
    seq_lens: torch.Tensor  # [B] int32
    max_query_len: int  # at least the longest query's; 1 in decode


@dataclass(frozen=True)
class AttentionBatch:
    """Where each sequence's queries, keys and values are. B sequences, T tokens of this pass.

    For sequence i, `|---- computed earlier ----|-- query --|` has `seq_lens[i]` tokens; its queries are rows
    `query_start_loc[i] : query_start_loc[i + 1]` of the flattened batch and stand at the end of the sequence.
    """

    query_start_loc: list[int]  # B + 1
    seq_lens: list[int]  # B; empty where only the device knows
    block_table: torch.Tensor  # [B, max blocks] int64, padded with 0
    slot_mapping: torch.Tensor  # [T] int64, block * block_size + offset: where each new key and value goes
    token_sequence: torch.Tensor  # [T] int64, the row of the block table
    token_visible: torch.Tensor  # [T] int64, how many tokens of its sequence a token sees: its position + 1
    device_lengths: DeviceLengths | None = None  # where a GPU's kernels attend
    token_encoder_len: torch.Tensor | None = (
        None  # [T] int64, how many of its sequence's first tokens are the encoder's
    )
    state_keys: Sequence[object] = ()  # B; by what each sequence's own state is found; empty: nobody comes back to it

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
class EncoderBatch:
    """P prompts that an encoder reads whole in this pass, sorted by variant, padded on the right to S tokens."""

    input_ids: torch.Tensor  # [P, S] int64
    lengths: list[int]  # P
    slot_mapping: torch.Tensor  # [sum of lengths] int64: where keys and values for cross-attention go
    rows: Segments  # P * S


@dataclass(frozen=True)
class ForwardBatch:
    """All that one forward pass needs to know beside token ids and positions.

    `sampled` describes the rows kept for the language-model head (`logits_to_keep`); it is the same object as
    `tokens` when every row is kept.
    """

    tokens: Segments
    sampled: Segments
    attention: AttentionBatch | None = None
    encoder: EncoderBatch | None = None
    shape: tuple[int, int] | None = None  # token tensors are [*shape, …], row after row; None: [1, T, …]

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one token; known where kernels run on a device."""
        lengths = None if self.attention is None else self.attention.device_lengths
        return lengths is not None and lengths.max_query_len == 1

    @property
    def present(self) -> set[int]:
        """The variants that this pass needs."""
        parts = [self.tokens] if self.encoder is None else [self.tokens, self.encoder.rows]
        return {variant for part in parts for variant, _, _ in part.spans}

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
