"""A bundle's packed non-experts into memory: all versions side by side, or a row for each slot."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from polymoe.kernels.cpu.packed_rows import PackedRows, packed_rows
from polymoe.model.transfer.staging import Staging
from polymoe.model.variants.slots import Slots
from polymoe.quant.formats import get_format

if TYPE_CHECKING:
    from polymoe.bundle.reader import Bundle

_PART = ":"  # between a weight's name and a part's: no name of a weight has it


@dataclass(frozen=True, eq=False)
class PlacedRows:
    """in_slots: a row serves whoever is in that slot. shared_bytes: of a base that all variants use."""

    rows: PackedRows
    in_slots: bool
    shared_bytes: int


def place_packed(bundle: "Bundle", name: str, slots: Slots, staging: Staging, device: torch.device) -> PlacedRows:
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
        _fill(own, [own_parts(bundle, source, name) for source in distinct], staging)
    if packed.delta is None:
        rows = packed_rows((own_format, own), None, shape)
        return PlacedRows(rows, in_slots, rows.num_bytes if len(distinct) == 1 else 0)
    given = bundle.nonexpert_parts(None, name)
    base = {part: torch.empty(1, *t.shape, dtype=t.dtype, device=device) for part, t in given.items()}
    _fill(base, [given], staging)
    rows = packed_rows((get_format(packed.base, bundle.levels), base), (own_format, own), shape)
    return PlacedRows(rows, in_slots, rows.bases.num_bytes)


def own_parts(bundle: "Bundle", variant: int, name: str) -> Mapping[str, torch.Tensor]:
    """Part -> tensor of what a variant has of its own: its delta, or its version."""
    sources, packed = bundle.nonexpert_sources(name), bundle.packed_nonexpert(name)
    assert packed is not None
    alone = packed.delta is None and not any(sources)
    return bundle.nonexpert_parts(None if alone else sources[variant], name)


def reader_of(bundle: "Bundle") -> Callable[[int, str], torch.Tensor]:
    """(variant, name of a stack in the slots) -> what comes into its row."""

    def read(variant: int, stack: str) -> torch.Tensor:
        name, _, part = stack.partition(_PART)
        return own_parts(bundle, variant, name)[part] if part else bundle.nonexpert(variant, name)

    return read


def _fill(rows: Mapping[str, torch.Tensor], versions: Sequence[Mapping[str, torch.Tensor]], staging: Staging) -> None:
    for row, parts in enumerate(versions):
        for part, tensor in parts.items():
            staging.copy(rows[part][row], tensor)
