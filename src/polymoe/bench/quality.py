"""`polymoe bench quality`: every contender on the same texts, in float32, against the same originals."""

import gc
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

import polymoe
from polymoe.bench.contenders import BUDGETS, GROUPS, Contender, contenders
from polymoe.bench.originals import OriginalLogProbs
from polymoe.bench.quality_figures import Row, conclusions, row_of
from polymoe.bench.rivals import make_rival, put_weights
from polymoe.bench.session import run_progress
from polymoe.console import Console
from polymoe.errors import PolymoeError
from polymoe.evaluate.fidelity import Fidelity, Logits, OriginalModel, check_token_ids, compare, served_logits
from polymoe.evaluate.record import float32_engine
from polymoe.evaluate.texts import MAX_WINDOWS, WINDOW, encode_texts, spread_windows
from polymoe.machine import describe_machine
from polymoe.offline.atomic import whole_file
from polymoe.offline.budget import build_plan
from polymoe.offline.bundle import Bundle
from polymoe.offline.bundle_writer import write_bundle
from polymoe.offline.calibrate import Calibration
from polymoe.offline.damage import Energies
from polymoe.offline.family import Family, max_model_len
from polymoe.offline.manifest import FORMAT_VERSION
from polymoe.offline.options import PlanOptions
from polymoe.offline.plan import Plan
from polymoe.offline.predicted import predicted_damage
from polymoe.offline.relation import check_related

Measured = dict[str, Fidelity]
_DECIDING = ("offline", "quant", "evaluate")  # folders of the package


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


def run_quality(plan: QualityPlan, console: Console) -> dict[str, Any]:
    """Measure all rows and say what they show. Raises `PolymoeError` for a family, text or group that is no good;
    a contender that this family or budget does not allow is listed under "skipped" with the reason."""
    chosen = contenders(len(plan.checkpoints), plan.groups, plan.budgets, bool(plan.calibrate))
    lab = Lab(plan, console)
    rows: dict[str, Row] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=lab.folder) as scratch:
        lab.scratch = Path(scratch)
        with run_progress(console) as progress:
            task = progress.add_task("", total=len(chosen))
            inner = progress.add_task("", total=lab.num_windows)

            def say(what: str) -> Callable[[int], None]:
                progress.update(task, description=what)
                progress.reset(inner, description="windows")
                return lambda count: progress.advance(inner, count)

            for contender in chosen:
                try:
                    rows[contender.name] = lab.row(contender, say)
                except PolymoeError as error:
                    skipped[contender.name] = str(error)
                progress.advance(task)
    shutil.rmtree(lab.calibration_folder, ignore_errors=True)
    return {
        "benchmark": "quality",
        "machine": describe_machine(),
        "settings": lab.settings(),
        "systems": {name: asdict(row) for name, row in rows.items()},
        "skipped": skipped,
        **conclusions(rows),
    }


