"""The policies one by one, with numbers instead of an engine."""

import itertools
import math
import random

import pytest

from polymoe.engine.policies.admission import AdmissionControl, Backlog, LoadEstimate, has_room
from polymoe.engine.policies.deficit_round_robin import MAX_DEBT, DeficitRoundRobin
from polymoe.engine.policies.fair_share import FairShare
from polymoe.engine.policies.slot_policy import SlotPolicy, VariantWork
from polymoe.engine.policies.step_budget import MIN_PREFILL, StepBudget
from polymoe.engine.policies.step_cost import StepCost
from polymoe.errors import OverloadedError


def serve(ring: DeficitRoundRobin[str], ready: set[str], tokens: int, most: int = 10) -> dict[str, int]:
    """Give away tokens in pieces of at most `most`; how many each got."""
    got = dict.fromkeys(sorted(ready), 0)
    for key in sorted(ready):
        ring.enter(key)
    while tokens > 0:
        key = ring.turn(ready)
        count = min(tokens, most, math.ceil(ring.credit(key)))
        ring.charge(key, count)
        got[key] += count
        tokens -= count
    return got


def test_deficit_round_robin_divides_by_weight() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    ring: DeficitRoundRobin[str] = DeficitRoundRobin(lambda key: 100 * weights[key])
    got = serve(ring, {"a", "b", "c"}, 35_000, most=33)
    for key, weight in weights.items():
        assert got[key] == pytest.approx(35_000 * weight / 3.5, abs=250)
    assert serve(ring, {"c"}, 1000) == {"c": 1000}, "idle shares are used by others"


def test_a_flow_that_was_idle_comes_first_for_one_quantum() -> None:
    ring: DeficitRoundRobin[str] = DeficitRoundRobin(lambda _: 100)
    serve(ring, {"flood", "other"}, 1010)
    assert serve(ring, {"flood", "other", "light"}, 100)["light"] == 100
    assert serve(ring, {"flood", "other", "light"}, 100)["light"] == 0, "and then it waits for its turn"


def test_what_is_taken_out_of_turn_is_paid_back_but_never_more_than_a_few_rounds() -> None:
    ring: DeficitRoundRobin[str] = DeficitRoundRobin(lambda _: 100)
    serve(ring, {"a", "b"}, 400)
    ring.charge("a", 300)
    assert serve(ring, {"a", "b"}, 300) == {"a": 0, "b": 300}
    ring.charge("a", 10**6)
    assert serve(ring, {"a", "b"}, 100 * (MAX_DEBT + 2))["a"] > 0
    ring.charge("a", 10**6)
    ring.clear()
    assert serve(ring, {"a", "b"}, 200) == {"a": 100, "b": 100}


def test_a_share_is_divided_by_variants_first_and_tenants_second() -> None:
    fair = FairShare([1.0, 3.0], quantum=50)
    flows = [(0, "x"), (0, "y"), (1, "x")]
    ready = {0: {"x": 0, "y": 0}, 1: {"x": 0}}
    got = dict.fromkeys(flows, 0)
    for flow in flows:
        fair.enter(flow)
    for _ in range(4000):
        flow, most = fair.turn(ready)
        count = min(most, 7)
        fair.charge(flow, count)
        got[flow] += count
    total = sum(got.values())
    assert [got[flow] / total for flow in flows] == pytest.approx([0.125, 0.125, 0.75], abs=0.01)


def test_entitlement_follows_the_weights_and_what_was_used_lately() -> None:
    fair = FairShare([1.0, 1.0, 2.0], quantum=10)
    active = {0, 1, 2}
    assert [fair.entitlement(v, active, 32) for v in active] == [8, 8, 16]
    assert fair.furthest_over({0: 9, 1: 8, 2: 15}, active, 32) is None, "a little more is no reason to take it back"
    assert fair.furthest_over({0: 16, 1: 0, 2: 16}, active, 32) == 0
    assert fair.furthest_over({0: 32}, {0}, 32) is None
    for _ in range(1000):
        fair.charge((0, ""), 30)
        fair.charge((1, ""), 10)
        fair.settle(active, contended=True)
    assert fair.entitlement(0, active, 36) == 3
    assert fair.entitlement(1, active, 36) == 9
    assert fair.entitlement(2, active, 36) == 54
    assert fair.is_greedy(0, active)
    assert not fair.is_greedy(0, {0}), "nobody is there to be greedy against"
    alone = FairShare([1.0, 1.0], quantum=10)
    alone.charge((0, ""), 10**6)
    alone.settle({0}, contended=True)
    assert alone.entitlement(0, {0, 1}, 32) == 16, "what nobody else wanted is free"


