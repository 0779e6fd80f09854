"""A row of the table of quality against memory."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.baselines.comparison import Measured
from benchmarks.baselines.methods import Method


@dataclass(frozen=True)
class Row:
    """One method. KL in nats a token, bytes on the device.

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
    method: Method,
    measured: Measured,
    predicted: Mapping[str, float] | None,
    seconds: float,
) -> Row:
    """`predicted`: variant -> nats a token."""
    fidelity = {name: marks.fidelity for name, marks in measured.marks.items()}
    kl = [found.kl for found in fidelity.values()]
    return Row(
        name=method.name,
        group=method.group,
        on_text=method.on_text,
        expert_bytes=measured.expert_bytes,
        expert_multiple=measured.expert_multiple,
        resident_bytes=measured.resident_bytes,
        kl_mean=statistics.fmean(kl),
        kl_worst=max(kl),
        top1_mean=statistics.fmean(found.top1_agreement for found in fidelity.values()),
        predicted_kl_mean=None if predicted is None else statistics.fmean(predicted[name] for name in fidelity),
        variants={
            name: {
                "kl": found.kl,
                "top1": found.top1_agreement,
                "perplexity_original": found.ppl_original,
                "perplexity_served": found.ppl_served,
                "tokens": found.tokens,
                "predicted_kl": None if predicted is None else predicted[name],
            }
            for name, found in fidelity.items()
        },
        seconds=seconds,
    )
