"""Algorithm 1 against its definition, the policies, and the budgets."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from polymoe.errors import PlanError
from polymoe.offline.plan.budget import build_plan, expert_capacity, parse_memory
from polymoe.offline.plan.layout import lay_out, table
from polymoe.offline.plan.plan import Plan, paper_plan, round_robin_layout, separate_plan
from polymoe.offline.similarity.scan import FamilyScan


def by_definition(distance: list[list[float]], num_variants: int, capacity: int) -> list[list[int]]:
    """Algorithm 1 in plain words: take the nearest position left, earliest layer and expert first on a tie."""
    left = [(layer, expert) for layer in range(len(distance)) for expert in range(len(distance[0]))]
    owner = [[-1] * len(distance[0]) for _ in distance]
    for i in range(min(capacity, len(left))):
        best = left[0]
        for position in left[1:]:
            if distance[position[0]][position[1]] < distance[best[0]][best[1]]:
                best = position
        owner[best[0]][best[1]] = i % num_variants
        left.remove(best)
    return owner


@pytest.mark.parametrize("seed", range(40))
def test_round_robin_layout_is_algorithm_1_on_ties_too(seed: int) -> None:
    rng = random.Random(seed)
    layers, experts, variants = rng.randint(1, 5), rng.randint(1, 7), rng.randint(1, 5)
    few_values = [rng.choice([0.0, 0.5, 1.0, 1.5]) for _ in range(3)]  # many ties
    distance = [[rng.choice(few_values) for _ in range(experts)] for _ in range(layers)]
    capacity = rng.randint(0, layers * experts + 3)
    want = by_definition(distance, variants, capacity)
    for given in (distance, np.array(distance), torch.tensor(distance), torch.tensor(distance, dtype=torch.bfloat16)):
        owner = round_robin_layout(given, variants, capacity)
        assert owner.dtype.kind == "i"
        assert owner.tolist() == want


def test_all_equal_distances_keep_layer_major_order() -> None:
    assert round_robin_layout(np.ones((2, 3)), 2, 5).tolist() == [[0, 1, 0], [1, 0, -1]]


@pytest.mark.parametrize(
    ("distance", "variants", "capacity", "reason"),
    [
        ([[1.0]], 0, 1, "num_variants"),
        ([[1.0]], 2, -1, "capacity"),
        ([1.0], 2, 1, r"shape \[L, E\]"),
        ([[float("nan")]], 2, 1, "not finite"),
        ([[1.0], [1.0, 2.0]], 2, 1, "numbers"),
        ([["x"]], 2, 1, "numbers"),
    ],
)
def test_bad_inputs(distance: object, variants: int, capacity: int, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        round_robin_layout(distance, variants, capacity)


def random_versions(rng: random.Random, variants: int, layers: int, experts: int) -> np.ndarray:
    """Some experts are bit-identical between some variants."""
    contents = np.array([[[rng.randint(0, 2) for _ in range(experts)] for _ in range(layers)] for _ in range(variants)])
    version = np.zeros_like(contents)
    for v in range(variants):
        for w in reversed(range(v + 1)):
            version[v][contents[v] == contents[w]] = w
    return version


def distinct(version: np.ndarray) -> int:
    _, layers, experts = version.shape
    return sum(len(set(version[:, layer, e].tolist())) for layer in range(layers) for e in range(experts))


def num_resident(plan: Plan) -> int:
    return sum(len(layer) for layer in lay_out(plan).resident)


@pytest.mark.parametrize("seed", range(30))
def test_plans_hold_together(seed: int) -> None:
    """Budgets are kept, tables point at what they promise, and an expert that serves is never stored twice."""
    rng = random.Random(seed)
    variants, layers, experts = rng.randint(2, 5), rng.randint(1, 4), rng.randint(1, 5)
    version = random_versions(rng, variants, layers, experts)
    distance = np.array([[float(rng.randint(0, 3)) for _ in range(experts)] for _ in range(layers)])
    capacity = rng.randint(0, variants * layers * experts + 2)
    for plan in (paper_plan(distance, version, capacity), separate_plan(version, capacity)):
        plan.check_integrity()
        layout = lay_out(plan)
        assert num_resident(plan) <= capacity
        assert (plan.serving == np.take_along_axis(version, plan.serving, axis=0)).all()  # canonical
        assert layout.table.dtype == np.int32
        assert (table(plan) == layout.table).all()
        for v, layer, e in np.ndindex(*version.shape):
            index = layout.table[v, layer, e]
            stored = layout.resident[layer][index] if index >= 0 else layout.host[layer][-1 - index]
            assert stored == (int(plan.serving[v, layer, e]), e)
            assert (index >= 0) == plan.resident[v, layer, e]
        for layer in range(layers):
            assert len(set(layout.resident[layer] + layout.host[layer])) == len(
                layout.resident[layer] + layout.host[layer]
            )
        assert sum(plan.position_counts().values()) == layers * experts

    paper, owner = paper_plan(distance, version, capacity), round_robin_layout(distance, variants, capacity)
    assert (paper.serving[paper.resident == 0] == version[paper.resident == 0]).all()  # absent: each its own
    if capacity <= layers * experts:
        assert (paper.resident == (owner >= 0)).all()
        for layer, e in np.argwhere(owner >= 0):
            assert (paper.serving[:, layer, e] == version[owner[layer, e], layer, e]).all()
    separate = separate_plan(version, capacity)
    assert (separate.serving == version).all()  # lossless at any budget
    assert num_resident(separate) == min(capacity, distinct(version))


def test_spare_capacity_separates_the_largest_distances_first() -> None:
    version = np.arange(3)[:, None, None] + np.zeros((3, 2, 2), dtype=int)
    plan = paper_plan([[1.0, 4.0], [2.0, 3.0]], version, capacity=4 + 2 + 2 + 1)
    own = (plan.serving == version).all(axis=0)
    assert own.tolist() == [[False, True], [False, True]]  # two fit (two more experts each), one expert stays unused
    assert plan.position_counts() == {"shared": 2, "separate": 2, "absent": 0}
    full = paper_plan([[1.0, 4.0], [2.0, 3.0]], version, capacity=12)
    assert (full.serving == version).all()


def test_separate_keeps_what_most_variants_use_then_spreads() -> None:
    version = np.arange(4)[:, None, None] + np.zeros((4, 4, 2), dtype=int)
    version[:, 2, 1] = 0  # one position is identical in all
    plan = separate_plan(version, capacity=1 + 4)
    assert plan.resident[:, 2, 1].all()
    rest = plan.resident.copy()
    rest[:, 2, 1] = False
    assert rest.sum(axis=(0, 2)).tolist() == [1, 1, 1, 1]  # one a layer
    assert rest.sum(axis=(1, 2)).tolist() == [1, 1, 1, 1]  # one a variant


@pytest.fixture
def scan() -> FamilyScan:
    version = np.arange(2)[:, None, None] + np.zeros((2, 2, 5), dtype=int)
    return FamilyScan(
        variant_names=("a", "b"),
        expert_modules=("model.layers.1.mlp.experts", "model.layers.2.mlp.experts"),
        distance=np.arange(10.0).reshape(2, 5),
        norm=np.ones((2, 5)),
        pair_distance=np.zeros((2, 2)),
        pair_square=np.zeros((2, 5, 2, 2)),
        changed_bytes=np.zeros((2, 2, 5), dtype=np.int64),
        expert_same_as=version,
        expert_hash=np.zeros((2, 2, 5, 32), dtype=np.uint8),
        expert_bytes=100,
        nonexpert_same_as={"embed": (0, 1), "norm": (0, 0)},
        nonexpert_hash={"embed": (b"1", b"2"), "norm": (b"3", b"3")},
        nonexpert_bytes={"embed": (300, 310), "norm": (30, 30)},
    )


def test_budgets(scan: FamilyScan) -> None:
    fixed = 300 + 310 + 30 + 4 * 20
    assert (scan.nonexpert_bytes_total, scan.table_bytes) == (640, 80)
    assert expert_capacity(parse_memory("1.0x"), scan) == 10
    assert expert_capacity(parse_memory("1.1x"), scan) == 11
    assert expert_capacity(parse_memory("0x"), scan) == 0
    assert expert_capacity(parse_memory(f"{fixed}B"), scan) == 0
    assert expert_capacity(parse_memory(f"{fixed + 399}B"), scan) == 3
    with pytest.raises(PlanError, match=f"minimum of .*{fixed} bytes"):
        expert_capacity(parse_memory(f"{fixed - 1}B"), scan)


@pytest.mark.parametrize("text", ["", "x", "-1x", "1.x", "1e3x", "24 apples", "nan", "1.0xx"])
def test_malformed_budgets(text: str) -> None:
    with pytest.raises(PlanError, match=r"not a memory budget; write 1\.0x"):
        parse_memory(text)


def test_policies(scan: FamilyScan) -> None:
    assert build_plan(scan, "paper").position_counts() == {"shared": 10, "separate": 0, "absent": 0}
    assert build_plan(scan, "separate").position_counts() == {"shared": 0, "separate": 10, "absent": 0}
    assert build_plan(scan, "paper", "0x").position_counts()["absent"] == 10
    assert num_resident(build_plan(scan, "separate", "1.5x")) == 15
    with pytest.raises(PlanError, match=r"unknown policy 'best'; there are auto, paper, .* and cluster"):
        build_plan(scan, "best")


def test_bit_identical_experts_are_shared_in_every_policy(scan: FamilyScan) -> None:
    same = replace(scan, expert_same_as=np.zeros_like(scan.expert_same_as))
    for plan in (build_plan(same, "separate"), build_plan(same, "paper", "2x")):
        assert plan.position_counts() == {"shared": 10, "separate": 0, "absent": 0}
        assert num_resident(plan) == 10
