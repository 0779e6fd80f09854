"""Latencies and tokens of the last seconds, for figures that follow the load."""

from collections import deque

import numpy as np

_SECONDS = 10  # what percentiles are of
_MOST = 5_000  # latencies kept of a variant and a second
_PERCENTILES = (50, 95, 99)

Percentiles = tuple[float, float, float] | None  # p50, p95, p99 in seconds


class _Second:
    """What one variant did in a second."""

    def __init__(self) -> None:
        self.first_token: list[float] = []
        self.between_tokens: list[float] = []
        self.tokens = 0
        self.prompt_tokens = 0
        self.errors = 0


class Recent:
    """By variant. Bounded, however many requests pass."""

    def __init__(self) -> None:
        self._now: dict[str, _Second] = {}
        self._past: deque[dict[str, _Second]] = deque(maxlen=_SECONDS)

    def _of(self, variant: str) -> _Second:
        found = self._now.get(variant)
        if found is None:
            found = self._now[variant] = _Second()
        return found

    def prompt(self, variant: str, tokens: int) -> None:
        self._of(variant).prompt_tokens += tokens

    def error(self, variant: str) -> None:
        self._of(variant).errors += 1

    def token(self, variant: str, count: int, latency: float, first: bool) -> None:
        """`count` tokens that came `latency` seconds after the request, or after the tokens before them."""
        second = self._of(variant)
        second.tokens += count
        kept = second.first_token if first else second.between_tokens
        if len(kept) < _MOST:
            kept.append(latency)

    def turn(self) -> dict[str, _Second]:
        """End the second; returns what was done in it."""
        done, self._now = self._now, {}
        self._past.append(done)
        return done

    def percentiles(self, variant: str) -> tuple[Percentiles, Percentiles]:
        """(to the first token, between tokens) over the last seconds; None where there was none."""
        seconds = [second[variant] for second in self._past if variant in second]
        return (
            _percentiles([value for second in seconds for value in second.first_token]),
            _percentiles([value for second in seconds for value in second.between_tokens]),
        )


def _percentiles(values: list[float]) -> Percentiles:
    if not values:
        return None
    p50, p95, p99 = (float(value) for value in np.percentile(values, _PERCENTILES))
    return round(p50, 6), round(p95, 6), round(p99, 6)
