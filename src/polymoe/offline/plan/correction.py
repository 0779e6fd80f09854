"""What the variants of a position get beside their base, as plans name it: "none", "d2", "exact" or "±d2"."""

from dataclasses import dataclass
from functools import cache

from polymoe.quant.formats import BASE_FORMATS, DELTA_FORMATS, Format, get_format

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


def undominated_bases() -> tuple[str, ...]:
    """Formats of bases by bits; without those that others of no more bits leave less error than."""
    return tuple(
        fmt.name
        for fmt in reversed(BASE_FORMATS)
        if not any(other.bits <= fmt.bits and other.distortion < fmt.distortion for other in BASE_FORMATS)
    )


def lossy_deltas() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(names of all deltas that are not lossless, the same between two variants, one of which takes the negative)."""
    formats = [fmt for fmt in DELTA_FORMATS if not fmt.is_lossless]
    return tuple(fmt.name for fmt in formats), tuple(str(Correction(fmt, mirrored=True)) for fmt in formats)
