"""The way from a method to figures: plan, temporary bundle, engine, comparison; of a baseline: weights, comparison."""

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.baselines.evaluation import Advance, Evaluation, Marks
from benchmarks.baselines.methods import Method
from benchmarks.baselines.weights import make_baseline
from polymoe.console import Console
from polymoe.errors import PolymoeError, UnknownVariantError
from polymoe.evaluate.record import float32_options
from polymoe.llm.llm import LLM
from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.budget import build_plan
from polymoe.offline.plan.options import PlanOptions
from polymoe.offline.plan.plan import Plan
from polymoe.offline.similarity.relation import check_related
from polymoe.offline.similarity.scan import scan_family
from polymoe.offline.write.bundle_writer import write_bundle

Say = Callable[[str], Advance]  # told what is done now; gives a function to count samples


class DoesNotFitError(PolymoeError):
    """A method in fewer bits may."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What a method does to a family.

    marks: variant -> what came out. plan: None for baselines. expert_bytes, resident_bytes: bases and deltas, and
    everything, on the device. expert_multiple: bases and deltas over one model's experts.
    """

    marks: Mapping[str, Marks]
    expert_bytes: int
    expert_multiple: float
    resident_bytes: int
    plan: Plan | None = None


class Comparison:
    """A family that is held by one method after the other, and asked the same each time.

    Args:
        evaluations: of each variant that is asked.
        scratch: for one bundle at a time.
        calibrate: variant -> files to fit plans to. kept: where fitted layers stay, so that an interrupted run goes on.
        console: for warnings. progress: of reading the weights.

    Raises `PolymoeError` for variants that are not related, and for text that is no good.
    """

    def __init__(
        self, family: Family, evaluations: Sequence[Evaluation], scratch: Path, calibrate: Mapping[str, Sequence[Path]],
        console: Console, progress: Console | None = None, kept: Path | None = None,
    ) -> None:  # fmt: skip
        self.family, self.evaluations, self.scratch = family, evaluations, scratch
        self.scan = scan_family(family, progress)
        check_related(self.scan, "auto", False, console)
        self.one_model = self.scan.expert_bytes * self.scan.expert_same_as[0].size
        self.calibration = Calibration.from_files(family, calibrate, folder=kept) if calibrate else None

    def measure(self, method: Method, say: Say, most: float | None = None) -> Measured:
        """Raises `PolymoeError` where the family or the budget does not allow the method.

        most: bytes of bases and deltas in multiples of one model's experts; `DoesNotFitError` for a baseline that needs
            more, and for a plan that leaves experts outside the device.
        """
        for evaluation in self.evaluations:
            _ = evaluation.original  # now: an original and a bundle are never in memory together
        return self._baseline(method, say, most) if method.baseline else self._planned(method, say, most)

    def _planned(self, method: Method, say: Say, most: float | None) -> Measured:
        """Through the plan, the bundle and the engine that serve it."""
        say(f"planning {method.name}")
        calibration = self.calibration if method.on_text else None
        options = PlanOptions(base=method.base, delta_bits=method.delta_bits)
        plan = build_plan(self.scan, method.policy, method.memory, options, self.family, calibration)
        if most is not None and not plan.resident.all():
            raise DoesNotFitError(f"{method.name} does not fit {method.memory} of one model's experts.")
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            bundle = write_bundle(self.family, self.scan, plan, Path(folder) / "bundle", calibration=calibration)
            longest, batch = max(e.longest for e in self.evaluations), max(e.batch for e in self.evaluations)
            llm, advance = LLM(bundle.path, **float32_options(longest, batch)), say(method.name)
            marks = {evaluation.variant: evaluation.of_engine(llm, advance) for evaluation in self.evaluations}
        sizes = bundle.resident_bytes
        del llm
        gc.collect()
        return self._measured(marks, sizes.resident_experts + sizes.deltas, sizes.total, plan)

    def _baseline(self, method: Method, say: Say, most: float | None) -> Measured:
        """In stock transformers, with other weights."""
        assert method.baseline is not None
        baseline = make_baseline(method.baseline, self.family, self.scan)
        multiple = baseline.expert_bytes / self.one_model
        if most is not None and multiple > most:
            raise DoesNotFitError(f"{method.name} need {multiple:.2f}x of one model's experts.")
        advance, names = say(method.name), self.family.names
        marks = {
            evaluation.variant: evaluation.of_weights(baseline.weights(names.index(evaluation.variant)), advance)
            for evaluation in self.evaluations
        }
        gc.collect()
        return self._measured(marks, baseline.expert_bytes, baseline.expert_bytes + baseline.nonexpert_bytes)

    def _measured(self, marks: Mapping[str, Marks], experts: int, resident: int, plan: Plan | None = None) -> Measured:
        return Measured(marks, experts, experts / self.one_model, resident, plan)


def check_names(checkpoints: Mapping[str, Path], *named: Sequence[str] | Mapping[str, object]) -> None:
    """Raise `UnknownVariantError` for a name that has no checkpoint."""
    for name in (name for names in named for name in names):
        if name not in checkpoints:
            raise UnknownVariantError(name, list(checkpoints))
