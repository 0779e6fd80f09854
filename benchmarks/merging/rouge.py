"""ROUGE of answers against references, with the `rouge-score` package, and its standard errors."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polymoe.errors import PolymoeError

KINDS = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Mean:
    """A mean over samples and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Of at least two values."""
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))


def require_rouge() -> Any:
    """The scorer's module. Raises `PolymoeError` that says how to install it."""
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise PolymoeError("ROUGE needs the package rouge-score: pip install 'polymoe[bench]'.") from error
    return rouge_scorer


def rouge(answers: Sequence[str], targets: Sequence[str]) -> dict[str, list[float]]:
    """Kind of `KINDS` -> F-measure of each answer; lower-cased words, no stemming (Lin, 2004)."""
    scorer = require_rouge().RougeScorer(list(KINDS))
    scores = [scorer.score(target, answer) for answer, target in zip(answers, targets, strict=True)]
    return {kind: [float(score[kind].fmeasure) for score in scores] for kind in KINDS}


def kept_share(served: Sequence[float], alone: Sequence[float]) -> Mean | None:
    """Mean of `served` over mean of `alone`, the same samples in both; None where alone is nothing.

    The error is that of the paired differences (delta method with the ratio near one): most samples agree, so it is far
    smaller than the errors of the two means.
    """
    reference = statistics.fmean(alone)
    if reference == 0:
        return None
    share = statistics.fmean(served) / reference
    differences = [s - share * a for s, a in zip(served, alone, strict=True)]
    return Mean(share, Mean.of(differences).error / reference)
