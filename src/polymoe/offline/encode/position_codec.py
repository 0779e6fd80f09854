"""One tensor of the experts at one position, packed: the group's base and its variants' deltas.

Base B = merge of the group's experts (or the leader's own), stored as Q(B); each delta is coded against what is
stored, Δ_v = W_v − Q(B), so that it repairs the base's rounding too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polymoe.offline.plan.correction import Correction, correction
from polymoe.offline.plan.merge import mean, regmean, weighted_mean
from polymoe.offline.plan.plan import Plan
from polymoe.quant.formats import STORED, Format, get_format

Parts = dict[str, Tensor]  # part -> packed tensor


@dataclass(frozen=True)
class Group:
    """The variants that build on one base at a position, and how it is stored."""

    leader: int
    expert: int
    members: tuple[int, ...]
    base: Format = STORED
    merge: str = "own"  # `Plan`'s word
    delta: Correction | None = None

    @property
    def is_verbatim(self) -> bool:
        """The base is the leader's expert as the checkpoint stores it."""
        return not self.base.is_packed and self.merge == "own"

    @property
    def is_lossless(self) -> bool:
        return self.is_verbatim or (self.delta is not None and self.delta.fmt.is_lossless)

    @property
    def is_mirrored(self) -> bool:
        return self.delta is not None and self.delta.mirrored


def groups_of(plan: Plan, layer: int) -> Iterator[Group]:
    """All groups of a layer; a variant whose expert is absent is a group of its own, verbatim."""
    for expert in range(plan.serving.shape[2]):
        served, on_device = plan.serving[:, layer, expert], plan.resident[:, layer, expert]
        base, merge, delta = (str(field[layer, expert]) for field in (plan.base, plan.merge, plan.delta))
        stored_as = get_format(base), merge, correction(delta)
        for leader in sorted({int(v) for v in served}):
            members = tuple(int(v) for v in (served == leader).nonzero()[0])
            yield (
                Group(leader, expert, members, *stored_as) if on_device[members[0]] else Group(leader, expert, members)
            )


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """`base` is None for a verbatim one; `deltas` by variant, without those that are the base as stored."""

    base: Parts | None
    deltas: dict[int, Parts]


def encode_tensor(
    group: Group, own: Mapping[int, Tensor], same_as: Sequence[int], moments: Mapping[int, Tensor] | None = None
) -> PackedTensor:
    """Pack one tensor of a group.

    Args:
        own: member -> its weight [O, I] (or bias [O]) in the stored dtype.
        same_as: for every variant the lowest with the identical expert.
        moments: member -> float32 [I, I], Σ g² x xᵀ of what it routes there (0 for nothing); None: not known.
    """
    first = own[group.leader]
    used = moments if moments is not None and first.ndim == 2 else None
    base = _encode_base(group, own, used)
    if group.delta is None:
        return PackedTensor(base, {})
    stored, fmt = _base_of(group, first, base), group.delta.fmt
    deltas: dict[int, Parts] = {}
    if group.delta.mirrored:
        half = (first.float() - own[group.members[1]].float()) / 2
        moment = None if used is None else _sum(used)
        return PackedTensor(base, {group.leader: fmt.encode(half, _known(moment))})
    for v, weight in own.items():
        if group.is_verbatim and same_as[v] == same_as[group.leader]:
            continue  # it is the base
        twin = next((w for w in deltas if same_as[w] == same_as[v]), None)
        if twin is not None:
            deltas[v] = deltas[twin]
        else:
            moment = None if used is None else _sum({w: used[w] for w in own if same_as[w] == same_as[v]})
            deltas[v] = fmt.encode_delta(weight, stored, _known(moment))
    return PackedTensor(base, deltas)


def served_weights(group: Group, own: Mapping[int, Tensor], packed: PackedTensor) -> dict[int, Tensor]:
    """member -> the weight that it will be served with, float32: base + sign · delta. `own` as in `encode_tensor`."""
    stored = _base_of(group, own[group.leader], packed.base)
    served = dict.fromkeys(group.members, stored.float())
    for v, parts in packed.deltas.items():
        assert group.delta is not None
        served[v] = group.delta.fmt.corrected(stored, parts).float()
        if group.delta.mirrored:
            served[group.members[1]] = group.delta.fmt.corrected(stored, parts, -1).float()
    return served


def merge_weights(group: Group, own: Mapping[int, Tensor], moments: Mapping[int, Tensor] | None) -> Tensor:
    """The group's base before it is quantised, float32.

    "regmean" is RegMean proper where the merged expert is what is served; below deltas it is the mean weighted by use,
    which keeps the deltas small (RegMean's own trades their size for directions that the deltas repair anyway).
    """
    weights = list(own.values())
    if group.merge == "own":
        return own[group.leader].float()
    if group.merge == "mean" or moments is None or weights[0].ndim == 1 or group.is_mirrored:
        return mean(weights)  # two variants that add and subtract one delta lie opposite the midpoint
    known = [moments[v] for v in own]
    if _known(_sum(moments)) is None:
        return mean(weights)
    return regmean(weights, known) if group.delta is None else weighted_mean(weights, known)


def _encode_base(group: Group, own: Mapping[int, Tensor], moments: Mapping[int, Tensor] | None) -> Parts | None:
    if group.is_verbatim:
        return None
    first = own[group.leader]
    merged = merge_weights(group, own, moments)
    if not group.base.is_packed or merged.ndim == 1:
        return {"": merged.to(first.dtype)}
    # Below deltas error feedback would only make them larger.
    moment = _known(_sum(moments)) if moments is not None and group.delta is None else None
    return group.base.encode(merged, moment)


def _base_of(group: Group, first: Tensor, base: Parts | None) -> Tensor:
    """The base as stored: in the stored dtype where it is not quantised, else float32."""
    if base is None:
        return first
    return base[""] if "" in base else group.base.decode(base, tuple(first.shape), torch.float32)


def _sum(moments: Mapping[int, Tensor]) -> Tensor:
    return torch.stack(list(moments.values())).sum(dim=0) if len(moments) > 1 else next(iter(moments.values()))


def _known(moment: Tensor | None) -> Tensor | None:
    """None for the moment of an expert that nothing was routed to."""
    return moment if moment is not None and float(moment.diagonal().sum()) > 0 else None
