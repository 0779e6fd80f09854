"""A promised agreement against the measured one: what falls short is planned again with more bytes."""

from collections.abc import Callable, Mapping

from msgspec.structs import replace

from polymoe.bundle.reader import Bundle
from polymoe.console import Console, warn
from polymoe.evaluate.fidelity import Fidelity
from polymoe.offline.plan.options import PlanOptions

ATTEMPTS = 3
_LEAST = 1.5  # times the caution before, so that a narrow miss is not missed again


def keep_promise(
    make: Callable[[PlanOptions, bool], Bundle],
    measure: Callable[[Bundle], Mapping[str, Fidelity]],
    options: PlanOptions,
    overwrite: bool,
    console: Console,
) -> Bundle:
    """Plan and measure, at most `ATTEMPTS` times, until every measured variant agrees with its original as often as
    `options.min_top1` promises; without a promise, once. What is still missing then is said.

    make: (options, overwrite) -> the bundle. measure: bundle -> figures of each variant that has text.
    """
    promise = options.min_top1
    for attempt in range(1, ATTEMPTS + 1):
        bundle = make(options, overwrite)
        results = measure(bundle)
        if promise is None:
            return bundle
        name = min(results, key=lambda variant: results[variant].top1_agreement)
        found = results[name].top1_agreement
        if found >= promise:
            console.print(
                f"Promise kept: {name}, the worst, agrees on {found:.2%} of tokens, {promise:.2%} were asked."
            )
            return bundle
        missed = f"{name} agrees with its original on {found:.2%} of tokens, {promise:.2%} were promised"
        if attempt == ATTEMPTS or promise == 1:
            break
        console.print(f"{missed}; planning again with more bytes ({attempt + 1} of {ATTEMPTS}).")
        # Disagreement grows with the root of KL.
        caution = options.caution * max(_LEAST, ((1 - found) / (1 - promise)) ** 2)
        options, overwrite = replace(options, caution=caution), True
    warn(console, f"{missed}. Ask for more with --min-top1, or give --memory.")
    return bundle
