"""What each way to store a position costs each variant, predicted in nats a token, without encoding anything.

Rounding a matrix to a format leaves the share D of its energy (`Format.distortion`), so three figures at a position
and a partition of the variants into groups, for each variant, say what all formats cost. With M the group's merged
expert:

    coherent   the outputs' error for M in place of W_v
    spread     ‖W_v − M‖², as noise at the outputs
    base       ‖M‖², as noise at the outputs

    quantisation error(base b, no delta) = coherent + D_b · base
    quantisation error(base b, delta d)  = D_d² · coherent + D_d (1 − D_d) · spread + R_bd · D_b · base

since least-squares levels leave D_d of the difference itself (they shrink it) and D_d (1 − D_d) of its energy as noise,
and R_bd (`Format.repair`) of the base's rounding error.

From the weights alone, errors are relative to ‖W_v‖² and positions count by `importance`. With text, the error of the
outputs of the tokens routed there is measured, Σ g² ‖E(x; W) − E(x; Ŵ)‖² a token: tr(ΔW G ΔWᵀ) for what is coherent,
and what error feedback (GPTQ) leaves of rounding noise, D · ‖W‖² / I · Σ_j 1 / U_jj² with UᵀU = G⁻¹. One more factor
turns it into KL: each layer's experts are disturbed alone, and the KL of the logits is measured (method.md, 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from polymoe.offline.plan.correction import correction
from polymoe.offline.plan.merge import spread, ward_groups
from polymoe.offline.similarity.scan import FamilyScan
from polymoe.quant.formats import Format, get_format

FloatArray = NDArray[np.float64]
Partition = tuple[tuple[int, ...], ...]

# From the weights alone: KL of a model for each unit of its experts' relative error as rounding noise. 0.8 to 5 were
# measured on the three families; it scales all predictions alike and decides no plan.
NATS_PER_ERROR = 1.5
# How much more a delta's rounding, noise in the shape of what training changed, counts than noise in the shape of the
# weights (1.5, 1.9 and 2.2 were measured).
RELEVANCE = 1.8
# The target of agreement was met on three families with so many times the error that the weights alone predict.
CAUTION = 2.0
# 1 − top-1 agreement ≈ this · √KL, from the same measurements.
TOP1_PER_ROOT_KL = 0.75


def coherence(distance: float) -> float:
    """How much more leaving out what training changed counts than rounding noise of the same energy.

    `distance`: mean distance of a pair of variants relative to the norm of their weights. 10, 2 and 26 were measured
    (without deltas and with 1-bit ones) at distances of 0.19, 0.078 and 0.03; not extrapolated far below.
    """
    return min(5 + 0.018 / max(distance, 1e-9) ** 2, 40.0)


def importance(norm_square: FloatArray) -> FloatArray:
    """float [L, E], mean 1: what a relative error of an expert counts, for ‖W‖² [L, E] of a family.

    Experts that are used much grow in training, and the first layers' errors go through all others: beside errors
    measured on text, ‖W‖⁴ and 1, 1/2, 1/3, 1/4, 1/4, … by layer rank the positions of three families with coefficients
    of 0.4 to 0.8, relative errors alone with −0.5 to 0.
    """
    by_layer = layer_weights(len(norm_square))[:, None]
    weight: FloatArray = (norm_square / max(float(norm_square.mean()), 1e-30)) ** 2 * by_layer
    return weight / max(float(weight.mean()), 1e-30)


def layer_weights(num_layers: int) -> FloatArray:
    """float [L]: what an error counts by the layer that it is in, the first's 1."""
    weights: FloatArray = np.maximum(1 / np.arange(1, num_layers + 1), 0.25)
    return weights


