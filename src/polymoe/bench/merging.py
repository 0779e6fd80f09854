"""`polymoe bench merging`: a variant on its own task, alone and with ever more variants in the memory of one.

The experiment of arXiv 2505.06481 on Switch Transformers (its table of ROUGE on SAMSum with 2, 3 and 4 variants), for
every policy at the same bytes. Decoder-only families are asked for perplexity and KL instead.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from polymoe.bench.consolidation import MEMORY, Consolidation, Measured, choices
from polymoe.bench.contenders import Contender
from polymoe.bench.exam import Exam, Marks, TextExam
from polymoe.bench.rouge import KINDS, Mean, kept_share, require_rouge
from polymoe.bench.session import run_progress
from polymoe.bench.task_exam import TaskExam
from polymoe.bench.task_pairs import draw_pairs
from polymoe.console import Console
from polymoe.errors import PolymoeError, UnknownVariantError
from polymoe.machine import describe_machine
from polymoe.offline.family import Family

_ALONE = Contender("alone", "alone")


@dataclass(frozen=True)
class MergingPlan:
    """What is measured.

    Args:
        checkpoints: variant -> folder, two at least, in the order in which they join.
        tasks: variant -> JSON lines of pairs, for encoder–decoder families.
        texts: variant -> held-out text, for decoder-only ones.
        variants: those that are asked, each in turn; empty: the first that has a task or text.
        samples: pairs or windows at most.
        max_new_tokens: of an answer.
        seed: which pairs are drawn.
        calibrate: variant -> other text or pairs, to fit a further plan to.
    """

    checkpoints: Mapping[str, Path]
    tasks: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, Path] = field(default_factory=dict)
    variants: Sequence[str] = ()
    samples: int = 200
    max_new_tokens: int = 64
    seed: int = 0
    calibrate: Mapping[str, Sequence[Path]] = field(default_factory=dict)


def run_merging(plan: MergingPlan, console: Console) -> dict[str, Any]:
    """Measure everything. Raises `PolymoeError` for input that is no good; a policy that a family or the budget does
    not allow is listed under "skipped" with the reason."""
    for name in (*plan.variants, *plan.tasks, *plan.texts, *plan.calibrate):
        if name not in plan.checkpoints:
            raise UnknownVariantError(name, list(plan.checkpoints))
    if len(plan.checkpoints) < 2:
        raise PolymoeError("there is nothing to consolidate with one variant; give two or more, NAME=PATH each.")
    family = Family.open(plan.checkpoints)
    asked = _asked(plan, family)
    if plan.tasks:
        require_rouge()
    counts = range(2, len(plan.checkpoints) + 1)
    compared = {count: choices(count, bool(plan.calibrate)) for count in counts}
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="polymoe-merging-") as folder, run_progress(console) as progress:
        exams = [_exam(plan, family, name, Path(folder)) for name in asked]
        task = progress.add_task("", total=len(exams) * (1 + sum(map(len, compared.values()))))
        inner = progress.add_task("", total=None)
        for exam in exams:

            def say(what: str, exam: Exam = exam) -> Callable[[int], None]:
                progress.update(task, description=what)
                progress.reset(inner, description=exam.sample, total=exam.num_samples)
                return lambda done: progress.advance(inner, done)

            alone = exam.alone(say(f"{exam.variant} alone"))
            rows.append(_row(exam, 1, Measured(_ALONE, alone, 1.0, None), alone))
            progress.advance(task)
            for count in counts:
                consolidation = Consolidation(plan.checkpoints, exam.variant, count, console, plan.calibrate)
                for choice in compared[count]:
                    try:
                        rows.append(_row(exam, count, consolidation.measure(choice, exam, Path(folder), say), alone))
                    except PolymoeError as error:
                        skipped[f"{exam.variant}, {count} variants: {choice[-1].name}"] = str(error)
                    progress.advance(task)
    return {
        "benchmark": "merging",
        "machine": describe_machine(),
        "settings": {
            "variants": list(plan.checkpoints),
            "asked": asked,
            "architecture": family.architecture.class_name,
            "files": {name: (plan.tasks or plan.texts)[name].name for name in asked},
            "kind": "task" if plan.tasks else "text",
            "samples": plan.samples,
            "max_new_tokens": plan.max_new_tokens,
            "seed": plan.seed,
            "memory": MEMORY,
            "calibrate": {name: [path.name for path in paths] for name, paths in plan.calibrate.items()},
            "dtype": "float32",
        },
        "rows": rows,
        "skipped": skipped,
        "best_share_of_rouge1": _best_shares(rows),
    }


def _asked(plan: MergingPlan, family: Family) -> list[str]:
    """The variants to ask. Raises `PolymoeError` where the family and what is given do not match."""
    seq2seq = bool(getattr(family.config, "is_encoder_decoder", False))
    if seq2seq and plan.texts:
        raise PolymoeError("this is an encoder–decoder family; give --task NAME=FILE.jsonl instead of --text.")
    if not seq2seq and plan.tasks:
        raise PolymoeError(
            "this is a decoder-only family, which has no tasks; give --text NAME=FILE instead of --task."
        )
    given, option = (plan.tasks, "--task NAME=FILE.jsonl") if seq2seq else (plan.texts, "--text NAME=FILE")
    if not given:
        raise PolymoeError(f"there is nothing to ask the variants; give {option}.")
    asked = list(plan.variants) or [next(name for name in plan.checkpoints if name in given)]
    for name in asked:
        if name not in given:
            raise PolymoeError(f"variant {name} has nothing to be asked; give {option.replace('NAME', name)}.")
    return asked


def _exam(plan: MergingPlan, family: Family, name: str, folder: Path) -> Exam:
    if plan.tasks:
        pairs = draw_pairs(name, plan.tasks[name], plan.samples, plan.seed)
        return TaskExam(family, name, pairs, plan.max_new_tokens, folder)
    return TextExam(family, name, plan.texts[name], plan.samples, folder)


def _row(exam: Exam, count: int, found: Measured, alone: Marks) -> dict[str, Any]:
    """A row as the JSON has it. `rouge1` … are {mean, error} and `rouge1_kept` … the same of the share of what the
    variant reaches alone; None where nothing is answered, or alone is nothing."""
    fidelity, rouge = found.marks.fidelity, found.marks.rouge
    row: dict[str, Any] = {
        "asked": exam.variant,
        "count": count,
        "name": found.contender.name,
        "group": found.contender.group,
        "expert_multiple": found.expert_multiple,
        "resident_bytes": found.resident_bytes,
        "kl": fidelity.kl,
        "top1": fidelity.top1_agreement,
        "perplexity": fidelity.ppl_served,
        "tokens": fidelity.tokens,
    }
    for kind in KINDS:
        values = rouge.get(kind)
        kept = None if values is None else kept_share(values, alone.rouge[kind])
        row[kind] = None if values is None else asdict(Mean.of(values))
        row[f"{kind}_kept"] = None if kept is None else asdict(kept)
    return row


def _best_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """ "variant, count" -> name and share of ROUGE-1 kept of the best plan of polymoe's own (delta, auto)."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        kept = row["rouge1_kept"]
        if row["group"] in ("delta", "auto") and kept is not None:
            key = f"{row['asked']}, {row['count']}"
            if key not in best or kept["mean"] > best[key]["share"]:
                best[key] = {"name": row["name"], "share": kept["mean"], "error": kept["error"]}
    return best
