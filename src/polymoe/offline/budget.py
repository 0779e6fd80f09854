"""How much memory a plan may use, and the plan that a policy makes of it."""

import re
from dataclasses import dataclass

from polymoe.config import format_bytes, parse_bytes
from polymoe.errors import ConfigError, PlanError
from polymoe.offline.plan import POLICIES, Plan, paper_plan, separate_plan
from polymoe.offline.scan import FamilyScan


@dataclass(frozen=True)
class Memory:
    """`multiple` of one model's expert bytes, for the experts alone, or `num_bytes` for every weight on the device."""

    text: str
    multiple: float | None = None
    num_bytes: int | None = None


def parse_memory(text: str) -> Memory:
    """`1.0x` -> a multiple, `24GiB` -> bytes. `0x` is allowed: then every expert comes from the host tier.

    Raises `PlanError` for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[xX]\s*", text)
    if match is not None:
        return Memory(text.strip(), multiple=float(match[1]))
    try:
        return Memory(text.strip(), num_bytes=parse_bytes(text))
    except ConfigError as error:
        raise PlanError(
            f"{text!r} is not a memory budget; write 1.0x (multiples of one model's experts) or 24GiB."
        ) from error


def expert_capacity(memory: Memory, scan: FamilyScan) -> int:
    """How many experts fit the budget. Raises `PlanError` that names the minimum when not even the rest fits."""
    _, num_layers, num_experts = scan.expert_version.shape
    if memory.multiple is not None:
        # A product such as 1.1 · 40 may end in …999; nobody means one expert less.
        return int(memory.multiple * num_layers * num_experts + 1e-6)
    assert memory.num_bytes is not None
    fixed = scan.nonexpert_bytes_total + scan.table_bytes
    if memory.num_bytes < fixed:
        raise PlanError(
            f"--memory {memory.text} is below the minimum of {format_bytes(fixed)} ({fixed} bytes): the non-experts of "
            f"{len(scan.variant_names)} variants must be on the device, and each expert there adds "
            f"{format_bytes(scan.expert_bytes)}."
        )
    return (memory.num_bytes - fixed) // scan.expert_bytes


def build_plan(scan: FamilyScan, policy: str, memory: str | None = None) -> Plan:
    """The plan of `policy` for a family. `memory` None: `paper` takes 1.0x, `separate` everything on the device.

    Raises `PlanError` for an unknown policy, a malformed budget or one below the minimum.
    """
    if policy not in POLICIES:
        raise PlanError(f"unknown policy {policy!r}; there are {' and '.join(POLICIES)}.")
    if memory is None and policy == "separate":
        return separate_plan(scan.expert_version)
    budget = parse_memory("1.0x" if memory is None else memory)
    capacity = expert_capacity(budget, scan)
    if policy == "paper":
        return paper_plan(scan.distance, scan.expert_version, capacity, budget.text)
    return separate_plan(scan.expert_version, capacity, budget.text)
