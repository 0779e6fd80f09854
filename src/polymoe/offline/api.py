"""What `polymoe plan` and `polymoe inspect` do, from checkpoints to a printed summary."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from polymoe.config import format_bytes
from polymoe.offline.atomic import check_target
from polymoe.offline.budget import build_plan, parse_memory
from polymoe.offline.bundle import Bundle
from polymoe.offline.bundle_writer import write_bundle
from polymoe.offline.family import Family
from polymoe.offline.plan import Plan
from polymoe.offline.scan import FamilyScan
from polymoe.offline.similarity import heatmap

_KINDS = {
    "resident_experts": "experts",
    "nonexperts_shared": "non-experts, shared by all",
    "nonexperts_own": "non-experts of single variants",
    "tables": "tables",
}


def make_plan(
    specs: Mapping[str, str | Path] | Sequence[str],
    policy: str,
    memory: str | None,
    out: str | Path,
    overwrite: bool = False,
    console: Console | None = None,
) -> Bundle:
    """Plan a family and write the bundle `out`. `specs`: {name: checkpoint} or ["NAME=SPEC", …]; `memory`: see
    `polymoe.offline.budget.build_plan`. With a console it shows progress and says at the end what was decided.

    Raises `CheckpointError`, `FamilyError` or `PlanError`; `out` is then what it was.
    """
    # What can be refused without reading gigabytes is refused first.
    if memory is not None:
        parse_memory(memory)
    check_target(Path(out).expanduser(), overwrite)
    family = Family.open(specs)
    _say_ignored(family, console)
    scan = family.scan(console)
    plan = build_plan(scan, policy, memory)
    bundle = write_bundle(family, scan, plan, out, overwrite, console)
    if console is not None:
        print_bundle(bundle, scan, plan, console)
    return bundle


def inspect(
    specs: Mapping[str, str | Path] | Sequence[str], png: str | Path | None, console: Console | None = None
) -> FamilyScan:
    """Compare the experts of a family: a table by layer on `console` and a heat map in the file `png`.

    Raises `CheckpointError` or `FamilyError`.
    """
    console = console or Console()
    family = Family.open(specs)
    _say_ignored(family, console)
    scan = family.scan(console)
    relative, same = scan.relative_distance, (scan.expert_version == 0).all(axis=0)
    grid = Table(title=f"{family.architecture.class_name}: {', '.join(scan.variant_names)}", title_justify="left")
    grid.add_column("layer", justify="right")
    for column in ("min", "mean", "max"):
        grid.add_column(f"{column} distance", justify="right")
    grid.add_column("identical experts", justify="right")
    for layer, number in enumerate(scan.layer_numbers):
        row = relative[layer]
        shown = (f"{value:.2%}" for value in (row.min(), row.mean(), row.max()))
        grid.add_row(str(number), *shown, f"{int(same[layer].sum())} of {len(row)}")
    grid.add_section()
    shown = (f"{value:.2%}" for value in (relative.min(), relative.mean(), relative.max()))
    grid.add_row("all", *shown, f"{int(same.sum())} of {same.size}")
    console.print(grid)
    console.print("Distance: of a pair of variants on average, relative to the norm of the weights.")
    if png is not None:
        heatmap(scan, png)
        console.print(f"Heat map: {png}", soft_wrap=True)
    return scan


def print_bundle(bundle: Bundle, scan: FamilyScan, plan: Plan, console: Console) -> None:
    """Say what a plan decided: bytes by kind, positions, and what each variant gets."""
    manifest = bundle.manifest
    kinds = Table(
        title=f"{bundle.path.name}: policy {manifest.policy} {manifest.memory}".rstrip(), title_justify="left"
    )
    kinds.add_column("on the device")
    kinds.add_column("bytes", justify="right")
    kinds.add_column("", justify="right")
    one_model = manifest.expert_bytes * manifest.num_experts * len(manifest.expert_modules)
    for kind, count in manifest.resident_bytes.items():
        note = f"{count / one_model:.2f}x one model's" if kind == "resident_experts" else ""
        kinds.add_row(_KINDS.get(kind, kind), format_bytes(count), note)
    kinds.add_section()
    kinds.add_row("together", format_bytes(sum(manifest.resident_bytes.values())))
    kinds.add_row("host tier: absent experts", format_bytes(manifest.host_bytes))
    console.print(kinds)

    counts = manifest.positions
    console.print(
        f"{sum(counts.values())} expert positions: {counts['shared']} shared by all variants, "
        f"{counts['separate']} separate, {counts['absent']} absent (fetched from the host).",
        soft_wrap=True,
    )
    variants = Table(title="Experts of each variant", title_justify="left")
    for column in ("variant", "its own", "another variant's", "from the host", "version"):
        variants.add_column(column, justify="left" if column in ("variant", "version") else "right")
    for index, record in enumerate(bundle.variants):
        own = plan.serving[index] == scan.expert_version[index]
        resident = plan.resident[index]
        numbers = (own & resident, ~own, own & ~resident)
        variants.add_row(record.name, *(str(int(np.sum(n))) for n in numbers), record.version[:12])
    console.print(variants)


def _say_ignored(family: Family, console: Console | None) -> None:
    for checkpoint in family.checkpoints:
        if checkpoint.ignored and console is not None:
            console.print(
                f"{checkpoint.name}: {len(checkpoint.ignored)} stored tensors are not part of the served model "
                f"({checkpoint.ignored[0]} …).",
                soft_wrap=True,
            )
