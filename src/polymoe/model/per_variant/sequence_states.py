"""What a sequence keeps beside keys and values in blocks: the layers of transformers' own cache, one set a sequence.

    sequence -> (herd, row)      a herd: one stock cache `[B, …]` of sequences that ran together last

Sequences that decode are one call of each module: those of a variant, or of all variants where the modules can. As long
as the same ones run together nothing is copied; when the company changes, their rows are put together anew. A state
lives as long as the key of its sequence, which a sequence loses when it is preempted.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from polymoe.model.batch.batch import ForwardBatch, segments_from_variants

_ALL = -1  # in place of a variant
_PARTS = (Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin)


@dataclass(frozen=True, eq=False)
class Group:
    """Sequences that are one call: B of them, each with L tokens of this pass.

    batch: what their rows are to stacks, where they are of several variants; `variant` says nothing then.
    """

    variant: int
    rows: slice | torch.Tensor  # which B * L rows of the pass, sequence after sequence
    shape: tuple[int, int]  # (B, L)
    computed: int  # tokens before, of the first sequence
    cache: Cache
    batch: ForwardBatch | None = None


@dataclass(eq=False)
class _Herd:
    cache: Cache
    size: int


class SequenceStates:
    """The states of all sequences of one model.

    Args:
        new_cache: an empty cache of the stock model's kind.
        together: whether states of sequences of different lengths have the same shapes, so that they can be put
            together; else every sequence is a call of its own.
        joint: whether sequences of several variants that decode can be one call of every module.
    """

    def __init__(self, new_cache: Callable[[], Cache], together: bool, joint: bool = False) -> None:
        self._new_cache, self._together, self._joint = new_cache, together, joint
        self._homes: WeakKeyDictionary[Any, tuple[_Herd, int]] = WeakKeyDictionary()
        self.groups: tuple[Group, ...] = ()

    def begin(self, batch: ForwardBatch) -> None:
        """Sort the sequences of a pass into calls; `groups` are those until the next pass."""
        attention = batch.attention
        assert attention is not None
        keys = attention.state_keys or [_Nobody() for _ in attention.seq_lens]
        spans = iter(batch.tokens.spans)
        variant, _, last = next(spans)
        alike: dict[tuple[int, ...], list[int]] = {}
        bounds = list(pairwise(attention.query_start_loc))
        variants: list[int] = []
        for i, (start, end) in enumerate(bounds):
            while start >= last:
                variant, _, last = next(spans)
            fresh = attention.seq_lens[i] == end - start
            alone = -1 if fresh or self._together else i
            whose = _ALL if self._joint and end - start == 1 and not fresh else variant
            variants.append(variant)
            alike.setdefault((whose, end - start, int(fresh), alone), []).append(i)
        groups = []
        for (variant, length, is_fresh, _), members in alike.items():
            starts = [bounds[i][0] for i in members]
            rows: slice | torch.Tensor = slice(starts[0], starts[0] + len(members) * length)
            if starts != list(range(starts[0], starts[0] + len(members) * length, length)):
                rows = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
                rows = rows.to(batch.tokens.token_variant.device)
            computed = attention.seq_lens[members[0]] - length
            cache = self._take([keys[i] for i in members], bool(is_fresh))
            shape = len(members), length
            tokens = None
            if variant == _ALL:
                own = segments_from_variants(
                    [variants[i] for i in members], [1] * len(members), batch.tokens.token_variant.device
                )
                tokens = ForwardBatch(tokens=own, sampled=own, shape=shape)
            groups.append(Group(variant, rows, shape, computed, cache, tokens))
        self.groups = tuple(groups)
        self._held = keys  # states of sequences that nobody keeps live as long as the pass

    def end(self) -> None:
        """The pass is over."""
        self.groups, self._held = (), ()

    @property
    def nbytes(self) -> int:
        """Bytes that the states hold."""
        herds = {id(herd): herd for herd, _ in self._homes.values()}
        return sum(t.numel() * t.element_size() for herd in herds.values() for t in tensors_of(herd.cache))

    def _take(self, keys: list[Any], fresh: bool) -> Cache:
        """One cache whose rows are the states of these sequences, in order; it is theirs from now on."""
        if fresh:
            herd = _Herd(self._new_cache(), len(keys))
        else:
            homes = [self._homes[key] for key in keys]
            herd = homes[0][0]
            if herd.size == len(keys) and all(home == (herd, row) for row, home in enumerate(homes)):
                return herd.cache
            herd = _Herd(joined([(old.cache, row, old.size) for old, row in homes]), len(keys))
        for row, key in enumerate(keys):
            self._homes[key] = herd, row
        return herd.cache


class _Nobody:
    """Stands for a sequence that no step comes back to."""


def joined(parts: list[tuple[Any, int, int]]) -> Any:
    """Rows of several caches (or of their layers, tensors, …) as one.

    Args:
        parts: (cache, row, number of rows) for each row of the result.
    """
    first, _, rows = parts[0]
    if isinstance(first, torch.Tensor):
        if not first.ndim or (not first.numel() and first.shape[0] != rows):  # nothing is kept yet, of no sequence
            return first
        assert all(x.shape[0] == size for x, _, size in parts), "the first axis of a state runs over sequences"
        return torch.cat([x[row : row + 1] for x, row, _ in parts])
    if isinstance(first, dict):
        return {key: joined([(part[key], row, size) for part, row, size in parts]) for key in first}
    if isinstance(first, list):
        return [joined([(part[i], row, size) for part, row, size in parts]) for i in range(len(first))]
    if isinstance(first, _PARTS):
        new = copy.copy(first)
        new.__dict__ = joined([(vars(part), row, size) for part, row, size in parts])
        return new
    return first


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """All tensors that a cache holds."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list):
        for item in state.values() if isinstance(state, dict) else state:
            yield from tensors_of(item)
    elif isinstance(state, _PARTS):
        yield from tensors_of(vars(state))
