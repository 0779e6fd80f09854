"""Finding stop strings in text that arrives piece by piece."""

from collections.abc import Sequence


class StopStrings:
    """Lets text pass until a stop string is complete; text that may be the start of one is held back.

        |--- released ---|--- held: a proper prefix of some stop string ---|

    Of several stop strings the one that is complete first wins, as if characters came one at a time.

    Some text is hidden: special tokens that the client does not want to see. It is never given out, but a stop string
    may be in it, or go on into it; across it the visible text is searched as well, as if nothing were between.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        """With `include` the stop string itself stays in the text, so nothing need be held back."""
        self._stops = list(stops)
        self._include = include
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._text = ""  # what a stop string could still start in
        self._hidden: set[int] = set()  # places of hidden characters in it
        self._released = 0  # how much of it was given out
        self._floor = 0  # a stop string counts only if it ends behind this

    def concerns(self, hidden: str) -> bool:
        """Whether a stop string could be in this hidden text, or go on into it."""
        return any(stop in hidden or _share(stop, hidden) for stop in self._stops)

    def push(self, text: str, may_stop: bool = True, hidden: bool = False) -> tuple[str, str | None]:
        """(text to give out, the stop string that was found or None).

        With `may_stop` False (fewer than `min_tokens` so far) a stop string that ends here is ordinary text.
        """
        if not self._stops:
            return "" if hidden else text, None
        if hidden:
            self._hidden.update(range(len(self._text), len(self._text) + len(text)))
        self._text += text
        if not may_stop:
            self._floor = len(self._text)
        elif (found := self._find()) is not None:
            start, end, stop = found
            before, first = self._visible(self._released, start), max(start, self._released)
            whole = self._text[first:end] if self._text[start:end] == stop else self._visible(first, end)
            return before + whole if self._include else before, stop
        return self._release(len(self._text) - self._held()), None

    def flush(self) -> str:
        """What was held, once nothing more comes."""
        return self._release(len(self._text))

    def _find(self) -> tuple[int, int, str] | None:
        """(start, end, stop string): the first that is complete."""
        found = [(end, start, stop) for start, end, stop in self._matches(self._text, range(len(self._text)))]
        if self._hidden:
            places = [i for i in range(len(self._text)) if i not in self._hidden]
            visible = "".join(self._text[i] for i in places)
            found += [(end, start, stop) for start, end, stop in self._matches(visible, places)]
        if not found:
            return None
        end, start, stop = min(found)
        return start, end, stop

    def _matches(self, text: str, places: Sequence[int]) -> list[tuple[int, int, str]]:
        """The first occurrence of each stop string in `text` that ends behind the floor; `places` of its characters."""
        floor = sum(place < self._floor for place in places) if self._hidden else self._floor
        found = []
        for stop in self._stops:
            start = text.find(stop, max(0, floor - len(stop) + 1))
            if start >= 0:
                found.append((places[start], places[start + len(stop) - 1] + 1, stop))
        return found

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        if self._include and not self._hidden:
            return 0
        held = self._held_of(self._text)
        if self._hidden:
            places = [i for i in range(len(self._text)) if i not in self._hidden]
            count = self._held_of("".join(self._text[i] for i in places))
            held = max(held, len(self._text) - places[-count] if count else 0)
        return held

    def _held_of(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0

    def _visible(self, start: int, end: int) -> str:
        if not self._hidden:
            return self._text[start:end]
        return "".join(self._text[i] for i in range(start, end) if i not in self._hidden)

    def _release(self, end: int) -> str:
        new = self._visible(self._released, end)
        # A stop string may overlap at most this much of what was given out (it does so only with `include`).
        cut = max(0, min(end, len(self._text) - self._longest + 1))
        self._text = self._text[cut:]
        self._hidden = {place - cut for place in self._hidden if place >= cut}
        self._released = end - cut
        self._floor = max(0, self._floor - cut)
        return new


def _share(stop: str, text: str) -> bool:
    """Whether `text` is in `stop`, or begins where the other ends."""
    lengths = range(1, min(len(stop), len(text)) + 1)
    return text in stop or any(stop[-n:] == text[:n] or stop[:n] == text[-n:] for n in lengths)
