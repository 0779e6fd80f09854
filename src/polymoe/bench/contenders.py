"""What `bench quality` compares: every way to hold a family in less memory, by name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from polymoe.errors import PolymoeError

GROUPS = {
    "average": "one average of everything",
    "merge": "one merged expert a position, own non-experts",
    "paper": "round-robin owners",
    "copies": "every variant whole, quantised",
    "delta": "one base and a delta of the same width everywhere",
    "auto": "formats chosen position by position",
}
BUDGETS = ("0.55x", "0.75x", "1.0x", "1.05x", "1.1x", "1.15x", "1.25x", "1.5x")
ON_TEXT = ", on text"


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    group: of `GROUPS`. rival: its name in `polymoe.bench.rivals.RIVALS`; None for a plan that polymoe serves, made of
    `policy`, `memory`, `base` and `delta_bits` as `polymoe plan` takes them. on_text: fitted to the calibration text.
    """

    name: str
    group: str
    rival: str | None = None
    policy: str = ""
    memory: str | None = None
    base: str = "stored"
    delta_bits: int | None = None
    on_text: bool = False


def contenders(num_variants: int, groups: Sequence[str], budgets: Sequence[str], with_text: bool) -> list[Contender]:
    """All rows of the table, those that text helps twice when there is some. Raises `PolymoeError` for a group that
    does not exist."""
    unknown = [group for group in groups if group not in GROUPS]
    if unknown or not groups:
        raise PolymoeError(f"unknown system {', '.join(unknown) or '(none)'}; there are {', '.join(GROUPS)}.")
    half, quarter = (_shared(share, num_variants) for share in (0.5, 0.75))
    found = [
        Contender("average of everything", "average", rival="average"),
        Contender("mean experts, own non-experts", "merge", policy="mean"),
        Contender("paper, one variant's non-experts", "paper", rival="one-nonexperts"),
        Contender("paper", "paper", policy="paper", memory="1.0x"),
        Contender("paper, 75 % shared", "paper", policy="paper", memory=quarter),
        Contender("paper, 50 % shared", "paper", policy="paper", memory=half),
        Contender("int8 copies", "copies", rival="int8-copies"),
        Contender("int4 copies", "copies", rival="int4-copies"),
        Contender("int3 copies", "copies", rival="int3-copies"),
        *(
            Contender(f"{base} + {bits} bit", "delta", policy="delta", base=base, delta_bits=bits)
            for base in ("stored", "int8", "int4")
            for bits in (1, 2, 3, 4)
        ),
        *(Contender(f"auto {budget}", "auto", policy="auto", memory=budget) for budget in budgets),
    ]
    if with_text:
        found += [
            Contender(f"regmean{ON_TEXT}", "merge", policy="regmean", on_text=True),
            *(
                Contender(f"{base} copies{ON_TEXT}", "copies", policy="separate", base=base, on_text=True)
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
