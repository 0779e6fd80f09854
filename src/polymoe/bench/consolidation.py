"""A variant consolidated with others: every way to hold them in the memory of one, as `bench merging` compares them."""

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polymoe.bench.contenders import GROUPS, ON_TEXT, Contender, contenders
from polymoe.bench.exam import Exam, Marks
from polymoe.bench.rivals import make_rival
from polymoe.console import Console
from polymoe.errors import PolymoeError
from polymoe.offline.budget import build_plan
from polymoe.offline.bundle_writer import write_bundle
from polymoe.offline.calibrate import Calibration
from polymoe.offline.family import Family
from polymoe.offline.options import PlanOptions
from polymoe.offline.relation import check_related

MEMORY = "1.0x"
_RIVALS_MAY = 1.1  # × one model's experts: quantised copies that need a little more than the budget are still shown

Say = Callable[[str], Callable[[int], None]]  # told what is done now; gives a function to count samples


@dataclass(frozen=True)
class Measured:
    """A contender's marks and its bytes on the device. expert_multiple: bases and deltas over one model's experts."""

    contender: Contender
    marks: Marks
    expert_multiple: float
    resident_bytes: int | None  # None where nothing is consolidated


class _DoesNotFitError(PolymoeError):
    """The next contender in fewer bits may."""


def choices(count: int, with_text: bool) -> list[list[Contender]]:
    """The rows for `count` variants, out of the table of `bench quality`. A row is the first of its contenders that
    fits the memory: quantised copies and deltas in as many bits as there is room for. `with_text`: there is some to fit
    a plan to."""
    every = {row.name: row for row in contenders(count, list(GROUPS), [MEMORY], with_text)}
    copies = [f"int{bits} copies" for bits in (8, 4, 3)]
    deltas = [f"int4 + {bits} bit" for bits in (4, 3, 2, 1)]
    names = [["average of everything"], ["mean experts, own non-experts"], ["paper, one variant's non-experts"],
             ["paper"], copies, deltas, [f"auto {MEMORY}"]]  # fmt: skip
    if with_text:
        names += [[f"regmean{ON_TEXT}"], [f"{name}{ON_TEXT}" for name in deltas], [f"auto {MEMORY}{ON_TEXT}"]]
    return [[every[name] for name in row] for row in names]


class Consolidation:
    """The first others and the variant that is asked, which joins last: the paper without reconfiguration serves it
    with the first variant's non-experts. `calibrate`: variant -> text files, of variants that are not there too."""

    def __init__(
        self,
        checkpoints: Mapping[str, Path],
        asked: str,
        count: int,
        console: Console,
        calibrate: Mapping[str, Sequence[Path]],
    ) -> None:
        others = [name for name in checkpoints if name != asked][: count - 1]
        self.asked, self.count = asked, count
        self.family = Family.open({name: checkpoints[name] for name in (*others, asked)})
        self.scan = self.family.scan()
        check_related(self.scan, "auto", False, console)
        self.one_model = self.scan.expert_bytes * self.scan.expert_version[0].size
        given = {name: files for name, files in calibrate.items() if name in self.family.names}
        self.calibration = Calibration.from_files(self.family, given) if given else None

    def measure(self, choice: Sequence[Contender], exam: Exam, scratch: Path, say: Say) -> Measured:
        """The first contender of `choice` that fits. Raises `PolymoeError` where none does."""
        why: PolymoeError | None = None
        for contender in choice:
            try:
                if contender.rival is None:
                    return self._planned(contender, exam, scratch, say)
                return self._rival(contender, exam, say)
            except _DoesNotFitError as error:
                why = error
        assert why is not None
        raise why

    def _planned(self, contender: Contender, exam: Exam, scratch: Path, say: Say) -> Measured:
        """Through the plan, the bundle and the engine that serve it."""
        say(f"{self.count} variants: planning {contender.name}")
        options = PlanOptions(base=contender.base, delta_bits=contender.delta_bits)
        memory = MEMORY if contender.group == "delta" else contender.memory
        calibration = self.calibration if contender.on_text else None
        plan = build_plan(self.scan, contender.policy, memory, options, self.family, calibration)
        if not plan.resident.all():
            raise _DoesNotFitError(f"{contender.name} does not fit {MEMORY} of one model's experts.")
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            bundle = write_bundle(self.family, self.scan, plan, Path(folder) / "bundle", calibration=calibration)
            marks = exam.of_bundle(bundle, say(f"{self.count} variants: {contender.name}"))
        sizes = bundle.resident_bytes
        gc.collect()
        experts = sizes["resident_experts"] + sizes.get("deltas", 0)
        return Measured(contender, marks, experts / self.one_model, sum(sizes.values()))

    def _rival(self, contender: Contender, exam: Exam, say: Say) -> Measured:
        """In stock transformers, with other weights."""
        assert contender.rival is not None
        rival = make_rival(contender.rival, self.family, self.scan)
        multiple = rival.expert_bytes / self.one_model
        if multiple > _RIVALS_MAY:
            raise _DoesNotFitError(f"{contender.name} need {multiple:.2f}x of one model's experts.")
        weights = rival.weights(self.family.names.index(self.asked))
        marks = exam.of_weights(weights, say(f"{self.count} variants: {contender.name}"))
        gc.collect()
        return Measured(contender, marks, multiple, rival.expert_bytes + rival.nonexpert_bytes)
