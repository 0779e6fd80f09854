"""Finding stop strings in text that arrives piece by piece."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class _Window:
    """The end of a text, as far as a stop string could still start in it."""

    text: str = ""
    # Of each character: how many visible ones came before it, whether it is hidden, and whether a hidden piece goes on
    # from the character before it, so that no stop string begins there.
    places: list[int] = field(default_factory=list)
    hidden: list[bool] = field(default_factory=list)
    inner: list[bool] = field(default_factory=list)
    floor: int = 0  # a stop string counts only if it ends behind this

    def copy(self) -> "_Window":
        return _Window(self.text, list(self.places), list(self.hidden), list(self.inner), self.floor)

    def push(self, text: str, place: int, hidden: bool) -> None:
        self.text += text
        self.places += [place] * len(text) if hidden else range(place, place + len(text))
        self.hidden += [hidden] * len(text)
        self.inner += [hidden and i > 0 for i in range(len(text))]

    def find(self, stop: str) -> tuple[int, int] | None:
        """(start, end) of the first that ends behind the floor."""
        start = self.text.find(stop, max(0, self.floor - len(stop) + 1))
        while start >= 0:
            end = start + len(stop)
            if not self.inner[start] and not (end < len(self.text) and self.inner[end]):
                return start, end
            start = self.text.find(stop, start + 1)
        return None

    def trim(self, length: int) -> None:
        cut = max(0, len(self.text) - length)
        self.text, self.floor = self.text[cut:], max(0, self.floor - cut)
        for column in (self.places, self.hidden, self.inner):
            del column[:cut]


class StopStrings:
    """Lets text pass until a stop string is complete; text that may be the start of one is held back.

        |--- released ---|--- held: a proper prefix of some stop string ---|

    Of several stop strings the one that is complete first wins, as if characters came one at a time.

    A piece may be hidden: a special token that the client does not want to see. It is never given out, but a stop
    string may contain it as a whole. The visible text is searched as well, as if nothing were between.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        """With `include` the stop string itself stays in the text, so nothing need be held back."""
        self._stops = list(stops)
        self._include = include
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._visible = _Window()
        self._whole: _Window | None = None  # with hidden pieces, once there is one that matters
        self._held = ""  # visible text that was not given out yet
        self._released = 0  # visible characters given out

    def concerns(self, hidden: str) -> bool:
        """Whether a stop string contains this hidden piece. Others are as if they were not there."""
        return any(hidden in stop for stop in self._stops)

    def push(self, text: str, may_stop: bool = True, hidden: bool = False) -> tuple[str, str | None]:
        """(text to give out, the stop string that was found or None).

        With `may_stop` False (fewer than `min_tokens` so far) a stop string that ends here is ordinary text.
        """
        if not self._stops:
            return "" if hidden else text, None
        if hidden and not (text and self.concerns(text)):
            return "", None
        if hidden and self._whole is None:
            self._whole = self._visible.copy()
        place = self._released + len(self._held)
        windows = [window for window in (self._whole, None if hidden else self._visible) if window is not None]
        for window in windows:
            window.push(text, place, hidden)
            if not may_stop:
                window.floor = len(window.text)
        if not hidden:
            self._held += text
        if may_stop and (found := self._find(windows)) is not None:
            return found
        new = self._release(self._num_free())
        for window in windows:
            window.trim(self._longest - 1)
        return new, None

    def flush(self) -> str:
        """What was held, once nothing more comes."""
        return self._release(len(self._held))

    def _find(self, windows: Sequence[_Window]) -> tuple[str, str] | None:
        """(text up to the stop string that is complete first, and that stop string)."""
        best: tuple[tuple[int, int, bool, int, str], str] | None = None
        for window in windows:
            for stop in self._stops:
                if (match := window.find(stop)) is not None:
                    start, end = match
                    # All windows end with the same piece, so that ends compare from the right. Of those that end
                    # together the longest: a hidden start comes before the visible character of the same place.
                    place, visible = window.places[start], not window.hidden[start]
                    key = (end - len(window.text), place, visible, start, stop)
                    if best is None or key < best[0]:
                        best = key, self._unreleased(window, start, end)
        if best is None:
            return None
        (_, place, _, _, stop), shown = best
        before = self._held[: max(0, place - self._released)]
        return before + shown if self._include else before, stop

    def _unreleased(self, window: _Window, start: int, end: int) -> str:
        """The part of a stop string that was not given out with earlier text."""
        return "".join(window.text[i] for i in range(start, end) if window.places[i] >= self._released)

    def _num_free(self) -> int:
        """How many of the held characters no stop string can begin with any more."""
        if self._include and self._whole is None:
            return len(self._held)
        free = len(self._held)
        for window in (self._visible, self._whole):
            if window is not None and (start := self._beginning(window.text)) < len(window.text):
                free = min(free, window.places[start] - self._released)
        return max(0, free)

    def _beginning(self, text: str) -> int:
        """Where the longest end of the text that begins a stop string starts; the text's length if there is none."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return len(text) - length
        return len(text)

    def _release(self, count: int) -> str:
        new, self._held = self._held[:count], self._held[count:]
        self._released += count
        return new
