"""What `polymoe plan` and `polymoe inspect` do, from checkpoints to a printed summary."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from polymoe.bundle.atomic import check_can_write, check_target, remove_files
from polymoe.bundle.reader import Bundle
from polymoe.console import Console
from polymoe.errors import PlanError
from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.checkpoint.serving_check import check_serving
from polymoe.offline.plan.budget import build_plan, parse_memory
from polymoe.offline.plan.options import PlanOptions
from polymoe.offline.similarity.distances_file import write_distances
from polymoe.offline.similarity.picture import heatmap, is_own_picture
from polymoe.offline.similarity.relation import check_related
from polymoe.offline.similarity.scan import FamilyScan, scan_family
from polymoe.offline.write.bundle_report import print_bundle, print_sharing, print_variants
from polymoe.offline.write.bundle_writer import write_bundle


def make_plan(
    specs: Mapping[str, str | Path] | Sequence[str],
    policy: str,
    memory: str | None,
    out: str | Path,
    overwrite: bool = False,
    console: Console | None = None,
    options: PlanOptions | None = None,
) -> Bundle:
    """Plan a family and write the bundle `out`. `specs`: {name: checkpoint} or ["NAME=SPEC", …]; `memory` and
    `options`: see `build_plan`. With a console it shows progress and says at the end what was decided.

    Raises `CheckpointError`, `FamilyError` or `PlanError`; `out` is then what it was. With calibration text an
    interrupted run leaves its finished layers in `.NAME.calibration` beside `out`; the same call goes on from there.
    """
    from polymoe.offline.calibrate.calibrate import KEPT_LAYERS

    # What can be refused without reading gigabytes is refused first.
    options = options or PlanOptions()
    options.check(policy)
    if memory is not None:
        parse_memory(memory)
    target = Path(out).expanduser()
    check_can_write(target)
    check_target(target, overwrite)
    family = Family.open(specs)
    _say(family.notes, console)
    check_serving(family, console)
    started = target.parent / f".{target.name}.calibration"
    calibration = _calibration(family, options, started)
    if options.distill is not None:
        from polymoe.offline.distill.distill import check_family

        check_family(family)
    scan = scan_family(family, console)
    _say(family.rounding_notes, console)
    check_related(scan, policy, options.accept_unrelated, console)
    plan = build_plan(scan, policy, memory, options, family, calibration, console)
    bundle = write_bundle(family, scan, plan, out, overwrite, console, calibration)
    remove_files(started, KEPT_LAYERS)
    if options.distill is not None:
        from polymoe.offline.distill.distill import distill

        assert calibration is not None
        bundle = distill(bundle, family, calibration, options.distill, console)
    if console is not None:
        print_bundle(bundle, console)
        print_sharing(bundle, scan, plan, console)
    return bundle


def _calibration(family: Family, options: PlanOptions, folder: Path) -> Calibration | None:
    """The variants' texts as token ids; None without any. `folder` keeps finished layers of an interrupted run."""
    if not options.calibrate:
        return None
    from polymoe.offline.calibrate.calibrate import Calibration

    return Calibration.from_files(family, options.calibrate, folder=folder)


def inspect_bundle(path: str | Path, console: Console | None = None) -> Bundle:
    """Print what a bundle holds and how close its variants are to their originals. Raises `BundleError`."""
    console = console or Console()
    bundle = Bundle.open(path)
    print_bundle(bundle, console)
    print_variants(bundle, console)
    return bundle


def inspect(
    specs: Mapping[str, str | Path] | Sequence[str],
    png: str | Path | None,
    console: Console | None = None,
    json: Path | None = None,
) -> FamilyScan:
    """Compare the experts of a family: a table by layer on `console`, a heat map in the file `png`, and in the file
    `json` what `polymoe place` reads.

    Raises `CheckpointError` or `FamilyError`; `PlanError` for a `png` that cannot be written.
    """
    console = console or Console()
    if png is not None:
        check_picture(Path(png))
    if json is not None:
        check_can_write(json)
        if json.is_dir():
            raise PlanError(f"--json {json} is a folder; give the name of a file.")
    family = Family.open(specs)
    _say(family.notes, console)
    scan = scan_family(family, console)
    _say(family.rounding_notes, console)
    relative, same = scan.relative_distance, (scan.expert_same_as == 0).all(axis=0)
    grid = Table(title=f"{family.architecture.class_name}: {', '.join(scan.variant_names)}", title_justify="left")
    grid.add_column("layer", justify="right")
    for column in ("min", "mean", "max"):
        grid.add_column(f"{column} distance", justify="right")
    grid.add_column("identical experts", justify="right")
    for layer, name in enumerate(scan.layer_names):
        row = relative[layer]
        shown = (f"{value:.2%}" for value in (row.min(), row.mean(), row.max()))
        grid.add_row(name, *shown, f"{int(same[layer].sum())} of {len(row)}")
    grid.add_section()
    shown = (f"{value:.2%}" for value in (relative.min(), relative.mean(), relative.max()))
    grid.add_row("all", *shown, f"{int(same.sum())} of {same.size}")
    console.print(grid)
    console.print("Distance: of a pair of variants on average, relative to the norm of the weights.")
    if json is not None:
        write_distances(family, scan, json)
        console.print(f"Distances: {json}", soft_wrap=True)
    if png is not None:
        heatmap(scan, png)
        console.print(f"Heat map: {png}", soft_wrap=True)
    return scan


def _say(notes: Sequence[str], console: Console | None) -> None:
    if console is not None:
        for note in notes:
            console.print(note, soft_wrap=True, highlight=False)


def check_picture(path: Path) -> None:
    """Raise `PlanError` for a heat map that could not be written."""
    if path.suffix.lower() in (".png", ".pdf", ".svg") and path.is_dir():
        raise PlanError(f"--png {path} is a folder; give the name of a file.")
    if os.path.lexists(path) and not is_own_picture(path):
        raise PlanError(f"--png {path} is not a PNG picture, so it is not overwritten; give another name.")
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise PlanError(f"--png {path}: give a file that ends in .png (.pdf and .svg work too).")
    if not path.absolute().parent.is_dir():
        raise PlanError(f"--png {path}: the folder {path.absolute().parent} does not exist.")
    check_can_write(path)
