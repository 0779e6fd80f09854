"""A bundle's packed non-experts into memory: all versions side by side, or a row for each slot."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from polymoe.bundle.reader import Bundle
from polymoe.kernels.cpu.packed_rows import PackedRows, packed_rows, versions
from polymoe.model.transfer.staging import Staging
from polymoe.model.variants.slots import Slots
from polymoe.quant.formats import get_format

_PART = ":"  # between a weight's name and a part's: no name of a weight has it


@dataclass(frozen=True, eq=False)
class PlacedRows:
    """in_slots: a row serves whoever is in that slot. shared_bytes: of a base that all variants use."""

    rows: PackedRows
    in_slots: bool
    shared_bytes: int


def place_packed(bundle: Bundle, name: str, slots: Slots, staging: Staging, device: torch.device) -> PlacedRows:
    """Read the packed non-expert `name`; with fewer slots than versions the slots will fill the rows."""
    packed = bundle.packed_nonexpert(name)
    assert packed is not None
    distinct = sorted(set(bundle.nonexpert_sources(name)))
    in_slots = len(distinct) > slots.num_rows
    own_format = get_format(packed.delta or packed.base, bundle.levels)
    shape = tuple(packed.shape)
    own = {}
    for part, (dtype, size) in own_format.parts(shape, torch.float32).items():
        own[part] = torch.empty(slots.num_rows if in_slots else len(distinct), *size, dtype=dtype, device=device)
        if in_slots:
            slots.stacks[name + _PART + part] = own[part]
    if not in_slots:
        _fill(own, [bundle.own_parts(source, name) for source in distinct], staging)
    if packed.delta is None:
        rows = packed_rows((own_format, own), None, shape)
        return PlacedRows(rows, in_slots, rows.num_bytes if len(distinct) == 1 else 0)
    given = bundle.nonexpert_parts(None, name)
    base = {part: torch.empty(1, *t.shape, dtype=t.dtype, device=device) for part, t in given.items()}
    _fill(base, [given], staging)
    rows = packed_rows((get_format(packed.base, bundle.levels), base), (own_format, own), shape)
    return PlacedRows(rows, in_slots, sum(pool.num_bytes for pool in rows.bases))


def by_place(rows: PackedRows, sources: Sequence[int], more: int) -> PackedRows:
    """The same with a row for each planned variant, whose versions' `sources` are, and `more` for those that come."""
    distinct = sorted(set(sources))
    made = list(zip(rows.versions.base.tolist(), rows.versions.delta.tolist(), strict=True))
    pairs = [*(made[distinct.index(source)] for source in sources), *[made[0]] * more]
    return replace(rows, versions=versions(tuple(pairs)))


def reader_of(bundle: Bundle) -> Callable[[int, str], torch.Tensor]:
    """(variant, name of a stack in the slots) -> what comes into its row."""

    def read(variant: int, stack: str) -> torch.Tensor:
        name, _, part = stack.partition(_PART)
        return bundle.own_parts(variant, name)[part] if part else bundle.nonexpert(variant, name)

    return read


def _fill(rows: Mapping[str, torch.Tensor], versions: Sequence[Mapping[str, torch.Tensor]], staging: Staging) -> None:
    for row, parts in enumerate(versions):
        for part, tensor in parts.items():
            staging.copy(rows[part][row], tensor)
