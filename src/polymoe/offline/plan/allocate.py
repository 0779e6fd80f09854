"""Policy `auto`: each position stored so that the bytes go where they save the most quantisation error.

The options of each position with their bytes and predicted error, and the plan that the chosen ones make; how they are
chosen is in `polymoe.offline.plan.knapsack`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from polymoe.config import format_bytes
from polymoe.console import Console
from polymoe.errors import PlanError
from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.correction import NO_DELTA, correction, lossy_deltas, undominated_bases
from polymoe.offline.plan.dial import dial
from polymoe.offline.plan.knapsack import Choices, IntArray, Option, fewest_bytes
from polymoe.offline.plan.merge import exact_delta_bytes
from polymoe.offline.plan.nonexperts import NonexpertOptions, nonexpert_options, with_nonexperts
from polymoe.offline.plan.options import PlanOptions
from polymoe.offline.plan.plan import STORED, Plan
from polymoe.offline.plan.quantisation_error import FloatArray, Partition, QuantisationErrors
from polymoe.offline.plan.sizes import ExpertSizes
from polymoe.offline.similarity.scan import FamilyScan
from polymoe.quant.formats import EXACT

HOST = "host"  # in place of a base: not on the device


def auto_plan(
    family: Family,
    scan: FamilyScan,
    budget_bytes: int | None,
    options: PlanOptions | None = None,
    calibration: Calibration | None = None,
    console: Console | None = None,
    of_all: bool = False,
) -> Plan:
    """The plan with the least predicted error for `budget_bytes` of bases and deltas or, without a budget, the fewest
    bytes for which every variant is predicted to agree with its original on a share `options.min_top1` of tokens.

    Everything is resident but what `options.host_share` allows. `of_all`: the budget is for every weight on the
    device, and non-experts are chosen for too; else they stay as stored. Raises `PlanError` for a budget below the
    minimum, with what that would cost.
    """
    options = options or PlanOptions()
    assert (budget_bytes is None) != (options.min_top1 is None)
    if calibration is None:
        errors = QuantisationErrors.of_weights(scan)
    else:
        from polymoe.offline.plan.error_on_text import errors_on_text

        errors = errors_on_text(family, scan, calibration, console, of_all)
    found = position_options(family, scan, errors)
    if options.host_share:
        offer_host(found, errors.traffic, options.host_share, console)
    uniform, others, beside = uniform_answers(found), NonexpertOptions({}, {}), 0
    if of_all:
        assert budget_bytes is not None
        others = nonexpert_options(family, scan, errors)
        uniform = with_nonexperts(uniform, others)
        # What is not chosen for: norms, routers, and tables of bases and deltas int32, signs int8.
        beside = scan.nonexpert_bytes_total - others.bytes_as_stored + 9 * scan.expert_same_as.size
        budget_bytes -= beside
    choices, on_text = Choices([*found, *others.options.values()], uniform), calibration is not None
    if options.min_top1 is not None:
        missed = max(0.0, 1 - options.min_top1) / errors.top1_per_root_kl
        limit = missed**2 / (errors.caution * options.caution)
        chosen = fewest_bytes(choices, limit, trusted=on_text)
    else:
        assert budget_bytes is not None
        _check_minimum(choices, budget_bytes, beside, scan)
        chosen = choices.best(budget_bytes, trusted=on_text)
    plan = _plan(choices, chosen, scan, "mean" if calibration is None else "regmean", list(others.options))
    points = dial(choices, errors.top1_per_root_kl, on_text, beside)
    return replace(plan, dial=points, dial_of_all=of_all)


def offer_host(options: list[list[Option]], traffic: FloatArray, share: float, console: Console | None) -> None:
    """Leave the host tier as the only option where the least is routed, up to `share` of all that is routed.

    There an expert is as the checkpoint stores it and takes no bytes on the device: nothing but speed is lost, so that
    no position within the limit is better off with anything else. Of positions with equal traffic (nothing is known
    without text) those go first that save most bytes, then by layer. `traffic` [L, E], 1 a layer.
    """
    num_layers, used = len(traffic), 0.0
    flat = traffic.reshape(-1)
    for p in sorted(range(len(options)), key=lambda p: (flat[p], -len(options[p][0].groups))):
        used += flat[p] / num_layers
        if used > share + 1e-9:
            break
        own = options[p][0]
        options[p][:] = [replace(own, base=HOST, num_bytes=0)]
    if console is not None:
        count = sum(row[0].base == HOST for row in options)
        console.print(f"Host tier: {count} of {len(options)} positions, within {share:.1%} of what is routed.")


def position_options(family: Family, scan: FamilyScan, errors: QuantisationErrors) -> list[list[Option]]:
    """All options of each position, layer-major: merged bases of each format with and without deltas of each format,
    in one group, in two, and in one for each that differs; separate experts as stored; exact deltas."""
    sizes = ExpertSizes.of(family)
    bases, (all_deltas, all_mirrored) = undominated_bases(), lossy_deltas()
    each = {name: sizes(name) for name in (*bases, *all_deltas)}
    exact = exact_delta_bytes(family, scan) if len(scan.variant_names) > 1 else None
    num_variants, num_layers, num_experts = scan.expert_same_as.shape
    nothing = np.zeros((3, num_variants))
    found = []
    for layer, expert in np.ndindex(num_layers, num_experts):
        same_as = scan.expert_same_as[:, layer, expert]
        distinct = len(np.unique(same_as))
        own: Partition = tuple(tuple(int(v) for v in (same_as == first).nonzero()[0]) for first in np.unique(same_as))
        options = [Option(own, STORED, "own", NO_DELTA, distinct * each[STORED], nothing)]
        for n, partition in enumerate(errors.partitions[layer][expert]):
            alone = len(partition) == distinct
            deltas = () if alone and distinct > 1 else all_deltas
            mirrored = all_mirrored if num_variants == 2 and len(partition) == 1 < distinct else ()
            for base in bases:
                for delta in (NO_DELTA, *deltas, *mirrored):
                    if alone and base == STORED:
                        continue  # lossless already, above
                    size = len(partition) * each[base]
                    if (kind := correction(delta)) is not None:
                        size += each[kind.fmt.name] * (1 if kind.mirrored else distinct)
                    error = errors.components(layer, expert, n, base, delta)
                    merge = "own" if alone else "merged"
                    options.append(Option(partition, base, merge, delta, size, error))
        if exact is not None and distinct > 1:
            changed = sum(int(exact[v, layer, expert]) for v in {int(v) for v in same_as} - {int(same_as[0])})
            changed += 8 * (distinct + 1) * len(sizes.tensors)  # where each delta's values start
            together: Partition = (tuple(range(num_variants)),)
            options.append(Option(together, STORED, "own", EXACT.name, each[STORED] + changed, nothing))
        found.append(options)
    return found


def uniform_answers(options: list[list[Option]]) -> dict[str, IntArray]:
    """{"int4 + d2": int [P]}: all positions in one format with one width of deltas, all variants on one base, and, as
    "int4 apart", each on its own. Where the variants are identical it may be without loss instead."""
    found = {}
    deltas, mirrored = lossy_deltas()
    for base in undominated_bases():
        ways = [(together, delta) for together in (True, False) for delta in (NO_DELTA, *deltas, *mirrored)]
        for together, delta in ways:
            chosen = [_find(row, base, delta, together) for row in options]
            if all(option is not None for option in chosen):
                name = f"{base} + {delta}" if together else f"{base} apart"
                found[name] = np.array(chosen, dtype=np.int64)
    return found


def _find(row: list[Option], base: str, delta: str, together: bool) -> int | None:
    """The option of that kind. The first one of a position is every expert that differs by itself, as stored."""
    distinct = len(row[0].groups)
    groups = 1 if together else distinct
    if row[0].base == HOST or (base == STORED and groups == distinct):
        return 0
    for index, option in enumerate(row):
        if (option.base, option.delta, len(option.groups)) == (base, delta, groups):
            return index
    return None


def _check_minimum(choices: Choices, budget: int, beside: int, scan: FamilyScan) -> None:
    least = choices.least_bytes
    if budget >= least:
        return
    error = choices.total(choices.solve(least, np.ones(choices.error.shape[2])))[1]
    one_model = scan.expert_bytes * scan.expert_same_as[0].size
    experts = f"{format_bytes(least)} ({least / one_model:.3g}x of one model's)"
    if beside:
        said = (
            f"--memory {format_bytes(budget + beside)} is below the minimum of {format_bytes(least + beside)}: "
            f"{format_bytes(beside)} of norms, routers and tables, and {experts} of all else"
        )
    else:
        said = f"the experts are left {format_bytes(budget)} ({budget / one_model:.3g}x); the minimum is {experts}"
    raise PlanError(
        f"{said}, which is predicted to cost {error.mean():.2g} nats a token (worst variant {error.max():.2g}). Give "
        "more --memory, or fetch experts from the host tier with --host-share 0.1 or --policy separate."
    )


def _plan(choices: Choices, chosen: IntArray, scan: FamilyScan, merge: str, nonexperts: list[str]) -> Plan:
    """`nonexperts`: the names of what follows the positions."""
    same_as = scan.expert_same_as
    _, num_layers, num_experts = same_as.shape
    serving, on_device = np.zeros_like(same_as), np.ones(same_as.shape, dtype=np.bool_)
    base, merges, delta = (np.empty((num_layers, num_experts), dtype=object) for _ in range(3))
    num_positions = num_layers * num_experts
    for p, option in enumerate(chosen[:num_positions].tolist()):
        layer, expert = divmod(p, num_experts)
        one = choices.options[p][option]
        for group in one.groups:
            serving[list(group), layer, expert] = min(group)
        on_device[:, layer, expert] = one.base != HOST
        base[layer, expert], delta[layer, expert] = STORED if one.base == HOST else one.base, one.delta
        merges[layer, expert] = "own" if one.merge == "own" else merge
    error = choices.total(chosen)[1]
    by_position = choices.error[np.arange(num_positions), chosen[:num_positions]].mean(axis=1)
    packed = {}
    for p, name in enumerate(nonexperts, start=num_positions):
        one = choices.options[p][int(chosen[p])]
        if one.base != STORED:
            packed[name] = one.base, one.delta
    plan = Plan(
        "auto", serving, on_device, base=base, merge=merges, delta=delta, predicted_error=error,
        position_error=by_position.reshape(num_layers, num_experts), nonexperts=packed,
    )  # fmt: skip
    return plan.with_shared_deltas(same_as)