class Lab:
    """The family, its texts and its originals: what all rows share."""

    def __init__(self, plan: QualityPlan, console: Console) -> None:
        self.plan, self.console = plan, console
        token_ids = encode_texts(plan.checkpoints, plan.texts)
        self.family = Family.open(plan.checkpoints)
        window = min(plan.window, *(max_model_len(c.config) for c in self.family.checkpoints))
        self.window = window
        self.texts = {name: spread_windows(ids, window, plan.windows) for name, ids in token_ids.items()}
        self.vocab_sizes = dict(zip(self.family.names, self.family.vocab_sizes, strict=True))
        for name, pieces in self.texts.items():
            check_token_ids(name, pieces, self.vocab_sizes[name])
        self.scan = self.family.scan(console)
        check_related(self.scan, "auto", False, console)
        self.one_model = self.scan.expert_bytes * self.scan.expert_version[0].size
        self.calibration_folder = plan.root / f"calibration-{self._key(None)}"
        self.calibration = (
            Calibration.from_files(self.family, plan.calibrate, folder=self.calibration_folder)
            if plan.calibrate
            else None
        )
        self.folder = plan.root
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scratch = self.folder

    @property
    def num_windows(self) -> int:
        return sum(len(pieces) for pieces in self.texts.values())

    @cached_property
    def originals(self) -> OriginalLogProbs:
        return OriginalLogProbs(self.scratch, self.plan.checkpoints, self.texts, self.plan.batch)

    @cached_property
    def _energies_of_weights(self) -> Energies:
        return Energies.of_weights(self.scan)

    @cached_property
    def _energies_on_text(self) -> Energies:
        from polymoe.offline.calibrated_damage import energies_on_text

        assert self.calibration is not None
        return energies_on_text(self.family, self.scan, self.calibration)

    def _predicted(self, plan: Plan, on_text: bool) -> dict[str, float] | None:
        """Variant -> nats a token, as the planner would predict it."""
        damage = plan.predicted_damage
        if damage is None:
            energies = self._energies_on_text if on_text else self._energies_of_weights
            damage = predicted_damage(plan.with_shared_deltas(self.scan.expert_version), energies)
        return None if damage is None else dict(zip(self.family.names, damage.tolist(), strict=True))

    def row(self, contender: Contender, say: Callable[[str], Callable[[int], None]]) -> Row:
        """One contender, measured now or found. `say`: told what is done; gives a function to count windows."""
        kept = self.folder / f"row-{self._key(contender)}.json"
        if kept.exists() and not self.plan.fresh:
            return Row(**json.loads(kept.read_text(encoding="utf-8")))
        started = time.monotonic()
        if contender.rival is not None:
            measured, sizes, predicted = self._rival(contender, say)
        else:
            measured, sizes, predicted = self._planned(contender, say)
        row = row_of(contender, measured, sizes, self.one_model, predicted, time.monotonic() - started)
        with whole_file(kept) as unfinished:
            unfinished.write_text(json.dumps(asdict(row)), encoding="utf-8")
        return row

    def _planned(
        self, contender: Contender, say: Callable[[str], Callable[[int], None]]
    ) -> tuple[Measured, dict[str, int], dict[str, float] | None]:
        """Through the plan, the bundle and the engine that serve it."""
        say(f"planning {contender.name}")
        calibration = self.calibration if contender.on_text else None
        options = PlanOptions(base=contender.base, delta_bits=contender.delta_bits)
        plan = build_plan(
            self.scan, contender.policy, contender.memory, options, self.family, calibration, console=None
        )
        with self._bundle_folder() as folder:
            bundle = write_bundle(self.family, self.scan, plan, folder, calibration=calibration)
            measured = self._served(bundle, say(contender.name))
        gc.collect()
        return measured, bundle.resident_bytes, self._predicted(plan, contender.on_text)

    def _served(self, bundle: Bundle, advance: Callable[[int], None]) -> Measured:
        engine = float32_engine(bundle, self.window, self.plan.batch)
        index = {variant.name: i for i, variant in enumerate(engine.info.variants)}
        return self._compare(lambda name: served_logits(engine, index[name]), advance)

    @contextmanager
    def _bundle_folder(self) -> Iterator[Path]:
        """A place for one bundle, which is gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            yield Path(folder) / "bundle"

    def _rival(
        self, contender: Contender, say: Callable[[str], Callable[[int], None]]
    ) -> tuple[Measured, dict[str, int], None]:
        """In stock transformers, with other weights."""
        assert contender.rival is not None
        rival = make_rival(contender.rival, self.family, self.scan)
        advance = say(contender.name)

        def logits_of(name: str) -> Logits:
            model = OriginalModel(self.plan.checkpoints[name], torch.float32, torch.device("cpu"))
            put_weights(model.model, rival.weights(self.family.names.index(name)))
            return model.numbered_logits()

        measured = self._compare(logits_of, advance)
        return measured, {"resident_experts": rival.expert_bytes, "nonexperts": rival.nonexpert_bytes}, None

    def _compare(self, logits_of: Callable[[str], Logits], advance: Callable[[int], None]) -> Measured:
        return {
            name: compare(
                windows, self.originals.of(name), logits_of(name), self.vocab_sizes[name], self.plan.batch, advance
            )
            for name, windows in self.texts.items()
        }

    def settings(self) -> dict[str, Any]:
        """What a reader of the table must know."""
        distance = self.scan.pair_distance
        count = len(distance)
        return {
            "variants": list(self.family.names),
            "architecture": self.family.architecture.class_name,
            "texts": {name: path.name for name, path in self.plan.texts.items()},
            "calibrate": {name: [path.name for path in paths] for name, paths in self.plan.calibrate.items()},
            "window": self.window,
            "tokens": {name: sum(len(w) - 1 for w in pieces) for name, pieces in self.texts.items()},
            "one_model_expert_bytes": self.one_model,
            "nonexpert_bytes": self.scan.nonexpert_bytes_total,
            "relative_distance": float(distance.sum() / max(1, count * (count - 1))),
            "dtype": "float32",
        }

    def _key(self, contender: Contender | None) -> str:
        """16 hex digits over all that decides a row's figures, or for None what is fitted to text."""
        facts: dict[str, Any] = {
            "versions": (polymoe.__version__, FORMAT_VERSION, torch.__version__, _sources()),
            "checkpoints": {name: _fingerprint(path) for name, path in self.plan.checkpoints.items()},
            "calibrate": {name: [_content(p) for p in paths] for name, paths in self.plan.calibrate.items()},
        }
        if contender is not None:
            facts |= {"contender": asdict(contender), "texts": self.texts}
            if not contender.on_text:
                del facts["calibrate"]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@cache
def _sources() -> str:
    """SHA-256 over the package's files that decide what is planned, packed and measured."""
    root, digest = Path(polymoe.__file__).parent, hashlib.sha256()
    for path in sorted(path for folder in _DECIDING for path in (root / folder).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _fingerprint(folder: Path) -> list[tuple[str, int, int]]:
    """Another one when a file of the checkpoint changed."""
    resolved = folder.resolve()
    files = sorted(path for path in resolved.iterdir() if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