@dataclass(frozen=True, eq=False)
class QuantisationErrors:
    """`partitions[l][e]`: the ways to group the variants there. `coherent`, `spread`, `base` float64 [L, E, N, V], in
    nats a token, N the number of partitions at most (0 beyond a position's own).

    top1_per_root_kl: float [V], 1 − top-1 agreement of a variant for a root of KL.
    traffic: float [L, E], share of a layer's routed tokens (mean over the variants) that an expert gets.
    caution: a target must be met for so many times the predicted error.
    nonexpert_nats: name -> float [V], nats a token for each unit of relative error of a matrix beside the experts,
        where that was measured.
    measured_repair: R_bd is as measured, else D_d. (With text, error feedback fits the deltas to what matters, and
        plans by the measured ones were no better.)
    """

    partitions: tuple[tuple[tuple[Partition, ...], ...], ...]
    coherent: FloatArray
    spread: FloatArray
    base: FloatArray
    top1_per_root_kl: FloatArray
    traffic: FloatArray
    caution: float = 1.0
    measured_repair: bool = False
    nonexpert_nats: Mapping[str, FloatArray] = field(default_factory=dict)

    def repaired(self, base: Format, delta: Format) -> float:
        """Share of a base's rounding error that is left below deltas that repair it."""
        return base.repair.get(delta.name, delta.distortion) if self.measured_repair else delta.distortion

    def of(self, layer: int, expert: int, partition: int, base: str, delta: str) -> FloatArray:
        """float [V], nats a token, for a merged base in format `base` with deltas of format `delta` ("none": none)."""
        total: FloatArray = self.components(layer, expert, partition, base, delta).sum(axis=0)
        return total

    def components(self, layer: int, expert: int, partition: int, base: str, delta: str) -> FloatArray:
        """float [3, V], nats a token: what is left of `coherent`, of `spread` and of `base`."""
        where = layer, expert, partition
        fmt, deltas = get_format(base), correction(delta)
        rounding = fmt.distortion * self.base[where]
        if deltas is None:
            return np.stack((self.coherent[where], np.zeros_like(rounding), rounding))
        share = deltas.fmt.distortion
        if not deltas.mirrored:  # which is against the exact midpoint and does not repair the base's rounding
            rounding = rounding * self.repaired(fmt, deltas.fmt)
        # Of W_v − M the share is left of itself, shrunk towards M, and the rest of it as noise.
        return np.stack((share**2 * self.coherent[where], share * (1 - share) * self.spread[where], rounding))

    @staticmethod
    def of_weights(scan: FamilyScan) -> QuantisationErrors:
        """From the distances alone."""
        same_as = scan.expert_same_as
        num_variants, num_layers, num_experts = same_as.shape
        square = scan.pair_square
        coherent = coherence(float(scan.relative_distance.mean()))
        partitions = tuple(
            tuple(partitions_of(square[layer, expert]) for expert in range(num_experts)) for layer in range(num_layers)
        )
        filled = ErrorTable(partitions, num_variants)
        counts = importance(square.diagonal(axis1=2, axis2=3).mean(axis=2))
        for layer, expert in np.ndindex(num_layers, num_experts):
            own = np.maximum(square[layer, expert].diagonal(), 1e-30)
            factor = NATS_PER_ERROR * counts[layer, expert] / (num_layers * num_experts) / own
            for n, partition in enumerate(partitions[layer][expert]):
                for group in partition:
                    inside = spread(square[layer, expert], group) / len(group)
                    merged = own[list(group)].mean() - inside  # ‖mean‖²
                    for v in group:
                        # ‖W_v − mean‖² = mean over the group of ‖W_v − W_w‖² less the spread's mean
                        away = max(0.0, sum(square[layer, expert, v, w] for w in group if w != v) / len(group) - inside)
                        filled.spread[layer, expert, n, v] = factor[v] * away * RELEVANCE
                        filled.coherent[layer, expert, n, v] = factor[v] * away * coherent
                        filled.base[layer, expert, n, v] = factor[v] * merged
        alike = np.full((num_layers, num_experts), 1 / num_experts)
        return filled.result(np.full(num_variants, TOP1_PER_ROOT_KL), alike, CAUTION, measured_repair=True)


class ErrorTable:
    """`QuantisationErrors` while they are filled in."""

    def __init__(self, partitions: Sequence[Sequence[tuple[Partition, ...]]], num_variants: int) -> None:
        self.partitions = tuple(tuple(row) for row in partitions)
        most = max(len(found) for row in self.partitions for found in row)
        shape = (len(self.partitions), len(self.partitions[0]), most, num_variants)
        self.coherent, self.spread, self.base = np.zeros(shape), np.zeros(shape), np.zeros(shape)

    def result(
        self,
        top1: FloatArray,
        traffic: FloatArray,
        caution: float = 1.0,
        measured_repair: bool = False,
    ) -> QuantisationErrors:
        found = self.partitions, self.coherent, self.spread, self.base
        return QuantisationErrors(*found, top1, traffic, caution, measured_repair)


def partitions_of(square: FloatArray) -> tuple[Partition, ...]:
    """All variants together, in two groups (of three variants and more), and every expert that differs by itself.
    `square` as a position of `FamilyScan.pair_square`; identical experts are always in one group."""
    distinct = len(ward_groups(square, len(square)))
    found: list[Partition] = []
    for clusters in (1, 2, distinct):
        if clusters <= distinct:
            groups = tuple(sorted(ward_groups(square, clusters)))
            if groups not in found:
                found.append(groups)
    return tuple(found)
