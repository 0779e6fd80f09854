"""Policy `auto`: the knapsack against brute force, its targets, and predicted error against measured."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from encoded import served_experts
from families import make_family
from polymoe.errors import PlanError
from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.allocate import auto_plan, position_options, uniform_answers
from polymoe.offline.plan.budget import build_plan
from polymoe.offline.plan.error_on_text import errors_on_text
from polymoe.offline.plan.knapsack import WORST_TO_MEAN, Choices, Option, fewest_bytes
from polymoe.offline.plan.layout import lay_out
from polymoe.offline.plan.options import PlanOptions
from polymoe.offline.plan.plan import Plan
from polymoe.offline.plan.quantisation_error import QuantisationErrors, partitions_of
from polymoe.offline.plan.sizes import ExpertSizes, plan_bytes
from polymoe.offline.similarity.scan import scan_family

GROUP = ((0, 1),)


def choices(seed: int, positions: int = 4, options: int = 5) -> Choices:
    rng = np.random.default_rng(seed)
    return Choices(
        [
            [Option(GROUP, "int4", "own", "none", int(b), d[None]) for b, d in zip(*one, strict=True)]
            for one in (
                (np.sort(rng.integers(1, 100, options)), np.sort(rng.random((options, 2)), axis=0)[::-1])
                for _ in range(positions)
            )
        ]
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_is_near_brute_force_and_never_over_budget(seed: int) -> None:
    """Greedy on the hull is optimal up to one step of one position."""
    given, weights = choices(seed), np.array([0.5, 0.5])
    everything = [np.array(c) for c in itertools.product(range(5), repeat=4)]
    for budget in np.linspace(given.least_bytes, given.bytes.max(axis=1).sum(), 7).astype(int):
        size, error = given.total(given.solve(int(budget), weights))
        assert size <= budget
        fitting = [given.total(c)[1] @ weights for c in everything if given.total(c)[0] <= budget]
        step = ((given.error[:, 0] - given.error[:, -1]) @ weights).max()
        assert min(fitting) <= error @ weights + 1e-12 <= min(fitting) + step + 1e-9


def test_more_bytes_never_hurt_and_the_ends_are_the_ends() -> None:
    given, weights = choices(3), np.array([0.5, 0.5])
    budgets = range(given.least_bytes, int(given.bytes.max(axis=1).sum()) + 1, 5)
    errors = [given.total(given.solve(budget, weights))[1] @ weights for budget in budgets]
    assert errors[0] == max(errors)
    assert given.total(given.solve(10**9, weights))[1] @ weights == pytest.approx(given.error[:, -1].mean(1).sum())


def test_the_worst_variant_is_bounded() -> None:
    """Variant 3 gains less from a byte than the other three together; left to the sum alone it would get none."""
    everyone = ((0, 1, 2, 3),)
    errors = [(0, (1.0, 1.0, 1.0, 4.0)), (10, (0.0, 0.0, 0.0, 4.0)), (10, (1.0, 1.0, 1.0, 2.0))]
    given = Choices([[Option(everyone, "", "own", "none", size, np.array([error])) for size, error in errors]] * 10)
    alone = given.total(given.solve(60, np.full(4, 0.25)))[1]
    assert alone.max() > WORST_TO_MEAN * alone.mean()
    bounded = given.total(given.best(60, trusted=True))[1]
    assert bounded.max() <= WORST_TO_MEAN * bounded.mean()


def test_without_text_nothing_gets_worse_than_uniform() -> None:
    """Two options that trade one kind of error for another are no way up, however good the sum is predicted to be."""
    kinds = [(10, (2.0, 2.0)), (20, (0.1, 2.5)), (25, (1.0, 2.0)), (40, (0.5, 1.0))]  # error by kind, one variant
    row = [Option(((0,),), "", "own", "none", size, np.array(error)[:, None]) for size, error in kinds]
    given = Choices([row] * 4, {"first": np.zeros(4, np.int64), "last": np.full(4, 3)})
    for budget in range(40, 161, 5):
        chosen = given.best(budget, trusted=False)
        assert given.total(chosen)[0] <= budget
        assert 1 not in chosen
    assert given.best(160, trusted=False).tolist() == [3] * 4
    assert given.best(110, trusted=False).tolist().count(3) == 2  # 40 + 40 and 10 + 10
    assert 1 in given.best(100, trusted=True)


def test_fewest_bytes_meet_the_target() -> None:
    given = choices(5)
    limit = 2.0 * given.error[:, -1].sum(axis=0)
    chosen = fewest_bytes(given, limit, trusted=True)
    size, error = given.total(chosen)
    assert (error <= limit).all()
    assert size <= given.bytes.max(axis=1).sum()
    if size > 1.1 * given.least_bytes:  # a tenth less does not keep it
        tighter = given.total(given.best(int(0.9 * size), trusted=True))[1]
        assert (tighter > limit).any()


def test_partitions_never_part_identical_experts() -> None:
    points = np.array([0.0, 0.0, 1.0, 3.0])
    found = partitions_of((points[:, None] - points[None]) ** 2)
    assert found == (((0, 1, 2, 3),), ((0, 1, 2), (3,)), ((0, 1), (2,), (3,)))
    assert partitions_of(np.zeros((2, 2))) == (((0, 1),),)


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    return Family.open(make_family(request.param, folder, 3, perturb=0.2, dtype=torch.bfloat16, frozen_experts=[2]))


def texts(count: int = 16, seed: int = 7) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, 110, (count, 32), generator=generator) for _ in range(3))


def one_model(family: Family) -> int:
    return family.expert_bytes * family.architecture.num_experts * family.architecture.num_layers


def is_lossless(plan: Plan) -> bool:
    deltas = set(plan.delta.reshape(-1))
    return (
        set(plan.base.reshape(-1)) == {"stored"}
        and set(plan.merge.reshape(-1)) == {"own"}
        and deltas <= {"none", "exact"}
    )


@pytest.mark.parametrize("with_text", [False, True])
def test_plans_keep_their_budget_and_get_better(family: Family, with_text: bool) -> None:
    scan, sizes = scan_family(family), ExpertSizes.of(family)
    calibration = Calibration(texts()) if with_text else None
    before = np.inf
    for multiple in (0.8, 1.2, 2.0, 3.0):
        budget = int(multiple * one_model(family))
        plan = auto_plan(family, scan, budget_bytes=budget, calibration=calibration)
        plan.check_integrity()
        assert sum(plan_bytes(lay_out(plan), sizes)) <= budget
        assert plan.predicted_error is not None
        assert plan.predicted_error.shape == (3,)
        assert plan.predicted_error.mean() <= before
        before = plan.predicted_error.mean()
    assert before == 0
    assert is_lossless(plan)


def test_without_text_a_plan_is_no_worse_than_any_uniform_one(family: Family) -> None:
    options = position_options(family, scan_family(family), QuantisationErrors.of_weights(scan_family(family)))
    given = Choices(options, uniform_answers(options))
    assert {"int4 + d2", "int8 + none", "stored + d1", "int4 apart"} <= set(given.uniform)
    for name, chosen in given.uniform.items():
        size, error = given.total(chosen)
        assert given.total(given.best(size, trusted=False))[1].mean() <= error.mean(), name


def test_a_budget_below_the_minimum_says_what_the_minimum_costs(family: Family) -> None:
    with pytest.raises(
        PlanError, match=r"the minimum is .* \(0\.\d+x of one model.s\), which is predicted to cost .* nats a token"
    ):
        auto_plan(family, scan_family(family), budget_bytes=one_model(family) // 20)
    scan = scan_family(family)
    cost = r"below the minimum of .*: .* of norms, routers and tables, and .*x of one model's\) of all else, .* cost .*"
    for memory in ("1KiB", "0.1x-all"):
        with pytest.raises(PlanError, match=cost):
            build_plan(scan, "auto", memory, None, family)


@pytest.mark.parametrize("with_text", [False, True])
def test_what_is_hardly_used_may_stay_in_the_host_tier(family: Family, with_text: bool) -> None:
    scan, calibration = scan_family(family), Calibration(texts()) if with_text else None
    traffic = np.full(scan.expert_same_as.shape[1:], 1 / scan.expert_same_as.shape[2])
    if calibration is not None:
        traffic = errors_on_text(family, scan, calibration).traffic
        assert traffic.sum(axis=1) == pytest.approx(1)
        assert traffic.std() > 0
    budget = one_model(family) // 10  # below the minimum of everything in three bits
    plan = auto_plan(family, scan, budget, PlanOptions(host_share=0.7), calibration)
    plan.check_integrity()
    absent = ~plan.resident.any(axis=0)
    assert 0 < traffic[absent].sum() / len(traffic) <= 0.7
    assert traffic[absent].max() <= traffic[~absent].min() + 1e-9
    assert sum(plan_bytes(lay_out(plan), ExpertSizes.of(family))) <= budget
    assert (plan.serving == scan.expert_same_as)[:, absent].all()  # as the checkpoints have it


def test_a_target_of_agreement_costs_bytes(family: Family) -> None:
    scan, sizes = scan_family(family), ExpertSizes.of(family)
    plans = [auto_plan(family, scan, None, PlanOptions(min_top1=share)) for share in (0.5, 0.97, 0.99, 1.0)]
    used = [sum(plan_bytes(lay_out(plan), sizes)) for plan in plans]
    assert used == sorted(used)
    assert used[0] < used[2]
    assert is_lossless(plans[3])


def test_two_variants_may_share_one_signed_delta(tmp_path: Path) -> None:
    family = Family.open(make_family("mixtral", tmp_path, 2, perturb=0.05, dtype=torch.bfloat16))
    scan = scan_family(family)
    plan = auto_plan(family, scan, budget_bytes=int(1.3 * one_model(family)))
    served = served_experts(family, plan)
    info = family.architecture
    for v, checkpoint in enumerate(family.checkpoints):
        for tensor in info.expert_shapes:
            own = checkpoint.tensor(info.expert_tensor(0, tensor)).float()
            assert (served[v, 0][tensor] - own).norm() < 0.01 * own.norm()


def uniform(family: Family, base: str, delta: str) -> Plan:
    info = family.architecture
    shape = (len(family.names), info.num_layers, info.num_experts)
    base_, merge_, delta_ = (np.array(text, dtype=object) for text in (base, "regmean", delta))
    return Plan("x", np.zeros(shape, np.int64), np.ones(shape, np.bool_), "", base_, merge_, delta_)


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def test_predicted_and_measured_error_rank_options_the_same(tmp_path: Path) -> None:
    """Spearman's coefficient over ten uniform options, measured by the logits of the served models."""
    torch.manual_seed(0)  # of the fine-tunes
    paths = make_family("mixtral", tmp_path, 3, perturb=0.2, num_hidden_layers=3)
    family, (seen, unseen) = Family.open(paths), (texts(48), texts(16, 8))
    calibration, scan = Calibration(seen), scan_family(family)
    predictions = {False: QuantisationErrors.of_weights(scan), True: errors_on_text(family, scan, calibration)}
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in paths.values()]
    info = family.architecture

    def measured(plan: Plan, with_text: bool) -> float:
        served = served_experts(family, plan, calibration if with_text else None)
        total = 0.0
        for v, model in enumerate(models):
            with torch.no_grad():
                want = model(input_ids=unseen[v]).logits.log_softmax(-1)
                own = {name: p.clone() for name, p in model.named_parameters() if ".experts." in name}
                for layer in range(info.num_layers):
                    for tensor, value in served[v, layer].items():
                        model.get_parameter(info.expert_tensor(layer, tensor)).copy_(value)
                got = model(input_ids=unseen[v]).logits.log_softmax(-1)
                for name, value in own.items():
                    model.get_parameter(name).copy_(value)
            total += float((want.exp() * (want - got)).sum(-1).mean())
        return total

    options = [("int4", "d1"), ("int4", "d2"), ("int4", "d4"), ("int5", "d1"), ("int3", "none"), ("stored", "none"),
               ("int3", "d2"), ("int6", "d3"), ("int8", "d1"), ("int5", "d3")]  # fmt: skip
    for with_text, found in predictions.items():
        predicted = [
            sum(
                found.of(layer, expert, 0, *option).sum()
                for layer in range(info.num_layers)
                for expert in range(info.num_experts)
            )
            for option in options
        ]
        errors = [measured(uniform(family, *option), with_text) for option in options]
        spearman = np.corrcoef(ranks(predicted), ranks(errors))[0, 1]
        assert spearman >= 0.9, (with_text, list(zip(options, predicted, errors, strict=True)))
