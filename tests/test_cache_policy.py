"""Cache policies on traces like those of absent experts, and the figures beside each other (`pytest -s`)."""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from polymoe.model.cache_policy import CachePolicy, FrequencyPolicy, LRUPolicy, StaticPolicy

KEYS, ROOM = 64, 16
Trace = list[int]


def zipf(rng: random.Random, count: int, order: list[int]) -> Trace:
    return rng.choices(order, weights=[1 / (i + 1) ** 1.2 for i in range(len(order))], k=count)


def stationary(rng: random.Random) -> Trace:
    """Decode with skewed routing."""
    return zipf(rng, 6000, list(range(KEYS)))


def drifting(rng: random.Random) -> Trace:
    """The hot experts change with the topic."""
    trace = []
    for _ in range(6):
        order = list(range(KEYS))
        rng.shuffle(order)
        trace += zipf(rng, 1000, order)
    return trace


def scanned(rng: random.Random) -> Trace:
    """Decode, with a prefill that touches every expert in layer order now and then."""
    trace = []
    for _ in range(60):
        trace += zipf(rng, 60, list(range(KEYS)))
        trace += list(range(KEYS))
    return trace


def cyclic(_rng: random.Random) -> Trace:
    """Every layer's experts in turn, more than fit: least recently used never hits."""
    return list(range(KEYS)) * 60


def hit_rate(policy: CachePolicy, trace: Trace) -> float:
    return sum(policy.access(key) for key in trace) / len(trace)


def rates(trace: Trace) -> dict[str, float]:
    hot = [key for key, _ in Counter(trace[:1000]).most_common(ROOM)]  # a list made from the first accesses
    return {
        "frequency": hit_rate(FrequencyPolicy(ROOM), trace),
        "lru": hit_rate(LRUPolicy(ROOM), trace),
        "static": hit_rate(StaticPolicy(hot), trace),
    }


@pytest.mark.parametrize("make", [stationary, drifting, scanned, cyclic])
def test_frequency_is_never_far_behind_and_often_ahead(make: Callable[[random.Random], Trace]) -> None:
    found = rates(make(random.Random(0)))
    print(make.__name__, {name: round(rate, 3) for name, rate in found.items()})
    assert found["frequency"] >= found["lru"] - 0.02
    assert found["frequency"] >= found["static"] - 0.05
    if make is drifting:
        assert found["frequency"] > found["static"] + 0.1
    if make in (scanned, cyclic):
        assert found["frequency"] > found["lru"] + 0.05


@pytest.mark.parametrize("policy", [FrequencyPolicy(ROOM), LRUPolicy(ROOM), FrequencyPolicy(0), LRUPolicy(0)])
def test_never_more_than_there_is_room_for(policy: FrequencyPolicy | LRUPolicy) -> None:
    rng = random.Random(1)
    for _ in range(3000):
        policy.access(rng.randrange(KEYS))
        assert sum(key in policy for key in range(KEYS)) <= policy.room


def test_scores_do_not_overflow() -> None:
    policy = FrequencyPolicy(4, half_life=2.0)
    for i in range(5000):
        policy.access(i % 7)
    assert all(score < float("inf") for score in policy._scores.values())
