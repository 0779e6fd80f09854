"""Finding stop strings in text that arrives piece by piece."""

from collections.abc import Sequence


class StopStrings:
    """Lets text pass until a stop string is complete; text that may be the start of one is held back.

        |--- released ---|--- held: a proper prefix of some stop string ---|

    Of several stop strings the one that is complete first wins, as if characters came one at a time.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        """With `include` the stop string itself stays in the text, so nothing need be held back."""
        self._stops = list(stops)
        self._include = include
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._text = ""  # what a stop string could still start in
        self._released = 0  # how much of it was given out
        self._floor = 0  # a stop string counts only if it ends behind this

    def push(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """(text to give out, the stop string that was found or None).

        With `may_stop` False (fewer than `min_tokens` so far) a stop string that ends here is ordinary text.
        """
        if not self._stops:
            return text, None
        self._text += text
        if not may_stop:
            self._floor = len(self._text)
        elif (found := self._find()) is not None:
            start, stop = found
            end = start + len(stop) if self._include else start
            return self._text[self._released : end], stop
        new = self._release(len(self._text) - self._held())
        return new, None

    def flush(self) -> str:
        """What was held, once nothing more comes."""
        return self._release(len(self._text))

    def _find(self) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None  # (end, start, stop)
        for stop in self._stops:
            start = self._text.find(stop, max(0, self._floor - len(stop) + 1))
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else (best[1], best[2])

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        if self._include:
            return 0
        for length in range(min(self._longest - 1, len(self._text)), 0, -1):
            tail = self._text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0

    def _release(self, end: int) -> str:
        new = self._text[self._released : end]
        # A stop string may overlap at most this much of what was given out (it does so only with `include`).
        cut = max(0, min(end, len(self._text) - self._longest + 1))
        self._text = self._text[cut:]
        self._released = end - cut
        self._floor = max(0, self._floor - cut)
        return new
