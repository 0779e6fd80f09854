"""What moves between the host and rows on the device, and when: one layer, two resident experts, four on the host."""

from collections.abc import Sequence

import pytest
import torch

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.model.experts.cache import TierStats
from polymoe.model.experts.mapped import MappedExperts
from polymoe.model.experts.mapped_layer import MappedLayer
from polymoe.model.transfer.copies import Arrival, Copy, copy_padded

RESIDENT, HOST = 2, 4
TABLE = torch.tensor([[0, 1, -1, -2], [0, -3, -1, -4]], dtype=torch.int32)  # [V, E]


class HeldCopier:
    """Copies when it is told to, as a bus that is busy with other things."""

    def __init__(self) -> None:
        self.held: list[Copy] = []
        self.open = False

    def prepare(self, copies: Sequence[Copy]) -> None:
        """Nothing to prepare."""

    def mark(self) -> None:
        return None

    def start(self, copies: Sequence[Copy], after: object) -> Arrival:  # noqa: ARG002
        self.held += copies
        return self

    def wait(self, group: str) -> None:
        """All is there once `seconds` says so."""

    def wait_all(self) -> None:
        assert self.open

    def seconds(self) -> float | None:
        if not self.open:
            return None
        while self.held:
            copy = self.held.pop()
            copy_padded(copy.target, copy.read())
        return 0.0


def make(rows: int, copier: HeldCopier) -> tuple[MappedLayer, MappedExperts]:
    host = {"weight": torch.arange(HOST * 6.0).view(HOST, 2, 3)}
    own = {"weight": torch.full((rows, 2, 3), torch.nan)} if rows else {}
    layer = MappedLayer(
        TABLE, TABLE.clone(), CompressedLayer({"weight": torch.zeros(RESIDENT, 2, 3)}, (), ()), host, own
    )
    return layer, MappedExperts({0: layer}, 24, copier, TierStats())


def step(layer: MappedLayer, mapped: MappedExperts, experts: list[int], variant: int = 0) -> None:
    layer.count(torch.full((1,), variant), torch.tensor([experts]))
    mapped.after_step()
    mapped.check_integrity()


@pytest.fixture(autouse=True)
def _every_step_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymoe.model.experts.mapped._PERIOD", 1)


def test_table_has_no_absent_entries() -> None:
    layer, _ = make(0, HeldCopier())
    assert layer.table.tolist() == [[0, 1, 2, 3], [0, 4, 2, 5]]


def test_counts_are_of_absent_experts_once_a_step_and_not_of_padding() -> None:
    layer, _ = make(1, HeldCopier())
    variants, experts = torch.tensor([0, 1]), torch.tensor([[0, 2], [3, 2]])
    layer.count(variants, experts)
    assert layer.counts[:-1].tolist() == [1, 0, 0, 1, 0]  # host experts 0 and 3; the row is empty
    layer.counts.zero_()
    layer.count(variants[[0, 1, 1, 1]], experts[[0, 1, 1, 1]])  # padded with its last row, as `StaticBatch` does
    assert layer.counts[:-1].tolist() == [1, 0, 0, 1, 0]


def test_an_expert_is_served_from_its_row_only_when_it_is_there() -> None:
    copier = HeldCopier()
    layer, mapped = make(1, copier)
    for _ in range(4):
        step(layer, mapped, [0, 2])
    assert copier.held
    assert layer.table[:, 2].tolist() == [2, 2]
    copier.open = True
    step(layer, mapped, [0, 2])
    assert layer.table[:, 2].tolist() == [6, 6]
    torch.testing.assert_close(layer.rows["weight"][0], layer.host["weight"][0])


def test_who_leaves_is_on_the_host_again_before_its_row_is_written() -> None:
    copier = HeldCopier()
    layer, mapped = make(1, copier)
    copier.open = True
    for _ in range(3):
        step(layer, mapped, [0, 2])
    assert layer.holder == [0]
    copier.open = False
    for _ in range(8):
        step(layer, mapped, [0, 3])
    assert copier.held
    assert layer.table.tolist() == [[0, 1, 2, 3], [0, 4, 2, 5]]  # nobody reads the row
    copier.open = True
    step(layer, mapped, [0, 3])
    assert layer.holder == [1]
    assert layer.table.tolist() == [[0, 1, 2, 6], [0, 4, 2, 5]]


def test_hits_and_bytes_are_what_steps_used() -> None:
    copier = HeldCopier()
    layer, mapped = make(1, copier)
    copier.open = True
    for _ in range(10):
        step(layer, mapped, [0, 2])
    stats = mapped._stats
    assert stats.hits + stats.misses == mapped.counted_steps
    assert 0 < stats.misses < stats.hits
    assert stats.host_bytes == 24 * stats.misses
