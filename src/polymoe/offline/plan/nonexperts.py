"""Policy `auto` beside the experts: how each matrix of projections, embeddings and heads may be stored, at what cost.

All versions on one base with a delta each, each version by itself in fewer bits, or as the checkpoints store it. The
error is that of experts (`quantisation_error.py`) with what a matrix counts in place of what an expert does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from polymoe.offline.checkpoint.checkpoint import Checkpoint
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.correction import NO_DELTA, lossy_deltas, undominated_bases
from polymoe.offline.plan.knapsack import IntArray, Option
from polymoe.offline.plan.plan import STORED
from polymoe.offline.plan.quantisation_error import (
    RELEVANCE,
    FloatArray,
    Partition,
    QuantisationErrors,
    coherence,
    layer_weights,
)
from polymoe.offline.similarity.scan import FamilyScan
from polymoe.quant.formats import get_format

# KL for each unit of relative error as rounding noise, on the scale of `NATS_PER_ERROR`: of an embedding (1.1) or a
# head (1.8), and of one projection in all layers (0.3 for queries and keys to 0.7 for values and outputs).
_NATS_OF_VOCABULARY = 1.5
_NATS_OF_PROJECTION = 0.5
# Leaving out what training changed counts for less than in experts (3 to 4 times rounding noise, where these had 5.5).
_COHERENCE = 0.6


@dataclass(frozen=True, eq=False)
class NonexpertOptions:
    """`options`: name -> the ways to store a matrix, the first as it is. `uniform`: a way for all of them -> name ->
    the option."""

    options: Mapping[str, list[Option]]
    uniform: Mapping[str, Mapping[str, int]]

    @property
    def bytes_as_stored(self) -> int:
        return sum(row[0].num_bytes for row in self.options.values())


def nonexpert_options(family: Family, scan: FamilyScan, errors: QuantisationErrors) -> NonexpertOptions:
    """All options of each packable matrix, in the order of the model."""
    nats = nats_from_weights(family, scan) | dict(errors.nonexpert_nats)
    options: dict[str, list[Option]] = {}
    uniform: dict[str, dict[str, int]] = {STORED: {}}
    for name in family.packable:
        same_as, shape = scan.nonexpert_same_as[name], family.checkpoints[0].shape(name)
        dtype = family.checkpoints[0].dtype(name)
        distinct = sorted(set(same_as))
        own: Partition = tuple(tuple(v for v, source in enumerate(same_as) if source == first) for first in distinct)
        together: Partition = (tuple(range(len(same_as))),)
        counts = _Counts.of(scan.nonexpert_square[name], distinct, nats[name])
        stored = sum(scan.nonexpert_bytes[name][v] for v in distinct)
        row = [Option(own, STORED, "own", NO_DELTA, stored, np.zeros((3, len(same_as))))]
        uniform[STORED][name] = 0
        for base in undominated_bases():
            fmt = get_format(base)
            if not fmt.is_coded:
                continue
            size = fmt.num_bytes(shape, dtype)
            uniform.setdefault(f"{base} apart", {})[name] = len(row)
            row.append(Option(own, base, "own", NO_DELTA, len(distinct) * size, counts.alone(fmt.distortion)))
            for delta in lossy_deltas()[0] if len(distinct) > 1 else ():
                correction = get_format(delta)
                both = size + len(distinct) * correction.num_bytes(shape, dtype)
                error = counts.on_one_base(fmt.distortion * errors.repaired(fmt, correction), correction.distortion)
                uniform.setdefault(f"{base} + {delta}", {})[name] = len(row)
                row.append(Option(together, base, "merged", delta, both, error))
        options[name] = row
    return NonexpertOptions(options, uniform)


def with_nonexperts(uniform: Mapping[str, IntArray], others: NonexpertOptions) -> dict[str, IntArray]:
    """Every way to store all positions alike with every way to store all matrices alike; a matrix that all variants
    share, which some ways are not for, stays as it is."""
    found = {}
    for name, positions in uniform.items():
        for other, chosen in others.uniform.items():
            index = np.array([chosen.get(matrix, 0) for matrix in others.options], dtype=np.int64)
            found[f"{name}, {other}"] = np.concatenate([positions, index])
    return found


def nats_from_weights(family: Family, scan: FamilyScan) -> dict[str, FloatArray]:
    """name -> float [V]: nats a token for each unit of relative error of a packable matrix, by where it is."""
    nats = nats_by_place(family.packable, family.checkpoints[0], scan.expert_modules)
    return {name: np.full(len(scan.variant_names), nats[name]) for name in family.packable}


def nats_by_place(names: Iterable[str], checkpoint: Checkpoint, layers: tuple[str, ...]) -> dict[str, float]:
    """name -> the same of one variant. layers: paths of the experts."""
    by_layer = layer_weights(len(layers))
    by_layer = by_layer / by_layer.sum()
    tied = set(checkpoint.tied.values())
    found = {}
    for name in names:
        if name in checkpoint.architecture.vocab_tensors:
            found[name] = _NATS_OF_VOCABULARY * (1 + (name in tied))
        else:
            found[name] = float(_NATS_OF_PROJECTION * by_layer[layer_of(name, layers)])
    return found


def layer_of(name: str, layers: tuple[str, ...]) -> int:
    """The expert layer that shares most of its path with a matrix; of dense layers before them the first."""
    parts = name.split(".")

    def shared(path: str) -> int:
        return next((n for n, (a, b) in enumerate(zip(parts, path.split("."), strict=False)) if a != b), len(parts))

    return max(range(len(layers)), key=lambda layer: (shared(layers[layer]), -layer))


@dataclass(frozen=True, eq=False)
class _Counts:
    """float [V], nats a token: `whole` for an error as large as the matrix itself, as rounding noise; `base` for one as
    large as the mean of the versions; `coherent` and `spread` for what a version differs from the mean by."""

    whole: FloatArray
    base: FloatArray
    coherent: FloatArray
    spread: FloatArray

    @classmethod
    def of(cls, square: FloatArray, distinct: list[int], nats: FloatArray) -> _Counts:
        """`square` [V, V] as a position of `FamilyScan.pair_square`; `distinct`: the versions that the mean is over."""
        own = np.maximum(square.diagonal(), 1e-30)
        between = square - np.diag(square.diagonal())
        inside = between[np.ix_(distinct, distinct)].sum() / (2 * len(distinct) ** 2)  # mean ‖W − mean‖²
        away = np.maximum(between[:, distinct].sum(axis=1) / len(distinct) - inside, 0)
        merged = max(float(own[distinct].mean() - inside), 0.0)
        pairs = len(distinct) * (len(distinct) - 1)
        distance = 0.0 if not pairs else float(np.sqrt(between[np.ix_(distinct, distinct)].sum() / pairs / own.mean()))
        factor = nats / own
        coherent = _COHERENCE * coherence(distance)
        return cls(nats, factor * merged, factor * away * coherent, factor * away * RELEVANCE)

    def alone(self, distortion: float) -> FloatArray:
        """float [3, V] as `QuantisationErrors.components`: each version rounded by itself."""
        nothing = np.zeros_like(self.whole)
        return np.stack((nothing, nothing, distortion * self.whole))

    def on_one_base(self, rounding: float, share: float) -> FloatArray:
        """float [3, V]. rounding: share of the base's energy that is left; share: of a delta's."""
        return np.stack((share**2 * self.coherent, share * (1 - share) * self.spread, rounding * self.base))
