"""What each way to store a position costs each variant, predicted in nats a token, without encoding anything.

Rounding a matrix to a format leaves the share D of its energy (`DISTORTION`), so three energies at a position and a
partition of the variants into groups, for each variant, say what all formats cost. With M the group's merged expert:

    coherent   the outputs' error for M in place of W_v
    spread     ‖W_v − M‖², as noise at the outputs
    base       ‖M‖², as noise at the outputs

    damage(base b, no delta) = coherent + D_b · base
    damage(base b, delta d)  = D_d² · coherent + D_d (1 − D_d) · spread + D_d · D_b · base

since least-squares levels leave D_d of the difference itself (they shrink it) and D_d (1 − D_d) of its energy as noise.

From the weights alone, energies are relative to ‖W_v‖² and every position counts alike. With text, the error of the
outputs of the tokens routed there is measured, Σ g² ‖E(x; W) − E(x; Ŵ)‖² a token: tr(ΔW G ΔWᵀ) for what is coherent,
and what error feedback (GPTQ) leaves of rounding noise, D · ‖W‖² / I · Σ_j 1 / U_jj² with UᵀU = G⁻¹. One more factor
turns it into KL: each layer's experts are disturbed alone, and the KL of the logits is measured (method.md, 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from polymoe.offline.merge import pair_squares, spread, ward_groups

if TYPE_CHECKING:
    from polymoe.offline.family import Family
    from polymoe.offline.scan import FamilyScan

FloatArray = NDArray[np.float64]
Partition = tuple[tuple[int, ...], ...]

# Share of a Gaussian matrix's energy that a format leaves as error (its own row scales, encoded without text).
DISTORTION = {
    "stored": 1.3e-6,
    "fp8": 6.8e-4,
    "int8": 4.8e-5,
    **{f"int{bits}": left for bits, left in ((3, 0.0345), (4, 0.0095), (5, 0.0025), (6, 0.00064))},
    **{f"d{bits}": left for bits, left in enumerate((0.363, 0.1175, 0.0345, 0.0095, 0.0025), start=1)},
}
# From the weights alone: KL of a model for each unit of its experts' relative error as noise, and what a base's
# rounding counts of it. Fitted to 13 uniform schemes on a family of four fine-tunes, within a factor of 1.8 each; only
# their ratios decide a plan.
NATS_PER_ERROR = 1.5
ROUNDING = 0.7
# 1 − top-1 agreement ≈ this · √KL, from the same measurements.
TOP1_PER_ROOT_KL = 0.75


def coherence(distance: float) -> float:
    """How much more leaving out what training changed counts than noise of the same energy.

    `distance`: mean distance of a pair of variants relative to the norm of their weights. What training changed all
    pushes one way, so that KL grows less than quadratically with it: measured (policy `mean`, and 1-bit deltas) 4.8 at
    a distance of 0.19 and 23 at 0.03, a power law between; not extrapolated far below.
    """
    return float(min(0.95 * max(distance, 1e-9) ** -0.9, 40.0))


@dataclass(frozen=True, eq=False)
class Energies:
    """`partitions[l][e]`: the ways to group the variants there. `coherent`, `spread`, `base` float64 [L, E, N, V], in
    nats a token, N the number of partitions at most (0 beyond a position's own).

    top1_per_root_kl: float [V], 1 − top-1 agreement of a variant for a root of KL.
    """

    partitions: tuple[tuple[tuple[Partition, ...], ...], ...]
    coherent: FloatArray
    spread: FloatArray
    base: FloatArray
    top1_per_root_kl: FloatArray

    def damage(self, layer: int, expert: int, partition: int, base: str, delta: str) -> FloatArray:
        """float [V], nats a token, for a merged base in format `base` with deltas of format `delta` ("none": none)."""
        where = layer, expert, partition
        rounding = DISTORTION[base] * self.base[where]
        if delta == "none":
            damage: FloatArray = self.coherent[where] + rounding
        elif delta.startswith("±"):  # the delta is against the exact midpoint: it does not repair the base's rounding
            damage = self._left(where, delta[1:]) + rounding
        else:
            damage = self._left(where, delta) + DISTORTION[delta] * rounding
        return damage

    def _left(self, where: tuple[int, int, int], delta: str) -> FloatArray:
        """What a delta format leaves of W_v − M: D of it shrunk towards M, the rest as noise."""
        share = DISTORTION[delta]
        left: FloatArray = share**2 * self.coherent[where] + share * (1 - share) * self.spread[where]
        return left

    @staticmethod
    def of_weights(family: Family, scan: FamilyScan, console: Console | None = None) -> Energies:
        """From one pass over the weights."""
        version = scan.expert_version
        num_variants, num_layers, num_experts = version.shape
        square = pair_squares(family, scan, console)
        coherent = coherence(float(scan.relative_distance.mean()))
        partitions = tuple(
            tuple(partitions_of(square[layer, expert]) for expert in range(num_experts)) for layer in range(num_layers)
        )
        filled = EnergyTable(partitions, num_variants)
        for layer, expert in np.ndindex(num_layers, num_experts):
            own = np.maximum(square[layer, expert].diagonal(), 1e-30)
            factor = NATS_PER_ERROR / (num_layers * num_experts) / own
            for n, partition in enumerate(partitions[layer][expert]):
                for group in partition:
                    inside = spread(square[layer, expert], group) / len(group)
                    merged = own[list(group)].mean() - inside  # ‖mean‖²
                    for v in group:
                        # ‖W_v − mean‖² = mean over the group of ‖W_v − W_w‖² less the spread's mean
                        away = max(0.0, sum(square[layer, expert, v, w] for w in group if w != v) / len(group) - inside)
                        filled.spread[layer, expert, n, v] = factor[v] * away
                        filled.coherent[layer, expert, n, v] = factor[v] * away * coherent
                        filled.base[layer, expert, n, v] = factor[v] * merged * ROUNDING
        return filled.result(np.full(num_variants, TOP1_PER_ROOT_KL))


class EnergyTable:
    """Energies while they are filled in."""

    def __init__(self, partitions: Sequence[Sequence[tuple[Partition, ...]]], num_variants: int) -> None:
        self.partitions = tuple(tuple(row) for row in partitions)
        most = max(len(found) for row in self.partitions for found in row)
        shape = (len(self.partitions), len(self.partitions[0]), most, num_variants)
        self.coherent, self.spread, self.base = np.zeros(shape), np.zeros(shape), np.zeros(shape)

    def result(self, top1: FloatArray) -> Energies:
        return Energies(self.partitions, self.coherent, self.spread, self.base, top1)


def partitions_of(square: FloatArray) -> tuple[Partition, ...]:
    """All variants together, in two groups (of three variants and more), and every version by itself. `square` as a
    position of `pair_squares`; identical experts are always in one group."""
    distinct = len(ward_groups(square, len(square)))
    found: list[Partition] = []
    for clusters in (1, 2, distinct):
        if clusters <= distinct:
            groups = tuple(sorted(ward_groups(square, clusters)))
            if groups not in found:
                found.append(groups)
    return tuple(found)
