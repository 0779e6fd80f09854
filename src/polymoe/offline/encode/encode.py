"""The weights of a plan's merged, quantised and residual experts, layer by layer, as the bundle stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from polymoe.console import Console
from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.checkpoint.matrices import as_matrix, is_transposed, mlp_order
from polymoe.offline.encode.encoded_layer import EncodedLayer
from polymoe.offline.encode.position_codec import Group, PackedTensor, encode_tensor, groups_of
from polymoe.offline.plan.plan import Plan
from polymoe.offline.similarity.scan import FamilyScan
from polymoe.thread_pool import thread_pool

_PIECE = 1 << 18  # values that a thread packs at once: what stays in the cache of a core


class Encoder(Protocol):
    """Makes one layer's packed experts; called once a layer, ascending."""

    def layer(self, layer: int) -> EncodedLayer: ...


def make_encoder(
    family: Family,
    scan: FamilyScan,
    plan: Plan,
    calibration: Calibration | None = None,
    console: Console | None = None,
) -> Encoder:
    """The encoder of `plan`: from the weights alone, or fitted to the calibration text.

    `console` is told which layers an earlier, interrupted run had finished; progress is shown by who asks for layers.
    """
    if calibration is None:
        return PlainEncoder(family, scan, plan)
    from polymoe.offline.encode.calibrated_encoder import CalibratedEncoder

    return CalibratedEncoder(family, scan, plan, calibration, console)


class PlainEncoder:
    """From the weights alone: plain means, scales by least squares, nearest levels."""

    def __init__(self, family: Family, scan: FamilyScan, plan: Plan) -> None:
        self.family, self.scan, self.plan = family, scan, plan
        self.transposed = is_transposed(family)

    def layer(self, layer: int) -> EncodedLayer:
        """Holds one tensor of the layer's experts V times, and the packed result."""
        encoded = EncodedLayer()
        groups = [g for g in groups_of(self.plan, layer) if not (g.is_verbatim and g.delta is None)]
        info, same_as = self.family.architecture, self.scan.expert_same_as[:, layer]
        used = {int(same_as[v, group.expert]) for group in groups for v in group.members}
        with thread_pool() as pool:
            for tensor in mlp_order(list(info.expert_shapes)) if groups else ():
                name = info.expert_tensor(layer, tensor)
                stacks = {v: self.family.checkpoints[v].tensor(name) for v in sorted(used)}
                for group in groups:
                    alike = same_as[:, group.expert].tolist()
                    own = {v: as_matrix(stacks[alike[v]][group.expert], self.transposed) for v in group.members}
                    encoded.add(group.leader, group.expert, tensor, in_pieces(group, own, alike, pool))
                del stacks  # before the next tensor is read
        return encoded


def in_pieces(
    group: Group, own: Mapping[int, Tensor], same_as: Sequence[int], pool: ThreadPoolExecutor
) -> PackedTensor:
    """`encode_tensor` by rows, which have their own scales: its float32 copies stay small."""
    first = own[group.leader]
    rows = max(1, _PIECE // first[0].numel())
    split = {v: torch.split(weight, rows) for v, weight in own.items()}

    def packed(i: int) -> PackedTensor:
        return encode_tensor(group, {v: part[i] for v, part in split.items()}, same_as)

    pieces = list(pool.map(packed, range(len(split[group.leader]))))
    bases = [piece.base for piece in pieces if piece.base is not None]
    return PackedTensor(
        _joined(bases) if bases else None, {v: _joined([piece.deltas[v] for piece in pieces]) for v in pieces[0].deltas}
    )


def _joined(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]}
