"""The figures of a row of `bench quality`, and what the rows show together."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polymoe.bench.contenders import Contender
from polymoe.evaluate.fidelity import Fidelity

_SAME_BYTES = 1.005  # a rival that needs half a per cent more still needs the same


@dataclass(frozen=True)
class Row:
    """One contender. KL in nats a token, bytes on the device.

    expert_multiple: bytes of bases and deltas in multiples of one model's experts. variants: name -> figures.
    """

    name: str
    group: str
    on_text: bool
    expert_bytes: int
    expert_multiple: float
    resident_bytes: int  # experts, deltas, all non-experts and tables
    kl_mean: float
    kl_worst: float
    top1_mean: float
    predicted_kl_mean: float | None
    variants: dict[str, dict[str, float | None]]
    seconds: float


def row_of(
    contender: Contender,
    measured: Mapping[str, Fidelity],
    sizes: Mapping[str, int],
    one_model: int,
    predicted: Mapping[str, float] | None,
    seconds: float,
) -> Row:
    """`sizes`: bytes by kind. `one_model`: bytes of one model's experts. `predicted`: variant -> nats a token."""
    experts = sizes["resident_experts"] + sizes.get("deltas", 0)
    kl = [found.kl for found in measured.values()]
    return Row(
        name=contender.name,
        group=contender.group,
        on_text=contender.on_text,
        expert_bytes=experts,
        expert_multiple=experts / one_model,
        resident_bytes=sum(sizes.values()),
        kl_mean=statistics.fmean(kl),
        kl_worst=max(kl),
        top1_mean=statistics.fmean(found.top1_agreement for found in measured.values()),
        predicted_kl_mean=None if predicted is None else statistics.fmean(predicted[name] for name in measured),
        variants={
            name: {
                "kl": found.kl,
                "top1": found.top1_agreement,
                "perplexity_original": found.ppl_original,
                "perplexity_served": found.ppl_served,
                "tokens": found.tokens,
                "predicted_kl": None if predicted is None else predicted[name],
            }
            for name, found in measured.items()
        },
        seconds=seconds,
    )


def conclusions(rows: Mapping[str, Row]) -> dict[str, Any]:
    """
    cheapest_as_good: budget of auto -> the least memory in which a rival is as good, {name, expert_multiple, kl_mean},
        None when none of the table is. Without text against rivals without text.
    beaten_by: budget of auto -> rivals that are better in the same bytes or fewer. Empty lists are the claim.
    rank_correlation: "weights" and "text" -> Spearman's ρ of predicted and measured mean KL over all predicted rows.
    worse_on_text: rows that text made worse.
    """
    autos = [row for row in rows.values() if row.group == "auto"]
    cheapest: dict[str, Any] = {}
    beaten: dict[str, list[str]] = {}
    for auto in autos:
        rivals = [r for r in rows.values() if r.group != "auto" and (auto.on_text or not r.on_text)]
        as_good = [r for r in rivals if r.kl_mean <= auto.kl_mean]
        best = min(as_good, key=lambda r: r.resident_bytes, default=None)
        cheapest[auto.name] = best and {
            "name": best.name, "expert_multiple": best.expert_multiple, "kl_mean": best.kl_mean,
        }  # fmt: skip
        beaten[auto.name] = [r.name for r in as_good if r.resident_bytes <= _SAME_BYTES * auto.resident_bytes]
    pairs = [(rows[row.name.removesuffix(", on text")], row) for row in rows.values()
             if row.on_text and row.name.removesuffix(", on text") in rows]  # fmt: skip
    return {
        "cheapest_as_good": cheapest,
        "beaten_by": beaten,
        "rank_correlation": {
            kind: _predictions([row for row in rows.values() if row.on_text == on_text])
            for kind, on_text in (("weights", False), ("text", True))
        },
        "worse_on_text": [fitted.name for plain, fitted in pairs if fitted.kl_mean > plain.kl_mean],
    }


def _predictions(rows: Sequence[Row]) -> dict[str, float] | None:
    """{"rows", "spearman"}; None for fewer than three rows."""
    known = [(row.predicted_kl_mean, row.kl_mean) for row in rows if row.predicted_kl_mean is not None]
    if len(known) < 3:
        return None
    return {"rows": len(known), "spearman": spearman(*zip(*known, strict=True))}


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks; equal values share their mean rank. 0 where one side is constant."""

    def ranks(values: Sequence[float]) -> np.ndarray[Any, Any]:
        array = np.asarray(values, dtype=np.float64)
        below = (array[None] < array[:, None]).sum(axis=1)
        same = (array[None] == array[:, None]).sum(axis=1)
        mean_rank: np.ndarray[Any, Any] = below + (same - 1) / 2
        return mean_rank

    a, b = (r - r.mean() for r in (ranks(first), ranks(second)))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else 0.0
