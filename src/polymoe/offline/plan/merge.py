"""Experts of several variants into one, the groups in which that costs least, and what differs bit for bit.

Mean, or RegMean (arXiv 2212.09849) per matrix: W* = (Σ_v W_v G_v) (Σ_v G_v)⁻¹ makes Σ_v tr((W_v − W*) G_v (W_v − W*)ᵀ)
least, with G_v = Σ g² x xᵀ over the inputs x that variant v routed there with weight g.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polymoe.offline.checkpoint.family import Family
from polymoe.offline.checkpoint.matrices import is_transposed, matrix_shape
from polymoe.offline.similarity.scan import FamilyScan
from polymoe.quant.exact import exact_bytes

RIDGE = 0.03  # of the mean diagonal over variants, added to every G: what no text has seen is merged by the mean


def mean(weights: Sequence[Tensor]) -> Tensor:
    """float32 mean of [O, I] matrices (or of biases)."""
    total = weights[0].float().clone()
    for weight in weights[1:]:
        total += weight.float()
    return total / len(weights)


def weighted_mean(weights: Sequence[Tensor], moments: Sequence[Tensor]) -> Tensor:
    """The mean with each variant's tr(G_v) as its weight: RegMean for inputs alike in all directions.

    It is the merge for a base with deltas, whose size it keeps small where the variant uses the expert.
    """
    used = torch.stack([moment.diagonal().mean() for moment in moments]).double()
    share = used + RIDGE * used.mean() + 1e-30
    share = (share / share.sum()).float()
    total = torch.zeros_like(weights[0], dtype=torch.float32)
    for weight, factor in zip(weights, share.tolist(), strict=True):
        total += factor * weight.float()
    return total


def regmean(weights: Sequence[Tensor], moments: Sequence[Tensor]) -> Tensor:
    """RegMean of matrices [O, I] with moments [I, I], float32; the arithmetic is float64."""
    diagonal = torch.stack([moment.diagonal().mean() for moment in moments]).double().mean()
    ridge = (RIDGE * diagonal + 1e-30) * torch.eye(moments[0].shape[0], dtype=torch.float64)
    left = torch.zeros(weights[0].shape, dtype=torch.float64)
    total = torch.zeros_like(ridge)
    for weight, moment in zip(weights, moments, strict=True):
        damped = moment.double() + ridge
        left += weight.double() @ damped
        total += damped
    merged: Tensor = torch.linalg.solve(total, left.T).T.float().contiguous()
    return merged


def cluster_positions(scan: FamilyScan, clusters: int) -> NDArray[np.int64]:
    """int [V, L, E]: the lowest variant of v's group at (l, e), with at most `clusters` groups at each position."""
    square = scan.pair_square
    num_layers, num_experts, num_variants, _ = square.shape
    leader = np.zeros((num_variants, num_layers, num_experts), dtype=np.int64)
    for layer, expert in np.ndindex(num_layers, num_experts):
        for group in ward_groups(square[layer, expert], clusters):
            leader[list(group), layer, expert] = min(group)
    return leader


def ward_groups(square: NDArray[np.float64], clusters: int) -> list[tuple[int, ...]]:
    """At most `clusters` groups with a small Σ ‖W_v − mean of its group‖² (Ward's agglomeration; `square` [V, V])."""
    groups: list[tuple[int, ...]] = [(v,) for v in range(len(square))]
    while len(groups) > 1:
        costs = [
            (spread(square, a + b) - spread(square, a) - spread(square, b), i, j)
            for i, a in enumerate(groups)
            for j, b in enumerate(groups[:i])
        ]
        cost, i, j = min(costs)
        if len(groups) <= clusters and cost > 0:
            break  # identical experts are always together
        groups[j] = tuple(sorted(groups[j] + groups[i]))
        del groups[i]
    return groups


def spread(square: NDArray[np.float64], group: Sequence[int]) -> float:
    """Σ_{v in group} ‖W_v − mean‖² = Σ_{pairs} ‖W_v − W_w‖² / size."""
    pairs = [square[v, w] for i, v in enumerate(group) for w in group[:i]]
    return float(sum(pairs)) / len(group)


def exact_delta_bytes(family: Family, scan: FamilyScan) -> NDArray[np.int64]:
    """int [V, L, E]: bytes of an exact delta of v's expert against the first variant's; 0 where it is identical."""
    shapes, transposed = family.architecture.expert_shapes.values(), is_transposed(family)
    unchanged = sum(exact_bytes(matrix_shape(tuple(shape), transposed), 0, torch.uint8) for shape in shapes)
    differs = scan.expert_same_as != scan.expert_same_as[:1]
    total: NDArray[np.int64] = np.where(differs, unchanged + scan.changed_bytes, 0)
    return total
