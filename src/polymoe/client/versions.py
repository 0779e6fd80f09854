"""Which versions are held, and what names mean now.

A version never changes; a name points to one, and a pointer moves in one step. `model` in a request is a name, or
`name@version` with at least the first digits of a version.
"""

from collections.abc import Mapping, Sequence

import msgspec

from polymoe.protocol.info import VariantInfo

FEWEST_DIGITS = 6  # of a version


class Versions:
    """`held`: place -> version. `names`: name -> place. Two planned variants may be the same version, each with a place
    of its own."""

    def __init__(self, variants: Sequence[VariantInfo], names: Mapping[str, int]) -> None:
        self.held = {variant.place: variant for variant in variants}
        self.names = dict(names) or {variant.name: variant.place for variant in variants}

    def hold(self, variant: VariantInfo) -> None:
        self.held[variant.place] = variant

    def drop(self, variant: VariantInfo) -> None:
        """No name may mean it."""
        assert variant.place not in self.names.values()
        del self.held[variant.place]

    def named(self) -> list[VariantInfo]:
        """What each name means; the record has that name."""
        return [self._as(name, place) for name, place in self.names.items()]

    def find(self, model: str) -> VariantInfo | None:
        """None for what is not there, or could be several."""
        if model in self.names:
            return self._as(model, self.names[model])
        name, at, digits = model.rpartition("@")
        if not at or len(digits) < FEWEST_DIGITS:
            return None
        found = [
            v for v in self.held.values()
            if v.version.startswith(digits) and name in (v.name, *self.names_of(v))
        ]  # fmt: skip
        return found[0] if len({v.version for v in found}) == 1 else None

    def names_of(self, variant: VariantInfo) -> list[str]:
        return [name for name, place in self.names.items() if place == variant.place]

    def _as(self, name: str, place: int) -> VariantInfo:
        found = self.held[place]
        return found if found.name == name else msgspec.structs.replace(found, name=name)
