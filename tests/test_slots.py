"""Slots alone: rows and row map agree through any order of needs, prefetches and failed reads."""

import random

import pytest
import torch

from polymoe.model.context import RowMap
from polymoe.model.slots import Slots, copy_padded

VARIANTS = 5


def value(variant: int, name: str) -> torch.Tensor:
    return torch.full((3, 2), float(variant * 10 + len(name)))


def make(num_slots: int, staging: int) -> Slots:
    slots = Slots(num_slots, staging, RowMap([-1] * VARIANTS), value)
    slots.stacks = {name: torch.zeros(slots.num_rows, 3, 2) for name in ("a", "bb")}
    slots.fill()
    return slots


def check(slots: Slots, present: set[int]) -> None:
    slots.check_integrity()
    for variant in present:
        for name, rows in slots.stacks.items():
            assert torch.equal(rows[slots.row_map.rows[variant]], value(variant, name))


@pytest.mark.parametrize(("num_slots", "staging"), [(1, 0), (1, 1), (2, 1), (3, 0)])
def test_random_needs_and_prefetches(num_slots: int, staging: int) -> None:
    rng = random.Random(num_slots)
    slots = make(num_slots, staging)
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
    slots._arriving[2].result()  # it has arrived while the batch computed
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


def test_rows_are_padded_and_converted() -> None:
    target = torch.full((4, 2), 9.0)
    copy_padded(target, torch.ones(3, 2))
    assert target.tolist() == [[1, 1]] * 3 + [[0, 0]]
    copy_padded(target, torch.full((4, 2), 2.0, dtype=torch.bfloat16))
    assert target.tolist() == [[2, 2]] * 4