def test_the_cost_of_a_step_is_learnt_and_kept() -> None:
    rng = random.Random(0)

    def seconds(tokens: int, decodes: int) -> float:
        return (0.02 + 0.0003 * tokens + 0.001 * decodes) * rng.uniform(0.95, 1.05)

    cost = StepCost()
    for _ in range(200):
        tokens, decodes = rng.choice([0, 0, 64, 200, 500]), rng.randrange(0, 32)
        cost.observe(tokens, decodes, seconds(tokens, decodes))
        cost.observe(tokens, decodes, seconds(tokens, decodes) * (50 if rng.random() < 0.01 else 1))  # a hiccup
    for tokens, decodes in ((0, 16), (100, 4), (500, 32)):
        assert cost.seconds(tokens, decodes) == pytest.approx(0.02 + 0.0003 * tokens + 0.001 * decodes, rel=0.15)
    for _ in range(3000):  # nobody prefills for a long time
        cost.observe(0, 8, seconds(0, 8))
    assert cost.seconds(0, 8) == pytest.approx(0.028, rel=0.05)
    assert cost.seconds(500, 8) - cost.seconds(0, 8) == pytest.approx(0.15, rel=0.3)


def test_the_budget_keeps_steps_short_and_prompts_going() -> None:
    cost = StepCost()
    assert StepBudget(cost, None).prefill_tokens(5, 512) == 512
    budget = StepBudget(cost, 0.1)
    assert budget.prefill_tokens(0, 512) == 512, "nobody decodes, nobody is kept waiting"
    assert budget.prefill_tokens(5, 512) == MIN_PREFILL, "nothing is known yet"
    for tokens in (16, 32, 0, 8) * 10:
        cost.observe(tokens, 10, 0.02 + 0.0005 * tokens + 0.001 * 10)
    assert budget.prefill_tokens(10, 512) == 64, "not far beyond what was measured"
    cost.observe(400, 10, 0.23)
    assert budget.prefill_tokens(10, 512) == pytest.approx(140, rel=0.1)
    assert budget.prefill_tokens(200, 512) == MIN_PREFILL, "a target that cannot be met stops nobody"
    assert budget.prefill_tokens(200, 5) == 5


def test_a_full_queue_still_takes_a_variant_below_its_share() -> None:
    assert has_room(8, total=7, own=7, share=0.25)
    assert not has_room(8, total=8, own=8, share=0.25)
    assert has_room(8, total=8, own=1, share=0.25)
    assert not has_room(8, total=8, own=2, share=0.25)


def trained(seconds: float = 0.1) -> StepCost:
    cost = StepCost()
    for tokens in (0, 100, 200, 300) * 10:
        cost.observe(tokens, 10, seconds + 0.001 * tokens)
    return cost


def load(own: float = 100, others: float = 0, room: float = 8, weight: float = 1.0) -> LoadEstimate:
    return LoadEstimate(Backlog(own, 1, 1.0), [Backlog(others, others / 100, weight)], 10, 100, room)


def test_predictions_count_what_fair_sharing_serves_before() -> None:
    now = 0.0
    admission = AdmissionControl(trained(), 2.0, lambda: now)
    assert admission.predict(load()) == pytest.approx(0.2, rel=0.05)
    assert admission.predict(load(others=10_000)) == pytest.approx(0.4, rel=0.05), "a flood counts as much as I do"
    assert admission.predict(load(others=10_000, weight=3)) == pytest.approx(0.8, rel=0.05)
    assert admission.predict(load(own=1000)) == pytest.approx(2.0, rel=0.05)
    for _ in range(200):
        now += 3.0
        admission.ended(2)
    assert admission.predict(load(room=0)) == pytest.approx(1.5, rel=0.05), "one place must become free"
    assert admission.predict(load(room=1)) == pytest.approx(0.2, rel=0.05)


