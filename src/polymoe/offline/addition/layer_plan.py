"""How each expert of a new variant is served: as a planned one, as the changes of one, or by itself."""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polymoe.bundle.manifest import packed_name
from polymoe.bundle.reader import Bundle
from polymoe.errors import CheckpointError
from polymoe.offline.addition.planned import Entry, Expert, PlannedLayer, nearest
from polymoe.offline.checkpoint.checkpoint import Checkpoint
from polymoe.offline.checkpoint.matrices import as_matrix
from polymoe.quant.exact import encode_exact, same_bits
from polymoe.quant.format import Format
from polymoe.quant.formats import EXACT, get_format

_WORTH = 0.9  # of the expert's bytes that its changes may take


@dataclass(frozen=True, eq=False)
class Choice:
    """How one expert is served: as a planned one, as its own, or by a delta of `fmt` on a planned base."""

    entry: Entry | None = None
    base: int = -1
    fmt: Format | None = None
    parts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        return self.entry is None and self.fmt is None


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer's experts: how each is served, and what is stored for it, tensor name in the file -> pieces."""

    choices: list[Choice]
    pieces: dict[str, list[Tensor]]
    expert_bytes: int
    delta_bytes: int

    @property
    def own(self) -> list[int]:
        """Experts that are stored as they are."""
        return [expert for expert, choice in enumerate(self.choices) if choice.is_own]

    @property
    def by_format(self) -> dict[str, list[int]]:
        """Format -> experts that are deltas in it."""
        found: dict[str, list[int]] = {}
        for expert, choice in enumerate(self.choices):
            if choice.fmt is not None:
                found.setdefault(choice.fmt.name, []).append(expert)
        return found


class LayerPlanner:
    """Plans layers of `checkpoint` beside what `bundle` was planned with. `bits`: of corrections; None: lossless."""

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, bits: int | None) -> None:
        self.bundle, self.checkpoint, self.bits = bundle, checkpoint, bits

    def in_order(self, pool: ThreadPoolExecutor) -> Iterator[LayerPlan]:
        """All layers, no more of them planned ahead than there are threads."""
        begun: deque[Future[LayerPlan]] = deque()
        try:
            for layer in range(self.checkpoint.architecture.num_layers):
                begun.append(pool.submit(self.plan, layer))
                if len(begun) > torch.get_num_threads():
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()

    def plan(self, layer: int) -> LayerPlan:
        """One layer, on this thread. Raises `CheckpointError` for weights that are not finite or cannot be read."""
        info, planned = self.checkpoint.architecture, PlannedLayer(self.bundle, layer)
        stacks = {t: self.checkpoint.tensor(info.expert_tensor(layer, t)) for t in info.expert_shapes}
        transposed = self.bundle.manifest.transposed
        choices = []
        for expert in range(info.num_experts):
            weights = {t: as_matrix(stack[expert], transposed) for t, stack in stacks.items()}
            choices.append(self._choose(planned, layer, expert, weights))
        found = LayerPlan(choices, {}, 0, 0)
        own = found.own
        pieces = {tensor: [stack[expert][None] for expert in own] for tensor, stack in stacks.items() if own}
        expert_bytes = sum(piece.nbytes for stack in pieces.values() for piece in stack)
        delta_bytes = 0
        for name, experts in found.by_format.items():
            fmt = get_format(name, self.bundle.levels)
            for tensor in stacks:
                for part, parts in fmt.pool([choices[e].parts[tensor] for e in experts]).items():
                    pieces[packed_name(name, tensor, part)] = parts
                    delta_bytes += sum(piece.nbytes for piece in parts)
        return LayerPlan(choices, pieces, expert_bytes, delta_bytes)

    def relative_error(self, layer: int) -> float:
        """Mean over the layer's experts of ‖W − Ŵ‖² / ‖W‖², for corrections of `bits`."""
        assert self.bits is not None
        info, planned = self.checkpoint.architecture, PlannedLayer(self.bundle, layer)
        stacks = {t: self.checkpoint.tensor(info.expert_tensor(layer, t)) for t in info.expert_shapes}
        total = 0.0
        for expert in range(info.num_experts):
            weights = {t: as_matrix(stack[expert], self.bundle.manifest.transposed) for t, stack in stacks.items()}
            choice = self._choose(planned, layer, expert, weights)
            if choice.fmt is None:
                continue
            base, square, error = planned.base(choice.base), 0.0, 0.0
            for tensor, weight in weights.items():
                delta = choice.fmt.decode(choice.parts[tensor], tuple(weight.shape), torch.float32)
                square += float(weight.float().square().sum())
                error += float((base[tensor].float() + delta - weight.float()).square().sum())
            total += error / max(square, 1e-30)
        return total / info.num_experts

    def _choose(self, planned: PlannedLayer, layer: int, expert: int, weights: Expert) -> Choice:
        entries = planned.entries(expert)
        exact = {i: found for i, entry in enumerate(entries) if (found := planned.exact(entry)) is not None}
        like = nearest(weights, iter(exact.items()))
        if like is not None and like[1] == 1.0:
            for i, other in exact.items():
                if all(same_bits(weight, other[name]) for name, weight in weights.items()):
                    return Choice(entries[i])
        bases = {entry.table: planned.stored_base(entry.table) for entry in entries if entry.table >= 0}
        stored = {index: base for index, base in bases.items() if base is not None}
        near = nearest(weights, iter(stored.items()))
        if self.bits is None and near is not None and near[1] > 0:
            base = stored[near[0]]
            parts = {name: encode_exact(weight, base[name]) for name, weight in weights.items()}
            size = sum(part.nbytes for encoded in parts.values() for part in encoded.values())
            if size < _WORTH * sum(weight.nbytes for weight in weights.values()):
                # The base is finite: it was looked at when it was planned.
                self._check_expert(layer, expert, {name: encoded["values"] for name, encoded in parts.items()})
                return Choice(None, near[0], EXACT, parts)
        self._check_expert(layer, expert, weights)
        if self.bits is not None and bases:
            index = next(iter(bases)) if near is None else near[0]
            fmt = get_format(f"d{self.bits}", self.bundle.levels)
            base = planned.base(index)
            return Choice(None, index, fmt, {n: fmt.encode_delta(w, base[n]) for n, w in weights.items()})
        return Choice()

    def _check_expert(self, layer: int, expert: int, values: Mapping[str, Tensor]) -> None:
        info = self.checkpoint.architecture
        for tensor, weight in values.items():
            check_finite(self.checkpoint, f"expert {expert} of {info.expert_tensor(layer, tensor)}", weight)


def check_finite(checkpoint: Checkpoint, name: str, weight: Tensor) -> None:
    """Raises `CheckpointError`."""
    if not bool(torch.isfinite(weight.sum(dtype=torch.float32))) and not bool(torch.isfinite(weight).all()):
        raise CheckpointError(
            f"{checkpoint.name}: {checkpoint.path}: {name} has NaN or infinite weights; save or download it again."
        )
