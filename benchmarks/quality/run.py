"""Every method on the same texts, in float32, against the same originals."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.baselines.comparison import check_names
from benchmarks.baselines.evaluation import Advance
from benchmarks.baselines.methods import methods
from benchmarks.quality.conclusions import conclusions
from benchmarks.quality.lab import Lab, QualityPlan
from benchmarks.quality.row import Row
from polymoe.bench.session import run_progress
from polymoe.console import Console
from polymoe.errors import PolymoeError
from polymoe.machine import describe_machine
from polymoe.offline.atomic import remove_files
from polymoe.offline.calibrate import KEPT_LAYERS


def run_quality(plan: QualityPlan, console: Console) -> dict[str, Any]:
    """Measure all rows and say what they show. Raises `PolymoeError` for a family, text or group that is no good;
    a method that this family or budget does not allow is listed under "skipped" with the reason."""
    chosen = methods(len(plan.checkpoints), plan.groups, plan.budgets, bool(plan.calibrate))
    check_names(plan.checkpoints, plan.texts, plan.calibrate)
    plan.root.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Row] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=plan.root) as scratch:
        lab = Lab(plan, Path(scratch), console)
        with run_progress(console) as progress:
            task = progress.add_task("", total=len(chosen))
            inner = progress.add_task("", total=sum(len(windows) for windows in lab.windows.values()))

            def say(what: str) -> Advance:
                progress.update(task, description=what)
                progress.reset(inner, description="windows")
                return lambda count: progress.advance(inner, count)

            for method in chosen:
                try:
                    rows[method.name] = lab.row(method, say)
                except PolymoeError as error:
                    skipped[method.name] = str(error)
                progress.advance(task)
    remove_files(lab.calibration_folder, KEPT_LAYERS)
    return {
        "benchmark": "quality",
        "machine": describe_machine(),
        "settings": lab.settings(),
        "systems": {name: asdict(row) for name, row in rows.items()},
        "skipped": skipped,
        **conclusions(rows),
    }
