"""How long a step will take, learnt while the engine runs.

    seconds = a + b · prefill tokens + c · decoding sequences

Fitted by least squares of the relative error with exponentially fading samples. What recent samples say nothing about
(b, while nobody prefills) stays as it was: each fit is pulled weakly towards the one before (a ridge), as in recursive
least squares with regularisation.
"""

import math

import numpy as np

_MIN_SAMPLES = 8
_DECAY = 0.99  # of a sample's weight with each that follows
_FIT_EVERY = 4  # samples
_OUTLIER = 4.0  # a sample further from the prediction counts as this many times the prediction
_RIDGE = 0.05  # part of the previous fit, in samples of the typical size


class StepCost:
    """The cost model of one engine on its machine."""

    def __init__(self) -> None:
        self._xx = np.zeros((3, 3))
        self._xy = np.zeros(3)
        self._scale = np.zeros(3)  # typical weighted square of each feature, forgotten slowly
        self._theta = np.zeros(3)
        self.num_samples = 0
        self.largest_prefill = 0  # tokens; beyond this the line is extrapolated

    @property
    def ready(self) -> bool:
        """Whether enough was seen to predict at all."""
        return self.num_samples >= _MIN_SAMPLES

    def observe(self, prefill_tokens: int, decodes: int, seconds: float) -> None:
        """A step of this size took so long (without reconfigurations)."""
        if prefill_tokens + decodes == 0 or seconds <= 0:
            return
        if self.ready:
            seconds = min(seconds, _OUTLIER * max(self.seconds(prefill_tokens, decodes), 1e-6))
        x = np.array([1.0, prefill_tokens, decodes]) / seconds
        self._xx = _DECAY * self._xx + np.outer(x, x)
        self._xy = _DECAY * self._xy + x
        self._scale = np.maximum(self._scale * 0.999, x * x)
        self.num_samples += 1
        if self.num_samples % _FIT_EVERY == 0:
            self._theta = self._fit()
        self.largest_prefill = max(self.largest_prefill, prefill_tokens)

    def _fit(self) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        """Least squares with coefficients of at least 0: one that would be negative is left out."""
        ridge = _RIDGE * self._scale
        matrix = self._xx + np.diag(ridge)
        target = self._xy + ridge * self._theta
        free = self._scale > 0
        while True:
            theta = np.zeros(3)
            kept = np.flatnonzero(free)
            theta[kept] = np.linalg.solve(matrix[np.ix_(kept, kept)], target[kept])
            if (theta >= 0).all():
                return theta
            free = free & (theta > 0)

    def seconds(self, prefill_tokens: float, decodes: float) -> float:
        """Predicted time of one step."""
        a, b, c = self._theta
        return float(a + b * prefill_tokens + c * decodes)

    def prefill_seconds(self, tokens: float, decodes: int, step_tokens: int) -> float:
        """Predicted time until `tokens` are prefilled in steps of `step_tokens`, each with these decodes beside."""
        steps = math.ceil(tokens / max(1, step_tokens))
        return steps * self.seconds(0, decodes) + float(self._theta[1]) * tokens

    def prefill_within(self, seconds: float, decodes: int) -> float:
        """Prefill tokens that a step with these decodes can hold within `seconds`; may be negative or infinite."""
        b = self._theta[1]
        left = seconds - self.seconds(0, decodes)
        return float(left / b) if b > 0 else float("inf") if left > 0 else float("-inf")
