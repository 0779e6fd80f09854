"""How long a step will take, learnt while the engine runs.

    seconds = a + b · prefill tokens + c · decoding sequences

Fitted by least squares of the relative error with exponentially fading samples. What recent samples say nothing about
(b, while nobody prefills) stays as it was: each fit is pulled weakly towards the one before (a ridge), as in recursive
least squares with regularisation.
"""

import math

_FEATURES = 3
_MIN_SAMPLES = 8
_DECAY = 0.99  # of a sample's weight with each that follows
_FIT_EVERY = 4  # samples
_OUTLIER = 4.0  # a sample further from the prediction counts as this many times the prediction
_RIDGE = 0.05  # part of the previous fit, in samples of the typical size


class StepCost:
    """The cost model of one engine on its machine. Three numbers are too few for numpy, whose calls take longer."""

    def __init__(self) -> None:
        self._xx = [[0.0] * _FEATURES for _ in range(_FEATURES)]
        self._xy = [0.0] * _FEATURES
        self._scale = [0.0] * _FEATURES  # typical weighted square of each feature, forgotten slowly
        self._theta = [0.0] * _FEATURES
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
        x = 1.0 / seconds, prefill_tokens / seconds, decodes / seconds
        for i, value in enumerate(x):
            self._xx[i] = [_DECAY * old + value * other for old, other in zip(self._xx[i], x, strict=True)]
            self._xy[i] = _DECAY * self._xy[i] + value
            self._scale[i] = max(self._scale[i] * 0.999, value * value)
        self.num_samples += 1
        if self.num_samples % _FIT_EVERY == 0:
            self._theta = self._fit()
        self.largest_prefill = max(self.largest_prefill, prefill_tokens)

    def _fit(self) -> list[float]:
        """Least squares with coefficients of at least 0: one that would be negative is left out."""
        ridge = [_RIDGE * scale for scale in self._scale]
        matrix = [
            [value + (ridge[i] if i == j else 0.0) for j, value in enumerate(row)] for i, row in enumerate(self._xx)
        ]
        target = [xy + r * theta for xy, r, theta in zip(self._xy, ridge, self._theta, strict=True)]
        kept = [i for i, scale in enumerate(self._scale) if scale > 0]
        while True:
            theta = [0.0] * _FEATURES
            for i, value in zip(kept, _solved([[*(matrix[i][j] for j in kept), target[i]] for i in kept]), strict=True):
                theta[i] = value
            if min(theta) >= 0:
                return theta
            kept = [i for i in kept if theta[i] > 0]

    def seconds(self, prefill_tokens: float, decodes: float) -> float:
        """Predicted time of one step."""
        a, b, c = self._theta
        return a + b * prefill_tokens + c * decodes

    def prefill_seconds(self, tokens: float, decodes: int, step_tokens: int) -> float:
        """Predicted time until `tokens` are prefilled in steps of `step_tokens`, each with these decodes beside."""
        steps = math.ceil(tokens / max(1, step_tokens))
        return steps * self.seconds(0, decodes) + self._theta[1] * tokens

    def prefill_within(self, seconds: float, decodes: int) -> float:
        """Prefill tokens that a step with these decodes can hold within `seconds`; may be negative or infinite."""
        b = self._theta[1]
        left = seconds - self.seconds(0, decodes)
        return left / b if b > 0 else float("inf") if left > 0 else float("-inf")


def _solved(rows: list[list[float]]) -> list[float]:
    """x of A x = b, by elimination. rows: `[*A_i, b_i]`; A is symmetric and positive definite."""
    size = len(rows)
    for i in range(size):
        for k in range(i + 1, size):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [below - factor * above for below, above in zip(rows[k], rows[i], strict=True)]
    x = [0.0] * size
    for i in reversed(range(size)):
        x[i] = (rows[i][size] - sum(rows[i][k] * x[k] for k in range(i + 1, size))) / rows[i][i]
    return x
