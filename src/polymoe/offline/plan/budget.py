"""How much memory a plan may use, and the plan that a policy makes of it."""

import re
from dataclasses import dataclass, replace

import numpy as np

from polymoe.config import format_bytes, parse_bytes
from polymoe.console import Console
from polymoe.errors import ConfigError, PlanError
from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.options import PlanOptions
from polymoe.offline.plan.plan import STORED, Plan, paper_plan, separate_plan
from polymoe.offline.plan.shared_plan import PositionBytes, delta_format, exact_delta_plan, fit, shared_plan
from polymoe.offline.plan.sizes import ExpertSizes
from polymoe.offline.similarity.scan import FamilyScan

_FEWEST_BYTES = 256  # a budget below, without a unit, is no number of bytes
_MOST_MULTIPLES = 1e6


@dataclass(frozen=True)
class Memory:
    """`multiple` of one model's expert bytes, for the experts alone, or `num_bytes` for every weight on the device, or
    `multiple` of all bytes of one model for every weight (`of_all`)."""

    text: str
    multiple: float | None = None
    num_bytes: int | None = None
    of_all: bool = False

    def total(self, scan: FamilyScan) -> int | None:
        """Bytes for every weight on the device; None for a budget of the experts alone."""
        if self.of_all:
            assert self.multiple is not None
            return int(self.multiple * scan.model_bytes + 1e-6)
        return self.num_bytes


