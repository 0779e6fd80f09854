"""A placement of one family while it is being made: devices as shelves that variants are put on and taken from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from polymoe.errors import PlanError
from polymoe.place.cost import variant_bytes
from polymoe.place.problem import Device, Family, PlacedPool

_LEAST_SHARE = 1e-6


class Shelves:
    """J devices of one family. Variants and devices are indices here.

    limit: the load that a device may have in the best case, as a part of its rate; what does not fit below it may go up
    to the whole rate, never beyond.
    """

    def __init__(self, family: Family, devices: Sequence[Device], rates: NDArray[np.float64], error: float,
                 limit: float) -> None:  # fmt: skip
        self.family, self.devices, self.rates, self.limit = family, tuple(devices), rates, min(limit, 1.0)
        self.added = variant_bytes(family, error)  # [V, V]
        self.memory = np.array([device.memory for device in devices], dtype=np.float64)
        self.capacity = np.array([device.rate for device in devices], dtype=np.float64)
        self.base = [-1] * len(devices)
        self.members: list[dict[int, float]] = [{} for _ in devices]
        self.bytes = np.zeros(len(devices))
        self.load = np.zeros(len(devices))

    # --- one step

    def add(self, shelf: int, variant: int, share: float) -> None:
        if not self.members[shelf]:
            self.base[shelf] = variant
            self.bytes[shelf] = self.family.expert_bytes
        if variant not in self.members[shelf]:
            self.bytes[shelf] += self.added[variant, self.base[shelf]]
        self.members[shelf][variant] = self.members[shelf].get(variant, 0.0) + share
        self.load[shelf] += share * self.rates[variant]

    def remove(self, shelf: int, variant: int) -> float:
        """Its share there."""
        share = self.members[shelf].pop(variant)
        self.load[shelf] -= share * self.rates[variant]
        self.recentre(shelf)
        return share

    def recentre(self, shelf: int) -> None:
        """The base becomes the member to which the others are nearest in bytes."""
        members = np.fromiter(self.members[shelf], dtype=np.int64)
        if not len(members):
            self.base[shelf], self.bytes[shelf], self.load[shelf] = -1, 0.0, 0.0
            return
        totals = self.added[np.ix_(members, members)].sum(axis=0, dtype=np.float64)
        best = int(totals.argmin())
        self.base[shelf], self.bytes[shelf] = int(members[best]), self.family.expert_bytes + float(totals[best])

    def price(self, variant: int) -> NDArray[np.float64]:
        """[J]: bytes that the variant would add to each device."""
        bases = np.array(self.base)
        price = np.where(bases < 0, self.family.expert_bytes + self.family.nonexpert_bytes, self.added[variant, bases])
        present = [shelf for shelf, members in enumerate(self.members) if variant in members]
        price = price.astype(np.float64)
        price[present] = 0.0
        return price

    # --- what is made of steps

    def insert(self, variant: int, share: float = 1.0, limit: float | None = None) -> float:
        """Put a share of a variant where it costs fewest bytes, on several devices if its rate needs that.

        Returns: the share that found no room.
        """
        limit = self.limit if limit is None else limit
        price, rate = self.price(variant), self.rates[variant]
        fits = self.bytes + price <= self.memory
        free = np.maximum(0.0, limit * self.capacity - self.load)
        order = np.argsort(price, kind="stable")
        for shelf in order:  # whole, if it can be
            if fits[shelf] and free[shelf] >= share * rate - 1e-12:
                self.add(int(shelf), variant, share)
                return 0.0
        if rate * share <= 0.5 * limit * float(self.capacity.max()):
            return share  # a second copy for want of a little room would cost more than it is worth
        for shelf in order:
            part = min(share, free[shelf] / rate)
            if fits[shelf] and part * rate > 0.02 * self.capacity[shelf]:
                self.add(int(shelf), variant, part)
                share -= part
                if share <= _LEAST_SHARE:
                    return 0.0
        return share

    def put(self, variant: int, share: float = 1.0) -> None:
        """Like `insert`, up to the devices' whole rate and in small parts, and making room if need be.

        Raises `PlanError`.
        """
        for limit in (self.limit, (self.limit + 1.0) / 2, 1.0):
            share = self.insert(variant, share, limit)
            if share <= _LEAST_SHARE:
                return
        if not self._make_room(variant, share):
            raise PlanError(self._full(variant, share))

    def _make_room(self, variant: int, share: float) -> bool:
        """Move one other variant elsewhere, the one whose move costs fewest bytes."""
        needed = share * self.rates[variant]
        price = self.price(variant)
        for shelf in np.argsort(price, kind="stable")[:32]:
            over = self.bytes[shelf] + price[shelf] - self.memory[shelf]
            busy = self.load[shelf] + needed - self.capacity[shelf]
            moves = []
            for member, part in self.members[shelf].items():
                if self.added[member, self.base[shelf]] < over or part * self.rates[member] < busy:
                    continue
                other = self.price(member)
                other[shelf] = np.inf
                room = (self.bytes + other <= self.memory) & (self.load + part * self.rates[member] <= self.capacity)
                other[~room] = np.inf
                target = int(other.argmin())
                if np.isfinite(other[target]):
                    moves.append((other[target], member, target))
            for _, member, target in sorted(moves)[:4]:
                part = self.remove(int(shelf), member)
                if self.bytes[shelf] + self.price(variant)[shelf] <= self.memory[shelf]:
                    self.add(target, member, part)
                    self.add(int(shelf), variant, share)
                    return True
                self.add(int(shelf), member, part)
        return False

    def relieve(self) -> None:
        """Move variants from devices that are over their memory or rate. Raises `PlanError`."""
        for shelf in range(len(self.devices)):
            while self.members[shelf] and (
                self.bytes[shelf] > self.memory[shelf] or self.load[shelf] > self.capacity[shelf] * (1 + 1e-9)
            ):
                busy = self.load[shelf] > self.capacity[shelf]
                if len(self.members[shelf]) == 1 and not busy:
                    raise PlanError(self._full(next(iter(self.members[shelf])), 1.0))
                member = self._best_to_leave(shelf, busy)
                share = self.members[shelf][member]
                over = self.load[shelf] - self.capacity[shelf]
                kept = max(0.0, share - over / self.rates[member]) if busy and self.rates[member] > 0 else 0.0
                self.remove(shelf, member)
                if kept > 0.1 * share:
                    self.add(shelf, member, kept)
                    share -= kept
                self.put(member, share)

    def _best_to_leave(self, shelf: int, busy: bool) -> int:
        """Of a device that is too busy: who frees most load a byte; of one that is too full: who frees most bytes."""
        base = self.base[shelf]
        freed = {
            member: share * self.rates[member] if busy else float(self.added[member, base])
            for member, share in self.members[shelf].items()
            if member != base or busy
        }
        return max(freed, key=lambda member: freed[member])

    def _full(self, variant: int, share: float) -> str:
        name = self.family.variants[variant]
        short_of = []
        if self.load.sum() + share * self.rates[variant] > self.capacity.sum():
            short_of.append(
                f"{self.rates.sum():.1f} requests a second for devices that serve {self.capacity.sum():.1f}"
            )
        smallest = self.family.expert_bytes + self.family.nonexpert_bytes
        if (self.memory < smallest).all():
            short_of.append(f"{smallest / 2**30:.1f} GiB for one variant, more than any device has")
        reason = "; ".join(short_of) or "memory and load of the devices do not go together"
        return (
            f"family {self.family.name}: {name} fits on no device ({reason}). Add a device, drop variants, lower "
            "rates, or accept a larger error."
        )

    # --- in and out

    def take(self, present: Iterable[tuple[int, str | None, Mapping[str, float]]]) -> None:
        """Start from what devices hold: (device, base, shares by name). Variants that are gone are left out."""
        index = {name: number for number, name in enumerate(self.family.variants)}
        for shelf, base, shares in present:
            known = [name for name in shares if name in index]
            for name in sorted(known, key=lambda name: name != base):  # the base first
                self.add(shelf, index[name], shares[name])
            if known and base not in known:
                self.recentre(shelf)

    def pools(self) -> list[PlacedPool]:
        names = self.family.variants
        return [
            PlacedPool(
                device.name, self.family.name, names[base], {names[v]: share for v, share in sorted(members.items())},
                round(num_bytes), float(load),
            )
            for device, base, members, num_bytes, load in zip(
                self.devices, self.base, self.members, self.bytes, self.load, strict=True
            )
            if members
        ]  # fmt: skip
