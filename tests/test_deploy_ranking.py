"""Which replica a request goes to: the ranking alone, and with real schedulers on a simulated clock."""

import pytest

from benchmarks.fleet import compare_routers
from polymoe.deploy.ranking import PREFIX, RELOAD, Ranking


def reported(**loaded: list[str]) -> Ranking:
    """Replicas with two slots, which report at time 0."""
    ranking = Ranking()
    for name, variants in loaded.items():
        ranking.report(name, 2, variants, 0.0)
    return ranking


def test_a_variant_goes_where_it_is_loaded_until_the_queue_costs_more() -> None:
    ranking = reported(a=["x", "y"], b=["z"])
    assert ranking.order([("a", 3), ("b", 0)], "x", "", 100.0) == ["a", "b"]
    assert ranking.order([("a", int(RELOAD) + 1), ("b", 0)], "x", "", 100.0) == ["b", "a"]


def test_a_new_variant_takes_a_free_slot_before_one_that_is_in_use() -> None:
    ranking = reported(a=["x", "y"], b=["z"])
    ranking.chosen("a", "x", "", 99.0)
    ranking.chosen("a", "y", "", 99.5)
    assert ranking.order([("a", 0), ("b", 2)], "new", "", 100.0) == ["b", "a"]
    # Nobody has asked for x and y for a while: their slots are as good as free, and the shorter queue decides.
    assert ranking.order([("a", 0), ("b", 2)], "new", "", 1000.0) == ["a", "b"]


def test_what_was_sent_counts_before_the_replica_says_so() -> None:
    ranking = reported(a=[], b=[])
    queues = [("a", 0), ("b", 0)]
    first = ranking.order(queues, "x", "", 1.0)[0]
    ranking.chosen(first, "x", "", 1.0)
    assert ranking.order(queues, "x", "", 1.1)[0] == first
    ranking.report(first, 2, [], 0.5)  # an older report does not take it back
    assert ranking.order(queues, "x", "", 1.2)[0] == first
    ranking.report(first, 2, ["y"], 2.0)  # a newer one does
    ranking.report("b" if first == "a" else "a", 2, ["x"], 2.0)
    assert ranking.order(queues, "x", "", 2.1)[0] != first


def test_a_known_prefix_breaks_ties_only() -> None:
    ranking = reported(a=["x"], b=["x"])
    ranking.chosen("b", "x", "p", 1.0)
    assert ranking.order([("a", 0), ("b", 0)], "x", "p", 1.0)[0] == "b"
    assert ranking.order([("a", 0), ("b", int(PREFIX) + 1)], "x", "p", 1.0)[0] == "a"


def test_replicas_that_are_gone_are_forgotten() -> None:
    ranking = reported(a=["x"], b=[])
    ranking.forget({"b"})
    assert ranking.order([("b", 0), ("c", 1)], "x", "", 1.0)[0] in ("b", "c")
    assert ranking.order([("a", 0)], "x", "", 1.0) == ["a"]


@pytest.mark.parametrize("seed", range(2))
def test_fewer_reconfigurations_than_random(seed: int) -> None:
    """8 variants, 4 replicas with 2 slots each, zipf: at least 3 times fewer, and no slower."""
    found = compare_routers(seconds=60.0, seed=seed, names=("random", "residency"))
    assert found["residency"]["requests"] == found["random"]["requests"]
    assert 3 * found["residency"]["reconfigurations"] <= found["random"]["reconfigurations"], found
    assert found["residency"]["p95_ttft"] <= found["random"]["p95_ttft"], found
