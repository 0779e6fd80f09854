"""Every way to hold a family in less memory, by name: polymoe's own plans and what one could do without it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from polymoe.errors import PolymoeError

GROUPS = {
    "average": "one average of everything",
    "merge": "one merged expert a position, own non-experts",
    "paper": "round-robin owners",
    "copies": "every variant whole, quantised",
    "delta": "one base and a delta of the same width everywhere",
    "residuals": "one base and a delta of the same bytes everywhere, written in other ways",
    "auto": "formats chosen position by position",
}
BUDGETS = ("0.55x", "0.75x", "1.0x", "1.05x", "1.1x", "1.15x", "1.25x", "1.5x")
ON_TEXT = ", on text"


@dataclass(frozen=True)
class Method:
    """A row of a table.

    group: of `GROUPS`. baseline: its name in `weights.BASELINES`; None for a plan that polymoe serves, made of
    `policy`, `memory`, `base` and `delta_bits` as `polymoe plan` takes them. on_text: fitted to the calibration text.
    """

    name: str
    group: str
    baseline: str | None = None
    policy: str = ""
    memory: str | None = None
    base: str = "stored"
    delta_bits: int | None = None
    on_text: bool = False


def methods(num_variants: int, groups: Sequence[str], budgets: Sequence[str], with_text: bool) -> list[Method]:
    """All rows of the table, those that text helps twice when there is some. Raises `PolymoeError` for a group that
    does not exist."""
    unknown = [group for group in groups if group not in GROUPS]
    if unknown or not groups:
        raise PolymoeError(f"unknown system {', '.join(unknown) or '(none)'}; there are {', '.join(GROUPS)}.")
    half, quarter = (_shared(share, num_variants) for share in (0.5, 0.75))
    found = [
        Method("average of everything", "average", baseline="average"),
        Method("mean experts, own non-experts", "merge", policy="mean"),
        Method("paper, one variant's non-experts", "paper", baseline="one-nonexperts"),
        Method("paper", "paper", policy="paper", memory="1.0x"),
        Method("paper, 75 % shared", "paper", policy="paper", memory=quarter),
        Method("paper, 50 % shared", "paper", policy="paper", memory=half),
        Method("int8 copies", "copies", baseline="int8-copies"),
        Method("int4 copies", "copies", baseline="int4-copies"),
        Method("int3 copies", "copies", baseline="int3-copies"),
        *(
            Method(f"{base} + {bits} bit", "delta", policy="delta", base=base, delta_bits=bits)
            for base in ("stored", "int8", "int4")
            for bits in (1, 2, 3, 4)
        ),
        *(
            Method(f"int{base} + {bits} bit, nested", "residuals", baseline=f"nested-{base}-{bits}")
            for base in (8, 4)
            for bits in (1, 2, 3)
        ),
        *(
            Method(f"int{base} + 1 bit + rank, as {bits} bit", "residuals", baseline=f"rank-{base}-{bits}")
            for base in (8, 4)
            for bits in (2, 3)
        ),
        *(Method(f"auto {budget}", "auto", policy="auto", memory=budget) for budget in budgets),
    ]
    if with_text:
        found += [
            Method(f"regmean{ON_TEXT}", "merge", policy="regmean", on_text=True),
            *(
                Method(f"{base} copies{ON_TEXT}", "copies", policy="separate", base=base, on_text=True)
                for base in ("int8", "int4", "int3")
            ),
            *(
                replace(row, name=f"{row.name}{ON_TEXT}", on_text=True)
                for row in found
                if row.group in ("delta", "auto")
            ),
        ]  # fmt: skip
    order = list(GROUPS)
    return sorted((row for row in found if row.group in groups), key=lambda row: order.index(row.group))


def _shared(share: float, num_variants: int) -> str:
    """The budget at which the paper's policy shares that part of the positions and keeps the rest separate."""
    return f"{share + (1 - share) * num_variants:g}x"