def parse_memory(text: str) -> Memory:
    """`1.0x` or `1.0x-all` -> a multiple, `24GiB` -> bytes. `0x`: every expert comes from the host tier.

    Raises `PlanError` for anything else, and asks back where `1.0` may have been meant as `1.0x`.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*[xX×]\s*(-\s*all\s*)?", text)
    if match is not None and float(match[1]) <= _MOST_MULTIPLES:
        return Memory(text.strip(), multiple=float(match[1]), of_all=match[2] is not None)
    number = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*", text)
    if number is not None and float(number[1]) < _FEWEST_BYTES:
        raise PlanError(
            f"--memory {number[1]} would be {number[1]} bytes; did you mean {number[1]}x, multiples of one model's "
            f"experts, {number[1]}x-all, multiples of one whole model, or {number[1]}GiB for all weights?"
        )
    try:
        return Memory(text.strip(), num_bytes=parse_bytes(text))
    except ConfigError as error:
        raise PlanError(
            f"{text[:40]!r} is not a memory budget; write 1.0x (multiples of one model's experts), 1.0x-all (multiples "
            "of one whole model, for all weights) or 24GiB (or 24G, which is the same)."
        ) from error


def expert_budget(memory: Memory, scan: FamilyScan, table_bytes: int | None = None) -> int:
    """Bytes for experts and deltas. Raises `PlanError` that names the minimum when not even the rest fits.

    table_bytes: of the tables on the device; default that of plans without deltas.
    """
    _, num_layers, num_experts = scan.expert_same_as.shape
    total = memory.total(scan)
    if total is None:
        assert memory.multiple is not None
        # A product such as 1.1 · 40 may end in …999; nobody means one expert less.
        return int((memory.multiple * num_layers * num_experts + 1e-6) * scan.expert_bytes)
    fixed = scan.nonexpert_bytes_total + (scan.table_bytes if table_bytes is None else table_bytes)
    if total < fixed:
        raise PlanError(
            f"--memory {memory.text} is below the minimum of {format_bytes(fixed)} ({fixed} bytes): the non-experts of "
            f"{len(scan.variant_names)} variants must be on the device, and each expert there adds "
            f"{format_bytes(scan.expert_bytes)}."
        )
    return total - fixed


def expert_capacity(memory: Memory, scan: FamilyScan) -> int:
    """How many experts, as stored, fit the budget. Raises as `expert_budget` does."""
    return expert_budget(memory, scan) // scan.expert_bytes


def build_plan(
    scan: FamilyScan,
    policy: str,
    memory: str | None = None,
    options: PlanOptions | None = None,
    family: Family | None = None,
    calibration: Calibration | None = None,
    console: Console | None = None,
) -> Plan:
    """The plan of `policy` for a family.

    Args:
        memory: None: `paper` and `auto` take 1.0x, every other policy what it needs with everything on the device.
        family: needed by everything but `paper` and `separate` with bases as stored.
        calibration: activations of the variants on text; needed by `regmean`, used by `auto`.

    Raises `PlanError` for an unknown policy, options that it does not have, a malformed budget or one below the
    minimum.
    """
    options = options or PlanOptions()
    options.check(policy)
    same_as, base = scan.expert_same_as, options.base
    if policy == "auto":
        assert family is not None
        return _auto_plan(family, scan, memory, options, calibration, console)
    if policy == "regmean" and calibration is None:
        raise PlanError("--policy regmean weighs experts by what they see; give text with --calibrate VARIANT=FILE.")
    if policy == "paper" and memory is None:
        memory = "1.0x"
    budget = None if memory is None else parse_memory(memory)
    text = "" if budget is None else budget.text
    if policy in ("paper", "separate"):
        expert_bytes = scan.expert_bytes if base == STORED else _sizes(family)(base)
        capacity = None if budget is None else expert_budget(budget, scan) // expert_bytes
        if policy == "separate":
            plan = separate_plan(same_as, capacity, text)
        else:
            assert capacity is not None
            plan = paper_plan(scan.distance, same_as, capacity, text)
        return replace(plan, base=np.full(same_as.shape[1:], base, dtype=object))

    assert family is not None
    sizes = _sizes(family)
    cost = PositionBytes(scan.expert_bytes, sizes, sizes)
    if policy == "exact-delta":
        from polymoe.offline.plan.merge import exact_delta_bytes

        exact = exact_delta_bytes(family, scan)
        exact += 16 * len(sizes.tensors)  # at most, for where each delta's values start
        cost = replace(cost, delta=lambda _: exact)
    if policy == "exact-delta":
        plan = exact_delta_plan(same_as, cost, text)
    else:
        groups = np.zeros_like(same_as)
        if policy == "cluster":
            from polymoe.offline.plan.merge import cluster_positions

            groups = cluster_positions(scan, options.clusters or 2)
        merge = "regmean" if calibration is not None else "mean"
        merge = "mean" if policy == "mean" else merge
        delta = delta_format(groups, base, options.bits) if policy == "delta" else "none"
        plan = shared_plan(policy, groups, same_as, base, merge, delta, text)
    if budget is None:
        return plan
    return fit(plan, same_as, scan.distance, cost, expert_budget(budget, scan, _table_bytes(plan)))


def _table_bytes(plan: Plan) -> int:
    """Bytes of the tables that `plan` needs, whatever fits in the end."""
    tables = 4 + 4 * bool((plan.delta_owner >= 0).any()) + bool((plan.sign < 0).any())
    return tables * plan.serving.size


def _sizes(family: Family | None) -> ExpertSizes:
    assert family is not None, "formats other than stored need the family"
    return ExpertSizes.of(family)


def _auto_plan(
    family: Family,
    scan: FamilyScan,
    memory: str | None,
    options: PlanOptions,
    calibration: Calibration | None,
    console: Console | None,
) -> Plan:
    from polymoe.offline.plan.allocate import auto_plan

    if options.min_top1 is not None and memory is not None:
        raise PlanError("give either --memory or --min-top1: one is the budget, the other the target.")
    if options.min_top1 is not None:
        return auto_plan(family, scan, None, options, calibration, console)
    budget = parse_memory("1.0x" if memory is None else memory)
    if (total := budget.total(scan)) is None:
        plan = auto_plan(family, scan, expert_budget(budget, scan), options, calibration, console)
    else:
        plan = auto_plan(family, scan, total, options, calibration, console, of_all=True)
    return replace(plan, memory=budget.text)
