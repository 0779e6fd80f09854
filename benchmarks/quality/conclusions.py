"""What the rows of a table of quality against memory show together."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.baselines.methods import ON_TEXT
from benchmarks.quality.row import Row

_SAME_BYTES = 1.005  # what needs half a per cent more still needs the same


def conclusions(rows: Mapping[str, Row]) -> dict[str, Any]:
    """
    cheapest_as_good: budget of auto -> the least memory in which another row is as good, {name, expert_multiple,
        kl_mean}, None when none of the table is. Without text against rows without text.
    beaten_by: budget of auto -> rows that are better in the same bytes or fewer. Empty lists are the claim.
    rank_correlation: "weights" and "text" -> Spearman's ρ of predicted and measured mean KL over all predicted rows.
    worse_on_text: rows that text made worse.
    """
    autos = [row for row in rows.values() if row.group == "auto"]
    cheapest: dict[str, Any] = {}
    beaten: dict[str, list[str]] = {}
    for auto in autos:
        others = [r for r in rows.values() if r.group != "auto" and (auto.on_text or not r.on_text)]
        as_good = [r for r in others if r.kl_mean <= auto.kl_mean]
        best = min(as_good, key=lambda r: r.resident_bytes, default=None)
        cheapest[auto.name] = best and {
            "name": best.name, "expert_multiple": best.expert_multiple, "kl_mean": best.kl_mean,
        }  # fmt: skip
        beaten[auto.name] = [r.name for r in as_good if r.resident_bytes <= _SAME_BYTES * auto.resident_bytes]
    fitted = [row for row in rows.values() if row.on_text]
    plain = {row.name: rows.get(row.name.removesuffix(ON_TEXT)) for row in fitted}
    return {
        "cheapest_as_good": cheapest,
        "beaten_by": beaten,
        "rank_correlation": {
            kind: _predictions([row for row in rows.values() if row.on_text == on_text])
            for kind, on_text in (("weights", False), ("text", True))
        },
        "worse_on_text": [row.name for row in fitted if (p := plain[row.name]) is not None and row.kl_mean > p.kl_mean],
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
