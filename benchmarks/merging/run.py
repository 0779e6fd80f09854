"""`python -m benchmarks.merging`: a variant on its own task, alone and with ever more variants in the memory of one.

The experiment of arXiv 2505.06481 on Switch Transformers (its table of ROUGE on SAMSum with 2, 3 and 4 variants), for
every policy at the same bytes. Decoder-only families are asked for perplexity and KL instead.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.baselines.comparison import Comparison, DoesNotFitError, Measured, Say, check_names
from benchmarks.baselines.evaluation import Advance, Evaluation, Marks, TextEvaluation
from benchmarks.baselines.methods import GROUPS, ON_TEXT, Method, methods
from benchmarks.merging.rouge import KINDS, Mean, kept_share, require_rouge
from benchmarks.merging.task import TaskEvaluation, draw_pairs
from polymoe.bench.session import run_progress
from polymoe.console import Console
from polymoe.errors import PolymoeError
from polymoe.machine import describe_machine
from polymoe.offline.family import Family

MEMORY = "1.0x"
_BASELINES_MAY = 1.1  # × one model's experts: quantised copies that need a little more than the budget are still shown
_ALONE = Method("alone", "alone")


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
    check_names(plan.checkpoints, plan.variants, plan.tasks, plan.texts, plan.calibrate)
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
        scratch = Path(folder)
        evaluations = [_evaluation(plan, family, name, scratch) for name in asked]
        task = progress.add_task("", total=len(evaluations) * (1 + sum(map(len, compared.values()))))
        inner = progress.add_task("", total=None)
        for evaluation in evaluations:
            name, num_samples = evaluation.variant, len(evaluation.samples.windows)

            def say(what: str, kind: str = evaluation.kind, total: int = num_samples) -> Advance:
                progress.update(task, description=what)
                progress.reset(inner, description=kind, total=total)
                return lambda done: progress.advance(inner, done)

            alone = evaluation.alone(say(f"{name} alone"))
            rows.append(_row(name, 1, _ALONE, alone, alone))
            progress.advance(task)
            for count in counts:
                comparison = _consolidated(plan, evaluation, count, scratch, console)
                for choice in compared[count]:
                    try:
                        method, found = _first_that_fits(comparison, choice, say)
                        rows.append(_row(name, count, method, found.marks[name], alone, found))
                    except PolymoeError as error:
                        skipped[f"{name}, {count} variants: {choice[-1].name}"] = str(error)
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


def _evaluation(plan: MergingPlan, family: Family, name: str, folder: Path) -> Evaluation:
    if plan.tasks:
        pairs = draw_pairs(name, plan.tasks[name], plan.samples, plan.seed)
        return TaskEvaluation(family, name, pairs, plan.max_new_tokens, folder)
    return TextEvaluation(family, name, plan.texts[name], plan.samples, folder)


def choices(count: int, with_text: bool) -> list[list[Method]]:
    """The rows for `count` variants. A row is the first of its methods that fits the memory: quantised copies and
    deltas in as many bits as there is room for. `with_text`: there is some to fit a plan to."""
    every = {method.name: method for method in methods(count, list(GROUPS), [MEMORY], with_text)}
    every |= {name: replace(method, memory=MEMORY) for name, method in every.items() if method.group == "delta"}
    copies = [f"int{bits} copies" for bits in (8, 4, 3)]
    deltas = [f"int4 + {bits} bit" for bits in (4, 3, 2, 1)]
    names = [["average of everything"], ["mean experts, own non-experts"], ["paper, one variant's non-experts"],
             ["paper"], copies, deltas, [f"auto {MEMORY}"]]  # fmt: skip
    if with_text:
        names += [[f"regmean{ON_TEXT}"], [f"{name}{ON_TEXT}" for name in deltas], [f"auto {MEMORY}{ON_TEXT}"]]
    return [[every[name] for name in row] for row in names]


def _consolidated(plan: MergingPlan, evaluation: Evaluation, count: int, scratch: Path, console: Console) -> Comparison:
    """The first others and the variant that is asked, which joins last: the paper without reconfiguration serves it
    with the first variant's non-experts."""
    others = [name for name in plan.checkpoints if name != evaluation.variant][: count - 1]
    family = Family.open({name: plan.checkpoints[name] for name in (*others, evaluation.variant)})
    calibrate = {name: files for name, files in plan.calibrate.items() if name in family.names}
    return Comparison(family, [evaluation], scratch, calibrate, console)


def _first_that_fits(comparison: Comparison, choice: Sequence[Method], say: Say) -> tuple[Method, Measured]:
    """Raises `PolymoeError` where none does."""
    count = len(comparison.family.names)
    for method in choice:
        try:
            return method, comparison.measure(method, lambda what: say(f"{count} variants: {what}"), _BASELINES_MAY)
        except DoesNotFitError as error:
            why = error
    raise why


def _row(
    asked: str, count: int, method: Method, marks: Marks, alone: Marks, measured: Measured | None = None
) -> dict[str, Any]:
    """A row as the JSON has it. `rouge1` … are {mean, error} and `rouge1_kept` … the same of the share of what the
    variant reaches alone; None where nothing is answered, or alone is nothing. measured: None of the variant alone."""
    fidelity, rouge = marks.fidelity, marks.rouge
    row: dict[str, Any] = {
        "asked": asked,
        "count": count,
        "name": method.name,
        "group": method.group,
        "expert_multiple": 1.0 if measured is None else measured.expert_multiple,
        "resident_bytes": None if measured is None else measured.resident_bytes,
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