def test_admission_refuses_what_would_be_too_late_and_says_when_to_come_back() -> None:
    admission = AdmissionControl(trained(), 1.5, lambda: 0.0)
    admission.check(1.0, load)
    admission.check(None, lambda: load(10**6))
    with pytest.raises(OverloadedError, match="SLO class") as refused:
        admission.check(1.0, lambda: load(5000))
    assert refused.value.status == 429
    assert refused.value.retry_after == pytest.approx(10 - 1.5, rel=0.1)
    AdmissionControl(trained(), None, lambda: 0.0).check(1.0, lambda: load(5000))
    AdmissionControl(StepCost(), 1.5, lambda: 0.0).check(1.0, lambda: load(5000))  # nothing measured, nothing refused


def test_slots_go_to_whoever_waited_longest_but_not_back_and_forth() -> None:
    policy = SlotPolicy(1, [0])
    policy.observe(1.0)
    busy = {0: VariantWork(0.0), 1: VariantWork(0.0)}
    assert policy.choose(0.0, busy) == {0}
    assert policy.upcoming(busy) == [1]
    switches = []
    for tick in range(1, 1000):
        before = policy.active
        if policy.choose(tick / 10, busy) != before:
            switches.append(tick / 10)
    assert switches[0] <= 20.0, "patience"
    gaps = [later - earlier for earlier, later in itertools.pairwise(switches)]
    assert min(gaps) >= 10.0, "a load is worth it"
    assert max(gaps) <= 20.2


def test_a_new_request_is_served_soon_while_loads_are_rare() -> None:
    policy = SlotPolicy(1, [0])
    policy.observe(1.0)
    busy = {0: VariantWork(0.0), 1: VariantWork(50.0, first_since=50.0)}
    policy.choose(50.0, busy)
    assert policy.choose(51.0, busy) == {0}
    assert policy.choose(52.0, busy) == {1}
    again = {0: VariantWork(0.0, first_since=52.0), 1: VariantWork(50.0)}
    assert policy.choose(54.1, again) == {0}, "there were savings for two"
    assert policy.choose(57.0, {0: VariantWork(0.0), 1: VariantWork(50.0, first_since=54.5)}) == {0}, "not for three"


def test_deadlines_make_a_variant_due_and_idle_slots_are_given_up() -> None:
    policy = SlotPolicy(2, [0, 1])
    policy.observe(1.0)
    work = {0: VariantWork(0.0), 1: VariantWork(0.0), 2: VariantWork(10.0, start_by=11.0)}
    assert policy.choose(10.0, work) == {0, 1}
    assert 2 in policy.choose(11.0, work)
    policy = SlotPolicy(2, [0, 1])
    policy.observe(1.0)
    assert policy.choose(10.0, {0: VariantWork(0.0), 3: VariantWork(10.0)}) == {0, 3}


def test_without_a_cost_the_variants_take_turns() -> None:
    policy = SlotPolicy(2, [0, 1])
    work = {v: VariantWork(0.0) for v in range(4)}
    seen = [policy.choose(float(tick), work) for tick in range(1, 5)]
    assert seen == [{2, 3}, {0, 1}, {2, 3}, {0, 1}]


def test_tenants_share_by_their_weights() -> None:
    fair = FairShare([1.0], quantum=10)
    fair.weigh("heavy", 3.0)
    ready = {0: {"heavy": None, "light": None}}
    taken = {"heavy": 0, "light": 0}
    for _ in range(400):
        for tenant in ready[0]:
            fair.enter((0, tenant))
        (_, tenant), most = fair.turn(ready)
        fair.charge((0, tenant), most)
        taken[tenant] += most
    assert taken["heavy"] / taken["light"] == pytest.approx(3.0, rel=0.1)
    assert fair.largest_tenant({"heavy": 6, "light": 2}, {"heavy", "light"}, "light", 1) is None  # each has its part
    assert fair.largest_tenant({"heavy": 8}, {"heavy", "light"}, "light", 1) == "heavy"
