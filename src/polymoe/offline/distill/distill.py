"""A short distillation after a plan: each variant's delta scales, norms and routers, to KL against its original.

Codes and bases stay as they are, so the bundle's bytes do too. A variant is one stock transformers model in float32: as
loaded it is the original; with expert weights base ± levels[code] · scale in place of its own it is what is served,
differentiable in the scales. What several variants use (bases, deltas and tensors that are shared) is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from polymoe.bundle.reader import Bundle
from polymoe.config import format_bytes
from polymoe.console import Console
from polymoe.device_memory import cpu_memory
from polymoe.errors import PlanError
from polymoe.model.stock.kind import kind_of
from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.distill.learned import Learned, rewrite
from polymoe.offline.distill.served_variant import ServedVariant
from polymoe.progress import step_progress

_HELD_OUT = 8  # one window of so many is for the comparison only
_BATCH = 4  # windows a step
_LEARNING_RATE = {"scales": 1e-3, "nonexperts": 1e-4}  # of relative changes
_COPIES = 7  # float32 models' worth of memory: weights, bases, levels, their products and gradients


def distill(
    bundle: Bundle, family: Family, calibration: Calibration, steps: int, console: Console | None = None
) -> Bundle:
    """Take `steps` steps of AdamW for each variant on its calibration text and keep what is better on held-out windows
    of it (which scales and codes were fitted to, so that the comparison is hard on what is learned).

    The bundle is replaced in one step at the end; until then it is what it was. Raises `PlanError` for a family that
    does not fit in memory.
    """
    check_family(family)
    learned: dict[int, Learned] = {}
    with step_progress("Distilling", steps * len(family.names), console) as advance:
        for v, checkpoint in enumerate(family.checkpoints):
            student = ServedVariant(bundle, v, checkpoint)
            before, after, found = _distill(student, calibration.windows[v], steps, advance)
            if after < before:
                learned[v] = found
            if console is not None:
                kept = "kept" if after < before else "not kept"
                console.print(
                    f"{checkpoint.name}: held-out KL {before:.5f} before, {after:.5f} after distilling, {kept}."
                )
    return rewrite(bundle, learned) if learned else bundle


def check_family(family: Family) -> None:
    """Raise `PlanError` for other models than decoders of text, and where a variant in float32, with its gradients, is
    more than the memory of this machine."""
    if not kind_of(family.config).distils:
        raise PlanError(
            f"--distill learns on decoder-only models of text, which {family.architecture.class_name} is not; leave it "
            "out. --calibrate alone fits merges, bases and deltas to text here too."
        )
    checkpoint = family.checkpoints[0]
    values = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.target_names)
    needed, there = 4 * _COPIES * values, cpu_memory()
    if needed > there:
        raise PlanError(
            f"--distill needs about {format_bytes(needed)} of memory for a variant of this size, {format_bytes(there)} "
            "are there; leave it out."
        )


def _distill(
    student: ServedVariant, windows: Tensor, steps: int, advance: Callable[[], None]
) -> tuple[float, float, Learned]:
    """(held-out KL before, after, what was learned in the dtypes as stored)."""
    held_out = torch.arange(len(windows)) % _HELD_OUT == _HELD_OUT - 1
    aside, text = windows[held_out] if bool(held_out.any()) else windows, windows[~held_out]
    before = _mean_kl(student, aside, student.stored())
    changes = student.changes()
    groups = [
        {
            "params": [change for key, change in changes.items() if isinstance(key, tuple) == (kind == "scales")],
            "lr": rate,
        }
        for kind, rate in _LEARNING_RATE.items()
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = text[torch.randperm(len(text), generator=order)[:_BATCH]]
        optimizer.zero_grad()
        _kl(student, batch, student.changed(changes)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        advance()
    with torch.no_grad():
        learned = student.rounded(changes)
    return before, _mean_kl(student, aside, learned.values), learned


def _kl(student: ServedVariant, windows: Tensor, values: Mapping[Any, Tensor]) -> Tensor:
    """KL(original ‖ served) in nats a token. `values`: what `ServedVariant.weights` is made of."""
    with torch.no_grad():
        want = student.original_logits(windows).log_softmax(dim=-1)
    found = student.logits(windows, values).log_softmax(dim=-1)
    return (want.exp() * (want - found)).sum(dim=-1).mean()


@torch.no_grad()
def _mean_kl(student: ServedVariant, windows: Tensor, values: Mapping[Any, Tensor]) -> float:
    pieces = torch.split(windows, _BATCH)
    return sum(float(_kl(student, piece, values)) * len(piece) for piece in pieces) / len(windows)
