"""How each tensor of a new variant beside the experts is served: as a planned one's, by a delta on a packed matrix, or
by itself."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polymoe.bundle.live import OWN, AddedDelta
from polymoe.bundle.manifest import PackedNonexpert, packed_name
from polymoe.bundle.reader import Bundle
from polymoe.offline.addition.layer_plan import check_finite
from polymoe.offline.checkpoint.checkpoint import Checkpoint
from polymoe.quant.exact import same_bits
from polymoe.quant.formats import get_format

_PIECE = 1 << 20  # values that are float32 at a time
_SAMPLE = 64  # rows of a matrix that tell which version is the nearest

Parts = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class NonexpertChoice:
    """source: the planned variant whose tensor it is, or `OWN`. delta: where it is one. tensors: what is stored for it,
    by the name in the file."""

    source: int = OWN
    delta: AddedDelta | None = None
    tensors: Parts = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class NonexpertPlanner:
    """Plans tensors of `checkpoint` beside what `bundle` was planned with. `bits`: of deltas on packed matrices; None:
    these are stored as the checkpoint has them."""

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, bits: int | None) -> None:
        self.bundle, self.checkpoint, self.bits = bundle, checkpoint, bits

    def plan(self, name: str) -> NonexpertChoice:
        """One tensor. Raises `CheckpointError` for weights that are not finite or cannot be read."""
        weight, bundle = self.checkpoint.tensor(name), self.bundle
        sources = dict.fromkeys(bundle.nonexpert_sources(name))
        packed = bundle.packed_nonexpert(name)
        if packed is None:
            same = next((v for v in sources if same_bits(weight, bundle.nonexpert(v, name))), OWN)
            if same != OWN:
                return NonexpertChoice(same)
        check_finite(self.checkpoint, name, weight)
        if packed is None or self.bits is None:
            return NonexpertChoice(tensors={name: weight})
        # A planned variant that had the same matrix was packed to the same codes.
        own = self._as_planned(name, weight, packed)
        same = next((v for v in sources if _alike(own, bundle.own_parts(v, name))), OWN)
        if same != OWN:
            return NonexpertChoice(same)
        return self._delta(name, weight, packed)

    def relative_error(self, name: str) -> float:
        """‖W − Ŵ‖² / ‖W‖² of a packed matrix, by deltas of `bits`."""
        packed = self.bundle.packed_nonexpert(name)
        assert packed is not None
        fmt, square, error = get_format(f"d{self.bits}", self.bundle.levels), 0.0, 0.0
        weight = self.checkpoint.tensor(name)
        for own, base in self._pieces(name, weight, packed, self._nearest(name, weight, packed)):
            square += float(own.square().sum())
            error += float((fmt.corrected(base, fmt.encode_delta(own, base)) - own).square().sum())
        return error / max(square, 1e-30)

    def _as_planned(self, name: str, weight: Tensor, packed: PackedNonexpert) -> Parts:
        """Part -> tensor, in the format that the planned variants have of their own."""
        if packed.delta is not None:
            return self._encoded(name, weight, packed, 0, packed.delta)
        fmt, step = get_format(packed.base, self.bundle.levels), max(1, _PIECE // packed.shape[1])
        return _joined([fmt.encode(rows.float()) for rows in torch.split(weight, step)])

    def _delta(self, name: str, weight: Tensor, packed: PackedNonexpert) -> NonexpertChoice:
        delta = AddedDelta(base=self._nearest(name, weight, packed), delta=f"d{self.bits}")
        parts = self._encoded(name, weight, packed, delta.base, delta.delta)
        return NonexpertChoice(delta=delta, tensors={packed_name(delta.delta, name, p): t for p, t in parts.items()})

    def _nearest(self, name: str, weight: Tensor, packed: PackedNonexpert) -> int:
        """The planned variant whose base is the nearest; where all have one, the first."""
        sources = list(dict.fromkeys(self.bundle.nonexpert_sources(name)))
        if packed.delta is not None or len(sources) == 1:
            return sources[0]
        sample = weight[:_SAMPLE].float()

        def distance(variant: int) -> float:
            return float((self._base_rows(name, packed, variant, slice(len(sample))) - sample).square().sum())

        return min(sources, key=distance)

    def _encoded(self, name: str, weight: Tensor, packed: PackedNonexpert, base: int, delta: str) -> Parts:
        fmt = get_format(delta, self.bundle.levels)
        return _joined([fmt.encode_delta(own, under) for own, under in self._pieces(name, weight, packed, base)])

    def _pieces(self, name: str, weight: Tensor, packed: PackedNonexpert, base: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, the base's), float32. Rows beyond a smaller vocabulary, which nobody reads, are the base's."""
        step = max(1, _PIECE // packed.shape[1])
        for start in range(0, packed.shape[0], step):
            rows = slice(start, start + step)
            own, under = weight[rows].float(), self._base_rows(name, packed, base, rows)
            yield torch.cat((own, under[len(own) :])), under

    def _base_rows(self, name: str, packed: PackedNonexpert, variant: int, rows: slice) -> Tensor:
        """float32 `[n, I]`."""
        whole = (
            self.bundle.own_parts(variant, name) if packed.delta is None else self.bundle.nonexpert_parts(None, name)
        )
        parts = {part: tensor[rows] for part, tensor in whole.items()}
        shape = (len(next(iter(parts.values()))), packed.shape[1])
        return get_format(packed.base, self.bundle.levels).decode(parts, shape, torch.float32)


def _joined(pieces: Sequence[Parts]) -> Parts:
    return {part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]}


def _alike(own: Parts, planned: Parts) -> bool:
    return all(same_bits(tensor, planned[part]) for part, tensor in own.items())
