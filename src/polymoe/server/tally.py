"""A histogram for what is observed at every token: a value costs a search and an addition, and the rest is done when
somebody asks. prometheus_client's own takes a lock and a look at each bucket for it."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Tally:
    """Values of one label. Not thread-safe."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """bounds: of the buckets, inclusive, ascending."""
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # of each bucket, the last without a bound
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class TallyHistogram(Collector):
    """As prometheus_client's `Histogram` with the label `model_name`."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, [float(bound) for bound in bounds]
        self._tallies: dict[str, Tally] = {}

    def labels(self, model: str) -> Tally:
        return self._tallies.setdefault(model, Tally(self._bounds))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        bounds = (*self._bounds, math.inf)
        names = [str(floatToGoString(bound)) for bound in bounds]  # type: ignore[no-untyped-call]
        for model, tally in self._tallies.items():
            buckets = zip(names, map(float, accumulate(tally.counts)), strict=True)
            family.add_metric([model], list(buckets), sum_value=tally.total)
        yield family
