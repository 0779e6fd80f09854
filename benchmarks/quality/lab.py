"""The family of a table of quality, its texts, and the rows that were measured on them before."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

from benchmarks.baselines.comparison import Comparison, Say
from benchmarks.baselines.evaluation import TextEvaluation
from benchmarks.baselines.methods import BUDGETS, GROUPS, Method
from benchmarks.baselines.sources import sources
from benchmarks.quality.row import Row, row_of
from polymoe.bundle.atomic import whole_file
from polymoe.console import Console
from polymoe.evaluate.texts import MAX_WINDOWS, WINDOW
from polymoe.native.library import cpu_kernels
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.error_on_text import errors_on_text
from polymoe.offline.plan.plan import Plan
from polymoe.offline.plan.predicted_error import predicted_error
from polymoe.offline.plan.quantisation_error import QuantisationErrors

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class QualityPlan:
    """What is measured, and where it is kept.

    Args:
        checkpoints: variant -> folder.
        texts: variant -> held-out text; variants without one are served but not measured.
        calibrate: variant -> files; nothing: only what needs no text is compared.
        root: where finished rows are kept, so that an interrupted run goes on from there.
        fresh: measure rows again that are there.
        windows: of each text at most, of `window` tokens, evenly spread.
    """

    checkpoints: Mapping[str, Path]
    texts: Mapping[str, Path]
    root: Path
    calibrate: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    groups: Sequence[str] = tuple(GROUPS)
    budgets: Sequence[str] = BUDGETS
    windows: int = MAX_WINDOWS
    window: int = WINDOW
    batch: int = 8
    fresh: bool = False


class Lab:
    """Measures rows, and finds again what it measured from the same sources."""

    def __init__(self, plan: QualityPlan, scratch: Path, console: Console) -> None:
        self.plan = plan
        family = Family.open(plan.checkpoints)
        evaluations = [
            TextEvaluation(family, name, text, plan.windows, scratch, plan.window, plan.batch)
            for name, text in plan.texts.items()
        ]
        self.windows = {evaluation.variant: evaluation.samples.windows for evaluation in evaluations}
        self.window = evaluations[0].longest
        self.calibration_folder = plan.root / f"calibration-{self._key(None)}"
        self.comparison = Comparison(
            family, evaluations, scratch, plan.calibrate, console, progress=console, kept=self.calibration_folder
        )

    def row(self, method: Method, say: Say) -> Row:
        """One method, measured now or found. `say`: told what is done; gives a function to count windows."""
        kept = self.plan.root / f"row-{self._key(method)}.json"
        if kept.exists() and not self.plan.fresh:
            return Row(**json.loads(kept.read_text(encoding="utf-8")))
        started = time.monotonic()
        measured = self.comparison.measure(method, say)
        predicted = None if measured.plan is None else self._predicted(measured.plan, method.on_text)
        row = row_of(method, measured, predicted, time.monotonic() - started)
        with whole_file(kept) as unfinished:
            unfinished.write_text(json.dumps(asdict(row)), encoding="utf-8")
        return row

    @cached_property
    def _errors_of_weights(self) -> QuantisationErrors:
        return QuantisationErrors.of_weights(self.comparison.scan)

    @cached_property
    def _errors_on_text(self) -> QuantisationErrors:
        assert self.comparison.calibration is not None
        return errors_on_text(self.comparison.family, self.comparison.scan, self.comparison.calibration)

    def _predicted(self, plan: Plan, on_text: bool) -> dict[str, float] | None:
        """Variant -> nats a token, as the planner would predict it."""
        error = plan.predicted_error
        if error is None:
            errors = self._errors_on_text if on_text else self._errors_of_weights
            error = predicted_error(plan.with_shared_deltas(self.comparison.scan.expert_same_as), errors)
        return None if error is None else dict(zip(self.comparison.family.names, error.tolist(), strict=True))

    def settings(self) -> dict[str, Any]:
        """What a reader of the table must know."""
        family, scan = self.comparison.family, self.comparison.scan
        distance = scan.pair_distance
        count = len(distance)
        return {
            "variants": list(family.names),
            "architecture": family.architecture.class_name,
            "texts": {name: path.name for name, path in self.plan.texts.items()},
            "calibrate": {name: [path.name for path in paths] for name, paths in self.plan.calibrate.items()},
            "window": self.window,
            "tokens": {name: sum(len(w) - 1 for w in windows) for name, windows in self.windows.items()},
            "one_model_expert_bytes": self.comparison.one_model,
            "nonexpert_bytes": scan.nonexpert_bytes_total,
            "relative_distance": float(distance.sum() / max(1, count * (count - 1))),
            "dtype": "float32",
        }

    def _key(self, method: Method | None) -> str:
        """16 hex digits over all that decides a row's figures, or for None what is fitted to text."""
        facts: dict[str, Any] = {
            "sources": sources(),
            "versions": [module.__version__ for module in (torch, transformers, numpy)],
            "kernels": cpu_kernels() is not None,
            "checkpoints": {name: _fingerprint(path) for name, path in self.plan.checkpoints.items()},
            "calibrate": {name: [_content(p) for p in paths] for name, paths in self.plan.calibrate.items()},
        }
        if method is not None:
            own = [_content(_HERE / name) for name in ("lab.py", "row.py")]
            facts |= {"method": asdict(method), "texts": self.windows, "row": own}
            if not method.on_text:
                del facts["calibrate"]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _fingerprint(folder: Path) -> list[tuple[str, int, int]]:
    """Another one when a file of the checkpoint changed."""
    resolved = folder.resolve()
    files = sorted(path for path in resolved.iterdir() if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
