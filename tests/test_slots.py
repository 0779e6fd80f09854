"""Slots alone: rows and row map agree through any order of needs, prefetches and failed reads."""

import random
import threading

import pytest
import torch

from polymoe.model.batch.batch import RowMap
from polymoe.model.transfer.copies import copy_padded
from polymoe.model.variants.slots import Slots

VARIANTS = 5


def value(variant: int, name: str) -> torch.Tensor:
    return torch.full((3, 2), float(variant * 10 + len(name)))


def make(num_slots: int, staging: int, pipelined: bool = False) -> Slots:
    groups = {"a": "first layer", "bb": "second layer"} if pipelined else None
    slots = Slots(num_slots, staging, RowMap([-1] * VARIANTS), value, groups=groups)
    slots.stacks = {name: torch.zeros(slots.num_rows, 3, 2) for name in ("a", "bb")}
    slots.fill()
    return slots


def check(slots: Slots, present: set[int]) -> None:
    slots.check_integrity()
    for name, rows in slots.stacks.items():
        if slots.groups is not None:
            slots.wait(slots.groups[name])
        for variant in present:
            assert torch.equal(rows[slots.row_map.rows[variant]], value(variant, name))


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize(("num_slots", "staging"), [(1, 0), (1, 1), (2, 1), (3, 0)])
def test_random_needs_and_prefetches(num_slots: int, staging: int, pipelined: bool) -> None:
    rng = random.Random(num_slots)
    slots = make(num_slots, staging, pipelined)
    for _ in range(400):
        present = set(rng.sample(range(VARIANTS), rng.randint(1, num_slots)))
        slots.ensure(present)
        check(slots, present)
        if rng.random() < 0.7:
            slots.prefetch(rng.randrange(VARIANTS))
            check(slots, present)  # the batch that runs beside a prefetch keeps its rows
    assert slots.stats.count > 0
    assert (slots.stats.prefetched > 0) == bool(staging)


def test_a_prefetched_switch_moves_nothing_when_it_happens() -> None:
    slots = make(1, 1)
    slots.ensure({0})
    slots.prefetch(4)
    assert slots._arriving is not None
    slots._arriving[2].wait_all()  # it has arrived while the batch computed
    slots.read = lambda _variant, _name: pytest.fail("a tensor was read at the switch")  # type: ignore[assignment]
    slots.ensure({4})
    check(slots, {4})
    assert (slots.stats.count, slots.stats.prefetched) == (1, 1)


def test_a_failed_read_leaves_no_mixed_row() -> None:
    slots = make(1, 0)

    def broken(variant: int, name: str) -> torch.Tensor:
        if name == "bb":
            raise OSError("disk gone")
        return value(variant, name)

    slots.read = broken
    with pytest.raises(OSError, match="disk gone"):
        slots.ensure({3})
    slots.check_integrity()
    assert slots.loaded == frozenset()
    slots.read = value
    slots.ensure({3})
    check(slots, {3})


def test_pipelined_a_step_begins_before_its_variant_is_there() -> None:
    """The first layer's tensors can be read while the second's are still on their way; a failure empties the row."""
    slots = make(1, 0, pipelined=True)
    second = threading.Event()

    def slow(variant: int, name: str) -> torch.Tensor:
        if name == "bb":
            assert second.wait(10)
        return value(variant, name)

    slots.read = slow
    slots.ensure({3})  # does not wait
    slots.wait("first layer")
    assert torch.equal(slots.stacks["a"][0], value(3, "a"))
    assert not torch.equal(slots.stacks["bb"][0], value(3, "bb"))
    second.set()
    slots.wait("second layer")
    check(slots, {3})

    def broken(_variant: int, _name: str) -> torch.Tensor:
        raise OSError("disk gone")

    slots.read = broken
    slots.ensure({2})
    with pytest.raises(OSError, match="disk gone"):
        slots.wait("second layer")
    slots.check_integrity()
    assert slots.loaded == frozenset()


def test_rows_are_padded_and_converted() -> None:
    target = torch.full((4, 2), 9.0)
    copy_padded(target, torch.ones(3, 2))
    assert target.tolist() == [[1, 1]] * 3 + [[0, 0]]
    copy_padded(target, torch.full((4, 2), 2.0, dtype=torch.bfloat16))
    assert target.tolist() == [[2, 2]] * 4
