"""Limits of keys across several ingresses: each says a few times a second what its keys have used, and hears what they
used at the others, which counts as if it had been used here.

What came in while a message was under way is let in by each ingress for itself. It makes a debt that delays what comes
next, so that a limit holds over a minute and may be passed for as long as two messages are apart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from polymoe.server.tenants import Keyring, Used

logger = logging.getLogger(__name__)

EVERY = 0.25  # seconds between two messages of an ingress
_FORGET_AFTER = 40  # messages of others in which an ingress has said nothing: it is gone, and what it runs

Report = dict[str, tuple[int, int, int]]  # hash of a key -> requests, tokens since the start, and running ones


class Ledger:
    """A deployment of one replica, which adds up. Lost, it begins anew, and so do the differences."""

    def __init__(self) -> None:
        self._reports: dict[str, Report] = {}  # ingress -> its last one
        self._heard: dict[str, dict[str, Used]] = {}  # ingress -> what it was told of the others so far
        self._silent: dict[str, int] = {}  # ingress -> messages of others since its last one

    async def hear(self, ingress: str, report: Report) -> Report:
        """`exchange`, as Ray calls it: not in a thread."""
        return self.exchange(ingress, report)

    def exchange(self, ingress: str, report: Report) -> Report:
        """What the other ingresses' keys used since this one asked last, and what they run."""
        self._reports[ingress], self._silent[ingress] = report, 0
        for other in list(self._silent):
            self._silent[other] += other != ingress
            if self._silent[other] > _FORGET_AFTER * len(self._silent):
                del self._reports[other], self._silent[other]
                self._heard.pop(other, None)
        known = ingress in self._heard
        heard = self._heard.setdefault(ingress, {})
        answer = {}
        others = [found for name, found in self._reports.items() if name != ingress]
        for key in {key for found in others for key in found}:
            parts = [found[key] for found in others if key in found]
            total = Used(sum(part[0] for part in parts), sum(part[1] for part in parts))
            before = heard.get(key, Used() if known else total)
            # Less than before: one of the others is gone or began anew.
            new = Used(max(0, total.requests - before.requests), max(0, total.tokens - before.tokens))
            heard[key] = total
            answer[key] = (*new, sum(part[2] for part in parts))
        return answer


def report_of(keys: Keyring) -> Report:
    return {name: (*tenant.used, tenant.running) for name, tenant in keys.tenants.items()}


def take(keys: Keyring, answer: Mapping[str, tuple[int, int, int]]) -> None:
    for name, tenant in keys.tenants.items():
        requests, tokens, running = answer.get(name, (0, 0, 0))
        tenant.charge_elsewhere(Used(requests, tokens), running)


async def keep_exchanging(keys: Keyring, ingress: str, exchange: Callable[[str, Report], Any]) -> None:
    """Until cancelled. While the ledger cannot be reached, each ingress counts for itself."""
    reached = True
    while True:
        try:
            take(keys, await exchange(ingress, report_of(keys)))
            reached = True
        except Exception as error:  # of Ray's, of many kinds
            if reached:
                logger.warning("limits are counted for this ingress alone: %s", error)
            reached = False
        await asyncio.sleep(EVERY)
