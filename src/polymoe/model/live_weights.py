"""A served model whose variants come and go: what a new one brings is loaded beside the steps, and put in between two.

reserve (between steps) -> load (a thread of its own) -> install (between steps)        remove (between steps)

On a GPU rows of stacks, places of tables and room for experts are there from the start and are filled in place, so that
captured steps stay valid. Where pools or stacks come or go `take_change` says so: the steps are to be captured again.
"""

from dataclasses import dataclass

import torch

from polymoe.bundle.addition import AddedFiles
from polymoe.bundle.live import OWN
from polymoe.model.batch.batch import RowMap
from polymoe.model.experts.added import AddedExperts, OwnExperts, Rows
from polymoe.model.served_model import ServedModel
from polymoe.model.transfer.beside import BesideSteps
from polymoe.model.transfer.pieces import copy_in_pieces
from polymoe.model.variants.added_packed import AddedPacked, OwnMatrices
from polymoe.model.variants.row_group import RowGroup

_ROOM_SHARE = 0.5  # of the headroom


@dataclass(eq=False)
class Arriving:
    """A variant on its way. rows: the group and the row that it will have there; `fills`: whether the row is a new one.
    expert_rows: of the room. Tensors that were one for all become the stacks of `promoted`."""

    place: int
    files: AddedFiles
    rows: list[tuple[RowGroup, int, bool]]
    expert_rows: Rows
    promoted: RowGroup | None
    experts: OwnExperts | None = None
    packed: OwnMatrices | None = None


class LiveWeights:
    """Adds variants to `model` and takes them away. All methods but `load` belong between two steps.

    headroom: bytes for what is added, where they have to be planned ahead (on a GPU); half of them is room for experts
    as they are stored. None: what comes is allocated when it comes.
    """

    def __init__(self, model: ServedModel, headroom: int | None = None) -> None:
        self._model, self._headroom = model, headroom
        self._beside = BesideSteps(model.device)
        self._promoted = False
        room = int(_ROOM_SHARE * (headroom or 0))
        self.experts = AddedExperts(model.pool, model.expert_modules, model.context.backend, room)
        self.packed = AddedPacked(model.packed, model.bundle, model.context.backend)

    def reserve(self, place: int, files: AddedFiles) -> Arriving:
        """Find rows for it. Raises `RuntimeError`, the allocator's, where there is no memory for what they lack."""
        self._beside.mark()
        own, source = set(files.own_nonexperts), files.addition.nonexperts
        rows = []
        for group in self._model.groups:
            sharing = {group.row_map.rows[source[n]] if source[n] != OWN else -1 for n in group.stacks}
            shares = len(sharing) == 1 and -1 not in sharing and not own & group.stacks.keys()
            rows.append((group, sharing.pop() if shares else group.reserve(), not shares))
        arriving = Arriving(place, files, rows, self.experts.reserve(files), None)
        if plain := [name for name in self._model.plain if name in own]:
            try:
                arriving.promoted = RowGroup(RowMap([-1] * len(self._model.occupied)))
                for name in plain:
                    value = self._model.weight(name)
                    arriving.promoted.stacks[name] = torch.empty(
                        self._model.max_variants, *value.shape, dtype=value.dtype, device=value.device
                    )
            except RuntimeError:
                self.cancel(arriving)
                raise
        return arriving

    def demand(self, files: AddedFiles) -> tuple[int, int] | None:
        """(bytes that it needs, bytes that are free for it) of the headroom that was planned, beside its room; None
        where nothing was."""
        if self._headroom is None:
            return None
        model, own = self._model, files.own_nonexperts
        needed = files.addition.delta_bytes
        needed += 0 if self.experts.has_room(files) else files.addition.expert_bytes
        needed += sum(files.num_bytes(name) for name in own if name in model.packed)
        needed += sum(model.max_variants * files.num_bytes(name) for name in own if name in model.plain)
        free = self._headroom - self.experts.room_bytes - self.experts.own_bytes - self.packed.num_bytes
        return needed, free

    def load(self, arriving: Arriving) -> None:
        """Read and copy it. May run in another thread, beside forward passes."""
        files, model = arriving.files, self._model
        source = files.addition.nonexperts
        with torch.inference_mode(), self._beside.copying():
            for group, row, fills in arriving.rows:
                for name, rows in group.stacks.items() if fills else ():
                    shared = source[name] != OWN
                    tensor = model.bundle.nonexpert(source[name], name) if shared else files.nonexpert(name)
                    copy_in_pieces(rows[row], tensor)
            if arriving.promoted is not None:
                for name, rows in arriving.promoted.stacks.items():
                    copy_in_pieces(rows[0], model.weight(name))
                    copy_in_pieces(rows[1], files.nonexpert(name))
            arriving.packed = self.packed.load(files)
            arriving.experts = self.experts.load(files, arriving.expert_rows)

    @torch.inference_mode()
    def install(self, arriving: Arriving) -> None:
        """From the next step on it is served."""
        assert arriving.experts is not None
        assert arriving.packed is not None
        self._beside.join()
        model, place = self._model, arriving.place
        for group, row, _ in arriving.rows:
            group.assign(place, row)
        if arriving.promoted is not None:
            model.promote(arriving.promoted)
            self._promoted = True
            for other, occupied in enumerate(model.occupied):
                arriving.promoted.assign(other, 0 if occupied > 0 else -1)
            arriving.promoted.assign(place, 1)
        model.occupied[place] = 1
        for group in model.groups:  # of tensors that became stacks since it was reserved, and that it shares
            if group.row_map.rows[place] < 0:
                group.assign(place, 0)
        model.places.assign(place, place)
        self.packed.install(place, arriving.packed)
        self.experts.install(place, arriving.experts)

    def cancel(self, arriving: Arriving) -> None:
        """It does not come; its rows are free again."""
        for group, row, fills in arriving.rows:
            if fills:
                group.reserved.discard(row)
        self.experts.give_back(arriving.expert_rows)

    @torch.inference_mode()
    def remove(self, place: int) -> None:
        """Nothing runs at `place`, and nothing will."""
        self._model.occupied[place] = -1
        for group in self._model.groups:
            group.assign(place, -1)
        self._model.places.assign(place, -1)
        self.packed.remove(place)
        self.experts.remove(place)

    def take_change(self) -> bool:
        """Whether weights moved, came or went since this was last asked for, other than in rows that were there."""
        changed = self._promoted or self.experts.has_changed or self.packed.has_changed
        self._promoted = self.experts.has_changed = self.packed.has_changed = False
        return changed

    def bytes_of(self, place: int) -> int:
        """What only this variant has on the device."""
        rows = 0
        for group in self._model.groups:
            row = group.row_map.rows[place]
            if row >= 0 and group.row_map.rows.count(row) == 1:
                rows += sum(t[row].numel() * t.element_size() for t in group.stacks.values())
        return rows + self.packed.bytes_of(place) + self.experts.bytes_of(place)
