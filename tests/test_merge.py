"""Merging: what is least at the optimum, which variants go together, and bytes of lossless deltas."""

from pathlib import Path

import numpy as np
import torch

from families import make_family
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.merge import (
    cluster_positions,
    exact_delta_bytes,
    mean,
    regmean,
    spread,
    ward_groups,
    weighted_mean,
)
from polymoe.offline.similarity.scan import scan_family
from polymoe.quant.exact import encode_exact


def moment(inputs: int, rank: int, seed: int) -> torch.Tensor:
    x = torch.randn(rank, inputs, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / rank


def test_regmean_is_the_least_output_error_of_all_merges() -> None:
    weights = [torch.randn(6, 16, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    moments = [moment(16, 64, s) for s in range(3)]

    def error(merged: torch.Tensor) -> float:
        return sum(float((((w - merged) @ g) * (w - merged)).sum()) for w, g in zip(weights, moments, strict=True))

    best = error(regmean(weights, moments))
    assert best < error(mean(weights))
    assert best < error(weighted_mean(weights, moments))
    for seed in range(5):
        nudge = 0.3 * torch.randn(6, 16, generator=torch.Generator().manual_seed(100 + seed))
        assert best < error(regmean(weights, moments) + nudge)


def test_merges_fall_back_to_the_mean() -> None:
    weights = [torch.randn(4, 8), torch.randn(4, 8)]
    for moments in ([torch.eye(8)] * 2, [torch.zeros(8, 8)] * 2):
        assert torch.allclose(regmean(weights, moments), mean(weights), atol=1e-5)
        assert torch.allclose(weighted_mean(weights, moments), mean(weights), atol=1e-5)


def test_a_variant_that_never_routes_there_has_next_to_no_say() -> None:
    weights = [torch.randn(4, 8), torch.randn(4, 8)]
    merged = weighted_mean(weights, [moment(8, 20, 0), torch.zeros(8, 8)])
    assert (merged - weights[0]).norm() < 0.05 * (weights[1] - weights[0]).norm()


def test_ward_puts_near_variants_together_and_never_parts_identical_ones() -> None:
    points = np.array([0.0, 1.0, 1.1, 5.0, 5.0])
    square = (points[:, None] - points[None]) ** 2
    assert sorted(ward_groups(square, 5)) == [(0,), (1,), (2,), (3, 4)]
    assert sorted(ward_groups(square, 3)) == [(0,), (1, 2), (3, 4)]
    assert sorted(ward_groups(square, 2)) == [(0, 1, 2), (3, 4)]
    assert ward_groups(square, 1) == [(0, 1, 2, 3, 4)]
    group = (0, 1, 2)
    assert np.isclose(spread(square, group), ((points[:3] - points[:3].mean()) ** 2).sum())


def test_distances_and_clusters_of_a_family(tmp_path: Path) -> None:
    family = Family.open(make_family("mixtral", tmp_path, 3, perturb=0.2, frozen_experts=[1]))
    scan = scan_family(family)
    square = scan.pair_square
    info, (layer, expert) = family.architecture, (1, 2)
    rows = [
        torch.cat([c.tensor(info.expert_tensor(layer, t))[expert].flatten() for t in info.expert_shapes])
        for c in family.checkpoints
    ]
    assert np.isclose(square[layer, expert, 0, 2], float((rows[0] - rows[2]).square().sum()), rtol=1e-4)
    assert np.isclose(square[layer, expert, 1, 1], float(rows[1].square().sum()), rtol=1e-4)
    groups = cluster_positions(scan, 2)
    assert (groups[:, :, 1] == 0).all()  # identical everywhere
    assert all(len(set(groups[:, layer, 0])) == 2 for layer in range(2))
    assert (groups <= np.arange(3)[:, None, None]).all()  # named by the lowest
    assert (cluster_positions(scan, 3)[:, :, 0] == np.arange(3)[:, None]).all()


def test_exact_delta_bytes_are_those_that_encoding_makes(tmp_path: Path) -> None:
    family = Family.open(make_family("gpt_oss", tmp_path, 2, perturb=0.001, dtype=torch.bfloat16, frozen_experts=[3]))
    scan = scan_family(family)
    counted = exact_delta_bytes(family, scan)
    assert (counted[0] == 0).all()
    assert (counted[1, :, 3] == 0).all()
    info, total = family.architecture, 0
    for tensor in info.expert_shapes:
        base, other = (c.tensor(info.expert_tensor(0, tensor))[0] for c in family.checkpoints)
        if base.ndim == 2:  # gpt-oss holds [in, out]
            base, other = base.T.contiguous(), other.T.contiguous()
        total += sum(part.nbytes for part in encode_exact(other, base).values())
    assert counted[1, 0, 0] == total
