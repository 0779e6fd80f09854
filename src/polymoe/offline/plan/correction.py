"""What the variants of a position get beside their base, as plans name it: "none", "d2", "exact" or "±d2"."""

from dataclasses import dataclass
from functools import cache

from polymoe.quant.formats import Format, get_format

NO_DELTA = "none"
_MIRRORED = "±"


@dataclass(frozen=True)
class Correction:
    """Deltas in format `fmt`, one for each expert that differs; or, `mirrored`, a single one that the first of two
    variants adds to the midpoint of both and the second subtracts."""

    fmt: Format
    mirrored: bool = False

    def __str__(self) -> str:
        return _MIRRORED * self.mirrored + self.fmt.name


@cache
def correction(name: str) -> Correction | None:
    """What `name` stands for; None: nothing. Raises `PlanError` for an unknown format."""
    if name == NO_DELTA:
        return None
    return Correction(get_format(name.removeprefix(_MIRRORED)), name.startswith(_MIRRORED))
