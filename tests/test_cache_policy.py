"""Cache policies on traces of absent experts, made and recorded, and the figures beside each other (`pytest -s`)."""

import random
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence

import pytest
import torch

from polymoe import LLM, SamplingParams
from polymoe.demo import family_paths, text_paths
from polymoe.model.experts.cache_policy import CachePolicy, FrequencyPolicy, LRUPolicy, StaticPolicy
from polymoe.offline.api import make_plan

KEYS, ROOM = 64, 16
Trace = Sequence[Hashable]


def zipf(rng: random.Random, count: int, order: list[int]) -> list[int]:
    return rng.choices(order, weights=[1 / (i + 1) ** 1.2 for i in range(len(order))], k=count)


def stationary(rng: random.Random) -> Trace:
    """Decode with skewed routing."""
    return zipf(rng, 6000, list(range(KEYS)))


def drifting(rng: random.Random) -> Trace:
    """The hot experts change with the topic."""
    trace: list[int] = []
    for _ in range(6):
        order = list(range(KEYS))
        rng.shuffle(order)
        trace += zipf(rng, 1000, order)
    return trace


def scanned(rng: random.Random) -> Trace:
    """Decode, with a prefill that touches every expert in layer order now and then."""
    trace: list[int] = []
    for _ in range(60):
        trace += zipf(rng, 60, list(range(KEYS)))
        trace += list(range(KEYS))
    return trace


def cyclic(_rng: random.Random) -> Trace:
    """Every layer's experts in turn, more than fit: least recently used never hits."""
    return list(range(KEYS)) * 60


def hit_rate(policy: CachePolicy, trace: Trace) -> float:
    return sum(policy.access(key) for key in trace) / len(trace)


def rates(trace: Trace, room: int = ROOM) -> dict[str, float]:
    hot = [key for key, _ in Counter(trace[:1000]).most_common(room)]  # a list made from the first accesses
    return {
        "frequency": hit_rate(FrequencyPolicy(room), trace),
        "lru": hit_rate(LRUPolicy(room), trace),
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


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, int]]:
    """(layer, expert of the host tier) as the engine asks for them: the demo family, texts, a quarter resident."""
    folder = tmp_path_factory.mktemp("trace") / "bundle"
    llm = LLM(make_plan(family_paths(), "paper", "0.25x", folder).path, device="cpu", max_num_seqs=4)
    cache, trace = llm.engine.model.pool.cache, list[tuple[int, int]]()
    fetch = cache.get

    def recording(layer: int, index: int) -> Mapping[str, torch.Tensor]:
        trace.append((layer, index))
        return fetch(layer, index)

    cache.get = recording  # type: ignore[method-assign]
    texts, rng = {name: path.read_text() for name, path in text_paths().items()}, random.Random(0)
    variants = rng.choices(llm.variants, weights=[8, 4, 2, 1], k=32)
    starts = [rng.randrange(5000) for _ in variants]
    prompts = [texts[variant][start : start + 200] for variant, start in zip(variants, starts, strict=True)]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48), variants=variants)
    return trace


@pytest.mark.parametrize("room", [8, 16, 32, 48])
def test_on_a_recorded_trace(recorded: list[tuple[int, int]], room: int) -> None:
    found = rates(recorded, room)
    print(f"recorded, {room} of {len(set(recorded))}", {name: round(rate, 3) for name, rate in found.items()})
    assert found["frequency"] >= max(found["lru"], found["static"]) - 0.03


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
