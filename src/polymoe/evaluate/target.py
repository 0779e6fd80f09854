"""The target of agreement against the measured one: what falls short is planned again with more bytes."""

from collections.abc import Callable, Mapping

from msgspec.structs import replace

from polymoe.bundle.manifest import Fidelity
from polymoe.bundle.reader import Bundle
from polymoe.console import Console, warn
from polymoe.offline.plan.options import PlanOptions

ATTEMPTS = 3
_LEAST = 1.5  # times the caution before, so that a narrow miss is not missed again


def meet_target(
    make: Callable[[PlanOptions, bool], Bundle],
    measure: Callable[[Bundle], Mapping[str, Fidelity]],
    options: PlanOptions,
    overwrite: bool,
    console: Console,
) -> Bundle:
    """Plan and measure, at most `ATTEMPTS` times, until every measured variant agrees with its original as often as
    `options.min_top1` says; without a target, once. What is still missing then is said.

    make: (options, overwrite) -> the bundle. measure: bundle -> figures of each variant that has text.
    """
    target = options.min_top1
    for attempt in range(1, ATTEMPTS + 1):
        bundle = make(options, overwrite)
        results = measure(bundle)
        if target is None:
            return bundle
        name = min(results, key=lambda variant: results[variant].top1)
        found = results[name].top1
        if found >= target:
            console.print(f"Target met: {name}, the worst, agrees on {found:.2%} of tokens, {target:.2%} were asked.")
            return bundle
        missed = f"{name} agrees with its original on {found:.2%} of tokens, the target was {target:.2%}"
        if attempt == ATTEMPTS or target == 1:
            break
        console.print(f"{missed}; planning again with more bytes ({attempt + 1} of {ATTEMPTS}).")
        # Disagreement grows with the root of KL.
        caution = options.caution * max(_LEAST, ((1 - found) / (1 - target)) ** 2)
        options, overwrite = replace(options, caution=caution), True
    warn(console, f"{missed}. Ask for more with --min-top1, or give --memory.")
    return bundle
